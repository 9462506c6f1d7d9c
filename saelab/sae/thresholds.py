"""Inference without batch mates: thresholds that give features the density that a batch-wide allocation gave them.

Mutual and feature choice pick the best entries of a whole batch, so what a token gets depends on its mates. For
inference an entry is active where its pre-activation exceeds a threshold: one for all after mutual choice, one for each
feature after feature choice. It is the held-out quantile that lets the wanted share of entries through. (BatchTopK,
Bussmann et al. 2024, arXiv 2412.06410, takes the mean over batches of the smallest activation selected. That is too
high where a feature has few tokens per batch: with one, it lets some 0.6 of the density through.)
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

CALIBRATION_TOKENS = 200_000
"""Held-out activations that `saelab train` sets thresholds on."""
MIN_HITS = 10
"""A threshold that fewer calibration entries are expected above is rough: its density is known to some 30% at best."""

BLOCK_ENTRIES = 2**22
"""Pre-activations at a time: 16 MB."""


class Calibration(NamedTuple):
    """`threshold`, `expected_hits` and `flagged` have the shape of the densities: scalars, or ``[n_features]``."""

    threshold: Tensor
    """What a pre-activation must exceed to be active, never below 0."""
    expected_hits: Tensor
    """How many calibration entries the densities put above the threshold, float64."""
    flagged: Tensor
    """True where that is below 10."""
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

    `pre_activations` maps x ``[t, d_in]`` to ``[t, n_features]``; `batches` yields held-out x. `tokens` is the most
    that they hold (ValueError where they hold more); without it all batches are held in memory to count them first.

    The j-th largest of n samples is exceeded by j / (n + 1) of all further ones, on average. So the threshold is where
    j = density * (n + 1), between the two samples on either side (as far down as log j says, for tails fall about
    exponentially; linearly in j, a threshold between the second and third lets 3% too few through); the largest sample
    where j < 1. Exact, as if all pre-activations had been sorted, but no more than some two or three times k * tokens
    of them are held.
    """
    if tokens is None:
        batches = list(batches)
        tokens = sum(len(batch) for batch in batches)
    largest, read, per_feature = None, 0, densities.ndim == 1
    wanted = densities.double().reshape(-1)
    n_features = len(wanted)
    for batch in batches:
        if not per_feature and largest is None:
            n_features = pre_activations(batch[:1]).shape[1]
        read += len(batch)
        if read > tokens:
            raise ValueError(f"calibration: the batches hold more than the {tokens} tokens that were announced")
        for x in batch.split(max(1, BLOCK_ENTRIES // n_features)):
            pre = pre_activations(x)
            if largest is None:
                wanted = wanted.to(pre.device)
                largest = _Largest(_position(wanted, tokens, n_features), pre)
            largest.see(pre)
    if largest is None:
        raise ValueError("calibration: there is not a single token to set thresholds on")
    position = _position(wanted, read, n_features)
    first = position.floor().clamp_min(1)
    upper, lower = largest.at(first.long()), largest.at(first.long() + 1)
    threshold = upper + (position / first).log().clamp_min(0) / (1 / first).log1p() * (lower - upper)
    hits = wanted * read * (1 if per_feature else n_features)
    shape = densities.shape
    return Calibration(
        threshold.to(largest.dtype).reshape(shape), hits.reshape(shape), (hits < MIN_HITS).reshape(shape), read
    )


def _position(densities: Tensor, tokens: int, n_features: int) -> Tensor:
    """Where in the falling order of samples the threshold lies, counted from 1: ``[groups]`` float64."""
    samples = tokens if len(densities) == n_features else tokens * n_features
    return densities * (samples + 1)


class _Largest:
    """The largest positive entries of each group, as many as a threshold can need: a group is a feature, or all."""

    def __init__(self, position: Tensor, like: Tensor) -> None:
        self.sizes = position.floor().long().clamp_min(1) + 1
        self.dtype = like.dtype
        self.groups = torch.empty(0, dtype=torch.int32, device=like.device)
        self.values = like.new_empty(0)
        self.bounds = like.new_zeros(len(position))
        """What an entry of a group must exceed to be among its largest."""
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._limit = max(BLOCK_ENTRIES, int(self.sizes.sum()))

    def see(self, pre: Tensor) -> None:
        """Take in pre-activations ``[t, n_features]``."""
        rows, features = (pre > self.bounds).nonzero(as_tuple=True)
        groups = features.int() if len(self.bounds) > 1 else torch.zeros_like(features, dtype=torch.int32)
        self._pending.append((groups, pre[rows, features]))
        if sum(len(values) for _, values in self._pending) > self._limit:
            self._prune()

    def at(self, place: Tensor) -> Tensor:
        """The value at a place ``[groups]`` in each group's falling order, from 1; float64, 0 behind its end."""
        self._prune()
        starts, counts = self._extent()
        there = place <= counts
        index = torch.where(there, starts + place - 1, 0)
        values = self.values.double() if len(self.values) else torch.zeros(1, dtype=torch.float64, device=there.device)
        return torch.where(there, values[index], 0.0)

    def _prune(self) -> None:
        if not self._pending:
            return
        groups = torch.cat([self.groups, *(part for part, _ in self._pending)])
        values = torch.cat([self.values, *(part for _, part in self._pending)])
        self._pending.clear()
        values, order = values.sort(descending=True)
        self.groups, order = groups[order].sort(stable=True)
        self.values = values[order]
        starts, counts = self._extent()
        rank = torch.arange(len(self.groups), device=starts.device) - starts[self.groups.long()]
        keep = rank < self.sizes[self.groups.long()]
        self.groups, self.values = self.groups[keep], self.values[keep]
        starts, counts = self._extent()
        full = counts >= self.sizes
        self.bounds[full] = self.values[(starts + counts - 1)[full]]

    def _extent(self) -> tuple[Tensor, Tensor]:
        """Where each group starts among the entries, and how many it has."""
        names = torch.arange(len(self.sizes) + 1, dtype=torch.int32, device=self.groups.device)
        ends = torch.searchsorted(self.groups, names)
        return ends[:-1], ends.diff()
