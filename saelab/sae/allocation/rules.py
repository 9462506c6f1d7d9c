"""Which (token, feature) entries stay active, given the score of each. One class per paper's rule.

`mask` is the rule as its paper states it: dense and a few lines long; the tests compare everything else with it. The
other methods find the same entries fast (selection.py): `bounds` proposes candidates tile by tile (candidates.py) and
`keep` chooses among them exactly. No rule picks an entry at or below zero. Ties go to the lower token, then
the lower feature.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from saelab.sae.allocation.candidates import (
    Bands,
    Bounds,
    ColumnBounds,
    Entries,
    FixedBounds,
    GroupBounds,
    RowBounds,
    TotalBound,
)


class Rule(Protocol):
    """An allocation for batches of scores ``[tokens, n_features]``."""

    compares: ClassVar[str]
    """What the entries share that an entry competes with: its token, its feature, the batch, or nothing."""

    def mask(self, scores: Tensor) -> Tensor:
        """The active entries, bool ``[tokens, n_features]``, by the dense formula."""
        ...

    def slots(self, tokens: int) -> int | None:
        """The most entries that can be active in a batch; None if nothing limits them."""
        ...

    def times(self, factor: int) -> "Rule":
        """The same rule with `factor` times the budget; itself if it has none."""
        ...

    def bounds(self, tokens: int, n_features: int, margin: float, device: torch.device) -> Bounds:
        """Finds candidates in tiles of scores that are within `margin` (relative) of exact."""
        ...

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        """Which candidates are active, bool ``[n]``; `entries` are in order, and ties go to the earlier one."""
        ...


@dataclass(frozen=True)
class TokenChoice:
    """Every token keeps its k best: the largest sum of scores with at most k entries in each row.

    TopK (Gao et al. 2024, arXiv 2406.04093, section 2.3); the name is Ayonrinde's (2024, arXiv 2411.02124).
    """

    compares: ClassVar[str] = "token"
    k: int

    def mask(self, scores: Tensor) -> Tensor:
        return (_rank(scores, dim=1) < self.k) & (scores > 0)

    def slots(self, tokens: int) -> int:
        return tokens * self.k

    def times(self, factor: int) -> "TokenChoice":
        return TokenChoice(factor * self.k)

    def bounds(self, tokens: int, n_features: int, margin: float, device: torch.device) -> RowBounds:
        return RowBounds(tokens, n_features, min(self.k, n_features), margin, device)

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        budgets = torch.full((tokens,), self.k, device=entries.tokens.device)
        return _best_of_each(entries.scores, entries.tokens, budgets)


@dataclass(frozen=True)
class GroupMax:
    """Every token keeps the best of each of k groups of consecutive features: sparsify's GroupMax.

    The groups have n_features / k features each.
    """

    compares: ClassVar[str] = "token"
    k: int
    n_features: int
    """All features, of which k is a divisor."""
    first: int = 0
    """Number of the first feature of the scores."""

    @property
    def size(self) -> int:
        """Features of a group."""
        return self.n_features // self.k

    def mask(self, scores: Tensor) -> Tensor:
        groups = scores.unflatten(1, (self.k, self.size))
        return ((_rank(groups, dim=2) < 1) & (groups > 0)).flatten(1)

    def slots(self, tokens: int) -> int:
        return tokens * self.k

    def times(self, factor: int) -> "GroupMax":
        return replace(self, k=factor * self.k)

    def bounds(self, tokens: int, n_features: int, margin: float, device: torch.device) -> GroupBounds:
        return GroupBounds(self.size, self.first, margin)

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        groups = entries.tokens * self.k + (entries.features + self.first) // self.size
        order = _falling(entries.scores, groups)
        first_of_group = groups[order].diff(prepend=groups.new_full((1,), -1)) != 0
        return torch.zeros_like(groups, dtype=torch.bool).index_copy_(0, order, first_of_group)


@dataclass(frozen=True)
class MutualChoice:
    """The batch keeps its k * tokens best: the largest sum of scores with at most that many entries in all.

    Ayonrinde (2024, arXiv 2411.02124); the same as BatchTopK (Bussmann et al. 2024, arXiv 2412.06410).
    """

    compares: ClassVar[str] = "batch"
    k: int

    def mask(self, scores: Tensor) -> Tensor:
        return (_rank(scores.flatten(), dim=0).view_as(scores) < self.k * len(scores)) & (scores > 0)

    def slots(self, tokens: int) -> int:
        return tokens * self.k

    def times(self, factor: int) -> "MutualChoice":
        return MutualChoice(factor * self.k)

    def bounds(self, tokens: int, n_features: int, margin: float, device: torch.device) -> TotalBound:
        return TotalBound(max(1, min(self.slots(tokens), tokens * n_features)), tokens * n_features, margin)

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        best = _falling(entries.scores)[: self.slots(tokens)]
        return torch.zeros_like(entries.scores, dtype=torch.bool).index_fill_(0, best, True)


@dataclass(frozen=True)
class FeatureChoice:
    """Every feature i keeps its m_i best tokens: the largest sum of scores with at most m_i entries in column i.

    Ayonrinde (2024, arXiv 2411.02124). The m_i, which sum to k * tokens, come from capacity.py.
    """

    compares: ClassVar[str] = "feature"
    capacities: Tensor
    """m, ``[n_features]`` int64."""
    total: int
    """The sum of m, as a number that the host knows without waiting for a GPU."""
    bands: Bands | None = field(default=None, repr=False)
    """Needed on GPUs only: see candidates.Bands."""

    def mask(self, scores: Tensor) -> Tensor:
        return (_rank(scores, dim=0) < self.capacities) & (scores > 0)

    def slots(self, tokens: int) -> int:
        return self.total

    def times(self, factor: int) -> "FeatureChoice":
        return FeatureChoice(factor * self.capacities, factor * self.total, self.bands and self.bands.times(factor))

    def bounds(self, tokens: int, n_features: int, margin: float, device: torch.device) -> ColumnBounds:
        return ColumnBounds(self.capacities, margin, self.bands)

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        return _best_of_each(entries.scores, entries.features, self.capacities)


@dataclass(frozen=True)
class Threshold:
    """An entry is active if its score exceeds the threshold of its feature (0 at least): no budget, no batch mates.

    JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435); ReLU if all thresholds are 0. It also replaces batch-wide
    rules in inference (thresholds.py).
    """

    compares: ClassVar[str] = "nothing"
    cut: Tensor
    """``[n_features]``, or ``[1]``: one for all."""

    def mask(self, scores: Tensor) -> Tensor:
        return scores > self.cut.clamp_min(0)

    def slots(self, tokens: int) -> None:
        return None

    def times(self, factor: int) -> "Threshold":
        return self

    def bounds(self, tokens: int, n_features: int, margin: float, device: torch.device) -> FixedBounds:
        return FixedBounds(self.cut.clamp_min(0).expand(n_features), margin)

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        cut = self.cut.clamp_min(0)
        return entries.scores > (cut if len(cut) == 1 else cut[entries.features])


def _rank(scores: Tensor, dim: int) -> Tensor:
    """Rank of each score in the falling order along `dim`, from 0; ties to the lower index."""
    return scores.clamp_min(0).argsort(stable=True, dim=dim, descending=True).argsort(dim)


def _best_of_each(scores: Tensor, groups: Tensor, budgets: Tensor) -> Tensor:
    """True for the ``budgets[g]`` largest scores of each group g: scores, groups ``[n]`` -> bool ``[n]``.

    Scores below zero count as zero. Ties go to the earlier entry.
    """
    order = _falling(scores, groups)
    group = groups[order]
    starts = torch.searchsorted(group, torch.arange(len(budgets), device=group.device))
    rank = torch.arange(len(order), device=group.device) - starts[group]
    return torch.zeros_like(group, dtype=torch.bool).scatter_(0, order, rank < budgets[group])


def _falling(scores: Tensor, groups: Tensor | None = None) -> Tensor:
    """The order in which groups rise and, within each, scores fall; stable.

    The bits of positive floats are ordered as their values, so group and score make one integer, and integers are
    sorted eight times faster than floats.
    """
    if scores.dtype != torch.float32:
        order = torch.argsort(scores.clamp_min(0), descending=True, stable=True)
        return order if groups is None else order[torch.argsort(groups[order], stable=True)]
    key = -scores.clamp_min(0).view(torch.int32).long()
    return torch.argsort(key if groups is None else key + (groups << 32), stable=True)
