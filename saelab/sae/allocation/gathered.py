"""The exact choice when tokens or features are spread over processes (saelab.ranks).

Each process finds the candidates among its own entries. Those that a rule compares are gathered, and every process
makes the choice on all of them with the rule's own `keep`, ties included, so all find what one process would find.
"""

from dataclasses import replace

import torch
from torch import Tensor

from saelab.ranks import Axis, Ranks
from saelab.sae.allocation.candidates import Bands, Entries
from saelab.sae.allocation.rules import FeatureChoice, MutualChoice, Rule


def compared_along(rule: Rule, ranks: Ranks) -> Axis:
    """The processes whose entries `rule` compares."""
    return {"token": ranks.features, "feature": ranks.data, "batch": ranks.every, "nothing": Axis()}[rule.compares]


def own_rule(rule: Rule, part: slice) -> Rule:
    """`rule`, for all features, on the features of one process."""
    if not isinstance(rule, FeatureChoice):
        return rule
    capacities = rule.capacities[part]
    bands = None if capacities.device.type == "cpu" else Bands.of(capacities)
    return replace(rule, capacities=capacities, bands=bands)


def proposing_rule(rule: Rule, tokens: int, own_tokens: int) -> Rule:
    """The rule that finds the candidates among `own_tokens` of the `tokens` of a batch: of the whole batch's budget."""
    return rule.times(-(-tokens // max(1, own_tokens))) if isinstance(rule, MutualChoice) else rule


def keep(rule: Rule, entries: Entries, tokens: int, ranks: Ranks) -> Tensor:
    """Which candidates of this process `rule` picks in a batch of `tokens`, bool ``[n]``.

    `entries` are in order; their numbers of tokens and features count from the first of this process.
    """
    axis, part = compared_along(rule, ranks), ranks.data.part(tokens)
    if axis.size == 1:
        return rule.keep(entries, part.stop - part.start)
    candidates = torch.arange(len(entries.scores), device=entries.scores.device)
    if isinstance(rule, MutualChoice):
        candidates = _possible(entries.scores, rule.slots(tokens), axis)
    mine = entries.where(candidates)
    if rule.compares != "token":
        mine, part = mine.shifted(part.start, 0), slice(0, tokens)
    everyone = axis.gather(_packed(mine))
    start = sum(map(len, everyone[: axis.rank]))
    together = _unpacked(torch.cat(everyone), entries.scores.dtype)
    order = torch.argsort(together.tokens, stable=True)  # within a token, processes are in the order of their features
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = rule.keep(together.where(order), part.stop - part.start)
    found = torch.zeros_like(entries.scores, dtype=torch.bool)
    return found.index_copy_(0, candidates, kept[start : start + len(candidates)])


def strongest(values: Tensor, k: int, axis: Axis) -> Tensor:
    """Which of this process's `values` ``[tokens, n]`` are among the k largest of each token, bool ``[tokens, n]``.

    n may differ between processes.
    """
    together = [part.T for part in axis.gather(values.T.contiguous())]
    start = sum(part.shape[1] for part in together[: axis.rank])
    everything = torch.cat(together, 1)
    best = everything.topk(min(k, everything.shape[1]), dim=1, sorted=False).indices
    kept = torch.zeros_like(everything, dtype=torch.bool).scatter_(1, best, True)
    return kept[:, start : start + values.shape[1]]


def _possible(scores: Tensor, total: int, axis: Axis) -> Tensor:
    """Indices of the scores that can be among the `total` largest of all processes.

    If each of n processes has total / n scores of at least c, no score below c is among them.
    """
    share = -(-total // axis.size)
    cut = scores.new_zeros(1)
    if share <= len(scores):
        cut = scores.topk(share, sorted=False).values.min()[None]
    return (scores >= axis.min_(cut)).nonzero().squeeze(1)


def _packed(entries: Entries) -> Tensor:
    """Entries as integers ``[n, 3]``, which one exchange carries."""
    kind = torch.int32 if entries.scores.dtype == torch.float32 else torch.int64
    return torch.stack([entries.tokens.to(kind), entries.features.to(kind), entries.scores.view(kind)], 1)


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Entries:
    tokens, features, scores = packed.T.contiguous()
    return Entries(tokens.long(), features.long(), scores.view(dtype))
