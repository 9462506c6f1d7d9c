"""Columns of the table that are statistics of the activations, computed for some features at a time.

All sums are float64, added up in the order of places, so their bits do not depend on the parts in which a feature's
activations come.
"""

from typing import NamedTuple

import numpy as np

from saelab.features.layout import BINS, QUANTILES, TOP_PLACES, TOP_TOKENS
from saelab.features.ordering import group_starts, largest, ranges, stable_order
from saelab.features.quantiles import Read, counted_quantiles, sorted_quantiles

COLUMNS = (
    "n_active",
    "mass",
    "mean_square",
    "skew",
    "kurtosis",
    "quantiles",
    "histogram",
    "first_place",
    "last_place",
    "token_entropy",
    "top_places",
    "top_tokens",
    "top_token_shares",
)
"""The columns that `statistics` returns."""


class Pairs(NamedTuple):
    """Features with the token ids on which they are active, sorted by feature, then by token id; ``[pairs]`` each."""

    owners: np.ndarray
    """Number of the feature among those whose statistics are computed, int64."""
    tokens: np.ndarray
    mass: np.ndarray
    """Sum of the feature's activations on the occurrences of the token id, float64."""


class _Places(NamedTuple):
    """Entries: number of the feature, place and activation, sorted by feature, then by place."""

    owners: np.ndarray
    places: np.ndarray
    values: np.ndarray


def statistics(read: Read, maxima: np.ndarray, rows: np.ndarray, n_tokens: int) -> tuple[dict[str, np.ndarray], Pairs]:
    """The columns `COLUMNS` of some consecutive features, and their token ids.

    `maxima` ``[features]`` are their largest activations, `rows` ``[rows, context]`` the token ids of the text and
    `n_tokens` the number of ordinary ones. A feature that comes in several parts is read five times.
    """
    n, ids, context = len(maxima), rows.reshape(-1), rows.shape[1]
    counts, histogram = np.zeros(n, np.int64), np.zeros(n * BINS, np.int64)
    mass, square = np.zeros(n), np.zeros(n)
    first_place, last_place = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
    pairs = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    top = _Places(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    parts = 0
    for part in read():
        owners, values = part.owners(), part.values
        exact = values.astype(np.float64)
        counts += part.counts
        np.add.at(mass, owners, exact)
        np.add.at(square, owners, exact * exact)
        bins = np.minimum((values / maxima[owners] * BINS).astype(np.int64), BINS - 1)
        histogram += np.bincount(owners * BINS + bins, minlength=n * BINS)
        active = part.counts > 0
        ends = np.cumsum(part.counts)
        first_place[active & (first_place < 0)] = part.indices[(ends - part.counts)[active & (first_place < 0)]]
        last_place[active] = part.indices[ends[active] - 1]
        pairs = _token_mass(pairs, owners, ids[part.indices], exact)
        top = _strongest(top, _Places(owners, part.indices, values), context)
        parts += 1
    if parts > 1:
        quantiles = counted_quantiles(read, int(counts[0]))
    else:
        quantiles = sorted_quantiles(*read()) if parts else np.zeros((n, len(QUANTILES)))
    skew, kurtosis = _moments(read, mass / n_tokens, counts, n_tokens)
    entropy, top_tokens, shares = _tokens(pairs, mass)
    columns = {
        "n_active": counts,
        "mass": mass,
        "mean_square": square / n_tokens,
        "skew": skew,
        "kurtosis": kurtosis,
        "quantiles": quantiles,
        "histogram": histogram.reshape(n, BINS),
        "first_place": first_place,
        "last_place": last_place,
        "token_entropy": entropy,
        "top_places": _lists(n, TOP_PLACES, top.owners, top.places[_by_strength(top.owners, top.values)], -1),
        "top_tokens": top_tokens,
        "top_token_shares": shares,
    }
    return columns, pairs


def _token_mass(before: Pairs, owners: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> Pairs:
    """The pairs of activations, after the pairs `before` of earlier places."""
    owners, tokens = np.concatenate([before.owners, owners]), np.concatenate([before.tokens, tokens])
    values = np.concatenate([before.mass, values])
    order = stable_order(owners * (int(tokens.max(initial=0)) + 1) + tokens)
    owners, tokens = owners[order], tokens[order]
    starts = group_starts(owners, tokens)
    lengths = np.diff(starts, append=len(order))
    mass = np.bincount(np.repeat(np.arange(len(starts)), lengths), weights=values[order], minlength=len(starts))
    return Pairs(owners[starts], tokens[starts], mass)


def _strongest(before: _Places, now: _Places, context: int) -> _Places:
    """Each feature's strongest entry in each of the `TOP_PLACES` rows with the strongest ones, and ties with the last.

    `now` are entries in rows after those of `before`.
    """
    owners, places, values = map(np.concatenate, zip(before, now, strict=True))
    starts = group_starts(owners, places // context)
    if not len(starts):
        return now
    peaks = np.maximum.reduceat(values, starts)
    rows = largest(owners[starts], peaks, TOP_PLACES)
    lengths = np.diff(starts, append=len(values))[rows]
    entries = ranges(starts[rows], lengths)
    at_peak = np.flatnonzero(values[entries] == np.repeat(peaks[rows], lengths))
    row = np.repeat(np.arange(len(rows)), lengths)[at_peak]
    chosen = entries[at_peak[group_starts(row)]]  # the first of equal ones
    return _Places(owners[chosen], places[chosen], values[chosen])


def _moments(read: Read, mean: np.ndarray, counts: np.ndarray, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Skew and kurtosis over all tokens, on most of which the activation is 0."""
    second, third, fourth = np.zeros((3, len(mean)))
    for part in read():
        owners = part.owners()
        deviation = part.values - mean[owners]
        squared = deviation * deviation
        np.add.at(second, owners, squared)
        np.add.at(third, owners, squared * deviation)
        np.add.at(fourth, owners, squared * squared)
    silent = n_tokens - counts
    second = (second + silent * mean**2) / n_tokens
    third = (third - silent * mean**3) / n_tokens
    fourth = (fourth + silent * mean**4) / n_tokens
    varies = second > 0
    second[~varies] = 1
    return np.where(varies, third / (second * np.sqrt(second)), 0), np.where(varies, fourth / second**2, 0)


def _tokens(pairs: Pairs, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entropy of the mass of each feature over token ids; the ids with most of it; their shares."""
    n = len(mass)
    shares = pairs.mass / mass[pairs.owners]
    entropy = np.bincount(pairs.owners, weights=shares * np.log2(1 / shares), minlength=n)
    top = largest(pairs.owners, pairs.mass.astype(np.float32), TOP_TOKENS)
    owners = pairs.owners[top]
    order = top[_by_strength(owners, pairs.mass[top])]
    tokens = _lists(n, TOP_TOKENS, owners, pairs.tokens[order], -1)
    return entropy, tokens, _lists(n, TOP_TOKENS, owners, shares[order], 0)


def _by_strength(owners: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """The order by owner, which is that of the arguments, then by falling strength; ties keep their order."""
    return np.lexsort((-strengths, owners))


def _lists(n: int, length: int, owners: np.ndarray, values: np.ndarray, empty: int) -> np.ndarray:
    """The first values of each of `n` owners, ``[n, length]``, filled up with `empty`; `owners` rise."""
    counts = np.bincount(owners, minlength=n)
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    listed = np.full((n, length), empty, values.dtype)
    kept = rank < length
    listed[owners[kept], rank[kept]] = values[kept]
    return listed
