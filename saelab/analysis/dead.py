"""Features that are dead, under-used or dense, how densities fall with rank, and why the dead ones are dead.

Definitions (over N ordinary held-out tokens, in inference):

density      the share of the tokens on which a feature is active
dead         active on none of them
under-used   alive, with a density below `share` times the one that the fitted curve expects of its rank, and below
             L0 / n_features (`saelab.sae.losses.under_used`, the definition of aux_zipf)
dense        with a density above `dense`
curve        Zipf-Mandelbrot, ``c (rank + shift) ** -exponent``, no density above 1; fitted to log density, each factor
             of rank weighing the same, without the last 15% of the ranks (`saelab.sae.allocation.capacity.fit_zipf`).
             R2 is that of log density on the ranks of the fit; `tail` is the mean of log10(density / curve) over the
             last 15% of the living ranks: what the curve misses there
on half      dead features on a random half of the rows, on average over all halves

Intervals are over rows (intervals.py). A resample has fewer different rows than the text, so it always finds more dead
and fewer rare features: the resamples of every figure are therefore moved to have the figure as their mean, and the
number of dead features has no interval. Beside it is the number on half of the text: if that is much larger, more text
would find fewer.

Why a feature is dead. Its pre-activation on a token is r + s + b: r = w (x - m), which varies, with the encoder row w
and the mean m of the activations; s = w (m - b_dec), which does not; and the bias b. To be active it must exceed a bar:
its threshold, or, with k places per token, the mean over tokens of the smallest activation of a token. Its highest
pre-activation on the text is r* + s + b. With the medians of the living features' b, s and length of w in place of its
own, one at a time, the highest pre-activation would be another, exactly. The reason is the first of these that holds:

duplicate    the decoder row has a cosine of at least `duplicate` with that of a living feature: to revive it would add
             nothing
crowded      it exceeds the bar on some token, but other features win there
bias         with their bias it exceeds the bar
mean         with their s it exceeds the bar: its encoder row is anti-aligned with the mean
norm         with an encoder row of their length it exceeds the bar: its own is shorter (lengths and cosines of a
             crosscoder's rows are those in the units of training)
several      with all three it exceeds the bar
direction    not even then: no token of the text lies far enough along its encoder row
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.affine import check_affine
from saelab.analysis.intervals import Interval, between, draws
from saelab.analysis.result import Result
from saelab.analysis.settings import DeadSettings
from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.sae.allocation.capacity import ZipfFit, expected_densities, fit_zipf, ranks
from saelab.sae.losses import under_used
from saelab.sae.model import SparseAutoencoder
from saelab.sae.side_by_side import comparable_rows

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

REASONS = ("duplicate", "crowded", "bias", "mean", "norm", "several", "direction")
RESAMPLES = 200
_TILE = 256
_PRE_ACTIVATIONS = 1 << 24
"""Pre-activations in memory at once."""


class Curve(NamedTuple):
    """The Zipf-Mandelbrot curve of the densities."""

    exponent: Interval
    shift: Interval
    r2: float
    """Share of the variance of log density that the curve explains, over the ranks of the fit."""
    tail: float
    """Mean of log10(density / curve) over the last 15% of the living ranks; NaN without living features."""


@dataclass(frozen=True, eq=False, repr=False)
class Dead(Result):
    """Densities of all features and the reasons of the dead ones; the head of the file defines them."""

    site: str
    tokens: int
    """N, the ordinary tokens that densities are shares of."""
    rows: int
    n_features: int
    l0: Interval
    """Active features per token."""
    dead: int
    dead_on_half: float
    under_used: Interval
    """Number of features."""
    dense: Interval
    """Number of features."""
    density_of_dense: float
    """Density above which a feature is dense."""
    curve: Curve
    reasons: dict[str, int]
    """Number of dead features by reason, in the order of `REASONS`."""
    density: np.ndarray
    """``[n_features]`` float64"""
    expected: np.ndarray
    """Density on the curve at each rank, densest first, ``[n_features]`` float64."""
    is_under_used: np.ndarray
    """``[n_features]`` bool"""
    dead_features: np.ndarray
    """Their numbers, ``[dead]`` int64, rising."""
    reason: np.ndarray
    """Index in `REASONS` of each dead feature, ``[dead]`` int8."""
    lacking: np.ndarray
    """What the highest pre-activation of each dead feature lacks of the bar, in units of activation, ``[dead]``."""
    twin: np.ndarray
    """The living feature with the decoder row nearest to that of each dead one, ``[dead]`` int64; -1 if none lives."""
    twin_cosine: np.ndarray
    """The cosine of the two rows, ``[dead]``."""
    silent_for: np.ndarray | None
    """Training tokens since each feature was last active, ``[n_features]`` int64; None if not known."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        return {
            "site": self.site,
            "tokens": self.tokens,
            "features": self.n_features,
            "L0 (active features per token)": self.l0,
            f"dead: active on none of {self.tokens:,} tokens": self.dead,
            "dead on half of the text": self.dead_on_half,
            "under-used (features)": self.under_used,
            f"dense: density above {self.density_of_dense:g} (features)": self.dense,
            "exponent of the curve": self.curve.exponent,
            "shift of the curve (ranks)": self.curve.shift,
            "R2 of log density": self.curve.r2,
            "log10(density / curve) in the last 15%": self.curve.tail,
            **{f"dead because of: {reason}": number for reason, number in self.reasons.items()},
        }

    def features(self) -> "pd.DataFrame":
        """A line per dead feature: its number, the reason, what the test of it found, and its age in training."""
        import pandas as pd

        columns = {
            "feature": self.dead_features,
            "reason": [REASONS[i] for i in self.reason],
            "lacking (activation)": self.lacking,
            "twin": self.twin,
            "twin cosine": self.twin_cosine,
        }
        if self.silent_for is not None:
            columns["silent for (training tokens)"] = self.silent_for[self.dead_features]
        return pd.DataFrame(columns)

    def plot(self) -> "go.Figure":
        """Density by rank with the curve and the density below which a feature is under-used; both axes are log."""
        import plotly.graph_objects as go

        falling = -np.sort(-self.density[self.density > 0])
        shown = np.unique(np.geomspace(1, max(1, self.n_features), 400).round().astype(np.int64))
        living = shown[shown <= len(falling)]
        figure = go.Figure(layout={"title": f"{self.site}: {self.dead:,} of {self.n_features:,} features are dead"})
        figure.add_scatter(x=living, y=falling[living - 1], mode="lines", name="density")
        name = f"exponent {self.curve.exponent.value:.2f}, shift {self.curve.shift.value:.0f}"
        figure.add_scatter(x=shown, y=self.expected[shown - 1], mode="lines", line={"dash": "dash"}, name=name)
        figure.update_xaxes(type="log", title="rank")
        return figure.update_yaxes(type="log", title="density (share of tokens)")


@torch.no_grad()
def dead(
    sae: SparseAutoencoder,
    blocks: Iterable[Block],
    rows: int,
    settings: DeadSettings = DeadSettings(),  # noqa: B008 (frozen)
    *,
    site: str = "",
    silent_for: Tensor | None = None,
    seed: int = 0,
) -> Dead:
    """What is defined at the head of this file, from the `blocks` of `rows` rows (`saelab.encoded.encoded`).

    Of the settings, `share`, `dense` and `duplicate` are used. `silent_for` are the training tokens since each feature
    was last active, if known. Memory: ``RESAMPLES * n_features`` numbers of 4 bytes, and 64 MB of pre-activations.
    Raises SaelabError if there is no ordinary token, or if the autoencoder normalises each token.
    """
    if sae.normalisation is not None:
        check_affine(sae, "dead")
    sums = _Sums(sae, rows, seed)
    for block in blocks:
        sums.add(block)
    if not sums.tokens:
        raise SaelabError("dead: the rows hold no ordinary token, only special ones; use another text")

    counts, n_features, share = sums.counts, sae.n_features, settings.share
    whole = _zones(counts / sums.tokens, share, settings.dense)
    drawn = [_zones(c / t, share, settings.dense) for c, t in zip(*sums.resamples(), strict=True)]

    def spread(figure: str) -> Interval:
        value, found = getattr(whole, figure), np.array([getattr(each, figure) for each in drawn])
        return between(value, found - found.mean() + value if len(found) else found)

    alive = counts > 0
    why = why_dead(sae, alive.to(sae.W_dec.device), sums.mean(), sums.highest, sums.bar(), settings.duplicate)
    numbers = np.bincount(why.reason, minlength=len(REASONS))
    return Dead(
        site=site or sae.metadata.get("hook_name", ""),
        tokens=sums.tokens,
        rows=rows,
        n_features=n_features,
        l0=spread("l0"),
        dead=int((~alive).sum()),
        dead_on_half=silent_on_half(sums.rows_active, rows),
        under_used=spread("under_used"),
        dense=spread("dense"),
        density_of_dense=settings.dense,
        curve=Curve(spread("exponent"), spread("shift"), whole.r2, whole.tail),
        reasons=dict(zip(REASONS, numbers.tolist(), strict=True)),
        density=(counts / sums.tokens).numpy(),
        expected=whole.expected.numpy(),
        is_under_used=whole.is_under_used.numpy(),
        dead_features=(~alive).nonzero().squeeze(1).numpy(),
        silent_for=None if silent_for is None else silent_for.cpu().numpy(),
        **why._asdict(),
    )


class _Sums:
    """Sums over the blocks of a pass."""

    def __init__(self, sae: SparseAutoencoder, rows: int, seed: int) -> None:
        device, d_in, F = sae.W_dec.device, sae.d_in, sae.n_features
        self.sae, self.tokens = sae, 0
        self.counts = torch.zeros(F, dtype=torch.float64)
        """Tokens on which each feature is active."""
        self.rows_active = torch.zeros(F, dtype=torch.long)
        """Rows in which each feature is active."""
        self._draws = torch.from_numpy(draws(rows, RESAMPLES, np.random.default_rng(seed)))
        self._drawn = torch.zeros(len(self._draws), F)
        self._drawn_tokens = torch.zeros(len(self._draws), dtype=torch.float64)
        self._x = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.highest = torch.full((F,), -torch.inf, device=device)
        """The highest pre-activation of each feature."""
        self._smallest, self._with_features = 0.0, 0

    def add(self, block: Block) -> None:
        row, F = block.row_of_token() - block.first_row, self.sae.n_features
        rows = len(block.rows)
        of_entry = row[block.codes.row_of_entry().cpu()]
        by_row = torch.bincount(of_entry * F + block.codes.features.cpu().long(), minlength=rows * F).view(rows, F)
        self.counts += by_row.sum(0)
        self.rows_active += (by_row > 0).sum(0)
        self.tokens += len(block.x)
        part = self._draws[:, block.first_row : block.first_row + rows]
        self._drawn += part.float() @ by_row.float()
        self._drawn_tokens += (part @ torch.bincount(row, minlength=rows)).double()
        self._x += block.x.double().sum(0)
        for part in block.x.split(max(1, _PRE_ACTIVATIONS // F)):
            torch.maximum(self.highest, self.sae.pre_activations(part).float().amax(0), out=self.highest)
        smallest = torch.full((len(block.x),), torch.inf, device=block.x.device)
        smallest.scatter_reduce_(0, block.codes.row_of_entry(), block.codes.values.float(), "amin")
        found = smallest[smallest.isfinite()]
        self._smallest += found.double().sum().item()
        self._with_features += len(found)

    def resamples(self) -> tuple[Tensor, Tensor]:
        """Counts ``[RESAMPLES, n_features]`` and tokens ``[RESAMPLES]`` of each resample."""
        return self._drawn.double(), self._drawn_tokens

    def mean(self) -> Tensor:
        return self._x / self.tokens

    def bar(self) -> Tensor:
        """What a pre-activation must exceed, ``[1]`` or ``[n_features]``."""
        if self.sae.threshold is not None:
            return self.sae.threshold.clamp_min(0).double()
        return torch.full((1,), self._smallest / max(1, self._with_features), dtype=torch.float64).to(self._x.device)


class _Zones(NamedTuple):
    """The figures of some densities, and what they are counted from."""

    l0: float
    under_used: float
    dense: float
    exponent: float
    shift: float
    r2: float
    tail: float
    expected: Tensor
    is_under_used: Tensor


def _zones(density: Tensor, share: float, dense: float) -> _Zones:
    """The figures of densities ``[n_features]`` float64."""
    l0, n_features, living = density.sum().item(), len(density), int((density > 0).sum())
    fit: ZipfFit = fit_zipf(density)
    million = 1_000_000  # the curve's cap is a density of 1, whatever the number of tokens
    expected = expected_densities(n_features, l0, million, fit.exponent, fit.shift)
    rank = ranks(density)
    few = under_used(density, expected[rank], share, l0 / n_features) & (density > 0)
    last = (rank < living) & (rank >= 0.85 * living)
    tail = (density[last] / expected[rank[last]]).log10().mean().item()
    dense_ones = int((density > dense).sum())
    return _Zones(l0, int(few.sum()), dense_ones, fit.exponent, fit.shift, fit.r2, tail, expected, few)


class Why(NamedTuple):
    """Why each dead feature is dead: arrays as in `Dead`."""

    reason: np.ndarray
    lacking: np.ndarray
    twin: np.ndarray
    twin_cosine: np.ndarray


@torch.no_grad()
def why_dead(
    sae: SparseAutoencoder, alive: Tensor, mean: Tensor, highest: Tensor, bar: Tensor, duplicate: float
) -> Why:
    """The reason of each feature that is not `alive` ``[n_features]`` bool, by the tests at the head of this file.

    `mean` ``[d_in]`` is that of the activations, `highest` ``[n_features]`` the highest pre-activation of each feature,
    and `bar` ``[1]`` or ``[n_features]`` what a pre-activation must exceed. If nothing lives, the reason is crowded or
    direction.
    """
    w, b, bar = sae.W_enc.double(), sae.b_enc.double(), bar.double().expand(sae.n_features)
    shift = w @ (mean.double() - sae.b_dec.double() if sae.centred else mean.double())
    encoder, decoder = comparable_rows(sae)
    norm, highest = torch.linalg.vector_norm(encoder.double(), dim=1), highest.double()
    along = highest - shift - b
    dead, some = ~alive, bool(alive.any())

    def usual(value: Tensor) -> Tensor:
        return value[alive].median() if some else value.new_tensor(torch.nan)

    scale = (usual(norm) / norm.clamp_min(1e-30)).clamp_min(1.0)
    changed = (
        highest,
        along + shift + usual(b),
        along + usual(shift) + b,
        scale * (along + shift) + b,
        scale * along + usual(shift) + usual(b),
    )
    twin, cosine = _nearest(decoder[dead], decoder[alive])
    tests = [cosine >= duplicate, *((each > bar)[dead] for each in changed), torch.ones_like(cosine, dtype=torch.bool)]
    reason = torch.stack(tests).int().argmax(0)
    living = alive.nonzero().squeeze(1)
    return Why(
        reason=reason.to(torch.int8).cpu().numpy(),
        lacking=(bar - highest)[dead].float().cpu().numpy(),
        twin=(living[twin] if some else torch.full_like(twin, -1)).cpu().numpy(),
        twin_cosine=cosine.cpu().numpy(),
    )


def _nearest(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `rows` the index of the nearest of `others`, and the cosine; index 0 and cosine -1 without others."""
    index = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    cosine = torch.full((len(rows),), -1.0, device=rows.device)
    if len(others):
        unit = F.normalize(others.float(), dim=1)
        for start in range(0, len(rows), _TILE):
            part = slice(start, start + _TILE)
            cosine[part], index[part] = (F.normalize(rows[part].float(), dim=1) @ unit.T).max(1)
    return index, cosine


def silent_on_half(rows_active: Tensor, rows: int) -> float:
    """Features that are active in none of ``rows // 2`` rows, on average over all choices of them.

    rows_active ``[n_features]`` int64 are the rows in which each feature is active. For one of them with r rows the
    share of choices is ``C(rows - r, half) / C(rows, half)``.
    """
    rest, half = (rows - rows_active).double(), float(rows // 2)
    logs = torch.lgamma(rest + 1) - torch.lgamma(rest - half + 1)
    whole = math.lgamma(rows + 1) - math.lgamma(rows - half + 1)
    return torch.where(rest >= half, (logs - whole).exp(), 0.0).sum().item()
