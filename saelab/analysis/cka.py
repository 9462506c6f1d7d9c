"""Linear CKA of two autoencoders' codes: how alike the codes are as a whole, whatever their features' order and number.

    codes = PairedCodes()
    for block in blocks: codes.add(codes_a, codes_b, row)      # of the same tokens, at any sites
    codes.cka()

With the dense codes X ``[tokens, features of A]`` and Y ``[tokens, features of B]``, centred over the tokens,

    CKA = ||Y^T X||^2 / (||X^T X|| ||Y^T Y||)        Frobenius norms; from 0 to 1

1 if the codes are equal up to a rotation and a factor. It is dominated by the features of largest variance.

By chance: the same figure when Y's tokens are in a random order. It is above 0, and more so with fewer tokens.

The dense codes are never made. The sum of squares of Y^T X is added up over tiles of X's features; a tile is one sparse
product. It takes k_A k_B multiply-adds per token, and memory for the codes, in some 40 bytes per entry, and for one
tile, some 150 MB, at any number of features. To centre, N mean(y) mean(x)^T is subtracted without being made.

Intervals are over rows of text, by a jackknife that leaves out one of up to 32 groups of consecutive rows at a time.
With the part S of a tile T that comes from a group, ||T - S||^2 = ||T||^2 - 2 T.S + ||S||^2 is that without the group.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.analysis.intervals import Interval
from saelab.analysis.result import Result
from saelab.errors import SaelabError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from saelab.codes import Codes

CsrArray = Any
"""A scipy.sparse.csr_array ``[tokens, n_features]``; scipy has no types."""
GROUPS = 32
_MOST_ENTRIES = 2**22
"""Most entries of the parts of a tile together, of 20 bytes each, and most cells of a dense tile, of 8."""


@dataclass(frozen=True, eq=False, repr=False)
class Cka(Result):
    """Linear CKA of the codes of two autoencoders; the head of the file defines it."""

    tokens: int
    rows: int
    features: tuple[int, int]
    cka: Interval
    by_chance: float
    """With B's tokens in a random order."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        return {
            "tokens": self.tokens,
            "rows": self.rows,
            "features of A": self.features[0],
            "features of B": self.features[1],
            "linear CKA of codes": self.cka,
            "linear CKA of codes, by chance": self.by_chance,
        }

    def plot(self) -> "go.Figure":
        """CKA with its interval, and by chance."""
        import plotly.graph_objects as go

        value, low, high = self.cka
        figure = go.Figure(layout={"yaxis_title": "linear CKA", "yaxis_range": [0, 1]})
        ends = {"array": [high - value, 0], "arrayminus": [value - low, 0]}
        return figure.add_bar(x=["codes", "by chance"], y=[value, self.by_chance], error_y=ends)


class PairedCodes:
    """Codes of two autoencoders on the same tokens, added block by block."""

    def __init__(self) -> None:
        self._blocks: list[tuple[CsrArray, CsrArray, np.ndarray]] = []

    def add(self, a: "Codes", b: "Codes", row: np.ndarray) -> None:
        """Add the codes of some tokens; `row` ``[tokens]`` is the number of each token's row of text, never falling.

        Raises SaelabError if they have different numbers of tokens.
        """
        if not a.tokens == b.tokens == len(row):
            raise SaelabError(
                f"cka: codes of {a.tokens} and {b.tokens} tokens, of {len(row)} rows' tokens, do not match"
            )
        self._blocks.append((_csr(a), _csr(b), np.asarray(row)))

    def cka(self, seed: int = 0) -> Cka:
        """Linear CKA of all tokens added. Raises SaelabError if there are fewer than two, or no feature varies."""
        from scipy.sparse import vstack

        if sum(len(row) for _, _, row in self._blocks) < 2:
            raise SaelabError("cka: there are fewer than two tokens, so no code varies; read more text")
        x: CsrArray
        y: CsrArray
        x, y = (vstack([block[i] for block in self._blocks], format="csr") for i in (0, 1))
        row = np.concatenate([block[2] for block in self._blocks])
        starts = np.flatnonzero(np.diff(row, prepend=row[0] - 1))  # of each row of text
        groups = min(GROUPS, len(starts))
        edges = np.append(starts, len(row))[np.linspace(0, len(starts), groups + 1).round().astype(int)]
        xx, yy, yx = (_squared_norms(*pair, edges) for pair in ((x, x), (y, y), (x, y)))
        if not (xx[0] > 0 and yy[0] > 0):
            raise SaelabError("cka: no feature varies over these tokens; read more text")
        shuffled: CsrArray = y[np.random.default_rng(seed).permutation(len(row))]
        chance = _squared_norms(x, shuffled, np.array([0, len(row)]))
        return Cka(
            tokens=len(row),
            rows=len(starts),
            features=(x.shape[1], y.shape[1]),
            cka=_jackknife(yx[0] / np.sqrt(xx[0] * yy[0]), yx[1:], np.sqrt(xx[1:] * yy[1:])),
            by_chance=float(chance[0] / np.sqrt(xx[0] * yy[0])),
        )


def _jackknife(value: float, left: np.ndarray, scale: np.ndarray) -> Interval:
    """The 95% interval of a ratio, given its two parts without each group, ``[groups]``."""
    from scipy.stats import t

    groups = len(left)
    if groups < 2 or not (scale > 0).all():
        return Interval(float(value), np.nan, np.nan)
    spread = np.sqrt((groups - 1) * (left / scale).var())
    reach = float(t.ppf(0.975, groups - 1) * spread)
    return Interval(float(value), float(value - reach), float(value + reach))


def _csr(codes: "Codes") -> CsrArray:
    from scipy.sparse import csr_array

    values, features, offsets = (each.cpu().numpy() for each in (codes.values.float(), codes.features, codes.offsets))
    return csr_array((values, features.astype(np.int32), offsets.astype(np.int64)), (codes.tokens, codes.n_features))


def _squared_norms(x: CsrArray, y: CsrArray, edges: np.ndarray) -> np.ndarray:
    """||Y^T X||^2 of the centred codes of all tokens, and without each group, ``[1 + groups]`` float64.

    The tokens from ``edges[g]`` to ``edges[g + 1]`` are group g. Of a single group only the first is returned.
    """
    groups = len(edges) - 1
    parts = [slice(*edges[g : g + 2]) for g in range(groups)]
    of_x, of_y = [x[part].T.tocsr() for part in parts], [y[part] for part in parts]
    whole, with_whole, own = 0.0, np.zeros(groups), np.zeros(groups)
    for tile in _tiles(of_x, of_y):
        found = [left[tile].astype(np.float64) @ right for left, right in zip(of_x, of_y, strict=True)]
        if math.prod(found[0].shape) <= _MOST_ENTRIES:  # dense, which is three times as fast
            cells = [_cells(part) for part in found]
            total = np.zeros(math.prod(found[0].shape))
            for part, cell in zip(found, cells, strict=True):
                total[cell] += part.data
            whole += total @ total
            with_whole += np.array([part.data @ total[cell] for part, cell in zip(found, cells, strict=True)])
        else:
            both: CsrArray = sum(found[1:], found[0])
            whole += both.data @ both.data
            with_whole += np.array([part.multiply(both).sum() for part in found])
        own += np.array([part.data @ part.data for part in found])
    sums_x, sums_y = (np.stack([_sums(each[part]) for part in parts]) for each in (x, y))
    # (y . sum of y over group h) (x . sum of x over group i), summed over the tokens of each group g
    cross = np.stack([(right @ sums_y.T).T @ (left.T @ sums_x.T) for left, right in zip(of_x, of_y, strict=True)])

    samples = 1 + groups if groups > 1 else 1
    weights = np.concatenate([np.ones((1, groups)), 1 - np.eye(groups)])[:samples]  # of the groups in each
    squares = np.append(whole, whole - 2 * with_whole + own)[:samples]
    tokens = weights @ np.diff(edges)
    means = np.einsum("sg,ghi,sh,si->s", weights, cross, weights, weights, optimize=True)
    lengths = [np.square(weights @ sums).sum(1) for sums in (sums_x, sums_y)]
    return squares - 2 * means / tokens + lengths[0] * lengths[1] / tokens**2


def _tiles(of_x: list[CsrArray], of_y: list[CsrArray]) -> Iterator[slice]:
    """Consecutive features of X, so many that the parts of a tile have no more than `_MOST_ENTRIES`."""
    features, width = of_x[0].shape[0], of_y[0].shape[1]
    entries = np.zeros(features)  # at most, of a feature with those of Y, in all parts
    for left, right in zip(of_x, of_y, strict=True):
        entries += np.minimum(width, left.astype(bool).astype(np.float64) @ np.diff(right.indptr))
    ends, first = np.append(0, entries.cumsum()), 0
    while first < features:
        last = int(np.searchsorted(ends, ends[first] + _MOST_ENTRIES, "right")) - 1
        last = max(first + 1, last)
        yield slice(first, last)
        first = last


def _cells(product: CsrArray) -> np.ndarray:
    """Row x columns + column of each entry, ``[entries]`` int64; a product has no cell twice."""
    rows, columns = product.shape
    return np.repeat(np.arange(rows), np.diff(product.indptr)) * columns + product.indices


def _sums(codes: CsrArray) -> np.ndarray:
    """Sum over the tokens of each feature, ``[n_features]`` float64; scipy's own sum is in float32."""
    return np.bincount(codes.indices, codes.data, codes.shape[1])
