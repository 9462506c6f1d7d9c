"""What a language model writes after windows of a feature's text while the feature is steered.

A prompt is a window up to its first token with an activation, with BOS before it. Steering takes the activation h at
the autoencoder's site to

    decode(encode(h) + s * e_i) + error  =  h + s * W_dec[i]          s: the strength

at the last token of the prompt and at every new one: at all positions from which a new token is predicted. (The paper's
code steers the last token of the prompt only, because later steps with a KV cache do not reach its slice.) BOS and
other special tokens stay clean, as everywhere in saelab.

The strength is tuned so that KL(clean || steered) of the next token at the end of the prompt, averaged over the
prompts, is the setting's, within a tenth. If no strength in the range does it, the nearest one found is taken.

Texts are sampled at temperature 1, the clean and the steered one with the same random numbers: without steering they
are equal. There is no KV cache, because models differ in what they cache.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.steering import check_steerable
from saelab.autointerp.contexts import Context, Contexts
from saelab.autointerp.settings import InterventionSettings
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

RAISED = 5
"""Tokens shown per prompt; the paper shows five."""
RTOL = 0.1
PASSES = 20
"""Most strengths that are tried."""
DECADES = 5
"""The search goes this far from its start, in powers of ten."""


class Tuned(NamedTuple):
    """A strength, in units of activation, and the KL in nats that it has."""

    strength: float
    kl: float

    def reaches(self, target: float) -> bool:
        """Whether the KL is within a tenth of the target."""
        return abs(self.kl - target) <= RTOL * target

    def missed(self, target: float) -> str:
        """The note on a KL that is not the target; "" if it is."""
        return "" if self.reaches(target) else f"KL is {self.kl:.2g} nats instead of {target:g}"


@dataclass(frozen=True, eq=False)
class Raised:
    """Next tokens that steering makes more likely."""

    tuned: Tuned
    tokens: list[list[tuple[str, float]]]
    """For each prompt the tokens whose probability rises most, and by how much, largest first."""
    mean: list[tuple[str, float]]
    """The same of the mean over the prompts."""


@dataclass(frozen=True, eq=False)
class SteeredTexts:
    """Prompts with what was written after them."""

    contexts: list[Context]
    lengths: list[int]
    """Tokens of each context's window that are in its prompt."""
    clean: list[str]
    steered: list[str]
    random: list[str]
    """With a random direction of the same length as the feature's change."""
    matched: list[str]
    """With that direction at a strength tuned to the same KL."""
    tuned: Tuned
    tuned_random: Tuned
    tuned_matched: Tuned


def raised_tokens(
    contexts: Contexts, sae: SparseAutoencoder, lm: LanguageModel, site: str, settings: InterventionSettings
) -> Raised:
    """What steering the feature does to the next token, on the windows that explanations are made from.

    Raises SaelabError if the autoencoder cannot be steered there.
    """
    prompts = Prompts(lm, site, spread(contexts.explain, settings.explain), settings.new_tokens)
    direction, _ = _directions(contexts.feature, sae, lm, site, settings.seed)
    tuned = _tuned(prompts, direction, contexts.maximum, settings.kl)
    if not prompts.ids:
        return Raised(tuned, [], [])
    rise = prompts.next_token(tuned.strength * direction).exp() - prompts.clean.exp()

    def largest(of: Tensor) -> list[tuple[str, float]]:
        top = of.topk(min(RAISED, len(of)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [(lm.tokenizer.decode([i]), value) for i, value in pairs if value > 0]

    return Raised(tuned, [largest(each) for each in rise], largest(rise.mean(0)))


def steered_texts(
    contexts: Contexts,
    sae: SparseAutoencoder,
    lm: LanguageModel,
    site: str,
    settings: InterventionSettings,
    *,
    strength: float | None = None,
) -> SteeredTexts:
    """Texts after the windows that scores are measured on; `strength` instead of a tuned one.

    Cost in passes over the prompts: at most ``2 * PASSES`` to tune, and 4 per new token. Memory: that of
    `LanguageModel.rows_at_once` rows, and a few times ``prompts x vocabulary`` float64. Raises SaelabError if the
    autoencoder cannot be steered there.
    """
    chosen = spread(contexts.positives, settings.prompts)
    prompts = Prompts(lm, site, chosen, settings.new_tokens)
    direction, random = _directions(contexts.feature, sae, lm, site, settings.seed)
    if strength is None:
        tuned = _tuned(prompts, direction, contexts.maximum, settings.kl)
        matched = _tuned(prompts, random, max(tuned.strength, contexts.maximum), settings.kl)
    else:
        tuned = Tuned(strength, prompts.kl(strength * direction))
        matched = Tuned(strength, prompts.kl(strength * random))

    def written(change: Tensor | None) -> list[str]:
        ids = prompts.written(change, settings.new_tokens, [settings.seed, contexts.feature, 4])
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return [lm.tokenizer.decode(each, **options) for each in ids]

    return SteeredTexts(
        contexts=chosen,
        lengths=[_first_active(each) + 1 for each in chosen],
        clean=written(None),
        steered=written(tuned.strength * direction),
        random=written(tuned.strength * random),
        matched=written(matched.strength * random),
        tuned=tuned,
        tuned_random=Tuned(tuned.strength, prompts.kl(tuned.strength * random)),
        tuned_matched=matched,
    )


def spread(contexts: Sequence[Context], n: int) -> list[Context]:
    """At most `n` of the contexts, evenly from the first to the last."""
    n = min(n, len(contexts))
    return [contexts[i] for i in np.linspace(0, len(contexts) - 1, n).round().astype(int).tolist()]


def tune(kl: Callable[[float], float], target: float, start: float) -> Tuned:
    """A strength at which `kl` is the target within a tenth, or the nearest of at most `PASSES` that were tried.

    Searches the logarithm of the strength: steps as for a KL that grows with the square of the strength until two
    strengths enclose the target, then interpolation of log KL, which stays off the ends so that the range shrinks.
    """
    first = x = math.log10(start)
    best, least = Tuned(0.0, 0.0), math.inf
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    for _ in range(PASSES):
        strength = 10**x
        value = kl(strength)
        off = math.log10(max(value, 1e-30) / target) if math.isfinite(value) else math.inf  # logits overflow: too much
        if abs(off) < least:
            best, least = Tuned(strength, value), abs(off)
        if best.reaches(target):
            break
        if off < 0:
            low = (x, off)
        else:
            high = (x, off)
        if low and high:
            share = low[1] / (low[1] - high[1]) if math.isfinite(high[1]) else 0.5
            x = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
        else:
            x -= math.copysign(min(max(abs(off) / 2, 0.1), 1.0), off)
            if abs(x - first) > DECADES:
                break
    return best


class Prompts:
    """Windows up to their first active token, and passes of the model over them."""

    def __init__(self, lm: LanguageModel, site: str, contexts: Sequence[Context], new_tokens: int) -> None:
        self._lm, self._site = lm, site
        self.ids = [_prompt(lm, each, new_tokens) for each in contexts]
        self.clean = self.next_token(None)
        """Log-probabilities of the next token of the clean model, ``[prompts, vocabulary]`` float64, on the CPU."""

    def next_token(self, change: Tensor | None) -> Tensor:
        """Log-probabilities of the next token if `change` ``[d_in]`` is added at the last one; like `clean`."""
        return self._predictions(self.ids, change)

    def kl(self, change: Tensor) -> float:
        """KL(clean || changed) of the next token, mean over the prompts, in nats; NaN without prompts."""
        other = self.next_token(change)
        return float((self.clean.exp() * (self.clean - other)).sum(1).mean().clamp_min(0))

    def written(self, change: Tensor | None, new_tokens: int, seed: Sequence[int]) -> list[list[int]]:
        """The prompts and at most `new_tokens` sampled tokens after each; a text ends after EOS."""
        texts, rng = [list(each) for each in self.ids], np.random.default_rng(seed)
        writing, end = [True] * len(texts), self._lm.tokenizer.eos_token_id
        for _ in range(new_tokens if texts else 0):
            log_p = self._predictions(texts, change)
            if not log_p.isfinite().all():
                raise SaelabError(f"intervention: the logits of {self._lm.name} are not finite; use a smaller strength")
            # the largest of log-probabilities with Gumbel noise is a sample
            noise = -np.log(-np.log(rng.random(log_p.shape).clip(1e-300)))
            for i, token in enumerate((log_p + torch.from_numpy(noise)).argmax(1).tolist()):
                if writing[i]:
                    texts[i].append(token)
                    writing[i] = token != end
        return texts

    @torch.no_grad()
    def _predictions(self, texts: Sequence[Sequence[int]], change: Tensor | None) -> Tensor:
        """Log-probabilities of the token after each text; `change` is added from the last token of its prompt on."""
        lm, longest = self._lm, max(map(len, texts), default=1)
        found = [torch.zeros(0, len(lm.unembedding), dtype=torch.float64)]
        step = lm.rows_at_once(longest)
        for begin in range(0, len(texts), step):
            block = texts[begin : begin + step]
            rows = torch.zeros(len(block), longest, dtype=torch.long)
            for row, text in zip(rows, block, strict=True):
                row[: len(text)] = torch.tensor(text)  # what follows a token does not change its logits
            rows = rows.to(lm.device)
            last = torch.tensor([len(text) - 1 for text in block], device=lm.device)
            first = torch.tensor([len(prompt) - 1 for prompt in self.ids[begin : begin + step]], device=lm.device)
            position = torch.arange(longest, device=lm.device)
            chosen = ((position >= first[:, None]) & (position <= last[:, None]))[lm.ordinary(rows)]
            logits = lm.logits(rows) if change is None else lm.spliced_logits(rows, self._site, _adding(change, chosen))
            at_end = logits[torch.arange(len(block), device=lm.device), last]
            found.append(at_end.cpu().double().log_softmax(-1))
        return torch.cat(found)


def _adding(change: Tensor, chosen: Tensor) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        new = x.clone()
        new[chosen] = (x[chosen].to(change.dtype) + change).to(x.dtype)
        return new

    return replace


def _first_active(context: Context) -> int:
    return int(np.flatnonzero(context.example.activations > 0)[0])


def _prompt(lm: LanguageModel, context: Context, new_tokens: int) -> list[int]:
    ids, bos = context.example.token_ids[: _first_active(context) + 1].tolist(), lm.tokenizer.bos_token_id
    begin = [] if bos is None else [bos]
    ids = ids[1:] if ids[:1] == begin else ids
    if lm.max_context is not None:
        room = lm.max_context - len(begin) - new_tokens
        if room < 1:
            raise SaelabError(f"new_tokens: {lm.name} takes {lm.max_context} tokens with the prompt; write fewer")
        ids = ids[-room:]
    return begin + ids


def _directions(feature: int, sae: SparseAutoencoder, lm: LanguageModel, site: str, seed: int) -> tuple[Tensor, Tensor]:
    """The feature's decoder row, and a random direction of the same length, ``[d_in]`` each."""
    check_steerable(sae, lm, site)
    row = sae.W_dec[feature].detach()
    random = torch.from_numpy(np.random.default_rng([seed, feature, 3]).standard_normal(sae.d_in)).to(row)
    return row, random * (row.norm() / random.norm())


def _tuned(prompts: Prompts, direction: Tensor, start: float, target: float) -> Tuned:
    if not prompts.ids or not direction.any():
        return Tuned(0.0, 0.0)  # nothing to steer
    return tune(lambda strength: prompts.kl(strength * direction), target, start)
