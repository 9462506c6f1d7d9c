"""Per-token inference thresholds that reproduce the densities of a batch-wide allocation.

Mutual and feature choice pick the best entries of a whole batch, so a token's features depend on the other tokens. In
inference an entry is active if its pre-activation exceeds a threshold: one for all after mutual choice, one for each
feature after feature choice. The threshold is a quantile of held-out pre-activations: the share above it is the
density. (BatchTopK, Bussmann et al. 2024, arXiv 2412.06410, takes the mean over batches of the smallest activation
selected. That is too high if a feature has few tokens per batch: with one, its density is some 0.6 of the target.)
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CALIBRATION_TOKENS = 200_000
"""Held-out activations that `saelab train` sets thresholds on."""
MIN_HITS = 10
"""A threshold with fewer expected calibration entries above it is rough: its density is known to some 30% at best."""

BLOCK_ENTRIES = 2**22
"""Pre-activations computed at a time: 16 MB."""
_PART = 2**18
"""Entries for which there are int64 indices at a time: 2 MB."""
_MOST_BITS = 2**31 - 1
"""Largest value that the bits of a positive float32 can have, read as an integer."""


class Calibration(NamedTuple):
    """`threshold`, `expected_hits` and `flagged` have the shape of the densities: scalars, or ``[n_features]``."""

    threshold: Tensor
    """Bound that a pre-activation must exceed to be active, never below 0."""
    expected_hits: Tensor
    """Number of calibration entries above the threshold by the densities, float64."""
    flagged: Tensor
    """True if `expected_hits` is below `MIN_HITS`."""
    tokens: int
    """Calibration tokens read."""


@torch.no_grad()
def calibrate(
    pre_activations: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    densities: Tensor,
    tokens: int | None = None,
) -> Calibration:
    """Thresholds that reproduce `densities`, the share of entries to be active: a scalar or ``[n_features]``.

    `pre_activations` maps x ``[t, d_in]`` to ``[t, n_features]``; `batches` yields held-out x. `tokens` is an upper
    bound of their tokens; without it all batches are kept in memory to count them first. Raises ValueError if there
    are more tokens than `tokens`, or none.

    On average j / (n + 1) of all further samples exceed the j-th largest of n. So the threshold lies at
    j = density * (n + 1), between the samples before and after it, interpolated in log j because tails fall about
    exponentially (linear in j, a threshold between the second and third is exceeded by 3% too few); if j < 1 it is the
    largest sample. The result is exact, as if all pre-activations had been sorted, but at most twice k * tokens of
    them are kept (or k * tokens and 4 M), in 8 bytes each, 16 in float64. Infinity is the largest value; NaN counts as
    inactive.
    """
    if tokens is None:
        batches = list(batches)
        tokens = sum(len(batch) for batch in batches)
    largest, read, per_feature = None, 0, densities.ndim == 1
    targets = densities.double().reshape(-1)
    n_features = len(targets)
    for batch in batches:
        if not per_feature and largest is None:
            n_features = pre_activations(batch[:1]).shape[1]
        read += len(batch)
        if read > tokens:
            raise ValueError(f"calibration: the batches have more than the {tokens} tokens announced")
        for x in batch.split(max(1, BLOCK_ENTRIES // n_features)):
            pre = pre_activations(x)
            if largest is None:
                targets = targets.to(pre.device)
                largest = _Largest(_position(targets, tokens, n_features), pre, tokens * n_features)
            largest.see(pre)
            del pre  # the next block needs the memory
    if largest is None:
        raise ValueError("calibration: there is not a single token to set thresholds from")
    position = _position(targets, read, n_features)
    first = position.floor().clamp_min(1)
    upper, lower = largest.at(torch.stack((first, first + 1)).long())
    threshold = upper + (position / first).log().clamp_min(0) / (1 / first).log1p() * (lower - upper)
    hits = targets * read * (1 if per_feature else n_features)
    shape = densities.shape
    return Calibration(
        threshold.to(largest.dtype).reshape(shape), hits.reshape(shape), (hits < MIN_HITS).reshape(shape), read
    )


def _position(densities: Tensor, tokens: int, n_features: int) -> Tensor:
    """Position of the threshold in the falling order of samples, from 1: ``[groups]`` float64."""
    samples = tokens if len(densities) == n_features else tokens * n_features
    return densities * (samples + 1)


class _Largest:
    """The largest positive entries of each group, as many as a threshold can need. A group is one feature, or all.

    The entries are keys in one buffer, which is sorted and cut to the largest whenever it is full. A key is a number
    with the group in its upper half and, in its lower half, a number that falls as the value rises: one sort in place,
    without an index, puts the groups in order and the values of each group in falling order.
    """

    def __init__(self, position: Tensor, like: Tensor, entries: int) -> None:
        """`at` answers up to `position` ``[groups]``; pre-activations are at most `entries`, of the kind of `like`."""
        self.sizes = position.floor().long().clamp_min(1) + 1
        self.dtype = like.dtype
        self.bounds = like.new_zeros(len(position))
        """Bound that an entry of each group must exceed to be among the largest."""
        capacity = key_capacity(int(self.sizes.sum()), like.shape[1], entries)
        kind = torch.complex128 if like.dtype == torch.float64 else torch.int64
        self._keys = torch.empty(capacity, dtype=kind, device=like.device)
        self._filled = self._kept = 0
        self._starts = self._counts = torch.zeros_like(self.sizes)
        """Start of each group among the keys kept, and its number of keys."""

    def see(self, pre: Tensor) -> None:
        """Add pre-activations ``[t, n_features]``."""
        n_features = pre.shape[1]
        for part in pre.split(max(1, _PART // n_features)):  # in parts, because the indices are int64
            index = (part > self.bounds).reshape(-1).nonzero().squeeze(1)
            values = part.reshape(-1).index_select(0, index)
            groups = index.remainder_(n_features) if len(self.bounds) > 1 else index.zero_()
            if self._filled + len(values) > len(self._keys):
                self._prune()
            self._keys[self._filled : self._filled + len(values)] = _keys(groups, values)
            self._filled += len(values)

    def at(self, position: Tensor) -> Tensor:
        """Values at `position` ``[..., groups]`` in each group's falling order, from 1: float64, 0 past its end."""
        self._prune()
        if len(self.sizes) == 1:
            _sort(self._keys[: self._filled])
        there = position <= self._counts
        index = torch.where(there, self._starts + position - 1, 0)
        return torch.where(there, _values(self._keys[index]).double(), 0.0)

    def _prune(self) -> None:
        if self._filled == self._kept:
            return
        keys = self._keys[: self._filled]
        if len(self.sizes) == 1:
            ends = torch.full_like(self.sizes, len(keys))
            _smallest_first(keys, int(self.sizes))
        else:
            _sort(keys)
            ends = _ends(keys, len(self.sizes))
        counts = ends.diff(prepend=ends.new_zeros(1))
        self._counts = counts.minimum(self.sizes)
        if len(counts) > 1:  # the kept keys of a single group are in front already
            self._close_up(keys, ends - counts)
        self._starts = self._counts.cumsum(0) - self._counts
        self._filled = self._kept = int(self._counts.sum())
        full = self._counts == self.sizes
        last = (self._starts + self._counts - 1)[full]
        self.bounds[full] = _values(self._keys[last]).to(self.dtype)

    def _close_up(self, keys: Tensor, starts: Tensor) -> None:
        """Move the kept keys of each group over the others; `starts` ``[groups]`` are the starts of the groups."""
        to = 0
        for first in range(0, len(keys), _PART):
            part = keys[first : first + _PART]
            groups = _groups(part)
            rank = torch.arange(first, first + len(part), device=keys.device) - starts[groups]
            part = part[rank < self.sizes[groups]]
            keys[to : to + len(part)] = part  # never past the part that is read
            to += len(part)


def key_capacity(largest: int, n_features: int, entries: int) -> int:
    """Number of keys that the buffer has room for, if the `largest` of `entries` pre-activations are kept.

    It has as much room again as for the kept ones, so that all sorting takes about as long as reading, but no more
    than `entries`.
    """
    return max(1, min(entries, largest + max(largest, BLOCK_ENTRIES, n_features)))


def _keys(groups: Tensor, values: Tensor) -> Tensor:
    """Keys of positive values ``[n]``; `groups` ``[n]`` int64 is overwritten.

    The bits of a positive float32 are a whole number that rises with it, and float32 represents every float16 and
    bfloat16. A float64 fills a word: its key is a complex number, which numpy sorts by the real part first.
    """
    if values.dtype == torch.float64:
        return torch.complex(groups.double(), -values)
    return groups.bitwise_left_shift_(32).add_(_MOST_BITS - values.float().view(torch.int32))


def _groups(keys: Tensor) -> Tensor:
    return keys.real.long() if keys.is_complex() else keys >> 32


def _values(keys: Tensor) -> Tensor:
    """Float64 of complex keys, else float32."""
    return -keys.imag if keys.is_complex() else (_MOST_BITS - (keys & _MOST_BITS)).int().view(torch.float32)


def _ends(keys: Tensor, n_groups: int) -> Tensor:
    """Ends of the groups among the sorted keys, exclusive: ``[n_groups]``."""
    names = torch.arange(1, n_groups + 1, device=keys.device)
    if keys.is_complex():
        return torch.searchsorted(keys.real.contiguous(), names.double())
    return torch.searchsorted(keys, names << 32)


def _sort(keys: Tensor) -> None:
    """In place. torch would make a second buffer, of int64 indices, and does not sort complex numbers."""
    if keys.device.type == "cpu":
        keys.numpy().sort()
    elif keys.is_complex():
        keys.copy_(torch.from_numpy(np.sort(keys.cpu().numpy())))
    else:
        keys.copy_(keys.sort().values)


def _smallest_first(keys: Tensor, n: int) -> None:
    """In place: the `n` smallest before all others, the largest of them last; on a CPU much faster than sorting."""
    if keys.device.type != "cpu":
        _sort(keys)
    elif n <= len(keys):
        keys.numpy().partition(n - 1)
