"""Which features of two autoencoders are the same: decoder rows matched by their cosine, beside chance.

    compare_decoders(rows_a, rows_b).to_frame()       # matching.py's figures, each beside its value by chance

By chance: the same figure with `random_rows` in the place of the other autoencoder's rows.

Needs numpy and scipy, no torch. Both autoencoders must read the same site of the same model: rows of different sites
are vectors of different spaces, and their cosines mean nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.analysis.intervals import Interval
from saelab.analysis.matching import (
    Assignment,
    DecoderMatch,
    blocks_of,
    checked_rows,
    histogram,
    match_and_assign,
    match_decoders,
    unit_rows,
)
from saelab.analysis.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

_CHANCE_ROWS = 2**14
"""Most features of B that are compared with random rows in the place of A's."""


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(Result):
    """Two autoencoders compared by their decoder rows, each figure beside its value by chance."""

    match: DecoderMatch
    one_to_one: Assignment
    one_to_one_by_chance: Assignment
    """A's rows paired with random ones in the place of B's."""
    cosine_of_a_by_chance: np.ndarray
    """Cosine of each feature of A with the nearest of random rows in the place of B's, ``[features of A]`` float32."""
    cosine_of_b_by_chance: np.ndarray
    """The same of B's features, or 16,384 drawn from them, and random rows in the place of A's, float32."""
    threshold: float
    """Cosine from which a feature has a counterpart."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        a, b, threshold = len(self.match.best_of_a), len(self.match.best_of_b), self.threshold
        return {
            "features of A": a,
            "features of B": b,
            "mean largest cosine, A's with B": self.match.mean_max_cosine,
            "mean largest cosine, A's with B, by chance": float(self.cosine_of_a_by_chance.mean(dtype=np.float64)),
            "mean largest cosine, B's with A": self.match.mean_max_cosine_of_b,
            "mean largest cosine, B's with A, by chance": float(self.cosine_of_b_by_chance.mean(dtype=np.float64)),
            "mean cosine of one-to-one pairs": self.one_to_one.mean_cosine,
            "mean cosine of one-to-one pairs, by chance": self.one_to_one_by_chance.mean_cosine,
            f"share paired at a cosine of {threshold:g}": self.one_to_one.share(threshold),
            f"share paired at a cosine of {threshold:g}, by chance": self.one_to_one_by_chance.share(threshold),
            "each other's best (pairs)": int(self.match.mutual.sum()),
            f"only in A, at a cosine of {threshold:g}": len(self.match.died(threshold)),
            f"only in B, at a cosine of {threshold:g}": len(self.match.born(threshold)),
        }

    def plot(self) -> "go.Figure":
        """Histograms of the largest cosines of A's and of B's features, and those by chance as lines."""
        figure = self.match.plot()
        for name, cosines in (("A", self.cosine_of_a_by_chance), ("B", self.cosine_of_b_by_chance)):
            middles, counts = histogram(cosines)
            figure.add_scatter(x=middles, y=counts, name=f"{name}, by chance", mode="lines")
        return figure


def compare_decoders(a: np.ndarray, b: np.ndarray, threshold: float = 0.7, seed: int = 0) -> Similarity:
    """The decoder rows ``a [features of A, d]`` and ``b [features of B, d]`` matched, beside chance.

    Takes the work of two to three `assign_decoders`. Raises SaelabError as that does.
    """
    a, b = checked_rows(a, b)
    numbers = np.random.default_rng(seed)
    some = b if len(b) <= _CHANCE_ROWS else b[np.sort(numbers.permutation(len(b))[:_CHANCE_ROWS])]
    cosine_of_b = match_decoders(some, random_rows(a, numbers)).cosine_of_a
    by_chance, one_to_one_by_chance = match_and_assign(a, random_rows(b, numbers))
    match, one_to_one = match_and_assign(a, b)
    return Similarity(
        match=match,
        one_to_one=one_to_one,
        one_to_one_by_chance=one_to_one_by_chance,
        cosine_of_a_by_chance=by_chance.cosine_of_a,
        cosine_of_b_by_chance=cosine_of_b,
        threshold=threshold,
    )


def random_rows(rows: np.ndarray, numbers: np.random.Generator) -> np.ndarray:
    """As many random rows, normal with mean and covariance of the unit rows of `rows` ``[n, d]``, of length 1, float32.

    So what all decoders of a site have in common, such as a few directions of large variance, counts as chance.
    """
    n, d = rows.shape
    total, products = np.zeros(d), np.zeros((d, d))
    for block in blocks_of(rows):
        unit = unit_rows(rows[block]).astype(np.float64)
        total += unit.sum(0)
        products += unit.T @ unit
    mean = total / n
    values, vectors = np.linalg.eigh(products / n - np.outer(mean, mean))
    root = (vectors * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)
    drawn = np.empty((n, d), np.float32)
    for block in blocks_of(rows):
        part = drawn[block]
        part[:] = unit_rows(mean + numbers.standard_normal(part.shape, np.float32) @ root)
    return drawn


def absolute_cosine_by_chance(d: int) -> float:
    """Mean absolute cosine of two directions drawn uniformly in `d` dimensions: c_dec of an untrained decoder."""
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


def training_of(facts: Mapping[str, Any]) -> str | None:
    """The training that made some weights, from its record in the run or in the checkpoint; None if it does not say."""
    return f"{facts['inputs']} {facts['tokens']}" if facts.get("inputs") and "tokens" in facts else None
