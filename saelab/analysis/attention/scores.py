"""What each attention head does on text: the shares of its attention that go to some kinds of positions.

Means over the ordinary tokens after the first position, the destinations t; s are the sources, A[t, s] the pattern:

previous    A[t, t - 1]
self        A[t, t]
first       A[t, 0], where many heads rest
duplicate   sum of A[t, s] over earlier s with the token of t; a mean over those t that have such s
induction   sum of A[t, s] over earlier s that follow the token of t; a mean over those t that have such s
entropy     -sum of A[t, s] log A[t, s], in nats
distance    sum of A[t, s] (t - s), in tokens: how far back queries find their keys

On real text, tokens come back for many reasons, so `induction` and `duplicate` have a chance level: the same sums for
attention that is equal on all sources. Repeated random tokens (induction.py) are the test without chance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.attention.report import CHANCE, SCORES
from saelab.lm.attention import Heads


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Sums over tokens of all scores, by row; `add` fills it, layer by layer."""

    sums: np.ndarray
    """``[rows, layers, heads, scores]`` float64"""
    counts: np.ndarray
    """Destinations that count for each score, ``[rows, scores]``."""
    chance: np.ndarray
    """Sums of the scores `CHANCE` for equal attention, ``[rows, 2]``."""
    layer_index: Mapping[int, int] = field(repr=False)

    @classmethod
    def empty(cls, rows: int, layers: list[int], heads: int) -> "HeadScores":
        shape = (rows, len(layers), heads, len(SCORES))
        index = {layer: i for i, layer in enumerate(layers)}
        return cls(np.zeros(shape), np.zeros((rows, len(SCORES))), np.zeros((rows, 2)), index)

    def add(self, rows: Tensor, ordinary: Tensor, layer: int, heads: Heads, first_row: int) -> None:
        """Add a layer's heads on `rows` ``[rows, context]``, the first of which has the number `first_row`."""
        destination = ordinary.clone()
        destination[:, 0] = False
        index = self.layer_index[layer]
        for i in range(len(rows)):
            at = destination[i].nonzero().squeeze(1)
            pattern = heads.pattern[i][:, at].float()  # [heads, destinations, sources]
            same, after = repeats(rows[i], at)
            sums, counts = _sums(pattern, at, same, after)
            self.sums[first_row + i, index] = sums.cpu().numpy()
            if index == 0:
                self.counts[first_row + i] = counts.cpu().numpy()
                sources = (at + 1)[:, None]
                self.chance[first_row + i] = [float((mask / sources).sum()) for mask in (same, after)]

    def mean(self) -> np.ndarray:
        """The scores, ``[layers, heads, scores]``; NaN if no token counts."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums.sum(0) / self.counts.sum(0)

    def chance_of(self, score: str) -> float:
        """The score of attention that is equal on all sources."""
        counts = self.counts[:, SCORES.index(score)].sum()
        return float(self.chance[:, CHANCE.index(score)].sum() / counts) if counts else float("nan")


def repeats(ids: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Earlier sources with the token of each destination, and earlier sources after one, ``[n, context]`` bool each."""
    position = torch.arange(len(ids), device=ids.device)
    equal = ids[at][:, None] == ids[None]
    earlier = position[None] < at[:, None]
    after = torch.zeros_like(equal)
    after[:, 1:] = equal[:, :-1]
    return equal & earlier, after & earlier


def _sums(pattern: Tensor, at: Tensor, same: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the scores over destinations ``[heads, scores]``, and how many count for each ``[scores]``."""
    one = partial(torch.ones_like, at, dtype=torch.float64)
    distance = (at[:, None] - torch.arange(pattern.shape[2], device=at.device)).clamp_min(0).to(pattern.dtype)
    picked = torch.arange(len(at), device=at.device)
    terms = [
        (pattern[:, picked, at - 1], one()),
        (pattern[:, picked, at], one()),
        (pattern[:, :, 0], one()),
        ((pattern * same).sum(2), same.any(1).double()),
        ((pattern * after).sum(2), after.any(1).double()),
        (torch.special.entr(pattern).sum(2), one()),
        ((pattern * distance).sum(2), one()),
    ]
    sums = torch.stack([(value.double() * counted).sum(1) for value, counted in terms], 1)
    return sums, torch.stack([counted.sum() for _, counted in terms])
