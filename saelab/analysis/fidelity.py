"""How much of the activations, and of what the model does with them, an autoencoder keeps.

Definitions (every figure over ordinary tokens only: BOS and other special tokens are in none of them):

FVU            sum ||x - xhat||^2 / sum ||x - mean x||^2, both pooled over all evaluated tokens, sums in float64
L0             mean number of active features per token
cosine         mean cosine between x and xhat
CE             mean loss in nats of the next token, where the token and the next one are both ordinary; clean, with the
               reconstruction spliced in at the site, with zeros, and with the mean activation
loss recovered (CE_ablated - CE_spliced) / (CE_ablated - CE_clean), for zero and for mean ablation
delta CE       CE_spliced - CE_clean
KL             mean KL(clean || spliced) of the next-token distributions, over the same positions as CE
never active   features that are active on none of the evaluated tokens
share below    share of features that are active on less than 1e-4 (1e-5) of the evaluated tokens

Features are selected as in inference. The other mode is an oracle: selection by the gradient affinity of training,
which sees the next token and is not to be compared with other autoencoders' figures. Its gradients are those of the
clean run at the same positions, for the spliced loss too; they are 0 at a row's last position and wherever no loss
follows, so selection there is plain.
Gradients are normalised over the rows of one forward pass, as over the batch in training, so in this mode alone
`rows_per_forward` touches the figures.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.settings import EvalSettings
from saelab.codes import Codes
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

INFERENCE = "inference"
ORACLE = "oracle: sees the next token"
MIN_DEAD_TOKENS = 300_000
"""Fewer held-out tokens than this say little about rare features; results say so."""


class Autoencoder(Protocol):
    """What fidelity needs of an autoencoder."""

    n_features: int

    def encode(self, x: Tensor) -> Codes: ...
    def decode(self, codes: Codes) -> Tensor: ...


class GradientAware(Autoencoder, Protocol):
    """What the oracle needs: selection that takes the loss's gradients, in the shape of x."""

    def encode(self, x: Tensor, gradients: Tensor | None = None) -> Codes: ...


@dataclass(frozen=True)
class Fidelity:
    """The figures defined at the head of this file."""

    site: str
    mode: str
    """`INFERENCE` or `ORACLE`."""
    tokens: int
    ce_tokens: int
    fvu: float
    l0: float
    cosine: float
    never_active: int
    n_features: int
    ce_clean: float
    ce_spliced: float
    ce_zero_ablated: float
    ce_mean_ablated: float
    kl: float
    counts: Tensor = field(repr=False, compare=False)
    """On how many of the evaluated tokens each feature is active, ``[n_features]`` int64; not in `to_dict`."""

    @property
    def delta_ce(self) -> float:
        return self.ce_spliced - self.ce_clean

    @property
    def loss_recovered_zero(self) -> float:
        return _recovered(self.ce_clean, self.ce_spliced, self.ce_zero_ablated)

    @property
    def loss_recovered_mean(self) -> float:
        return _recovered(self.ce_clean, self.ce_spliced, self.ce_mean_ablated)

    @property
    def never_active_share(self) -> float:
        return self.never_active / self.n_features

    @property
    def share_below_1e4(self) -> float:
        return self.share_below(1e-4)

    @property
    def share_below_1e5(self) -> float:
        return self.share_below(1e-5)

    def share_below(self, density: float) -> float:
        """Share of features active on less than `density` of the evaluated tokens, the never active ones included."""
        return (self.counts.double() / self.tokens < density).double().mean().item()

    def to_dict(self) -> dict[str, float | int | str]:
        """All figures by name, the derived ones too; without the counts."""
        stored = [entry.name for entry in fields(self) if entry.name != "counts"]
        return {name: getattr(self, name) for name in (*stored, *_DERIVED)}

    def to_frame(self) -> "pd.DataFrame":
        """One line per figure."""
        import pandas as pd

        return pd.DataFrame({"value": self.to_dict()})

    def plot(self) -> "go.Figure":
        """CE of the four runs, in nats per token."""
        import plotly.graph_objects as go

        bars = {
            "clean": self.ce_clean,
            "spliced": self.ce_spliced,
            "mean-ablated": self.ce_mean_ablated,
            "zero-ablated": self.ce_zero_ablated,
        }
        figure = go.Figure(go.Bar(x=list(bars), y=list(bars.values()), text=[f"{v:.3f}" for v in bars.values()]))
        title = f"{self.site}, {self.ce_tokens:,} tokens" + (f", {self.mode}" if self.mode != INFERENCE else "")
        return figure.update_layout(yaxis_title="CE (nats/token)", title=title)


_DERIVED = (
    "delta_ce",
    "loss_recovered_zero",
    "loss_recovered_mean",
    "never_active_share",
    "share_below_1e4",
    "share_below_1e5",
)


def fidelity(
    sae: Autoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str | None = None,
    *,
    ce_tokens: int = EvalSettings.ce_tokens,
    rows_per_forward: int = EvalSettings.rows_per_forward,
    oracle: bool = False,
    track: Track = silent,
) -> Fidelity:
    """Evaluate `sae` on `rows` ``[rows, context]`` of token ids.

    `site` defaults to the one the autoencoder was trained at. CE and KL are measured on the first rows that hold
    `ce_tokens` tokens. `oracle` selects by the gradient affinity, as the head of this file says. Raises SaelabError if
    no site is known, if widths do not fit, if no ordinary token is there or if there is no such selection.
    """
    site = site or getattr(sae, "metadata", {}).get("hook_name")
    if site is None:
        raise SaelabError("fidelity: the autoencoder does not say its site; pass site='blocks.N.hook_resid_post'")
    width, d_in = lm.width(site), getattr(sae, "d_in", None)
    if d_in is not None and d_in != width:
        raise SaelabError(f"fidelity: {site} of {lm.name} has width {width}, the autoencoder has d_in {d_in}")
    if isinstance(sae, torch.nn.Module) and (place := next(sae.parameters()).device) != lm.device:
        raise SaelabError(
            f"fidelity: the autoencoder is on {place}, the model on {lm.device}; move it with sae.to(...)"
        )
    if oracle and "gradients" not in inspect.signature(sae.encode).parameters:
        raise SaelabError("fidelity: this autoencoder's encode takes no gradients, so there is no oracle of it")
    blocks = rows.to(lm.device).long().split(rows_per_forward)
    if not any(lm.ordinary(block).any() for block in blocks):
        raise SaelabError("fidelity: the rows hold no ordinary token")

    code_sums, mean = _code_sums(sae, lm, site, oracle, track(iter(blocks), "reconstruction", rows.numel(), _size))
    chosen = _first_blocks(lm, blocks, ce_tokens)
    total = sum(block.numel() for block in chosen)
    runs = _splice_sums(sae, lm, site, oracle, mean, track(iter(chosen), "spliced loss", total, _size))
    return Fidelity(site=site, mode=ORACLE if oracle else INFERENCE, n_features=sae.n_features, **code_sums, **runs)


def _size(block: Tensor) -> int:
    return block.numel()


def _first_blocks(lm: LanguageModel, blocks: tuple[Tensor, ...], tokens: int) -> list[Tensor]:
    chosen, held = [], 0
    for block in blocks:
        chosen.append(block)
        held += int(lm.ordinary(block).sum())
        if held >= tokens:
            break
    return chosen


def _read(lm: LanguageModel, block: Tensor, site: str, oracle: bool) -> tuple[Tensor, Tensor | None]:
    """Activations of the ordinary tokens, ``[tokens, d_in]`` float32, and for the oracle the gradients there."""
    keep = lm.ordinary(block)
    if not oracle:
        return lm.activations(block, [site])[site][keep].float(), None
    values, gradients = lm.activations_and_gradients(block, [site])
    return values[site][keep].float(), gradients[site][keep]


def _encode(sae: Autoencoder, x: Tensor, gradients: Tensor | None) -> Codes:
    return sae.encode(x) if gradients is None else cast(GradientAware, sae).encode(x, gradients=gradients)


@torch.no_grad()
def _code_sums(
    sae: Autoencoder, lm: LanguageModel, site: str, oracle: bool, blocks: Iterator[Tensor]
) -> tuple[dict[str, Any], Tensor]:
    """FVU, L0, cosine and firing counts; and the mean activation, ``[d_in]`` float64."""
    n, squares, errors, active, cosines = 0, 0.0, 0.0, 0, 0.0
    total = fired = origin = None
    for block in blocks:
        x, gradients = _read(lm, block, site, oracle)
        if not len(x):
            continue
        codes = _encode(sae, x, gradients)
        reconstruction = sae.decode(codes).float()
        if total is None or fired is None or origin is None:
            origin = x.double().mean(0)  # sums about a point near the mean lose no digits to a large mean
            total = torch.zeros_like(origin)
            fired = torch.zeros(sae.n_features, dtype=torch.long, device=x.device)
        centred = x.double() - origin
        n += len(x)
        total += centred.sum(0)
        squares += centred.square().sum().item()
        errors += (x.double() - reconstruction.double()).square().sum().item()
        cosines += F.cosine_similarity(x, reconstruction, dim=1).double().sum().item()
        active += int(codes.l0().sum())
        fired += codes.firing_counts()
    assert total is not None and fired is not None and origin is not None
    deviation = squares - total.square().sum().item() / n
    sums = {
        "tokens": n,
        "fvu": errors / deviation if deviation else float("nan"),  # all activations the same: nothing to explain
        "l0": active / n,
        "cosine": cosines / n,
        "never_active": int((fired == 0).sum()),
        "counts": fired.cpu(),
    }
    return sums, origin + total / n


@torch.no_grad()
def _splice_sums(
    sae: Autoencoder, lm: LanguageModel, site: str, oracle: bool, mean: Tensor, blocks: Iterator[Tensor]
) -> dict[str, Any]:
    gradients: Tensor | None = None  # of the block at hand

    replacements: dict[str, Callable[[Tensor], Tensor]] = {
        "ce_spliced": lambda x: sae.decode(_encode(sae, x.float(), gradients)),
        "ce_zero_ablated": torch.zeros_like,
        "ce_mean_ablated": lambda x: mean.to(x.dtype).expand_as(x),
    }
    sums = dict.fromkeys(["ce_clean", *replacements, "kl"], 0.0)
    n = 0
    for block in blocks:
        keep = lm.scored(block)
        targets = block.roll(-1, 1)[keep]
        if oracle:
            _, gradients = _read(lm, block, site, oracle)
        n += len(targets)
        clean = _log_probabilities(lm.logits(block), keep)
        sums["ce_clean"] += F.nll_loss(clean, targets, reduction="none").double().sum().item()
        for name, replace in replacements.items():
            other = _log_probabilities(lm.spliced_logits(block, site, replace), keep)
            sums[name] += F.nll_loss(other, targets, reduction="none").double().sum().item()
            if name == "ce_spliced":
                sums["kl"] += F.kl_div(other, clean, reduction="none", log_target=True).sum(1).double().sum().item()
    if not n:
        raise SaelabError("fidelity: no position has an ordinary token followed by another, so there is no loss")
    return {"ce_tokens": n} | {name: value / n for name, value in sums.items()}


def _log_probabilities(logits: Tensor, keep: Tensor) -> Tensor:
    return logits[keep].float().log_softmax(-1)


def _recovered(clean: float, spliced: float, ablated: float) -> float:
    """NaN where the ablation does no harm: then there is no loss to recover."""
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")
