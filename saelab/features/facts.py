"""The text of a feature database and every activation on it, by feature and by token.

A question reads only its own entries. FORMAT.md says how exact values are: to 2^-11 of an activation, except below
2^-14 of the feature's maximum.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saelab.errors import SaelabError
from saelab.features.arrays import Arrays


class Activations(NamedTuple):
    """The activations of a feature."""

    places: np.ndarray
    """row * context + position in the row, ``[n]`` int32, rising."""
    values: np.ndarray
    """``[n]`` float32"""


class ActiveFeatures(NamedTuple):
    """The features that are active on a token."""

    features: np.ndarray
    """``[n]`` int32, rising."""
    values: np.ndarray
    """Their activations, ``[n]`` float32."""


@dataclass(frozen=True, eq=False)
class Facts:
    """The facts in an open database. Methods raise SaelabError if a file turns out to be damaged."""

    arrays: Arrays

    @property
    def n_tokens(self) -> int:
        """N: ordinary tokens, of which densities are fractions."""
        return int(self.arrays.manifest["n_tokens"])

    @property
    def rows(self) -> np.ndarray:
        """Token ids ``[rows, context]`` int32."""
        return self.arrays["tokens"]

    @property
    def maxima(self) -> np.ndarray:
        """Largest activation of each feature, ``[n_features]`` float32; 0 if it is never active."""
        return self.arrays["by_feature.maxima"]

    @property
    def n_features(self) -> int:
        return len(self.maxima)

    def check(self, feature: int) -> None:
        """Raises SaelabError if there is no such feature."""
        if not 0 <= feature < self.n_features:
            raise SaelabError(
                f"There is no feature {feature} in {self.arrays.folder}: its features are 0 to {self.n_features - 1}."
            )

    def activations(self, feature: int) -> Activations:
        """All activations of a feature. Raises SaelabError if there is no such feature."""
        self.check(feature)
        places, values = self._entries("by_feature", "places", feature, self.rows.size)
        return Activations(places, values.astype(np.float32) * self.maxima[feature])

    def between(self, feature: int, first: int, stop: int) -> Activations:
        """The activations of a feature from the place `first` up to `stop`. Reads little more than these.

        Raises SaelabError if there is no such feature.
        """
        self.check(feature)
        start, end = self.arrays["by_feature.offsets"][feature : feature + 2].tolist()
        places = self.arrays["by_feature.places"][start:end]
        low, high = np.searchsorted(places, np.array([first, stop], places.dtype))
        values = self.arrays["by_feature.values"][start + low : start + high]
        return Activations(np.asarray(places[low:high]), values.astype(np.float32) * self.maxima[feature])

    def at(self, row: int, position: int) -> ActiveFeatures:
        """The features that are active on a token; special tokens have none.

        Raises SaelabError if there is no such row or position.
        """
        n, context = self.rows.shape
        if not (0 <= row < n and 0 <= position < context):
            raise SaelabError(
                f"There is no place {row}, {position} in {self.arrays.folder}: its rows are 0 to {n - 1}, of {context} "
                "tokens."
            )
        features, values = self._entries("by_token", "features", row * context + position, self.n_features)
        return ActiveFeatures(features, values.astype(np.float32) * self.maxima[features])

    def on_token(self, token: int) -> ActiveFeatures:
        """The features that are active on any occurrence of a token id, with the sums of their activations there.

        Raises SaelabError if there is no such token id.
        """
        n = len(self.arrays["vocabulary.counts"])
        if not 0 <= token < n:
            raise SaelabError(f"There is no token {token} in {self.arrays.folder}: its tokens are 0 to {n - 1}.")
        features, mass = self._entries("by_vocabulary", "features", token, self.n_features, "mass")
        return ActiveFeatures(features, mass)

    def _entries(
        self, order: str, of: str, index: int, size: int, what: str = "values"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of the entries from ``offsets[index]`` up to ``offsets[index + 1]``.

        Raises SaelabError unless the indices rise and are below `size`.
        """
        first, stop = self.arrays[f"{order}.offsets"][index : index + 2].tolist()
        indices, values = (np.asarray(self.arrays[f"{order}.{name}"]) for name in (of, what))
        if not 0 <= first <= stop <= len(values):
            raise self.arrays.damaged(f"{order}.offsets", "does not rise from 0 to the number of entries")
        for name in (of, what):
            self.arrays.read_ahead(f"{order}.{name}", first, stop)
        indices = indices[first:stop]
        if len(indices) and not (indices[0] >= 0 and indices[-1] < size and (np.diff(indices) > 0).all()):
            raise self.arrays.damaged(f"{order}.{of}", f"does not rise within 0 to {size - 1}")
        return indices, values[first:stop]
