"""Steering: text that a language model writes while some features are set to other activations.

At the autoencoder's site every ordinary token's activation x becomes

    x + sum over the steered features of (new - old) * W_dec row        old: the feature's activation in the clean run

    add       new = old + value
    clamp     new = value
    ablate    new = 0

Values are in units of activation; multiples of a feature's maximum are a common choice. What the autoencoder does not
reconstruct of x, its error, stays as it is: without steering, and with `add` of 0, the model is the clean one to the
bit. Special tokens such as BOS are left clean. What is set is the feature's contribution to x. Encoded again, x may
give the feature another activation, because its encoder and decoder rows differ, or its pre-activation was negative.

There is no KV cache, because models differ in what they cache: each new token takes a pass over all tokens so far, so
n new tokens after p take some n (p + n / 2) tokens' work for the clean and for the steered text each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.settings import Intervention, Mode, Where
from saelab.codes import Codes
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import pandas as pd

Forward = Callable[[Tensor], Tensor]
"""Token ids ``[1, tokens]`` to logits ``[1, tokens, vocabulary]``."""


@dataclass(frozen=True, eq=False)
class Written:
    """The prompt and what a model wrote after it."""

    ids: list[int]
    log_probs: Tensor
    """Log-probability of each token given those before it, in nats, in the model that wrote it, ``[tokens]`` float64;
    0 for the first."""


@dataclass(frozen=True, eq=False)
class Steering:
    """A clean and a steered continuation of a prompt; `steer` makes it."""

    prompt_tokens: int
    clean: Written
    steered: Written
    clean_log_probs: Tensor
    """Log-probability of each token of the steered text in the clean model, in nats, ``[tokens]`` float64."""
    kl: Tensor
    """KL(clean || steered) of the predictions of each token of the steered text from those before it, in nats,
    ``[tokens]`` float64; 0 for the first."""

    def to_frame(self) -> "pd.DataFrame":
        """One line per token of the steered text."""
        import pandas as pd

        columns = {
            "token_id": self.steered.ids,
            "written": [position >= self.prompt_tokens for position in range(len(self.steered.ids))],
            "log_prob": self.steered.log_probs.tolist(),
            "clean_log_prob": self.clean_log_probs.tolist(),
            "kl": self.kl.tolist(),
        }
        return pd.DataFrame(columns)


@torch.no_grad()
def steer(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    prompt: Sequence[int],
    interventions: Sequence[Intervention],
    site: str | None = None,
    *,
    new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    where: Where = "all",
) -> Steering:
    """The clean and the steered continuation of the token ids `prompt`, at most `new_tokens` each.

    `site` defaults to the one the autoencoder was trained at. A continuation ends after EOS. Temperature 0 takes the
    most likely token; otherwise both continuations are sampled with the same random numbers of `seed`, so that they
    differ by the steering. `where` steers all ordinary tokens, or only the new ones.

    Raises SaelabError for an unknown feature, mode or site, a feature that is named twice, a transcoder, a value or
    temperature that makes no sense, a prompt that is empty or too long, widths that differ, and logits that are not
    finite.
    """
    site = site or sae.metadata.get("hook_name")
    if site is None:
        raise SaelabError("steer: the autoencoder does not say its site; pass site='blocks.N.hook_resid_post'")
    _check(sae, lm, prompt, site, interventions, new_tokens, temperature, where)
    first = len(prompt) if where == "new" else 0

    def steered_logits(rows: Tensor) -> Tensor:
        position = torch.arange(rows.shape[1], device=lm.device).expand_as(rows)[lm.ordinary(rows)]
        chosen = position >= first

        def replace(x: Tensor) -> Tensor:
            new = x.clone()
            new[chosen] = steered(sae, x[chosen], interventions)
            return new

        return lm.spliced_logits(rows, site, replace) if interventions else lm.logits(rows)

    clean, changed = (
        _written(lm, forward, prompt, new_tokens, temperature, seed) for forward in (lm.logits, steered_logits)
    )
    rows = torch.tensor([changed.ids], device=lm.device)
    own, other = (_log_p(forward(rows)[0, :-1]) for forward in (steered_logits, lm.logits))
    kl = F.kl_div(own, other, reduction="none", log_target=True).sum(1)
    return Steering(
        prompt_tokens=len(prompt),
        clean=clean,
        steered=changed,
        clean_log_probs=_of_tokens(other, rows[0]),
        kl=F.pad(kl.clamp_min(0), (1, 0)).cpu(),  # rounding alone can take it below 0
    )


@torch.no_grad()
def steered(sae: SparseAutoencoder, x: Tensor, interventions: Sequence[Intervention], *, error: bool = True) -> Tensor:
    """Activations x ``[tokens, d_in]`` of ordinary tokens with the interventions, in the dtype of x.

    Without `error` they are the reconstruction of x with the interventions. Computed in the autoencoder's dtype.
    Features must be different and in range (`check_interventions`).
    """
    features = torch.tensor([i.feature for i in interventions], dtype=torch.long, device=x.device)
    values = torch.tensor([0.0 if i.mode == "ablate" else i.value for i in interventions], device=x.device)
    replaces = torch.tensor([i.mode != "add" for i in interventions], dtype=torch.bool, device=x.device)
    change, base = values.to(sae.W_dec.dtype).expand(len(x), -1), x.to(sae.W_dec.dtype)
    if len(x) and (replaces.any() or not error):
        codes = sae.encode(x)
        change = torch.where(replaces, change - activations_of(codes, features), change)
        base = base if error else sae.decode(codes, base)
    written = change @ sae.W_dec[features]
    return (base + (written if sae.affine else written * sae.gain(x.to(written.dtype)))).to(x.dtype)


def activations_of(codes: Codes, features: Tensor) -> Tensor:
    """The activations of some features, ``[tokens, len(features)]``; 0 if inactive."""
    token, which = (codes.features[:, None] == features).nonzero(as_tuple=True)
    found = codes.values.new_zeros(codes.tokens, len(features))
    found[codes.row_of_entry()[token], which] = codes.values[token]
    return found


def _written(
    lm: LanguageModel, forward: Forward, prompt: Sequence[int], new_tokens: int, temperature: float, seed: int
) -> Written:
    """`prompt` and at most `new_tokens` tokens after it, written by `forward`."""
    ids, end = list(prompt), lm.tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that devices draw the same numbers
    for _ in range(new_tokens):
        logits = forward(torch.tensor([ids], device=lm.device))[0, -1].double().cpu()
        if not logits.isfinite().all():
            raise SaelabError(
                f"steer: the logits of {lm.name} are NaN or infinite after {len(ids)} tokens; use smaller values"
            )
        if temperature > 0:
            # the largest of logits with Gumbel noise is a sample from their softmax
            uniform = torch.rand(len(logits), dtype=torch.float64, generator=generator)
            logits = logits / temperature - (-uniform.log()).log()
        ids.append(int(logits.argmax()))
        if ids[-1] == end:
            break
    rows = torch.tensor([ids], device=lm.device)
    return Written(ids, _of_tokens(_log_p(forward(rows)[0, :-1]), rows[0]))


def _log_p(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def _of_tokens(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token, ``[tokens]``, from predictions ``[tokens - 1, vocabulary]``; 0 for the first."""
    return F.pad(log_p.gather(1, ids[1:, None]).squeeze(1), (1, 0)).cpu()


def check_steerable(sae: SparseAutoencoder, lm: LanguageModel, site: str) -> None:
    """Raises SaelabError if features of `sae` cannot be steered at `site`."""
    check_fits(sae, lm.name, site, lm.width(site), lm.device)


def check_fits(
    sae: SparseAutoencoder, model: str, site: str, width: int, device: torch.device, what: str = "steer"
) -> None:
    """Raises SaelabError, which begins with `what`, if `sae` is not of activations of this width on this device."""
    if len(sae.site_widths) > 1:
        raise SaelabError(f"{what}: a crosscoder's features write to several sites; use an autoencoder of {site}")
    if sae.transcodes:
        raise SaelabError(
            f"{what}: a transcoder's features write to another place than it reads from; use an autoencoder of {site}"
        )
    if width != sae.d_in:
        raise SaelabError(f"{what}: {site} of {model} has width {width}, the autoencoder has d_in {sae.d_in}")
    if (own := sae.W_dec.device) != device:
        raise SaelabError(f"{what}: the autoencoder is on {own}, the model on {device}; move it with sae.to(...)")


def check_interventions(sae: SparseAutoencoder, interventions: Sequence[Intervention]) -> None:
    """Raises SaelabError for an unknown feature or mode, a feature that is named twice, or a value not finite."""
    features = [i.feature for i in interventions]
    for i in interventions:
        if not 0 <= i.feature < sae.n_features:
            raise SaelabError(f"steer: there is no feature {i.feature}: features are 0 to {sae.n_features - 1}")
        if i.mode not in get_args(Mode):
            raise SaelabError(f"steer: {i.mode!r} is not a mode; use {', '.join(get_args(Mode))}")
        if not torch.isfinite(torch.tensor(i.value)):
            raise SaelabError(f"steer: the value {i.value} of feature {i.feature} is not a finite number")
    if len(set(features)) < len(features):
        twice = next(feature for feature in features if features.count(feature) > 1)
        raise SaelabError(f"steer: feature {twice} is named twice; give one intervention per feature")


def _check(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    prompt: Sequence[int],
    site: str,
    interventions: Sequence[Intervention],
    new_tokens: int,
    temperature: float,
    where: str,
) -> None:
    """Raises SaelabError for what `steer` cannot do."""
    check_steerable(sae, lm, site)
    check_interventions(sae, interventions)
    if where not in get_args(Where):
        raise SaelabError(f"steer: where={where!r}; use {' or '.join(get_args(Where))}")
    if new_tokens < 1:
        raise SaelabError(f"steer: new_tokens={new_tokens} is not a positive number")
    if not 0 <= temperature < float("inf"):
        raise SaelabError(f"steer: the temperature {temperature} is not a number from 0 up")
    if not prompt:
        raise SaelabError("steer: the prompt has no token; begin it with BOS, or give some text")
    if not 0 <= min(prompt) <= max(prompt) < lm.embeddings:
        raise SaelabError(f"steer: the prompt has a token id outside of 0 to {lm.embeddings - 1}")
    if lm.max_context is not None and len(prompt) + new_tokens > lm.max_context:
        raise SaelabError(
            f"steer: {len(prompt)} tokens of prompt and {new_tokens} new ones are more than the {lm.max_context} that "
            f"{lm.name} takes; use a shorter prompt or fewer new tokens"
        )
