"""The active entries of a batch: dense scores in tiles, candidates, an exact choice in float32.

The dense ``[tokens, n_features]`` matrix exists one tile at a time (encoder.tiles). In float32 the scores of a tile are
final. In bfloat16 they only propose candidates, with a margin of `BF16_MARGIN`, and the candidates are scored again in
float32 before the choice is made.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from saelab.codes import Codes
from saelab.ranks import ALONE, Axis, Ranks
from saelab.sae.affinity import Affinity
from saelab.sae.allocation.candidates import Entries
from saelab.sae.allocation.gathered import compared_along, keep, proposing_rule, strongest
from saelab.sae.allocation.rules import Rule
from saelab.sae.encoder import Encoder, Scratch, Tile, tiles

BF16_MARGIN = 2.0**-6
"""Relative error allowed in a bfloat16 score. Half a unit in its last digit is 2^-9: four of them for the rounding of
products on both sides of the cut, four more for the rounding of the inputs."""
EXACT_MARGIN = 1e-5
"""Relative error allowed between two float32 computations of one score in different orders of summation."""


class Request(NamedTuple):
    """Entries that a term of the loss needs besides the active ones."""

    rule: Rule
    mask: Tensor | None = None
    """bool ``[n_features]``: each token's strongest pre-activations among these features, as many as the rule grants
    one token. None: the entries that the rule picks among all."""


class Selection(NamedTuple):
    pattern: Codes
    """The selected entries; the values are their scores, 0 (with a mask: -inf) in an unfilled slot."""
    pre: Tensor | None
    """Pre-activations of these entries, float32 ``[nnz]``; None if only bfloat16 ones are known."""


@torch.no_grad()
def select(
    encoder: Encoder,
    W_dec: Tensor,
    centred: Tensor,
    rules: Sequence[Rule],
    affinity: Affinity | None = None,
    *,
    bf16: bool = False,
    masked: Request | None = None,
    scratch: Scratch,
    ranks: Ranks = ALONE,
    batch: int | None = None,
) -> tuple[list[Selection], Selection | None]:
    """The selection by each of `rules`, and that of a request with a mask.

    centred = x - b_dec ``[tokens, d_in]``, at least float32. Without an `affinity` the scores are the pre-activations;
    that of the gradient needs W_dec ``[n_features, d_in]``. All share one pass over the tiles: the rule with the most
    slots finds the candidates, and the others choose among them.

    If several processes share the work, everything is of this process's tokens and features, but the choice is the one
    among all of them; `batch` is the number of tokens of all.
    """
    tokens, n_features = len(centred), len(W_dec)
    batch = tokens if batch is None else batch
    margin = BF16_MARGIN if bf16 else EXACT_MARGIN if affinity is not None else 0.0
    margin *= 1.0 if affinity is None else affinity.roundings
    widest = proposing_rule(max(rules, key=lambda rule: rule.slots(tokens) or 0), batch, tokens)
    bounds = widest.bounds(tokens, n_features, margin, centred.device)
    masked_best = None
    if masked is not None and masked.mask is not None:
        masked_best = _Strongest(masked.mask, masked.rule.slots(1) or n_features, centred)
    proposing = centred.bfloat16() if bf16 else centred
    found, ordered = [], bounds.row_major
    for tile in tiles(tokens, n_features, centred.device, bf16, bounds.whole_columns):
        scores = encoder.scores(proposing, tile, scratch)
        if masked_best is not None:
            with record_function("selection"):
                masked_best.see(scores, tile)
        if affinity is not None:
            scores = affinity.tile(scores, tile, W_dec, scratch)
        with record_function("selection"):
            found.append(bounds.candidates(scores, tile.tokens.start, tile.features.start))
        ordered = ordered and tile.features == slice(0, n_features)
    del proposing
    with record_function("selection"):
        entries = Entries(*(torch.cat(parts) for parts in zip(*found, strict=True))) if len(found) > 1 else found[0]
        entries = bounds.final(entries)
        if not ordered:
            entries = in_order(entries, n_features)
        pre = entries.scores
        if bf16 or affinity is not None:
            pattern = _pattern(entries, tokens, n_features)
            exact = pre = encoder.pre(pattern, centred, None)
            if affinity is not None:
                exact = affinity.entries(pre, pattern, W_dec)
            entries = entries._replace(scores=exact)
        selections = []
        for rule in rules:
            limit = rule.slots(tokens) if compared_along(rule, ranks).size == 1 else None
            pattern, slots = as_codes(entries, keep(rule, entries, batch, ranks), limit, tokens, n_features)
            selections.append(Selection(pattern, pre[slots]))
        return selections, None if masked_best is None else masked_best.selection(ranks.features, exact=not bf16)


def in_order(entries: Entries, n_features: int) -> Entries:
    """`entries` sorted by token, then feature."""
    place = entries.tokens * n_features + entries.features
    if place.device.type == "cpu" and len(place) and int(place.max()) < 2**31:
        place = place.int()  # sorts twice as fast
    order = torch.argsort(place)
    return Entries(*(part[order] for part in entries))


def as_codes(
    entries: Entries, keep: Tensor, slots: int | None, tokens: int, n_features: int
) -> tuple[Codes, Tensor | slice]:
    """The entries to keep as codes, and their indices into `entries`, which are in order.

    On a CPU, or if `slots` is None, the codes are exactly these entries. Otherwise they have `slots` entries (or all
    there are), the last of them not kept and of value 0, so that the host need not wait for the number of kept ones.
    """
    keep = keep & (entries.scores > 0)
    if keep.device.type == "cpu" and bool(keep.all()):  # so it is with a threshold in float32
        return _pattern(entries, tokens, n_features), slice(None)
    if slots is None or keep.device.type == "cpu":
        return _gathered(entries, keep, keep.nonzero().squeeze(1), tokens, n_features)
    return _fixed(entries, keep, slots, tokens, n_features)


def _fixed(entries: Entries, keep: Tensor, slots: int, tokens: int, n_features: int) -> tuple[Codes, Tensor]:
    index = torch.argsort(keep.logical_not().byte(), stable=True)[:slots].sort().values
    return _gathered(entries, keep, index, tokens, n_features)


def _gathered(entries: Entries, keep: Tensor, index: Tensor, tokens: int, n_features: int) -> tuple[Codes, Tensor]:
    scores = torch.where(keep[index], entries.scores[index], 0.0)
    offsets = torch.searchsorted(entries.tokens[index], torch.arange(tokens + 1, device=keep.device))
    return Codes(scores, entries.features[index], offsets, n_features), index


def _pattern(entries: Entries, tokens: int, n_features: int) -> Codes:
    offsets = torch.searchsorted(entries.tokens, torch.arange(tokens + 1, device=entries.tokens.device))
    return Codes(entries.scores, entries.features, offsets, n_features)


class _Strongest:
    """Per token, the k largest pre-activations among the features of a mask, over tiles of features or tokens."""

    def __init__(self, mask: Tensor, k: int, centred: Tensor) -> None:
        self.mask, device = mask, centred.device
        self.k = k
        if device.type == "cpu":  # elsewhere the host cannot know how many there are without waiting
            k = min(k, int(mask.sum()))
        k = min(k, len(mask))
        self.values = torch.full((len(centred), k), -torch.inf, device=device, dtype=centred.dtype)
        self.features = torch.zeros((len(centred), k), dtype=torch.long, device=device)

    def see(self, pre: Tensor, tile: Tile) -> None:
        k = self.values.shape[1]
        mask = self.mask[tile.features]
        if pre.device.type == "cpu":
            which = mask.nonzero().squeeze(1)
            pre = pre[:, which]
        else:
            which = torch.arange(len(mask), device=pre.device)
            pre = pre.masked_fill(~mask, -torch.inf)
        if not k or not len(which):
            return
        values, index = pre.topk(min(k, len(which)), dim=1, sorted=False)
        values = torch.cat([self.values[tile.tokens], values.to(self.values.dtype)], 1)
        features = torch.cat([self.features[tile.tokens], which[index] + tile.features.start], 1)
        self.values[tile.tokens], best = values.topk(k, dim=1, sorted=False)
        self.features[tile.tokens] = features.gather(1, best)

    def selection(self, axis: Axis, *, exact: bool) -> Selection:
        """The entries found, those of this process along `axis`; slots that no feature fills have value -inf."""
        pattern = Codes.from_topk(self.values, self.features, len(self.mask))
        if axis.size > 1:
            kept = strongest(self.values, self.k, axis) & (self.values > -torch.inf)
            pattern = pattern.where(kept.flatten())
        return Selection(pattern, pattern.values if exact else None)
