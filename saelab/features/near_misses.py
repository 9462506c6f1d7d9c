"""Near misses of a feature: text on which it could be active and is not.

They show what a feature does not respond to, and are hard negatives for a test of an explanation.
"""

from typing import NamedTuple

import numpy as np

from saelab.features.examples import Example, check_positive, drawn, example_at, top_places, window_start
from saelab.features.facts import Activations, Facts
from saelab.features.table import Table
from saelab.features.vocabulary import Vocabulary

SEARCHED = 2_000_000
"""Most tokens that are searched; of a longer text, rows at equal distances."""
_CHUNK = 256
"""Windows whose similarity is computed at once."""


class NearMisses(NamedTuple):
    """Examples with activation 0. Their windows overlap neither each other nor those of the top examples."""

    same_token: list[Example]
    """At a token of the feature: the one of its strongest activation, or if there are too few, its other top tokens."""
    similar_text: list[Example]
    """Windows in which the feature is silent, most similar to those of its top examples first. Marked is the token that
    adds most to the similarity."""
    searched: int
    """Tokens of the text that were searched."""


def near_misses(
    facts: Facts, table: Table, vocabulary: Vocabulary, feature: int, n: int, window: int, searched: int = SEARCHED
) -> NearMisses:
    """At most `n` near misses of each kind, in windows of `window` tokens; the same every time.

    - same_token: drawn at random.
    - similar_text: the cosine of a window's TF-IDF vector with the mean of those of the top examples' windows, each
      scaled to length 1. Term frequencies are counts of token ids in the window, inverse document frequencies
      log(1 + N / occurrences in the text). Windows begin at multiples of `window` in their row.

    Both are empty if the feature is never active. Raises SaelabError if there is no such feature, or if `n` or `window`
    is below 1.
    """
    check_positive(n=n, window=window)
    active = facts.activations(feature)
    n_rows, context = facts.rows.shape
    window = min(window, context)
    take = max(1, min(n_rows, searched // context))
    rows = np.arange(take) * n_rows // take
    top = top_places(table, feature)
    if take == n_rows:
        facts.arrays.read_ahead("tokens")
    tokens = facts.rows[rows]
    if not len(top):
        return NearMisses([], [], tokens.size)
    taken = _Windows(window, context)
    for place in top.tolist():
        taken.add(place)

    same = [
        example_at(facts, vocabulary, active, place, window)
        for place in _same_token(active, _tokens_of(facts, table, feature), tokens, rows, feature, taken, n)
    ]

    idf = _idf(vocabulary.counts)
    query = _query(facts, top, idf, window)
    starts = np.arange(0, context - window + 1, window)
    windows = tokens[:, : len(starts) * window].reshape(-1, window)
    row, start = np.repeat(rows, len(starts)), np.tile(starts, len(rows))
    free = np.flatnonzero(_silent(active, row * context + start, window) & taken.free(row, start))
    similar = []
    for found in free[nearest(windows[free], idf, query, n)].tolist():
        marked = int((idf * query)[windows[found]].argmax())
        place = int(row[found] * context + start[found]) + marked
        similar.append(example_at(facts, vocabulary, active, place, window, int(start[found])))
    return NearMisses(same, similar, tokens.size)


class _Windows:
    """Windows of text that a further one may not overlap."""

    def __init__(self, window: int, context: int) -> None:
        self._window, self._context = window, context
        self._found: list[tuple[int, int]] = []

    def add(self, place: int) -> None:
        """Add the window of the example at a place."""
        row, position = divmod(place, self._context)
        self._found.append((row, window_start(position, self._window, self._context)))

    def overlap(self, place: int) -> bool:
        """Whether the window of the example at a place overlaps one of them."""
        row, position = divmod(place, self._context)
        start = window_start(position, self._window, self._context)
        return any(row == other and abs(start - begin) < self._window for other, begin in self._found)

    def free(self, row: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Whether each window at `start` in `row` overlaps none of them, ``[n]`` bool."""
        free = np.ones(len(row), bool)
        for other, begin in self._found:
            free &= (row != other) | (np.abs(start - begin) >= self._window)
        return free


def _tokens_of(facts: Facts, table: Table, feature: int) -> list[int]:
    """The token id of the feature's strongest activation, then its other top tokens."""
    peak = int(facts.rows.reshape(-1)[top_places(table, feature)[0]])
    top = [token for token in table["top_tokens"][feature].tolist() if token >= 0]
    return list(dict.fromkeys([peak, *top]))


def _same_token(
    active: Activations,
    token_ids: list[int],
    tokens: np.ndarray,
    rows: np.ndarray,
    feature: int,
    taken: _Windows,
    n: int,
) -> list[int]:
    """`n` places with one of `token_ids`, earlier ones first, where the feature is not active; adds their windows."""
    chosen: list[int] = []
    for token in token_ids:
        row, position = (tokens == token).nonzero()
        places = rows[row] * tokens.shape[1] + position
        places = places[~np.isin(places, active.places, assume_unique=True)]
        for place in drawn(places, feature, len(places)).tolist():
            if len(chosen) == n:
                return chosen
            if not taken.overlap(place):
                taken.add(place)
                chosen.append(place)
    return chosen


def _silent(active: Activations, begins: np.ndarray, window: int) -> np.ndarray:
    """Whether the feature is active on no token of each window, ``[n]`` bool; windows begin at the places `begins`."""
    first, stop = (np.searchsorted(active.places, ends) for ends in (begins, begins + window))
    return first == stop


def _idf(counts: np.ndarray) -> np.ndarray:
    """Inverse document frequency of each token id, ``[vocabulary]``; 0 for one that is never ordinary."""
    return np.log1p(counts.sum() / np.maximum(counts, 1)) * (counts > 0)


def _query(facts: Facts, places: np.ndarray, idf: np.ndarray, window: int) -> np.ndarray:
    """Sum of the TF-IDF vectors of the windows at `places`, each scaled to length 1, ``[vocabulary]``."""
    context = facts.rows.shape[1]
    query = np.zeros(len(idf))
    for place in places.tolist():
        row, position = divmod(place, context)
        start = window_start(position, window, context)
        ids, counts = np.unique(facts.rows[row, start : start + window], return_counts=True)
        vector = counts * idf[ids]
        query[ids] += vector / np.linalg.norm(vector)
    return query


def nearest(windows: np.ndarray, idf: np.ndarray, query: np.ndarray, n: int) -> np.ndarray:
    """Indices of the `n` windows ``[m, window]`` of token ids with the largest cosine of TF-IDF and `query`, above 0.

    The length of a TF-IDF vector is at least that of one with all counts 1, for which no window is sorted: so most
    windows are passed over by an upper bound on their cosine.
    """
    dots, least = ((weight[windows]).sum(1) for weight in (idf * query, idf**2))
    candidates = np.flatnonzero(dots > 0)
    bounds = dots[candidates] / np.sqrt(least[candidates])
    order = np.argsort(-bounds, kind="stable")
    candidates, bounds = candidates[order], bounds[order]
    best, cosines = candidates[:0], bounds[:0]
    for first in range(0, len(candidates), _CHUNK):
        if len(best) == n and bounds[first] < cosines[-1]:
            break
        chunk = candidates[first : first + _CHUNK]
        counts = (windows[chunk][:, :, None] == windows[chunk][:, None, :]).sum(2)  # of each token in its window
        lengths = np.sqrt((idf[windows[chunk]] ** 2 * counts).sum(1))
        best, cosines = np.concatenate([best, chunk]), np.concatenate([cosines, dots[chunk] / lengths])
        order = np.lexsort((best, -cosines))[:n]
        best, cosines = best[order], cosines[order]
    return best
