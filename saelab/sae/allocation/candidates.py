"""From dense scores to candidates: the few entries that can be among the largest, for an exact choice afterwards.

A budget belongs to a token (rows), to the whole batch, or to a feature (columns); a threshold needs none. Scores arrive
in tiles ``[tokens, features]``. Every entry that the exact choice would take is among the candidates if its score is
within ``margin`` (relative) of exact, ties included. Entries at or below zero (or the smallest normal number) are no
candidates.

On a CPU the bound is read off block maxima: if the K-th largest of them is c, at least K entries reach c, so an entry
below c cannot be among the K largest. One pass takes the maxima (memory speed), a top-k over 1/32 of the row finds c,
and only blocks that reach c are searched. On a GPU the host must not wait, so the number of candidates is fixed
beforehand: a margin becomes spare slots, filled by the next largest.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from saelab.kernels.products import topk

_BLOCK = 32
_GROUP_SPARE = 3
"""Spare slots of a group on a GPU, if its scores are rounded."""
_PART = 2**20
"""Scores that are searched for the largest of groups at a time."""


class Entries(NamedTuple):
    """Entries of a dense ``[tokens, features]`` matrix: positions and scores, in no particular order; all ``[n]``."""

    tokens: Tensor
    features: Tensor
    scores: Tensor

    def where(self, keep: Tensor) -> "Entries":
        return Entries(*(part[keep] for part in self))

    def shifted(self, tokens: int, features: int) -> "Entries":
        return Entries(self.tokens + tokens, self.features + features, self.scores)


class Bands(NamedTuple):
    """Features grouped by capacity, for GPUs: the host must not wait for the number of candidates."""

    order: Tensor
    """Features in order of falling capacity, ``[n_features]`` int64."""
    runs: list[tuple[int, int, int]]
    """(start, stop, largest capacity) of runs of that order."""

    @classmethod
    def of(cls, capacities: Tensor) -> "Bands":
        """The bands of features with `capacities` ``[n_features]``; waits for a GPU."""
        order = torch.argsort(capacities, descending=True, stable=True)
        return cls(order, runs_of(capacities[order]))

    def times(self, factor: int) -> "Bands":
        return Bands(self.order, [(start, stop, factor * largest) for start, stop, largest in self.runs])


def runs_of(by_rank: Tensor) -> list[tuple[int, int, int]]:
    """Runs of ranks (start, stop, largest capacity) whose capacities differ by about a factor of two at most."""
    falling = -by_rank.ceil().long().cpu().numpy()
    runs, start = [], 0
    while start < len(falling):
        largest = -int(falling[start])
        smallest = max(min(1, largest), largest // 2)
        stop = int(np.searchsorted(falling, -smallest, side="right"))
        runs.append((start, stop, largest))
        start = stop
    return runs


class Bounds(Protocol):
    """Finds candidates in tiles. One object serves one batch: bounds rise with each tile."""

    whole_columns: bool
    """Whether a tile must hold all tokens of the batch."""
    row_major: bool
    """Whether the candidates of a tile come sorted by token, then feature."""

    def candidates(self, scores: Tensor, first_token: int, first_feature: int) -> Entries:
        """Candidates of one tile ``[tokens, features]``, with their positions in the whole matrix."""
        ...

    def final(self, entries: Entries) -> Entries:
        """The `entries`, gathered from all tiles, that the last bounds still admit."""
        ...


class RowBounds:
    """Per token, a lower bound of its k-th largest score, which rises with each tile of its features."""

    whole_columns, row_major = False, False

    def __init__(self, tokens: int, n_features: int, k: int, margin: float, device: torch.device) -> None:
        self.k, self.margin, self.n_features = k, margin, n_features
        self.risen = False
        """Whether a bound may have risen after candidates of its token were found."""
        self.best = torch.full((tokens, k), -torch.inf, device=device)

    def candidates(self, scores: Tensor, first_token: int, first_feature: int) -> Entries:
        if scores.device.type != "cpu":
            return self.fixed(scores).shifted(first_token, first_feature)
        blocks, maxima = _row_maxima(scores, self.n_features // (4 * self.k))
        rows = slice(first_token, first_token + len(scores))
        seen = torch.cat([self.best[rows], maxima], 1) if first_feature else maxima
        self.risen = self.risen or first_feature > 0
        self.best = self.best.to(seen.dtype)
        if seen.shape[1] > self.k:
            seen = seen.topk(self.k, dim=1, sorted=False).values
        self.best[rows, : seen.shape[1]] = seen
        cut = self.best[rows].amin(1, keepdim=True)
        token, slot, block, found = _members(blocks, maxima, _lowered(cut, self.margin))
        return Entries(token + first_token, slot * maxima.shape[1] + block + first_feature, found)

    def fixed(self, scores: Tensor) -> Entries:
        """Candidates of a tile, a number set by k and the margin: on a GPU, where the host must not wait."""
        spare = max(8, self.k // 4) if self.margin else 0
        values, features = topk(scores, min(self.k + spare, scores.shape[1]))
        tokens = torch.arange(len(scores), device=scores.device)[:, None].expand_as(features)
        return Entries(tokens.flatten(), features.flatten(), _at_least_float32(values.flatten()))

    def final(self, entries: Entries) -> Entries:
        if entries.scores.device.type != "cpu" or not self.risen:
            return entries
        cut = _lowered(self.best.amin(1), self.margin)
        return entries.where(entries.scores >= cut[entries.tokens])


class GroupBounds:
    """The largest of each token and group of `size` consecutive features; the features of the tiles begin at `first`.

    A tile may have a part of a group, whose largest is then a candidate too.
    """

    whole_columns, row_major = False, False

    def __init__(self, size: int, first: int, margin: float) -> None:
        self.size, self.first, self.margin = size, first, margin

    def candidates(self, scores: Tensor, first_token: int, first_feature: int) -> Entries:
        find = self._reaching if scores.device.type == "cpu" else self._fixed
        found, start, stop = [], 0, scores.shape[1]
        while start < stop:  # the rest of a group, whole groups, the beginning of a group
            rest = self.size - (self.first + first_feature + start) % self.size
            whole = (stop - start) // self.size * self.size
            length = whole if rest == self.size and whole else min(rest, stop - start)
            part = scores[:, start : start + length].unflatten(1, (-1, min(self.size, length)))
            found.append(find(part).shifted(first_token, first_feature + start))
            start += length
        return Entries(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _reaching(self, groups: Tensor) -> Entries:
        """Entries of groups ``[tokens, n, size]`` that may be the largest of their groups."""
        found = []
        rows = max(1, _PART // max(1, groups.shape[1] * groups.shape[2]))
        for start in range(0, max(1, len(groups)), rows):
            part = groups[start : start + rows].transpose(1, 2)
            maxima = _at_least_float32(part.amax(1))
            token, slot, group, scores = _members(part, maxima, _lowered(maxima, self.margin))
            found.append(Entries(token + start, group * groups.shape[2] + slot, scores))
        return Entries(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _fixed(self, groups: Tensor) -> Entries:
        """As in RowBounds."""
        tokens, n, size = groups.shape
        values, slot = groups.topk(min(size, 1 + (_GROUP_SPARE if self.margin else 0)), dim=2)
        token = torch.arange(tokens, device=groups.device)[:, None, None].expand_as(slot)
        feature = slot + size * torch.arange(n, device=groups.device)[:, None]
        return Entries(token.flatten(), feature.flatten(), _at_least_float32(values.flatten()))

    def final(self, entries: Entries) -> Entries:
        return entries


class TotalBound:
    """A lower bound of the `total`-th largest score of the whole batch, which rises with every tile."""

    whole_columns, row_major = False, False

    def __init__(self, total: int, n_entries: int, margin: float) -> None:
        self.total, self.margin, self.n_entries = total, margin, n_entries
        self.histogram = torch.zeros(2**15, dtype=torch.long)
        self.cut = torch.tensor(0.0)

    def candidates(self, scores: Tensor, first_token: int, first_feature: int) -> Entries:
        if scores.device.type != "cpu":
            return self.fixed(scores).shifted(first_token, first_feature)
        blocks, maxima = _row_maxima(scores, self.n_entries // (4 * self.total))
        # positive floats are ordered as their bits are; their upper half makes bins of 0.8%, counted from the top
        bins = (maxima.float().view(torch.int32) >> 16).clamp_min_(0)
        self.histogram += torch.bincount(bins.flatten(), minlength=len(self.histogram))
        enough = self.histogram.flip(0).cumsum(0) >= self.total
        if enough.any():
            top = len(enough) - 1 - int(enough.int().argmax())
            self.cut = (torch.tensor(top, dtype=torch.int32) << 16).view(torch.float32) * (1 - 1e-6)  # of float64, too
        token, slot, block, found = _members(blocks, maxima, _lowered(self.cut, self.margin))
        return Entries(token + first_token, slot * maxima.shape[1] + block + first_feature, found)

    def fixed(self, scores: Tensor) -> Entries:
        """As in RowBounds."""
        spare = self.total // 8 if self.margin else 0
        values, index = scores.flatten().topk(min(self.total + spare, scores.numel()), sorted=False)
        return Entries(index // scores.shape[1], index % scores.shape[1], _at_least_float32(values))

    def final(self, entries: Entries) -> Entries:
        if entries.scores.device.type != "cpu":
            return entries
        return entries.where(entries.scores >= _lowered(self.cut, self.margin))


class ColumnBounds:
    """Per feature, a lower bound of its m-th largest score: `capacities` ``[n_features]`` int64 are the m."""

    whole_columns, row_major = True, False

    def __init__(self, capacities: Tensor, margin: float, bands: Bands | None = None) -> None:
        self.capacities, self.margin, self.bands = capacities, margin, bands

    def candidates(self, scores: Tensor, first_token: int, first_feature: int) -> Entries:
        if scores.device.type != "cpu":
            return self.fixed(scores)
        capacities = self.capacities[first_feature : first_feature + scores.shape[1]]
        size = _divisor(len(scores), _BLOCK)
        blocks = scores.view(size, len(scores) // size, scores.shape[1])
        maxima = _at_least_float32(blocks.amax(0))
        cut = _lowered(_column_cuts(maxima, capacities), self.margin)
        block, slot, feature, found = _members(blocks.transpose(0, 1), maxima, cut)
        return Entries(slot * len(maxima) + block + first_token, feature + first_feature, found)

    def fixed(self, scores: Tensor) -> Entries:
        """As in RowBounds; a tile must hold all features too."""
        assert self.bands is not None
        found = []
        for start, stop, largest in self.bands.runs:
            features = self.bands.order[start:stop]
            spare = 1 + largest // 8 if self.margin else 0
            values, tokens = scores[:, features].topk(min(largest + spare, len(scores)), dim=0)
            found.append(
                Entries(tokens.flatten(), features.expand_as(tokens).flatten(), _at_least_float32(values.flatten()))
            )
        return Entries(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def final(self, entries: Entries) -> Entries:
        return entries


class FixedBounds:
    """A known threshold: cut ``[n_features]``, at least 0."""

    whole_columns, row_major = False, True

    def __init__(self, cut: Tensor, margin: float) -> None:
        self.cut, self.margin = cut, margin

    def candidates(self, scores: Tensor, first_token: int, first_feature: int) -> Entries:
        cut = (self.cut[first_feature : first_feature + scores.shape[1]] * (1 - self.margin)).to(scores.dtype)
        token, feature = (scores > cut).nonzero(as_tuple=True)
        found = scores.take(token * scores.shape[1] + feature)  # faster than scores[token, feature]
        return Entries(token.add_(first_token), feature.add_(first_feature), _at_least_float32(found))

    def final(self, entries: Entries) -> Entries:
        return entries


def _row_maxima(scores: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scores as blocks ``[tokens, size, n_blocks]``, a block being every n_blocks-th feature, and their maxima.

    Strided blocks reduce at memory speed, contiguous ones eight times slower in bfloat16.
    """
    size = _divisor(scores.shape[1], min(_BLOCK, max(1, largest)))
    blocks = scores.view(len(scores), size, scores.shape[1] // size)
    return blocks, _at_least_float32(blocks.amax(1))


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _divisor(n: int, largest: int) -> int:
    return next(size for size in range(largest, 0, -1) if n % size == 0)


def _lowered(cut: Tensor, margin: float) -> Tensor:
    """The bound, lowered by the error of the scores; a bound at or below zero admits every positive entry."""
    return (cut * (1 - margin)).clamp_min(torch.finfo(torch.float32).tiny)


def _members(blocks: Tensor, maxima: Tensor, cut: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positive entries of at least `cut` in blocks ``[n, size, m]`` with `maxima` ``[n, m]``.

    `cut` is broadcast to ``[n, m]``. Returns the indices into the three dimensions and the entries, float32.
    """
    row, column = (maxima >= cut).nonzero(as_tuple=True)
    inside = blocks[row, :, column]
    # compared in their own dtype: the margin is many times larger than the rounding of the bound
    limit = cut.expand_as(maxima)[row, column].to(inside.dtype)
    hit, slot = (inside >= limit[:, None]).nonzero(as_tuple=True)
    return row[hit], slot, column[hit], _at_least_float32(inside[hit, slot])


def _column_cuts(maxima: Tensor, capacities: Tensor) -> Tensor:
    """The m-th largest of each column of `maxima` ``[n, features]``; infinite for m = 0, zero for m > n."""
    cuts = maxima.new_zeros(len(capacities))
    cuts[capacities == 0] = torch.inf
    low = 0
    while low < len(maxima):
        high = min(max(1, 4 * low), len(maxima))
        chosen = ((capacities > low) & (capacities <= high)).nonzero().squeeze(1)
        if len(chosen):
            top = maxima[:, chosen].T.contiguous().topk(high, dim=1).values
            cuts[chosen] = top.gather(1, capacities[chosen, None] - 1).squeeze(1)
        low = high
    return cuts
