"""Sorting and grouping of integer keys, on which the writer of the feature database spends its time."""

import numpy as np


def stable_order(keys: np.ndarray) -> np.ndarray:
    """The order that sorts non-negative integers, ``[n]`` int64; equal ones keep their order.

    Sorts each key together with its index, which numpy does three times as fast as ``argsort(kind="stable")``. Key and
    index must fit into 63 bits.
    """
    bits = len(keys).bit_length()
    assert not len(keys) or int(keys.max()) >> (63 - bits) == 0, "a key does not fit beside its index"
    packed = np.sort((keys.astype(np.int64) << bits) | np.arange(len(keys)))
    return packed & ((1 << bits) - 1)


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Where consecutive groups of these sizes begin, and the end of the last, ``[n + 1]`` int64."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices from ``starts[i]`` up to ``starts[i] + lengths[i]``, for each i one after the other, int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def group_starts(*keys: np.ndarray) -> np.ndarray:
    """Indices at which any of some sorted keys of equal length changes, 0 included, int64."""
    begins = np.zeros(len(keys[0]), bool)
    begins[:1] = True
    for key in keys:
        begins[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(begins)


def largest(owner: np.ndarray, values: np.ndarray, most: int) -> np.ndarray:
    """Indices of the entries that are among the `most` largest of their owner, and of ties with the last of these.

    `owner` ``[n]`` are indices in rising order, `values` ``[n]`` positive float32. The indices rise.
    """
    bits = values.view(np.int32)  # in the order of the values, since these are positive
    keys = np.sort((owner.astype(np.int64) << 31) | bits)
    counts = np.bincount(owner)
    last = np.cumsum(counts) - np.minimum(counts, most)
    least = keys[np.minimum(last, max(0, len(keys) - 1))] & 0x7FFFFFFF
    return np.flatnonzero(bits >= least[owner])
