"""Merges files of sorted entries, a bucket of keys at a time.

The files are sorted, so each entry's position in the result follows from counts, and nothing is sorted. Memory
(`saelab.features.needs`): a bucket, whatever the length of the text.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from saelab.features.ordering import offsets_of, ranges
from saelab.features.shards import Entries, SortedFile

BUCKET = 1 << 20
"""Most entries merged at once, counting what else a key costs as entries (`buckets`)."""


def buckets(counts: np.ndarray, extra: int) -> Iterator[tuple[int, int]]:
    """Ranges of keys, first and stop, that are merged together; each key is in one, in order.

    A bucket has one key, or at most `BUCKET` entries, to which `extra` are added for each key: as many entries as the
    other work on a key takes the memory of.
    """
    costs = np.cumsum(counts + extra)
    first, before = 0, 0
    while first < len(counts):
        stop = max(first + 1, int(np.searchsorted(costs, before + BUCKET, side="right")))
        yield first, stop
        first, before = stop, int(costs[stop - 1])


def merged(files: Sequence[SortedFile], first: int, stop: int) -> Iterator[Entries]:
    """The entries of a bucket, files one after the other for each key; nothing if there is none.

    They come whole, or in parts of about `BUCKET` entries if they are one key's.
    """
    parts: list[Entries] = []
    entries = 0
    for file in files:
        parts.append(file.entries(first, stop))
        entries += len(parts[-1].values)
        if entries >= BUCKET and stop == first + 1:
            yield _join(parts)
            parts, entries = [], 0
    if entries:
        yield _join(parts)


def _join(parts: list[Entries]) -> Entries:
    counts = np.stack([part.counts for part in parts])  # [files, keys]
    starts = offsets_of(counts.sum(0))
    indices, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    begins = starts[:-1] + np.cumsum(counts, 0) - counts  # of each key's entries from each file
    for part, begin in zip(parts, begins, strict=True):
        target = ranges(begin, part.counts)
        indices[target], values[target] = part.indices, part.values
    return Entries(counts.sum(0), indices, values)
