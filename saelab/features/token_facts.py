"""What the explorer shows about each token of a window: how strong it is for its feature, and what else is active."""

import numpy as np

from saelab.features.facts import Activations, ActiveFeatures, Facts

OTHERS = 5


def percentiles(active: Activations, values: np.ndarray) -> np.ndarray:
    """Percentage of a feature's activations that are at or below each of `values`, ``[n]`` float64.

    0 for the value 0, and if the feature is never active.
    """
    asked = np.unique(values)
    # side="left": an activation counts for the smallest asked value that it does not exceed
    counts = np.bincount(np.searchsorted(asked, active.values), minlength=len(asked) + 1)[: len(asked)]
    shares = 100 * np.cumsum(counts) / max(1, len(active.values))
    return shares[np.searchsorted(asked, values)]


def strongest_others(
    facts: Facts, row: int, start: int, n: int, feature: int | None = None, most: int = OTHERS
) -> list[ActiveFeatures]:
    """The features with the largest activations on each of `n` tokens of a row, strongest first, except `feature`."""

    def strongest(position: int) -> ActiveFeatures:
        features, values = facts.at(row, position)
        if feature is not None:
            others = features != feature
            features, values = features[others], values[others]
        chosen = np.argsort(-values, kind="stable")[:most]
        return ActiveFeatures(features[chosen], values[chosen])

    return [strongest(position) for position in range(start, start + n)]
