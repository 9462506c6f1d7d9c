"""Who gets the budget: which (token, feature) entries stay active, given what each is worth.

Three rules (Ayonrinde 2024, arXiv 2411.02124), each the exact maximum of the summed scores under its constraint:

    token choice      every token keeps its k best                  (TopK: Gao et al. 2024, arXiv 2406.04093)
    mutual choice     the batch keeps its k * tokens best           (BatchTopK: Bussmann et al. 2024, arXiv 2412.06410)
    feature choice    every feature keeps its m_i best tokens, the m_i summing to k * tokens (capacity.py)

No rule picks an entry at or below zero, so fewer than the budget are active where too few are positive. Ties go to the
lower token, then the lower feature. A rule works in two steps: bounds on its cut find candidates in dense scores
(kernels/candidates.py), then `keep` chooses among those, exactly.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.sae.allocation.candidates import ColumnBounds, Entries, RowBounds, TotalBound


class Rule(Protocol):
    """An allocation for batches ``[tokens, n_features]``."""

    def bounds(
        self, tokens: int, n_features: int, margin: float, device: torch.device
    ) -> RowBounds | TotalBound | ColumnBounds:
        """What finds candidates in tiles of scores that are within `margin` of exact."""
        ...

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        """True for the entries that get budget, bool ``[n]``; ties go to the earlier entry."""
        ...

    def budget(self, tokens: int) -> int:
        """The most entries that can be active in a batch."""
        ...

    def times(self, factor: int) -> "Rule":
        """The same rule with a budget so many times as large."""
        ...


@dataclass(frozen=True)
class TokenChoice:
    k: int

    def bounds(self, tokens: int, n_features: int, margin: float, device: torch.device) -> RowBounds:
        return RowBounds(tokens, n_features, min(self.k, n_features), margin, device)

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        budgets = torch.full((tokens,), self.k, device=entries.tokens.device)
        return _best_of_each(entries.scores, entries.tokens, budgets)

    def budget(self, tokens: int) -> int:
        return tokens * self.k

    def times(self, factor: int) -> "TokenChoice":
        return TokenChoice(factor * self.k)


@dataclass(frozen=True)
class MutualChoice:
    k: int

    def bounds(self, tokens: int, n_features: int, margin: float, device: torch.device) -> TotalBound:
        return TotalBound(min(self.budget(tokens), tokens * n_features), tokens * n_features, margin)

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        best = _falling(entries.scores)[: self.budget(tokens)]
        return torch.zeros_like(entries.scores, dtype=torch.bool).index_fill_(0, best, True)

    def budget(self, tokens: int) -> int:
        return tokens * self.k

    def times(self, factor: int) -> "MutualChoice":
        return MutualChoice(factor * self.k)


@dataclass(frozen=True)
class FeatureChoice:
    capacities: Tensor
    """How many tokens each feature may have, ``[n_features]`` int64."""
    total: int
    """Their sum, known to the host."""
    ladder: tuple[Tensor, list[tuple[int, int, int]]] | None = field(default=None, repr=False)
    """For GPUs: see ColumnBounds."""

    def bounds(self, tokens: int, n_features: int, margin: float, device: torch.device) -> ColumnBounds:
        return ColumnBounds(self.capacities, margin, self.ladder)

    def keep(self, entries: Entries, tokens: int) -> Tensor:
        return _best_of_each(entries.scores, entries.features, self.capacities)

    def budget(self, tokens: int) -> int:
        return self.total

    def times(self, factor: int) -> "FeatureChoice":
        ladder = self.ladder and (self.ladder[0], [(a, b, factor * largest) for a, b, largest in self.ladder[1]])
        return FeatureChoice(factor * self.capacities, factor * self.total, ladder)


def token_choice(scores: Tensor, k: int) -> Codes:
    """The k largest positive scores of each token: scores ``[tokens, n_features]`` -> codes with those values."""
    return allocate(scores, TokenChoice(k))


def mutual_choice(scores: Tensor, k: int) -> Codes:
    """The k * tokens largest positive scores of all: scores ``[tokens, n_features]`` -> codes with those values."""
    return allocate(scores, MutualChoice(k))


def feature_choice(scores: Tensor, capacities: Tensor) -> Codes:
    """The m_i largest positive scores of each feature i, `capacities` being m ``[n_features]`` int64."""
    return allocate(scores, FeatureChoice(capacities, int(capacities.sum())))


def allocate(scores: Tensor, rule: Rule) -> Codes:
    """Apply `rule` to dense scores ``[tokens, n_features]``; the codes' values are the scores."""
    tokens, n_features = scores.shape
    bounds = rule.bounds(tokens, n_features, 0.0, scores.device)
    entries = in_order(bounds.final(bounds.candidates(scores, 0, 0)), n_features)
    return as_codes(entries, rule.keep(entries, tokens), rule.budget(tokens), tokens, n_features)[0]


def in_order(entries: Entries, n_features: int) -> Entries:
    """Sorted by token, then feature."""
    order = torch.argsort(entries.tokens * n_features + entries.features)
    return Entries(*(part[order] for part in entries))


def as_codes(entries: Entries, keep: Tensor, budget: int, tokens: int, n_features: int) -> tuple[Codes, Tensor]:
    """The kept ones of `entries`, which are in order, as codes; and their indices into `entries`.

    On a CPU the codes hold what was kept. Elsewhere, so that the host need not wait to know how many, they hold
    `budget` entries (or all there are); those that were not kept fill up with value 0.
    """
    keep = keep & (entries.scores > 0)
    if keep.device.type != "cpu":
        return _fixed(entries, keep, budget, tokens, n_features)
    return _gathered(entries, keep, keep.nonzero().squeeze(1), tokens, n_features)


def _fixed(entries: Entries, keep: Tensor, budget: int, tokens: int, n_features: int) -> tuple[Codes, Tensor]:
    slots = torch.argsort(keep.logical_not().byte(), stable=True)[:budget].sort().values
    return _gathered(entries, keep, slots, tokens, n_features)


def _gathered(entries: Entries, keep: Tensor, slots: Tensor, tokens: int, n_features: int) -> tuple[Codes, Tensor]:
    scores = torch.where(keep[slots], entries.scores[slots], 0.0)
    offsets = torch.searchsorted(entries.tokens[slots], torch.arange(tokens + 1, device=keep.device))
    return Codes(scores, entries.features[slots], offsets, n_features), slots


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
