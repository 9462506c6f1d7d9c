"""How well an autoencoder preserves activations and the predictions that the model makes from them.

Definitions (every figure over ordinary tokens only: BOS and other special tokens are in none of them):

x              the activation that the reconstruction xhat stands for; of a transcoder, that at the target site
sites          of a crosscoder: FVU at each site, and CE with the reconstruction spliced in at that site only, in the
               site's own model if there are two (ce_clean is that model's). The other figures take the activations of
               all sites side by side, each scaled as in training; CE and KL are those of the first site
FVU            sum ||x - xhat||^2 / sum ||x - mean x||^2, both pooled over all evaluated tokens, sums in float64
L0             mean number of active features per token
cosine         mean cosine between x and xhat
sinks          evaluated tokens whose norm is above 10 times the median norm of the first 8,192 evaluated tokens; the
               shares of the variance in sinks and in the largest dimensions are those of activations/sinks.py
without sinks  FVU and cosine over the other tokens, deviations being from the mean of these; CE with the reconstruction
               spliced in at the other tokens only, the sinks being left clean as BOS is
CE             mean loss in nats of the next token, if the token and the next one are both ordinary; clean, with the
               reconstruction spliced in at the site of x, with zeros, and with the mean activation. A transcoder
               predicts from the clean input
loss recovered (CE_ablated - CE_spliced) / (CE_ablated - CE_clean), for zero and for mean ablation
delta CE       CE_spliced - CE_clean
KL             mean KL(clean || spliced) of the next-token distributions, over the same positions as CE
never active   features that are active on none of the evaluated tokens
share below    share of features that are active on less than 1e-4 (1e-5) of the evaluated tokens
c_dec          mean absolute cosine between the decoder rows of two different features, over all pairs of features: a
               property of the weights only (decoder.py); over autoencoders that differ in L0, its elbow is at
               the right L0

With `ce_tokens` 0, as for activations from an array, there are no figures of CE, loss recovered and KL: they are NaN,
and left out of `to_dict`.

Features are selected as in inference. The other mode is an oracle: selection by the gradient affinity of training,
which sees the next token, so its figures do not compare with those of other autoencoders. Its gradients are those of
the clean run at the same positions, for the spliced loss too; they are 0 at a row's last position and at every position
that no loss follows, so selection there is by activation.
Gradients are normalised over the rows of one forward pass, as over the batch in training, so only in this mode
`rows_per_forward` changes the figures by more than their last bits.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.activations.sinks import Moments, SinkSums, concentration
from saelab.activations.sites import Sites, as_sites
from saelab.activations.stream import ActivationModel, check_finite
from saelab.analysis.decoder import mean_absolute_cosine
from saelab.analysis.result import shown
from saelab.analysis.settings import EvalSettings
from saelab.analysis.spliced_loss import Spliced, spliced_losses
from saelab.encoded import Autoencoder, Block, encoded
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder
from saelab.sae.side_by_side import factors_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

INFERENCE = "inference"
ORACLE = "oracle: sees the next token"
MIN_DEAD_TOKENS = 300_000
"""With fewer held-out tokens the figures say little about rare features; `saelab eval` then prints a note."""

_WEIGHTS = "its weights may be too large for their dtype"


@dataclass(frozen=True)
class Fidelity:
    """The figures defined at the head of this file."""

    site: str
    """Where activations are read; of a transcoder also, after ->, where the target is."""
    mode: str
    """`INFERENCE` or `ORACLE`."""
    tokens: int
    """Evaluated tokens."""
    ce_tokens: int
    """Positions that CE and KL are means over."""
    fvu: float
    l0: float
    cosine: float
    sinks: int
    """Number of evaluated tokens that are sinks."""
    sink_variance: float
    """Share of the variance in them."""
    top_variance: float
    """Share of the other tokens' variance in the 1% of dimensions with the largest variance."""
    fvu_without_sinks: float
    cosine_without_sinks: float
    never_active: int
    n_features: int
    ce_clean: float
    ce_spliced: float
    ce_zero_ablated: float
    ce_mean_ablated: float
    ce_spliced_without_sinks: float
    kl: float
    c_dec: float | None
    """None if the autoencoder has no `W_dec`."""
    counts: Tensor = field(repr=False, compare=False)
    """Number of evaluated tokens on which each feature is active, ``[n_features]`` int64; not in `to_dict`."""
    sites: tuple[dict[str, Any], ...] = ()
    """For each site of a crosscoder: site, fvu, ce_clean, delta_ce, loss_recovered_zero and loss_recovered_mean."""

    @property
    def delta_ce(self) -> float:
        return self.ce_spliced - self.ce_clean

    @property
    def delta_ce_without_sinks(self) -> float:
        return self.ce_spliced_without_sinks - self.ce_clean

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
        """Share of features active on less than `density` of the evaluated tokens, including never active ones."""
        return (self.counts.double() / self.tokens < density).double().mean().item()

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, the derived ones too; without the counts, without losses if none was measured, and with
        `sites` only for a crosscoder."""
        stored = [entry.name for entry in fields(self) if entry.name not in ("counts", "sites")]
        left_out = () if self.ce_tokens else _OF_LOSSES
        found = {name: getattr(self, name) for name in (*stored, *_DERIVED) if name not in left_out}
        return found | ({"sites": list(self.sites)} if self.sites else {})

    def to_frame(self) -> "pd.DataFrame":
        """One line per figure."""
        import pandas as pd

        lines = {name: value for name, value in self.to_dict().items() if name != "sites"}
        for each in self.sites:
            lines |= {f"{name} at {each['site']}": value for name, value in each.items() if name != "site"}
        return pd.DataFrame({"value": lines})

    def _repr_html_(self) -> str:
        return f"<b>Fidelity</b>{self.to_frame().map(shown).to_html(border=0)}"  # pandas escapes names and values

    def plot(self) -> "go.Figure":
        """CE of the four runs, in nats per token. Raises SaelabError if no loss was measured."""
        if not self.ce_tokens:
            raise SaelabError(f"fidelity: no loss was measured at {self.site}, so there is no plot of losses")
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
    "delta_ce_without_sinks",
    "loss_recovered_zero",
    "loss_recovered_mean",
    "never_active_share",
    "share_below_1e4",
    "share_below_1e5",
)


_LOSSES = ("ce_clean", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated", "ce_spliced_without_sinks", "kl")
_OF_LOSSES = (*_LOSSES, "delta_ce", "delta_ce_without_sinks", "loss_recovered_zero", "loss_recovered_mean")


def fidelity(
    sae: Autoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str | Sites | None = None,
    *,
    ce_tokens: int = EvalSettings.ce_tokens,
    rows_per_forward: int = EvalSettings.rows_per_forward,
    oracle: bool = False,
    track: Track = silent,
) -> Fidelity:
    """Evaluate `sae` on `rows` ``[rows, context]`` of token ids.

    `site` defaults to the one the autoencoder was trained at; a transcoder has `Sites`. CE and KL are measured on the
    first rows that hold `ce_tokens` tokens, on none if it is 0. `oracle` selects by the gradient affinity, as the head
    of this file says.
    Raises SaelabError if no site is known, if widths or devices differ, if there is no ordinary token, or if `encode`
    takes no gradients.
    """
    metadata = getattr(sae, "metadata", {})
    if site is None and (site := metadata.get("hook_name")) is None:
        raise SaelabError("fidelity: the autoencoder does not say its site; pass site='blocks.N.hook_resid_post'")
    if isinstance(site, str):
        target = metadata.get("hook_name_out") if getattr(sae, "transcodes", False) else None
        crosses = len(getattr(sae, "site_widths", ())) > 1
        site = Sites(site, target, tuple(metadata.get("hook_names") or ())[1:] if crosses else ())
    evaluation = Evaluation(sae, lm, site, ce_tokens=ce_tokens, oracle=oracle)
    for block in encoded(sae, lm, rows, site, rows_per_forward, gradients=oracle, track=track):
        evaluation.add(block)
    return evaluation.result(track)


class Evaluation:
    """Sums over the blocks of one pass (`add`), and the figures that follow from them and from the losses (`result`).

    Memory: the reconstructions of the tokens for CE, ``ce_tokens * d_in`` float32 numbers on the model's device, kept
    so that no token is encoded twice; ``8192 * d_in`` such numbers in `SinkSums`; in `result`, the runs of the model on
    one block.
    Raises SaelabError if the widths or devices differ, or if `oracle` is asked of an `encode` that takes no gradients.
    """

    def __init__(
        self, sae: Autoencoder, lm: ActivationModel, site: str | Sites, *, ce_tokens: int, oracle: bool = False
    ) -> None:
        sites = as_sites(site)
        if sites.target is None and getattr(sae, "transcodes", False):
            raise SaelabError("fidelity: a transcoder needs a target: pass site=saelab.Sites(INPUT, TARGET)")
        for name, places in (("d_in", sites.inputs), ("d_out", sites.outputs)):
            width, own = sum(map(lm.width, places)), getattr(sae, name, None)
            if own is not None and own != width:
                where = " + ".join(places)
                raise SaelabError(f"fidelity: {where} of {lm.name} has width {width}, the autoencoder has {name} {own}")
        if isinstance(sae, torch.nn.Module) and (device := next(sae.parameters()).device) != lm.device:
            raise SaelabError(
                f"fidelity: the autoencoder is on {device}, the model on {lm.device}; move it with sae.to(...)"
            )
        if oracle and "gradients" not in inspect.signature(sae.encode).parameters:
            raise SaelabError("fidelity: this autoencoder's encode takes no gradients, so it has no oracle mode")
        self._sae, self._lm, self._sites, self._oracle = sae, lm, sites, oracle
        self._factors = factors_of(sae) if isinstance(sae, SparseAutoencoder) and sites.more else None
        self._widths = list(sae.site_widths) if isinstance(sae, SparseAutoencoder) else []
        self._ce_tokens = ce_tokens
        self._ce_blocks: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._tokens = self._active = 0
        self._sums = SinkSums()
        self._fired = torch.zeros(sae.n_features, dtype=torch.long, device=lm.device)

    @torch.no_grad()
    def add(self, block: Block) -> None:
        """Add the next block of the pass. Raises SaelabError if a reconstruction is NaN or infinite."""
        x, reconstruction = block.output, self._sae.decode(block.codes, block.x)
        spliced, reconstruction = reconstruction, reconstruction.float()
        context = block.rows.shape[1]
        rows, positions = block.positions // context, block.positions % context
        check_finite(f"{self._sites}: the autoencoder", "reconstructions", reconstruction, rows, positions, _WEIGHTS)
        if self._factors is not None:
            x, reconstruction = x * self._factors, reconstruction * self._factors
        if self._tokens < self._ce_tokens:
            self._ce_blocks.append((block.first_row, block.rows, spliced, torch.linalg.vector_norm(x, dim=1)))
        squares = (x.double() - reconstruction.double()).square()
        cosines = F.cosine_similarity(x, reconstruction, dim=1).double()
        at_sites = [] if self._factors is None else [part.sum(1) for part in squares.split(self._widths, 1)]
        self._sums.add(x, torch.stack((squares.sum(1), cosines, *at_sites), 1))
        self._tokens += len(x)
        self._active += int(block.codes.l0().sum())
        self._fired += block.codes.firing_counts()

    def result(self, track: Track = silent) -> Fidelity:
        """All figures, after running the model on the rows for CE.

        Raises SaelabError if the pass had no ordinary token, or none that is followed by another, and if a loss is NaN
        or infinite.
        """
        return results([self], track)[0]

    def _at_sites(self, whole: Moments, losses: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The figures of each site of a crosscoder, given the losses with it spliced in at that site."""
        deviations = [part.sum().item() for part in whole.deviation.split(self._widths)]
        for i, (site, of) in enumerate(zip(self._sites.inputs, losses, strict=True)):
            ce = {name: of[f"ce_{name}"] for name in ("clean", "spliced", "zero_ablated", "mean_ablated")}
            yield {
                "site": site,
                "fvu": whole.figures[2 + i].item() / deviations[i] if deviations[i] else float("nan"),
                "ce_clean": ce["clean"],
                "delta_ce": ce["spliced"] - ce["clean"],
                "loss_recovered_zero": _recovered(ce["clean"], ce["spliced"], ce["zero_ablated"]),
                "loss_recovered_mean": _recovered(ce["clean"], ce["spliced"], ce["mean_ablated"]),
            }

    def _figures(self, losses: Sequence[dict[str, Any]]) -> Fidelity:
        n, (others, sinks) = self._tokens, self._sums.result()
        whole, spread = others.merged(sinks), concentration(self._sums)
        W_dec = getattr(self._sae, "W_dec", None)
        if W_dec is not None and self._factors is not None:
            W_dec = W_dec * self._factors
        return Fidelity(
            site=str(self._sites),
            mode=ORACLE if self._oracle else INFERENCE,
            tokens=n,
            fvu=_fvu(whole),
            l0=self._active / n,
            cosine=whole.figures[1].item() / n,
            sinks=sinks.tokens,
            sink_variance=spread.sink_variance,
            top_variance=spread.top_variance,
            fvu_without_sinks=_fvu(others),
            cosine_without_sinks=others.figures[1].item() / others.tokens,
            never_active=int((self._fired == 0).sum()),
            n_features=self._sae.n_features,
            c_dec=None if W_dec is None else mean_absolute_cosine(W_dec),
            counts=self._fired.cpu(),
            sites=tuple(self._at_sites(whole, losses)) if self._sites.more else (),
            **losses[0],
        )


def results(evaluations: Sequence[Evaluation], track: Track = silent) -> list[Fidelity]:
    """The figures of evaluations that were added the same rows at the same sites, which share runs of the model.

    Raises SaelabError as `Evaluation.result` does.
    """
    first = evaluations[0]
    if not first._tokens:
        raise SaelabError("fidelity: the rows hold no ordinary token, only special ones; use another text")
    others, sinks = first._sums.result()
    sink_norm = first._sums.sink_norm if sinks.tokens else None
    mean = others.merged(sinks).mean
    if not first._ce_tokens:
        none = dict.fromkeys(_LOSSES, math.nan) | {"ce_tokens": 0}
        return [each._figures([none for _ in each._sites.outputs]) for each in evaluations]
    lm = cast(LanguageModel, first._lm)
    if first._factors is not None:
        mean = mean / first._factors
    losses, start = [], 0
    for site in first._sites.outputs:
        of, there = lm.owner(site)
        columns = slice(start, start + of.width(there))
        start = columns.stop
        blocks = [
            Spliced(
                first_row,
                rows,
                [each._ce_blocks[i][2][:, columns] for each in evaluations],
                None if sink_norm is None else norms <= sink_norm,
            )
            for i, (first_row, rows, _, norms) in enumerate(first._ce_blocks)
        ]
        losses.append(spliced_losses(of, there, blocks, mean[columns], track))
    return [each._figures(own) for each, own in zip(evaluations, zip(*losses, strict=True), strict=True)]


def _fvu(tokens: Moments) -> float:
    """FVU over some tokens, whose first figure is the squared error; NaN if all are equal: nothing to explain."""
    deviation = tokens.deviation.sum().item()
    return tokens.figures[0].item() / deviation if deviation else float("nan")


def _recovered(clean: float, spliced: float, ablated: float) -> float:
    """Loss recovered; NaN if the ablation changes no loss, because then there is none to recover."""
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")
