"""For each feature, the other features that are active on the same tokens (columns `coactive_*`; FORMAT.md).

phi is the correlation of two features' "active on a token" over all N tokens. by_feature says on which tokens a feature
is active, and by_token what else is active there: one step per entry of the feature and active feature of its token. To
bound the steps, a feature counts on at most `COACTIVATION_ENTRIES` of its entries. A pair is counted by the rarer of
the two, so its numbers are exact unless both features have more entries than that.

A step takes 13 ns of one busy core, for 4,096 features, 1 M tokens and L0 34: a third of it reads by_token at scattered
places, a fifth makes their indices, a fifth counts. Those 527 M steps take 7 s; without the bound they were 1.2 G.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from saelab.features.layout import COACTIVATION_ENTRIES, LIST_LENGTH
from saelab.features.ordering import group_starts

COLUMNS = ("coactive_neighbours", "coactive_phi", "coactive_jaccard")
_PART = 2**17
"""Steps counted at once: few enough for a processor's cache."""
_WAITING = 2**16
"""Entrants that wait before lists are updated."""
_BLOCK = 2**16
"""Features per block of columns."""


def coactivation_bytes(n_features: int) -> int:
    """Most bytes that `coactive_columns` needs, unless tokens have thousands of active features."""
    return 300 * n_features + 30_000_000


def coactive_columns(arrays: Mapping[str, np.ndarray], n_tokens: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns `coactive_*` of consecutive features, feature 0 first.

    `arrays` are those of a database under ``by_feature`` and ``by_token``; `n_tokens` is N.
    """
    size = np.diff(arrays["by_feature.offsets"]).astype(np.float64)
    spread = size * (n_tokens - size)
    ids, phis = _lists({name: np.asarray(array) for name, array in arrays.items()}, size, spread, n_tokens)
    for first in range(0, len(size), _BLOCK):
        block = slice(first, first + _BLOCK)
        own, other = size[block, None], size[ids[block]]
        together = (phis[block] * np.sqrt(spread[block, None] * spread[ids[block]]) + own * other) / n_tokens
        jaccard = np.where(ids[block] < 0, 0, together / np.maximum(own + other - together, 1))
        yield dict(zip(COLUMNS, (ids[block], phis[block].astype("f4"), jaccard.astype("f4")), strict=True))


def _lists(
    arrays: Mapping[str, np.ndarray], size: np.ndarray, spread: np.ndarray, n_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The neighbours of each feature and their phi in float64, both ``[n_features, LIST_LENGTH]``.

    `size` are the numbers of entries, `spread` size x (N - size).
    """
    ids, phis = np.full((len(size), LIST_LENGTH), -1, np.int32), np.zeros((len(size), LIST_LENGTH))
    least = np.zeros(len(size))  # the last phi of each list, as it was when entrants were last merged
    entrants: list[tuple[np.ndarray, ...]] = []
    waiting = 0
    # The commonest first: then the lists of a feature's partners are full of strong ones, and few pairs enter them.
    for feature in np.argsort(-size, kind="stable")[: np.count_nonzero(size)].tolist():
        others, together = _together(arrays, feature, int(size[feature]))
        partner = size[others]
        commoner = (partner > size[feature]) | ((partner == size[feature]) & (others < feature))
        others, together = others[commoner], together[commoner]
        phi = n_tokens * together - size[feature] * size[others]
        others, phi = others[phi > 0], phi[phi > 0]
        phi /= np.sqrt(spread[feature] * spread[others])
        best = _best(others, phi)
        ids[feature, : len(best)], phis[feature, : len(best)] = others[best], phi[best]
        entering = phi >= least[others]
        entrants.append((others[entering], np.full(np.count_nonzero(entering), feature), phi[entering]))
        waiting += 1 + len(entrants[-1][0])
        if waiting >= _WAITING:
            _merge(ids, phis, entrants)
            least = phis[:, -1].copy()
            entrants, waiting = [], 0
    if entrants:
        _merge(ids, phis, entrants)
    return ids, phis


def counted_entries(entries: int) -> np.ndarray:
    """Which of its entries a feature counts on, int64, rising: all, or a random one of each of equal parts of them."""
    if entries <= COACTIVATION_ENTRIES:
        return np.arange(entries)
    within = np.random.default_rng(0).random(COACTIVATION_ENTRIES)
    return ((np.arange(COACTIVATION_ENTRIES) + within) * (entries / COACTIVATION_ENTRIES)).astype(np.int64)


def _together(arrays: Mapping[str, np.ndarray], feature: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The features that are active on tokens of `feature`, rising, and on how many of them."""
    first, stop = arrays["by_feature.offsets"][feature : feature + 2]
    entries = counted_entries(count)
    places = arrays["by_feature.places"][first:stop][entries].astype(np.int64)
    starts = arrays["by_token.offsets"][places]
    lengths = arrays["by_token.offsets"][places + 1] - starts
    steps, n_features = int(lengths.sum()), len(arrays["by_feature.offsets"]) - 1
    if steps < 2 * n_features:  # then sorting takes less time than a counter for every feature
        active = np.sort(_active(arrays, starts, lengths))
        begins = group_starts(active)
        others, together = active[begins], np.diff(begins, append=len(active))
    else:
        totals = np.zeros(n_features, np.int64)
        parts = steps // _PART + 1
        for part in range(parts):
            some = slice(len(starts) * part // parts, len(starts) * (part + 1) // parts)
            totals += np.bincount(_active(arrays, starts[some], lengths[some]), minlength=n_features)
        others = np.flatnonzero(totals)
        together = totals[others]
    return others, together * count / len(entries)


def _active(arrays: Mapping[str, np.ndarray], starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The active features of tokens whose entries are ``lengths[i]``, not 0, from ``starts[i]`` on."""
    index = np.ones(int(lengths.sum()), np.int64)  # sums up to the indices of the entries: one more, or a jump
    index[:1] = starts[:1]
    index[np.cumsum(lengths[:-1])] = starts[1:] - (starts[:-1] + lengths[:-1]) + 1
    np.cumsum(index, out=index)
    return np.take(arrays["by_token.features"], index, mode="clip")  # "raise" would take twice the time


def _best(others: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """Indices of the `LIST_LENGTH` largest phi, largest first; ties go to the lower id."""
    if len(phi) > LIST_LENGTH:
        among = np.flatnonzero(phi >= np.partition(phi, -LIST_LENGTH)[-LIST_LENGTH])
    else:
        among = np.arange(len(phi))
    return among[np.lexsort((others[among], -phi[among]))][:LIST_LENGTH]


def _merge(ids: np.ndarray, phis: np.ndarray, entrants: list[tuple[np.ndarray, ...]]) -> None:
    """Put entrants, each a list's feature, another feature and their phi, into the lists `ids` and `phis`."""
    own, other, phi = (np.concatenate(column) for column in zip(*entrants, strict=True))
    lists = np.unique(own)
    earlier = ids[lists] >= 0
    own = np.concatenate([own, np.repeat(lists, earlier.sum(1))])
    other = np.concatenate([other, ids[lists][earlier]])
    phi = np.concatenate([phi, phis[lists][earlier]])
    order = np.lexsort((other, -phi, own))
    own = own[order]
    rank = np.arange(len(own)) - np.searchsorted(own, own)
    own, rank, order = own[rank < LIST_LENGTH], rank[rank < LIST_LENGTH], order[rank < LIST_LENGTH]
    ids[own, rank], phis[own, rank] = other[order], phi[order]
