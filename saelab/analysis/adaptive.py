"""Adaptive computation: how unevenly errors and budgets are spread, and whether a budget that varies is what helps.

Definitions, over ordinary tokens, in inference (arXiv 2411.02124 gives none; these are ours):

error        squared norm of x - xhat of a token, over the mean squared deviation of x from its mean: FVU is its mean
Gini         mean absolute difference of two tokens (features) over twice the mean: 0 if all are equal, near 1 if one
             has everything
top tenth    share of the sum that belongs to the tenth of the tokens (features) with the largest values
difficulty   error of an autoencoder that gives every token the same number of features
rank         of a token among all of them, equal values having their mean rank; a correlation of ranks is Spearman's

`deal` changes the number of features of each token and nothing else. A token with n features has those n of the largest
pre-activations, whose values stay; the sum of all n is the same in every selection:

own          the autoencoder's own selection
constant     n as equal as whole numbers allow; the tokens that get one more are random
dealt        the own n, dealt to other tokens by a random permutation of all of them
batch-wide   the largest pre-activations of a block of rows, as many as its own selection has there

If the own selection is better than the constant one because hard tokens get more, then the dealt one, which varies as
much, is not. Intervals are over rows (intervals.py); ranks are those in the whole text. In a resample the counts of
rare features vary more than in the text, so resamples of figures over features are moved to have the figure as their
mean.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.affine import check_reconstructs
from saelab.analysis.intervals import Interval, add_by_row, between, draws, interval, ratio
from saelab.analysis.result import Result
from saelab.codes import Codes
from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import plotly.graph_objects as go

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SELECTIONS = ("own", "constant", "dealt", "batch-wide")
RESAMPLES = 200
_LORENZ = 101


@dataclass(frozen=True, eq=False, repr=False)
class Spread(Result):
    """How unevenly something is spread over tokens or features."""

    what: str
    n: int
    """Tokens or features."""
    mean: Interval
    deviation: Interval
    """Standard deviation."""
    quantiles: tuple[float, ...]
    """At `QUANTILES`."""
    gini: Interval
    top_tenth: Interval
    lorenz: np.ndarray
    """Share of the sum that belongs to the smallest 0%, 1% ... 100% of the values, ``[101]`` float64."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        return {
            "of": self.what,
            "number": self.n,
            "mean": self.mean,
            "standard deviation": self.deviation,
            **{f"{share:.0%} quantile": value for share, value in zip(QUANTILES, self.quantiles, strict=True)},
            "Gini": self.gini,
            "share of the top tenth": self.top_tenth,
        }

    def plot(self) -> "go.Figure":
        """The Lorenz curve: the share of the sum that belongs to the smallest values."""
        import plotly.graph_objects as go

        share = np.linspace(0, 1, _LORENZ)
        figure = go.Figure(layout={"title": f"{self.what}: Gini {self.gini.value:.2f}"})
        figure.add_scatter(x=share, y=self.lorenz, mode="lines", name=self.what)
        figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dash"}, name="all equal")
        figure.update_xaxes(title="share, smallest first")
        return figure.update_yaxes(title="share of the sum")


@dataclass(frozen=True, eq=False, repr=False)
class Dealt(Result):
    """FVU of one autoencoder when the number of features of each token changes; the head of the file says how."""

    tokens: int
    l0: dict[str, Interval]
    """Active features per token, by `SELECTIONS`."""
    fvu: dict[str, Interval]
    gain: Interval
    """FVU of the constant less that of the own selection: what the autoencoder gains by its varying numbers."""
    gain_dealt: Interval
    """FVU of the constant less that of the dealt selection."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        return {
            "tokens": self.tokens,
            **{f"L0, {name}": self.l0[name] for name in SELECTIONS},
            **{f"FVU, {name}": self.fvu[name] for name in SELECTIONS},
            "gain over constant (FVU)": self.gain,
            "gain of dealt numbers over constant (FVU)": self.gain_dealt,
        }

    def plot(self) -> "go.Figure":
        """FVU by selection, with intervals."""
        import plotly.graph_objects as go

        found = [self.fvu[name] for name in SELECTIONS]
        error = {"array": [f.high - f.value for f in found], "arrayminus": [f.value - f.low for f in found]}
        figure = go.Figure(go.Scatter(x=list(SELECTIONS), y=[f.value for f in found], error_y=error, mode="markers"))
        return figure.update_layout(yaxis_title="FVU", title="numbers of features per token")


class PerToken:
    """Number of features, error and row of each token of a pass (`add`), and tokens of each feature.

    Memory: 16 bytes per token, ``(RESAMPLES + 1) * n_features`` numbers and ``rows * d_in``, of 8 bytes each.
    """

    def __init__(self, sae: SparseAutoencoder, rows: int) -> None:
        check_reconstructs(sae, "adaptive")
        self._sae, self.rows = sae, rows
        self._row: list[Tensor] = []
        self._l0: list[Tensor] = []
        self._error: list[Tensor] = []
        self._moments = _Moments(rows, sae.d_out)
        self._draws = torch.from_numpy(draws(rows, RESAMPLES, np.random.default_rng(0))).double()
        self._drawn = torch.zeros(len(self._draws), sae.n_features, dtype=torch.float64)
        self._counts = torch.zeros(sae.n_features, dtype=torch.long)

    @torch.no_grad()
    def add(self, block: Block) -> None:
        codes, row, F = block.codes, block.row_of_token(), self._sae.n_features
        self._row.append(row)
        self._l0.append(codes.l0().cpu())
        self._error.append(_squared_errors(self._sae, block.x, codes))
        self._moments.add(block.x, row)
        rows, local = len(block.rows), row - block.first_row
        active = codes.values > 0
        entries = local[codes.row_of_entry().cpu()] * F + codes.features.long().cpu()
        by_row = torch.bincount(entries[active.cpu()], minlength=rows * F).view(rows, F)
        self._counts += by_row.sum(0)
        self._drawn += self._draws[:, block.first_row : block.first_row + rows] @ by_row.double()

    def arrays(self) -> dict[str, np.ndarray]:
        """By name: row, l0 and error ``[tokens]``, counts ``[n_features]``, drawn ``[RESAMPLES, n_features]`` and rows.

        `counts` are the tokens on which each feature is active, `drawn` the same in resamples of the rows, whose number
        is `rows`. Raises SaelabError if there was no ordinary token.
        """
        if not self._row:
            raise SaelabError("adaptive: the rows hold no ordinary token, only special ones; use another text")
        deviation = self._moments.deviation()
        error = torch.cat(self._error).numpy() / (deviation.sum() / self._moments.tokens.sum())
        found = {"row": torch.cat(self._row).numpy(), "l0": torch.cat(self._l0).numpy(), "error": error}
        numbers = {"counts": self._counts.numpy(), "drawn": self._drawn.numpy(), "rows": np.array(self.rows)}
        return found | numbers


def spread_over_tokens(what: str, values: np.ndarray, row: np.ndarray, rows: int) -> Spread:
    """The spread of `values` ``[tokens]``, which are not negative, of tokens in the rows `row` ``[tokens]``."""
    order = np.argsort(values, kind="stable")
    values, row = np.asarray(values, np.float64)[order], row[order]
    drawn = [_uneven(values, each[row]) for each in draws(rows, RESAMPLES, np.random.default_rng(0))]
    return _spread(what, values, np.array(drawn).reshape(-1, 4))


def spread_over_features(what: str, counts: np.ndarray, drawn: np.ndarray) -> Spread:
    """The spread of `counts` ``[n_features]``; `drawn` ``[resamples, n_features]`` are those of resamples of rows."""
    values = np.sort(np.asarray(counts, np.float64))
    found = np.array([_uneven(np.sort(each)) for each in drawn]).reshape(-1, 4)
    centred = found - found.mean(0) + _uneven(values) if len(found) else found
    return _spread(what, values, centred)


def rank_correlation(a: np.ndarray, b: np.ndarray, row: np.ndarray, rows: int) -> Interval:
    """Spearman's correlation of a and b ``[tokens]`` of tokens in the rows `row`; NaN if one of them is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(each) / len(each) - 0.5 for each in (a, b))
    sums = np.zeros((rows, 6))
    add_by_row(sums, row, np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1))

    def correlation(s: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            n, mean_x, mean_y = s[..., 0], s[..., 1] / s[..., 0], s[..., 2] / s[..., 0]
            spread = (s[..., 3] / n - mean_x**2) * (s[..., 4] / n - mean_y**2)
            return (s[..., 5] / n - mean_x * mean_y) / np.sqrt(np.where(spread > 1e-18, spread, np.nan))

    return interval(sums, correlation)


@torch.no_grad()
def deal(sae: SparseAutoencoder, blocks: Iterable[Block], rows: int, l0: np.ndarray, *, seed: int = 0) -> Dealt:
    """FVU in each of `SELECTIONS`, on the `blocks` of `rows` rows (`saelab.encoded.encoded`).

    `l0` ``[tokens]`` are the own numbers of features of the tokens in order, as `PerToken` finds them. Takes a product
    with the encoder more than the pass, and memory for the pre-activations of a block. Raises SaelabError for a
    transcoder, and if there is no ordinary token.
    """
    check_reconstructs(sae, "adaptive")
    numbers = np.random.default_rng(seed)
    least, more = divmod(int(l0.sum()), max(1, len(l0)))
    even = np.full(len(l0), least)
    even[numbers.permutation(len(l0))[:more]] += 1
    planned = {"constant": even, "dealt": numbers.permutation(l0)}
    moments, done = _Moments(rows, sae.d_out), 0
    sums = np.zeros((rows, 2 * len(SELECTIONS)))
    for block in blocks:
        x, tokens = block.x, slice(done, done + len(block.x))
        pre = sae.pre_activations(x.to(sae.W_enc.dtype)).clamp_min_(0)
        codes = {"own": block.codes}
        for name, each in planned.items():
            codes[name] = _largest(pre, torch.from_numpy(each[tokens]).to(pre.device))
        bar = pre.flatten().topk(max(1, int(block.codes.l0().sum()))).values[-1].clamp_min(1e-30)
        codes["batch-wide"] = _largest(pre, (pre >= bar).sum(1))
        of_token = [_squared_errors(sae, x, codes[name]) for name in SELECTIONS]
        of_token += [codes[name].l0().double().cpu() for name in SELECTIONS]
        row = block.row_of_token()
        add_by_row(sums, row, torch.stack(of_token, 1))
        moments.add(x, row)
        done += len(x)
    if not done:
        raise SaelabError("adaptive: the rows hold no ordinary token, only special ones; use another text")
    n = len(SELECTIONS)
    sums = np.concatenate([sums, moments.deviation()[:, None], moments.tokens[:, None]], 1)

    def fvu(name: str, less: str | None = None) -> Interval:
        i, j = SELECTIONS.index(name), None if less is None else SELECTIONS.index(less)
        columns = sums[:, [i, 2 * n] if j is None else [i, j, 2 * n]]
        return interval(columns, ratio if j is None else lambda s: (s[..., 0] - s[..., 1]) / s[..., 2])

    return Dealt(
        done,
        {name: interval(sums[:, [n + i, -1]]) for i, name in enumerate(SELECTIONS)},
        {name: fvu(name) for name in SELECTIONS},
        fvu("constant", "own"),
        fvu("constant", "dealt"),
    )


class _Moments:
    """Sums by row, and from them the squared deviation of each row's tokens from the mean of all."""

    def __init__(self, rows: int, width: int) -> None:
        self.tokens, self._square, self._x = np.zeros(rows), np.zeros(rows), np.zeros((rows, width))

    def add(self, x: Tensor, row: Tensor) -> None:
        self.tokens += np.bincount(row, minlength=len(self.tokens))
        self._square += np.bincount(row, x.double().square().sum(1).cpu().numpy(), len(self._square))
        self._x += torch.zeros(self._x.shape, dtype=torch.float64).index_add_(0, row, x.double().cpu()).numpy()

    def deviation(self) -> np.ndarray:
        """``[rows]``"""
        mean = self._x.sum(0) / self.tokens.sum()
        return self._square - 2 * self._x @ mean + self.tokens * (mean @ mean)


def _squared_errors(sae: SparseAutoencoder, x: Tensor, codes: Codes) -> Tensor:
    return (x.double() - sae.decode(codes, x).double()).square().sum(1).cpu()


def _largest(pre: Tensor, number: Tensor) -> Codes:
    """The `number` ``[tokens]`` largest entries of each token of `pre` ``[tokens, n_features]``, those above 0."""
    most = min(max(1, int(number.max())), pre.shape[1])
    values, features = pre.topk(most, dim=1)
    values = values.where(torch.arange(most, device=pre.device) < number[:, None], 0.0)
    return Codes.from_topk(values, features, pre.shape[1]).compact()


def _uneven(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float, float, float]:
    """Mean, standard deviation, Gini and share of the top tenth of rising `values` with these weights."""
    weights = np.ones(len(values)) if weights is None else weights
    n, total = weights.cumsum(), (weights * values).cumsum()
    if not total[-1] > 0:
        return (0.0 if n[-1] else np.nan), np.nan, np.nan, np.nan
    mean = total[-1] / n[-1]
    deviation = np.sqrt(max(0.0, (weights * values**2).sum() / n[-1] - mean**2))
    gini = 1 - (weights * (2 * total - weights * values)).sum() / (n[-1] * total[-1])
    top = 1 - np.interp(0.9 * n[-1], np.r_[0, n], np.r_[0, total]) / total[-1]
    return float(mean), float(deviation), float(gini), float(top)


def _spread(what: str, values: np.ndarray, drawn: np.ndarray) -> Spread:
    whole = _uneven(values)
    mean, deviation, gini, top = (between(whole[i], drawn[:, i]) for i in range(4))
    total = np.r_[0, values.cumsum()]
    lorenz = np.interp(np.linspace(0, len(values), _LORENZ), np.arange(len(values) + 1), total) / max(total[-1], 1e-300)
    quantiles = tuple(float(each) for each in np.quantile(values, QUANTILES))
    return Spread(what, len(values), mean, deviation, quantiles, gini, top, lorenz)
