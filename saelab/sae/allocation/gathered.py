"""The exact choice when tokens or features are spread over processes (saelab.ranks).

Each process finds the candidates among its own entries. Those that a rule compares come together in one process, or in
all of them for mutual choice, and the choice is made with the rule's own `keep`, ties included: it is what one process
would find.
"""

from dataclasses import replace

import torch
from torch import Tensor

from saelab.ranks import Axis, Ranks
from saelab.sae.allocation.candidates import Bands, Entries
from saelab.sae.allocation.rules import FeatureChoice, GroupMax, MutualChoice, Rule


def compared_along(rule: Rule, ranks: Ranks) -> Axis:
    """The processes whose entries `rule` compares."""
    return {"token": ranks.features, "feature": ranks.data, "batch": ranks.every, "nothing": Axis()}[rule.compares]


def own_rule(rule: Rule, part: slice) -> Rule:
    """`rule`, for all features, on the features of one process."""
    if isinstance(rule, GroupMax):
        return replace(rule, first=part.start)
    if not isinstance(rule, FeatureChoice) or part == slice(0, len(rule.capacities)):
        return rule  # with its bands: to make new ones waits for a GPU
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
    if isinstance(rule, MutualChoice):
        candidates = _possible(entries.scores, rule.slots(tokens), axis)
    else:  # an entry that others of this process beat is not among the best of all either
        own = rule.keep(entries, part.stop - part.start) & (entries.scores > 0)
        candidates = own.nonzero().squeeze(1)
    mine = entries.where(candidates)
    if isinstance(rule, GroupMax):  # its groups count from the first feature of all
        mine, rule = mine.shifted(0, rule.first), replace(rule, first=0)
    if rule.compares == "token":
        kept = _keep_by_parts(rule, mine, mine.tokens, part.stop - part.start, axis)
    elif isinstance(rule, FeatureChoice):
        kept = _keep_by_parts(rule, mine.shifted(part.start, 0), mine.features, len(rule.capacities), axis)
    else:
        kept = _keep_of_all(rule, mine.shifted(part.start, 0), tokens, axis)
    return torch.zeros_like(entries.scores, dtype=torch.bool).index_copy_(0, candidates, kept)


def _keep_of_all(rule: Rule, mine: Entries, tokens: int, axis: Axis) -> Tensor:
    """Which of the entries `mine` the rule picks among those of all processes along `axis`: all make the choice."""
    everyone = axis.gather(_packed(mine))
    start = sum(map(len, everyone[: axis.rank]))
    kept = _kept(rule, _unpacked(torch.cat(everyone), mine.scores.dtype), tokens)
    return kept[start : start + len(mine.scores)]


def _keep_by_parts(rule: Rule, mine: Entries, groups: Tensor, number: int, axis: Axis) -> Tensor:
    """As `_keep_of_all`, for a rule that compares the entries of a group: of one of `number` tokens, or features.

    Each process along `axis` makes the choice for a part of the groups, and sends the others the result. `groups` are
    those of `mine`.
    """
    order, parts = torch.argsort(groups, stable=True), axis.parts(number)
    part = parts[axis.rank]
    ends = torch.tensor([part.stop for part in parts], device=groups.device)
    sizes = torch.searchsorted(groups[order], ends).diff(prepend=ends.new_zeros(1)).tolist()
    received = axis.swap(_packed(mine.where(order)).split(sizes))
    together = _unpacked(torch.cat(received), mine.scores.dtype)
    if rule.compares == "token":
        together = together.shifted(-part.start, 0)
    else:
        rule, together = own_rule(rule, part), together.shifted(0, -part.start)
    kept = _kept(rule, together, part.stop - part.start)
    found = torch.cat(axis.swap(kept.split([len(each) for each in received])))
    return torch.empty_like(found).index_copy_(0, order, found)


def _kept(rule: Rule, entries: Entries, tokens: int) -> Tensor:
    """Which entries the rule picks, if those of a token are in the order of their features."""
    order = torch.argsort(entries.tokens, stable=True)
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = rule.keep(entries.where(order), tokens)
    return kept


def strongest(values: Tensor, k: int, axis: Axis) -> Tensor:
    """Which of this process's `values` ``[tokens, n]`` are among the k largest of each token, bool ``[tokens, n]``.

    n may differ between processes. Each makes the choice for a part of the tokens, and sends the others the result.
    """
    n, parts = values.shape[1], axis.parts(len(values))
    wide = values.new_full((len(values), axis.largest(n)[0]), -torch.inf)
    wide[:, :n] = values
    together = torch.cat(axis.swap([wide[part] for part in parts]), 1)
    best = together.topk(min(k, together.shape[1]), dim=1, sorted=False).indices
    kept = torch.zeros_like(together, dtype=torch.bool).scatter_(1, best, True)
    return torch.cat(axis.swap([each.contiguous() for each in kept.chunk(axis.size, 1)]))[:, :n]


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
