"""Columns of the features that are active together (`layout.ACTIVITY`)."""

from collections.abc import Iterator, Mapping

import numpy as np

from saelab.features.layout import ACTIVITY, LIST_LENGTH

COLUMNS = ("coactive_neighbours", "coactive_phi", "coactive_jaccard")


def coactive_columns(arrays: Mapping[str, np.ndarray], n_tokens: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of consecutive features, all of them in order."""
    n_features = len(arrays["by_feature.maxima"])
    for first in range(0, n_features, 1024):
        n = min(1024, n_features - first)
        fill = {name: -1 if name == COLUMNS[0] else 0 for name in COLUMNS}
        yield {name: np.full((n, LIST_LENGTH), fill[name], ACTIVITY[name][0]) for name in COLUMNS}
