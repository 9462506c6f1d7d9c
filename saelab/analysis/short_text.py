"""A short text and its features, token by token: what a page or a notebook shows of a prompt. Needs only numpy."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class ShortText:
    """A text of some hundred tokens with its codes, a CSR matrix. Special tokens have no features."""

    token_ids: np.ndarray
    """``[tokens]`` int64"""
    tokens: list[str]
    """The text of each token."""
    offsets: np.ndarray
    """Token t has the entries from offsets[t] up to offsets[t + 1], ``[tokens + 1]`` int64."""
    features: np.ndarray
    """``[entries]`` int64, rising within a token"""
    values: np.ndarray
    """Activations, ``[entries]`` float32, above 0"""
    norms: np.ndarray | None = None
    """L2 norm of each token's activation x at the site, ``[tokens]`` float32; None if no model ran."""
    errors: np.ndarray | None = None
    """L2 norm of x minus its reconstruction, ``[tokens]`` float32; 0 for special tokens."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def l0(self) -> np.ndarray:
        """Active features of each token, ``[tokens]`` int64."""
        return np.diff(self.offsets)

    def at(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """The features that are active on a token, and their activations."""
        entries = slice(self.offsets[token], self.offsets[token + 1])
        return self.features[entries], self.values[entries]

    def of(self, feature: int) -> np.ndarray:
        """The activation of a feature on each token, ``[tokens]`` float32."""
        found = np.zeros(len(self), np.float32)
        here = self.features == feature
        found[self._token_of_entry()[here]] = self.values[here]
        return found

    def similarity(self) -> np.ndarray:
        """Cosine of the codes of each pair of tokens, ``[tokens, tokens]`` float32; 0 for tokens without features.

        Takes memory for tokens times different features of the text.
        """
        different, column = np.unique(self.features, return_inverse=True)
        dense = np.zeros((len(self), len(different)), np.float32)
        dense[self._token_of_entry(), column] = self.values
        dense /= np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return dense @ dense.T

    def maxima(self) -> tuple[np.ndarray, np.ndarray]:
        """The different features of the text, rising, and the largest activation of each."""
        different, column = np.unique(self.features, return_inverse=True)
        largest = np.zeros(len(different), np.float32)
        np.maximum.at(largest, column, self.values)
        return different, largest

    def _token_of_entry(self) -> np.ndarray:
        return np.repeat(np.arange(len(self)), self.l0)


class Changes(NamedTuple):
    """The features that differ between two texts, the largest change first."""

    features: np.ndarray
    """``[n]`` int64"""
    before: np.ndarray
    """Largest activation on the first text, ``[n]`` float32; 0 if it is not active there: it appeared."""
    after: np.ndarray
    """Largest activation on the second text; 0 if it vanished."""


def changes(before: ShortText, after: ShortText) -> Changes:
    """The features whose largest activation on one text is not their largest on the other."""
    (first, was), (second, now) = before.maxima(), after.maxima()
    features = np.union1d(first, second)
    old, new = np.zeros((2, len(features)), np.float32)
    old[np.searchsorted(features, first)], new[np.searchsorted(features, second)] = was, now
    order = np.argsort(-np.abs(new - old), kind="stable")
    order = order[new[order] != old[order]]
    return Changes(features[order], old[order], new[order])
