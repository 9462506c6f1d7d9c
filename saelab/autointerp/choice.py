"""Which features are explained and scored, and which of them are compared."""

import re
from bisect import bisect_left

import numpy as np
from numpy.typing import ArrayLike

from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.features.indices import indices

NEAR = 1.5
"""Largest ratio of the densities of two features that are compared."""


def chosen(database: Database, text: str) -> list[int]:
    """The features that `text` names, each once, rising: a list (`saelab.features.indices`), or ``random:200``.

    ``random:n`` draws n of the features that are active on the text, the same ones each time: ordered by density they
    are divided into n parts of equal size, and one of each is drawn; all if there are no more than n. Raises
    SaelabError if the text names no feature, or one that does not exist.
    """
    if drawn := re.fullmatch(r"\s*random:\s*([0-9]{1,9})\s*", text):
        return _drawn(database.table["n_active"], int(drawn[1]))
    try:
        return np.sort(indices(text, database.facts)).tolist()
    except SaelabError as error:
        raise SaelabError(f"features: {error}") from error


def _drawn(n_active: np.ndarray, n: int) -> list[int]:
    active = np.flatnonzero(n_active)
    if n < 1:
        raise SaelabError(f"features: random:{n} draws none; write random:200")
    if not len(active):
        raise SaelabError("features: there is nothing to draw: no feature is active on the text")
    active = active[np.argsort(n_active[active], kind="stable")]
    n = min(n, len(active))
    bounds = np.linspace(0, len(active), n + 1).astype(int)
    return np.sort(active[np.random.default_rng(0).integers(bounds[:-1], bounds[1:])]).tolist()


def pairs(density: np.ndarray, other: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of indices of two lists of densities, each used once, as many as there can be with ratios up to `NEAR`."""
    a, b = np.argsort(density, kind="stable").tolist(), np.argsort(other, kind="stable").tolist()
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        low, high = density[a[i]] * NEAR, other[b[j]]
        if high > low:
            i += 1
        elif density[a[i]] > other[b[j]] * NEAR:
            j += 1
        else:
            found.append((a[i], b[j]))
            i, j = i + 1, j + 1
    return found


def matched(density: np.ndarray, other: np.ndarray) -> list[int]:
    """For each of the densities `other` the feature nearest to it in `density`, each once, rising.

    The densest chooses first. A feature more than a factor of `NEAR` away is not taken, so there may be fewer.
    """
    active = np.flatnonzero(density)
    left = active[np.argsort(density[active], kind="stable")].tolist()
    values = density[left].tolist()
    found = []
    for wanted in np.sort(other[other > 0])[::-1].tolist():
        at = bisect_left(values, wanted)
        near = [(max(values[i] / wanted, wanted / values[i]), i) for i in (at, at - 1) if 0 <= i < len(left)]
        ratio, nearest = min(near, default=(np.inf, 0))
        if ratio <= NEAR:
            found.append(left.pop(nearest))
            del values[nearest]
    return sorted(found)


def strangers(density: np.ndarray, texts: ArrayLike) -> np.ndarray:
    """For each feature the index of the one nearest in the order of densities that has another text; -1 if none has.

    Of two that are as near, the denser one. `texts` ``[n]`` are texts, or numbers that stand for them.
    """
    texts = np.asarray(texts)
    n, order = len(texts), np.argsort(density, kind="stable")
    ranks, different = np.arange(n), texts[order][1:] != texts[order][:-1]
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, n), bool), different]))  # of runs with the same text
    run = np.cumsum(np.concatenate([np.zeros(min(1, n), int), different]))
    before, after = starts[run] - 1, np.append(starts[1:], n)[run]
    down, up = (np.where((end >= 0) & (end < n), abs(end - ranks), n) for end in (before, after))
    found = np.full(n, -1)
    found[order] = np.where(
        np.minimum(down, up) < n, order[np.where(up <= down, after, before).clip(0, max(0, n - 1))], -1
    )
    return found
