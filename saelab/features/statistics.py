"""Statistics of each feature's activations, from the exact values, added up bucket by bucket."""

from typing import Any

import pyarrow as pa
import torch

from saelab.features.activity import Activity
from saelab.features.shards import Totals

BINS = 50


class Statistics:
    """Density, counts, mean and maximum over active tokens, and the histogram of activations, per feature.

    `add` takes the activations of all features, each once, in order; `columns` are then those of the table.
    """

    def __init__(self, totals: Totals) -> None:
        n = len(totals.counts)
        self._totals = totals
        self._sums = torch.zeros(n, dtype=torch.float64)
        self._histograms = torch.zeros(n, BINS, dtype=torch.int32)

    def add(self, activity: Activity) -> None:
        """Add activations."""
        features, values = activity.features, activity.values
        self._sums.index_add_(0, features, values.double())
        bins = (values / self._totals.maxima[features] * BINS).long().clamp_(max=BINS - 1)
        n = activity.stop - activity.first
        counts = torch.bincount((features - activity.first) * BINS + bins, minlength=n * BINS)
        self._histograms[activity.first : activity.stop] += counts.view(n, BINS)

    def columns(self, first: int, stop: int) -> dict[str, Any]:
        """The columns of the features from `first` up to `stop`.

        A feature's histogram sums to n_active, and n_active sums to the number of activations.
        """
        counts = self._totals.counts[first:stop]
        return {
            "feature": pa.array(range(first, stop), pa.int32()),
            "density": (counts.double() / self._totals.tokens).numpy(),
            "n_active": counts.numpy(),
            "mean_activation": (self._sums[first:stop] / counts.clamp_min(1)).float().numpy(),
            "max_activation": self._totals.maxima[first:stop].numpy(),
            "histogram": lists(pa.array(self._histograms[first:stop].long().flatten().numpy()), BINS, stop - first),
        }


def lists(flat: pa.Array, length: int, n: int) -> pa.Array:
    """`n` lists of equal `length`."""
    return pa.ListArray.from_arrays(pa.array([i * length for i in range(n + 1)], pa.int32()), flat)
