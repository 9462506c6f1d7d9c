"""Features of two autoencoders matched by the cosine of their decoder rows: the nearest ones, and one-to-one pairs.

    match = match_decoders(rows_a, rows_b)
    match.mean_max_cosine          # of A's features with their best ones of B
    match.pairs                    # features that are each other's best
    assign_decoders(rows_a, rows_b).mean_cosine       # of the best one-to-one pairs

Cosines are computed block by block and never all kept: besides the two decoders, one-to-one pairs take some 60 bytes
per candidate of each feature. On one core, with two decoders of 2^15 features and 768 dimensions, the products of all
pairs take 20 s and the assignment 16 s; both grow with the square of the number of features.

Needs numpy and scipy, no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saelab.errors import SaelabError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CANDIDATES = 32
"""Nearest features of the other autoencoder among which a feature may find its partner if there are many features."""
_BLOCK = 2048
_FEW = 0.02
"""Share of a block's cosines up to which those that are nearer than all so far are sorted by themselves."""
_MOST_COSINES = 2**24
"""Most cosines that `assign_decoders` keeps at once, in float64."""


@dataclass(frozen=True, eq=False)
class DecoderMatch:
    """For each feature of autoencoders A and B, the feature of the other with the largest cosine of decoder rows."""

    best_of_a: np.ndarray
    """The feature of B that is nearest to each feature of A, ``[features of A]`` int64; the lowest of equal ones."""
    cosine_of_a: np.ndarray
    """Their cosine, ``[features of A]`` float32."""
    best_of_b: np.ndarray
    """The feature of A that is nearest to each feature of B, ``[features of B]`` int64."""
    cosine_of_b: np.ndarray

    @property
    def mutual(self) -> np.ndarray:
        """Whether a feature of A is also the best of its best, ``[features of A]`` bool."""
        return self.best_of_b[self.best_of_a] == np.arange(len(self.best_of_a))

    @property
    def pairs(self) -> np.ndarray:
        """Features of A and B that are each other's best, the largest cosine first, ``[n, 2]`` int64."""
        a = np.flatnonzero(self.mutual)
        a = a[np.argsort(-self.cosine_of_a[a], kind="stable")]
        return np.stack([a, self.best_of_a[a]], 1)

    @property
    def mean_max_cosine(self) -> float:
        """Mean over A's features of the cosine with their best of B."""
        return float(self.cosine_of_a.mean(dtype=np.float64))

    @property
    def mean_max_cosine_of_b(self) -> float:
        """Mean over B's features of the cosine with their best of A."""
        return float(self.cosine_of_b.mean(dtype=np.float64))

    def died(self, threshold: float) -> np.ndarray:
        """Features of A without one in B of at least this cosine, the smallest cosine first, ``[n]`` int64."""
        return _below(self.cosine_of_a, threshold)

    def born(self, threshold: float) -> np.ndarray:
        """Features of B without one in A of at least this cosine, the smallest cosine first, ``[n]`` int64."""
        return _below(self.cosine_of_b, threshold)

    def to_frame(self) -> "pd.DataFrame":
        """A line per feature of A: feature, best of B, cosine, whether they are each other's best."""
        import pandas as pd

        columns = {"feature": np.arange(len(self.best_of_a)), "best": self.best_of_a, "cosine": self.cosine_of_a}
        return pd.DataFrame(columns | {"mutual": self.mutual})

    def plot(self, a: str = "A", b: str = "B") -> "go.Figure":
        """Histograms of the cosines with the best feature, of A's features and of B's, which `a` and `b` name."""
        import plotly.graph_objects as go

        figure = go.Figure(layout={"barmode": "overlay", "xaxis_title": "cosine", "yaxis_title": "features"})
        for name, cosines in ((f"{a}, best of {b}", self.cosine_of_a), (f"{b}, best of {a}", self.cosine_of_b)):
            middles, counts = histogram(cosines)
            figure.add_bar(x=middles, y=counts, name=name, opacity=0.7)
        return figure


def match_decoders(a: np.ndarray, b: np.ndarray) -> DecoderMatch:
    """The best matches between decoder rows ``a [features of A, d]`` and ``b [features of B, d]``.

    A row of zeros has cosine 0 with every other. Takes features of A x features of B x d multiply-adds, and some
    50 MB of memory. Raises SaelabError if the widths differ, or if one has no rows.
    """
    return match_rows(*checked_rows(a, b))


@dataclass(frozen=True, eq=False)
class Assignment:
    """One-to-one pairs of features of autoencoders A and B."""

    pairs: np.ndarray
    """Features of A and B, the largest cosine first, ``[n, 2]`` int64. Only cosines above 0 make a pair."""
    cosine: np.ndarray
    """Cosine of the decoder rows of each pair, ``[n]`` float32."""
    features: tuple[int, int]
    """Number of features of A and of B."""

    @property
    def mean_cosine(self) -> float:
        """Sum of the cosines of the pairs over the number of features of the smaller autoencoder."""
        return float(self.cosine.sum(dtype=np.float64)) / min(self.features)

    def share(self, threshold: float) -> float:
        """Share of the smaller autoencoder's features with a partner of at least this cosine."""
        return int((self.cosine >= threshold).sum()) / min(self.features)


def assign_decoders(a: np.ndarray, b: np.ndarray, candidates: int = CANDIDATES) -> Assignment:
    """The one-to-one pairs of decoder rows ``a [features of A, d]`` and ``b [features of B, d]`` with the largest sum.

    Up to 4096 x 4096 features the sum of cosines is the largest of all (Hungarian algorithm). With more, a pair needs
    one of its features among the `candidates` nearest of the other, and the sum is the largest of all such pairs
    (sparse assignment); memory is then some 60 bytes per candidate of each feature, besides that of `match_decoders`.
    Raises SaelabError as that does.
    """
    return match_and_assign(*checked_rows(a, b), candidates)[1]


def match_rows(a: np.ndarray, b: np.ndarray, near: "_Near | None" = None) -> DecoderMatch:
    """`match_decoders`; `near`, if given, takes the nearest ones of each from the same products."""
    best_of_a, cosine_of_a = np.zeros(len(a), np.int64), np.full(len(a), -np.inf, np.float32)
    best_of_b, cosine_of_b = np.zeros(len(b), np.int64), np.full(len(b), -np.inf, np.float32)
    for rows in blocks_of(a):
        of_a = unit_rows(a[rows])
        for columns in blocks_of(b):
            cosines = of_a @ unit_rows(b[columns]).T  # not scaled before: copies take memory
            _improve(cosines, best_of_a[rows], cosine_of_a[rows], columns.start)
            _improve(cosines.T, best_of_b[columns], cosine_of_b[columns], rows.start)
            if near is not None:
                near.of_a.add(cosines, rows, columns.start)
                near.of_b.add(cosines.T, columns, rows.start)
    return DecoderMatch(best_of_a, cosine_of_a, best_of_b, cosine_of_b)


def match_and_assign(a: np.ndarray, b: np.ndarray, candidates: int = CANDIDATES) -> tuple[DecoderMatch, Assignment]:
    """`match_decoders` and `assign_decoders`, from the same products."""
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    if len(a) * len(b) <= _MOST_COSINES:
        match, cosines = match_rows(a, b), unit_rows(a) @ unit_rows(b).T
        left, right = linear_sum_assignment(np.maximum(cosines, 0), maximize=True)
        found = cosines[left, right]
    else:
        near = _Near(_Nearest.start(len(a), min(candidates, len(b))), _Nearest.start(len(b), min(candidates, len(a))))
        match = match_rows(a, b, near)
        rows = np.concatenate([np.repeat(np.arange(len(a)), near.of_a.index.shape[1]), near.of_b.index.ravel()])
        columns = np.concatenate([near.of_a.index.ravel(), np.repeat(np.arange(len(b)), near.of_b.index.shape[1])])
        cosines = np.concatenate([near.of_a.cosine.ravel(), near.of_b.cosine.ravel()])
        _, first = np.unique(rows * len(b) + columns, return_index=True)
        rows, columns, cosines = rows[first], columns[first], cosines[first]
        # Every feature of A may stay without a partner: it is then paired with a column of its own, of cosine 0.
        # Costs are 2 - cosine, because the solver takes a cost of 0 for no edge.
        own = np.arange(len(a))
        costs = np.concatenate([2 - cosines.astype(np.float64), np.full(len(a), 2.0)])
        edges = np.concatenate([rows, own]), np.concatenate([columns, len(b) + own])
        graph = csr_array((costs, edges), shape=(len(a), len(b) + len(a)))
        left, right = min_weight_full_bipartite_matching(graph)
        left, right = left[right < len(b)], right[right < len(b)]
        found = np.empty(len(left), np.float32)
        for part in blocks_of(left):
            found[part] = np.einsum("nd,nd->n", unit_rows(a[left[part]]), unit_rows(b[right[part]]))
    order = np.argsort(-found, kind="stable")
    order = order[found[order] > 0]
    pairs = np.stack([left[order], right[order]], 1).astype(np.int64)
    return match, Assignment(pairs, found[order].astype(np.float32), (len(a), len(b)))


def histogram(cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middles and counts of 50 bins, up to 1."""
    cosines = np.minimum(cosines, 1)  # rounding takes equal rows above it, where no bin counts them
    counts, edges = np.histogram(cosines, 50, (min(0.0, float(cosines.min(initial=0.0))), 1.0))
    return (edges[:-1] + edges[1:]) / 2, counts


def checked_rows(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, if their rows can be compared. Raises SaelabError if not."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise SaelabError(
            f"Decoders of shapes {list(a.shape)} and {list(b.shape)} cannot be matched: both need rows, of one width."
        )
    return a, b


class _Nearest(NamedTuple):
    """The nearest rows so far of each row of a matrix, in any order."""

    index: np.ndarray
    """``[rows, n]`` int32"""
    cosine: np.ndarray
    """``[rows, n]`` float32"""

    @classmethod
    def start(cls, rows: int, n: int) -> "_Nearest":
        return cls(np.zeros((rows, n), np.int32), np.full((rows, n), -np.inf, np.float32))

    def add(self, new: np.ndarray, rows: slice, start: int) -> None:
        """Take cosines of `rows` with the rows of the other matrix from `start` on."""
        index, cosine = self.index[rows], self.cosine[rows]
        n = index.shape[1]
        nearer = np.flatnonzero(new > cosine.min(1)[:, None])
        if len(nearer) > _FEW * new.size:
            cosines = np.concatenate([cosine, new], 1)
            kept = np.argpartition(-cosines, n - 1, 1)[:, :n]
            earlier = np.take_along_axis(index, np.minimum(kept, n - 1), 1)
            index[:] = np.where(kept < n, earlier, kept - n + start)
            cosine[:] = np.take_along_axis(cosines, kept, 1)
            return
        row, column = np.divmod(nearer, new.shape[1])  # few are nearer than all so far: sort only these
        touched, counts = np.unique(row, return_counts=True)
        which = np.concatenate([np.repeat(np.arange(len(touched)), n), np.repeat(np.arange(len(touched)), counts)])
        cosines = np.concatenate([cosine[touched].ravel(), new[row, column]])
        indices = np.concatenate([index[touched].ravel(), column + start])
        order = np.lexsort((-cosines, which))
        firsts = np.concatenate([[0], np.cumsum(n + counts)[:-1]])
        kept = order[firsts[:, None] + np.arange(n)]
        index[touched], cosine[touched] = indices[kept], cosines[kept]


class _Near(NamedTuple):
    of_a: _Nearest
    of_b: _Nearest


def _improve(cosines: np.ndarray, best: np.ndarray, cosine: np.ndarray, start: int) -> None:
    """Take the largest cosine of each row if it is larger than the best so far; its columns begin at `start`."""
    nearest = cosines.argmax(1)
    found = np.take_along_axis(cosines, nearest[:, None], 1)[:, 0]
    better = found > cosine
    best[better], cosine[better] = nearest[better] + start, found[better]


def blocks_of(rows: np.ndarray) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, len(rows), _BLOCK))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """The rows scaled to length 1, float32; a row of zeros stays as it is."""
    rows = rows.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _below(cosine: np.ndarray, threshold: float) -> np.ndarray:
    found = np.flatnonzero(cosine < threshold)
    return found[np.argsort(cosine[found], kind="stable")]
