"""Exact quantiles of activations: by sorting, or by counting if a feature has more entries than fit into memory."""

from collections.abc import Callable, Iterable

import numpy as np

from saelab.features.layout import QUANTILES
from saelab.features.shards import Entries

Read = Callable[[], Iterable[Entries]]
"""Reads the activations of some features: in one part; or, if it is one feature, in several of consecutive rows."""

_HALF = 16
"""Bits that one pass counts. The bit patterns of positive float32 are in the order of their values."""


def sorted_quantiles(part: Entries) -> np.ndarray:
    """The quantiles of each feature, ``[features, QUANTILES]`` float32; 0 if it has no entry."""
    keys = np.sort((part.owners() << 31) | part.values.view(np.int32))
    ends = np.cumsum(part.counts)
    ranks = _ranks(part.counts) + (ends - part.counts)[:, None]
    found = np.zeros(ranks.shape, np.float32)
    active = part.counts > 0
    found[active] = (keys[ranks[active]] & 0x7FFFFFFF).astype(np.int32).view(np.float32)
    return found


def counted_quantiles(read: Read, count: int) -> np.ndarray:
    """The quantiles of one feature that has `count` entries, at least one: ``[1, QUANTILES]`` float32.

    Counts upper halves of the bit patterns, then the lower halves of entries whose upper half is a quantile's.
    """
    upper = np.zeros(1 << _HALF, np.int64)
    for part in read():
        upper += np.bincount(part.values.view(np.uint32) >> _HALF, minlength=len(upper))
    ranks = _ranks(np.array([count]))[0]
    ends = np.cumsum(upper)
    bins = np.searchsorted(ends, ranks, side="right")
    lower = {int(each): np.zeros(1 << _HALF, np.int64) for each in bins}
    for part in read():
        bits = part.values.view(np.uint32)
        for each, counts in lower.items():
            inside = bits[bits >> _HALF == each] & ((1 << _HALF) - 1)
            counts += np.bincount(inside, minlength=len(counts))
    found = [
        (int(each) << _HALF) | int(np.searchsorted(np.cumsum(lower[int(each)]), rank - before, side="right"))
        for each, rank, before in zip(bins, ranks, (ends - upper)[bins], strict=True)
    ]
    return np.array([found], np.uint32).view(np.float32)


def _ranks(counts: np.ndarray) -> np.ndarray:
    """Index of each quantile among a feature's sorted activations, ``[features, QUANTILES]``; -1 if there is none."""
    percent = np.array([round(100 * share) for share in QUANTILES])  # integers, so that shares of counts are exact
    return -(-counts[:, None] * percent // 100) - 1
