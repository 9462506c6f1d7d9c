"""Which features of two autoencoders are the same: decoder rows matched by their cosine.

    match = match_decoders(rows_a, rows_b)
    match.mean_max_cosine          # of A's features with their best ones of B
    match.pairs                    # features that are each other's best
    match.plot()

Needs numpy, no torch. Both autoencoders must read the same site of the same model: rows of different sites are vectors
of different spaces, and their cosines mean nothing.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from saelab.errors import SaelabError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_BLOCK = 2048


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
            cosines = np.minimum(cosines, 1)  # rounding takes equal rows above it, where no bin counts them
            counts, edges = np.histogram(cosines, 50, (min(0.0, float(cosines.min(initial=0.0))), 1.0))
            figure.add_bar(x=(edges[:-1] + edges[1:]) / 2, y=counts, name=name, opacity=0.7)
        return figure


def match_decoders(a: np.ndarray, b: np.ndarray) -> DecoderMatch:
    """The best matches between decoder rows ``a [features of A, d]`` and ``b [features of B, d]``.

    A row of zeros has cosine 0 with every other. Takes features of A x features of B x d multiply-adds, and 16 MiB
    beside copies of both. Raises SaelabError if the widths differ, or if one has no rows.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise SaelabError(
            f"Decoders of shapes {list(a.shape)} and {list(b.shape)} cannot be matched: both need rows, of one width."
        )
    a, b = _unit(a), _unit(b)
    best_of_a, cosine_of_a = np.zeros(len(a), np.int64), np.full(len(a), -np.inf, np.float32)
    best_of_b, cosine_of_b = np.zeros(len(b), np.int64), np.full(len(b), -np.inf, np.float32)
    for first in range(0, len(a), _BLOCK):
        for start in range(0, len(b), _BLOCK):
            cosines = a[first : first + _BLOCK] @ b[start : start + _BLOCK].T
            _improve(cosines, best_of_a[first : first + _BLOCK], cosine_of_a[first : first + _BLOCK], start)
            _improve(cosines.T, best_of_b[start : start + _BLOCK], cosine_of_b[start : start + _BLOCK], first)
    return DecoderMatch(best_of_a, cosine_of_a, best_of_b, cosine_of_b)


def _improve(cosines: np.ndarray, best: np.ndarray, cosine: np.ndarray, start: int) -> None:
    """Take the largest cosine of each row if it is larger than the best so far; its columns begin at `start`."""
    nearest = cosines.argmax(1)
    found = np.take_along_axis(cosines, nearest[:, None], 1)[:, 0]
    better = found > cosine
    best[better], cosine[better] = nearest[better] + start, found[better]


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _below(cosine: np.ndarray, threshold: float) -> np.ndarray:
    found = np.flatnonzero(cosine < threshold)
    return found[np.argsort(cosine[found], kind="stable")]
