"""Linear CKA of two autoencoders' codes: how alike the codes are as a whole, whatever their features' order and number.

    codes = PairedCodes()
    for block in blocks: codes.add(codes_a, codes_b, row)      # of the same tokens, at any sites
    codes.cka()

With the dense codes X ``[tokens, features of A]`` and Y ``[tokens, features of B]``, centred over the tokens,

    CKA = ||Y^T X||^2 / (||X^T X|| ||Y^T Y||)        Frobenius norms; from 0 to 1

1 if the codes are equal up to a rotation and a factor. It is dominated by the features of largest variance.

By chance: the mean of the same figure over all orders of Y's tokens, which is ||X||^2 ||Y||^2 / (N - 1) over the same
denominator. It is above 0, and more so with fewer tokens.

The dense codes are never made. The sum of squares of Y^T X is added up over tiles of X's features. A tile is dense if
enough pairs of entries meet in it, else sparse. It takes k_A k_B + k_A^2 + k_B^2 multiply-adds per token, and memory
for the codes, some 20 bytes per entry, and for one tile, some 150 MB, at any number of features. To centre, N mean(y)
mean(x)^T is subtracted without being made.

Intervals are over rows of text, by a jackknife that leaves out one of up to 32 groups of consecutive rows at a time.
With the part S of a tile T that comes from a group, ||T - S||^2 = ||T||^2 - 2 T.S + ||S||^2 is that without the group.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
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
_MOST_PAIRS = 2**21
"""Most pairs of an entry of X and one of Y at once, of some 50 bytes each."""
_MOST_CELLS = 2**22
"""Most cells of a dense tile, of 8 bytes each."""
_CELLS_PER_PAIR = 32
"""Cells that take as long in a dense tile as a pair does in a sparse one."""


@dataclass(frozen=True, eq=False, repr=False)
class Cka(Result):
    """Linear CKA of the codes of two autoencoders; the head of the file defines it."""

    tokens: int
    rows: int
    features: tuple[int, int]
    cka: Interval
    by_chance: float
    """Mean over all orders of B's tokens."""

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

    def cka(self) -> Cka:
        """Linear CKA of all tokens added. Raises SaelabError if there are fewer than two, or no feature varies."""
        from scipy.sparse import vstack

        if sum(len(row) for _, _, row in self._blocks) < 2:
            raise SaelabError("cka: there are fewer than two tokens, so no code varies; read more text")
        x: CsrArray
        y: CsrArray
        x, y = (vstack([block[i] for block in self._blocks], format="csr") for i in (0, 1))
        row = np.concatenate([block[2] for block in self._blocks])
        self._blocks = [(x, y, row)]  # the same codes, once in memory
        starts = np.flatnonzero(np.diff(row, prepend=row[0] - 1))  # of each row of text
        groups = min(GROUPS, len(starts))
        edges = np.append(starts, len(row))[np.linspace(0, len(starts), groups + 1).round().astype(int)]
        xx, yy, yx = (_squared_norms(*pair, edges) for pair in ((x, x), (y, y), (x, y)))
        if not (xx[0] > 0 and yy[0] > 0):
            raise SaelabError("cka: no feature varies over these tokens; read more text")
        return Cka(
            tokens=len(row),
            rows=len(starts),
            features=(x.shape[1], y.shape[1]),
            cka=_jackknife(yx[0] / np.sqrt(xx[0] * yy[0]), yx[1:], np.sqrt(xx[1:] * yy[1:])),
            by_chance=_variation(x) * _variation(y) / (len(row) - 1) / float(np.sqrt(xx[0] * yy[0])),
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
    # scipy keeps both in the wider type: with offsets in int64 an entry takes 12 bytes and not 8
    narrow = (features.astype(np.int32), offsets.astype(np.int32 if codes.nnz < 2**31 else np.int64))
    return csr_array((values, *narrow), (codes.tokens, codes.n_features))


def _squared_norms(x: CsrArray, y: CsrArray, edges: np.ndarray) -> np.ndarray:
    """||Y^T X||^2 of the centred codes of all tokens, and without each group, ``[1 + groups]`` float64.

    The tokens from ``edges[g]`` to ``edges[g + 1]`` are group g. Of a single group only the first is returned.
    """
    groups = len(edges) - 1
    group = np.repeat(np.arange(groups), np.diff(edges))
    sums_x, sums_y = (np.stack([_sums(each[slice(*ends)]) for ends in pairwise(edges)]) for each in (x, y))
    whole, with_whole, own = 0.0, np.zeros(groups), np.zeros(groups)
    # (y . sum of y over group h) (x . sum of x over group i), summed over the tokens of each group g
    cross = np.zeros((groups, groups, groups))
    by_feature, length = x.T.tocsr(), np.diff(y.indptr)
    pairs = np.zeros(x.shape[1])
    for first, last in pairwise(edges):
        rows: CsrArray = x[first:last]
        pairs += np.bincount(rows.indices, np.repeat(length[first:last], np.diff(rows.indptr)), len(pairs))
    cells = groups * y.shape[1]
    dense = cells <= _CELLS_PER_PAIR * pairs
    tiles = chain(_tiles(dense, pairs, max(1, _MOST_CELLS // cells)), _tiles(~dense, pairs, len(pairs)))
    for tile in tiles:
        left: CsrArray = by_feature[tile]
        if dense[tile[0]]:
            parts = _dense_parts(left, y, group, groups)
            both = parts.sum(0)
            whole += np.vdot(both, both)
            with_whole += [np.vdot(part, both) for part in parts]
            own += [np.vdot(part, part) for part in parts]
        else:
            parts = [left[:, first:last].astype(np.float64) @ y[first:last] for first, last in pairwise(edges)]
            both: CsrArray = sum(parts[1:], parts[0])
            whole += both.data @ both.data
            with_whole += [part.multiply(both).sum() for part in parts]
            own += [part.data @ part.data for part in parts]
        cross += np.stack([(part @ sums_y.T).T @ sums_x[:, tile].T for part in parts])

    samples = 1 + groups if groups > 1 else 1
    weights = np.concatenate([np.ones((1, groups)), 1 - np.eye(groups)])[:samples]  # of the groups in each
    squares = np.append(whole, whole - 2 * with_whole + own)[:samples]
    tokens = weights @ np.diff(edges)
    means = np.einsum("sg,ghi,sh,si->s", weights, cross, weights, weights, optimize=True)
    lengths = [np.square(weights @ sums).sum(1) for sums in (sums_x, sums_y)]
    return squares - 2 * means / tokens + lengths[0] * lengths[1] / tokens**2


def _tiles(chosen: np.ndarray, pairs: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """The chosen features of X, at least one at a time, at most `most`, and at most `_MOST_PAIRS` pairs with Y."""
    features = np.flatnonzero(chosen)
    ends, first = np.append(0, pairs[features].cumsum()), 0
    while first < len(features):
        last = int(np.searchsorted(ends, ends[first] + _MOST_PAIRS, "right")) - 1
        last = min(max(first + 1, last), first + most)
        yield features[first:last]
        first = last


def _dense_parts(left: CsrArray, y: CsrArray, group: np.ndarray, groups: int) -> np.ndarray:
    """The product of some features of X ``[features, tokens]`` and Y by group, ``[groups, features, features of Y]``.

    A pair of entries adds to one cell. The tokens of a feature are in order, so the cells that are added to change
    slowly and stay in the processor's cache: a third faster than a sparse product, or more.
    """
    shape = (groups, left.shape[0], y.shape[1])
    found = np.zeros(math.prod(shape))
    feature = np.repeat(np.arange(left.shape[0]), np.diff(left.indptr))
    step = max(1, _MOST_PAIRS * left.nnz // max(1, int(np.diff(y.indptr)[left.indices].sum())))
    for first in range(0, left.nnz, step):
        here = slice(first, first + step)
        rows: CsrArray = y[left.indices[here]]
        length = np.diff(rows.indptr)
        cell = (group[left.indices[here]] * shape[1] + feature[here]) * shape[2]
        weight = np.repeat(left.data[here].astype(np.float64), length)
        weight *= rows.data
        found += np.bincount(np.repeat(cell, length) + rows.indices, weight, len(found))
    return found.reshape(shape)


def _variation(codes: CsrArray) -> float:
    """Sum of the squares of the centred codes."""
    squares = np.einsum("e,e->", codes.data, codes.data, dtype=np.float64)  # makes no copy
    return float(squares - np.square(_sums(codes)).sum() / codes.shape[0])


def _sums(codes: CsrArray) -> np.ndarray:
    """Sum over the tokens of each feature, ``[n_features]`` float64; scipy's own sum is in float32."""
    found = np.zeros(codes.shape[1])
    for first in range(0, codes.nnz, _MOST_PAIRS):
        entries = slice(first, first + _MOST_PAIRS)
        found += np.bincount(codes.indices[entries], codes.data[entries], len(found))
    return found
