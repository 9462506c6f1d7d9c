"""The densities of all features of a database: a histogram, and density by rank as few points."""

from typing import NamedTuple

import numpy as np


class DensityHistogram(NamedTuple):
    """Features counted by the log10 of their density; never active ones are in no bin."""

    edges: np.ndarray
    """``[bins + 1]``, log10 of a density"""
    counts: np.ndarray
    """``[bins]`` int64"""


class RankFrequency(NamedTuple):
    """Density by rank, densest first, at ranks that are evenly spaced on a log scale."""

    ranks: np.ndarray
    """``[n]`` int64, rising from 1 to the number of features that are ever active."""
    densities: np.ndarray
    """``[n]``, falling."""


def density_histogram(density: np.ndarray, bins: int = 60) -> DensityHistogram:
    """The histogram of densities ``[n_features]``, from the smallest one, or 1e-4, up to 1."""
    logs = np.log10(density[density > 0])
    counts, edges = np.histogram(logs, bins, (min(-4.0, logs.min(initial=-4.0)), 0.0))
    return DensityHistogram(edges, counts)


def rank_frequency(density: np.ndarray, points: int = 400) -> RankFrequency:
    """At most `points` ranks and the densities there: the Zipf plot of densities ``[n_features]``."""
    falling = -np.sort(-density[density > 0])
    if not len(falling):
        return RankFrequency(np.zeros(0, np.int64), falling)
    ranks = np.unique(np.geomspace(1, len(falling), points).round().astype(np.int64))
    return RankFrequency(ranks, falling[ranks - 1])
