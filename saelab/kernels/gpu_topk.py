"""The exact k largest scores per token, for GPUs, in Triton. Reads the scores once; torch.topk reads them many times.

Reading them, T * F * s bytes, limits its speed. Of the four kernels only the first sees all scores. They find

1. the largest score of every group of G neighbouring features;
2. the k groups with the largest maxima, ties to the lower group. These groups contain the k largest scores, ties to the
   lower feature: any score outside them comes after k maxima that are larger, or equal with a lower feature;
3. the k largest of the k * G scores in these groups;
4. their order.

With G = sqrt(F / k), steps 2 and 3 see about sqrt(F * k) scores each, in all F / G + k * G of the F. They find the k-th
largest bit by bit: scores become integers with the same order, and the largest integer that at least k of them reach is
built from its highest bit down, with one count per bit. Larger scores are taken, then ties from the lowest feature up.
The host never waits, and the result does not depend on timing.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab.kernels import reference
from saelab.kernels.launch import launch

DIRECT = 4096
"""With at most this many features, step 3 reads them all and steps 1 and 2 are skipped."""
MOST_K = 2048
MOST_CANDIDATES = 16384
"""Most scores that one program of steps 2 and 3 can keep: 16 to 32 numbers per thread."""
_SPARE_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Number of lowest bits of a float32 that are the same for all numbers of the dtype."""
_jit: Any = triton.jit
"""For kernels called by kernels: type checkers think that such a call never returns, as it raises outside kernels."""


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of every row in descending order, ties to the lower feature: two ``[tokens, k]``.

    scores ``[tokens, n_features]`` in float32, bfloat16 or float16. Sorts fully for float64, for k above 2048, and for
    k * n_features above some 2^27.
    """
    tokens, n = scores.shape
    group = group_size(n, k)
    groups = -(-n // group) if group else 0
    if scores.dtype not in _SPARE_BITS or k > MOST_K or max(groups, k * group or n) > MOST_CANDIDATES:
        return reference.topk(scores, k)
    values = scores.new_empty(tokens, k)
    features = torch.empty(tokens, k, dtype=torch.long, device=scores.device)
    if not values.numel():
        return values, features
    scores = scores.contiguous()
    best = chosen = torch.empty(tokens, k, dtype=torch.int32, device=scores.device)
    if group:
        best = torch.empty_like(chosen)
        maxima = scores.new_empty(tokens, groups)
        grid, options = maxima_launch(tokens, groups, group)
        launch(_maxima, grid, maxima, scores, n, groups, **options)
        launch(_choose, (tokens,), best, maxima, best, groups, k, **choose_options(groups, 0, scores.dtype))
    launch(_choose, (tokens,), chosen, scores, best, n, k, **choose_options(k * group or n, group, scores.dtype))
    launch(_order, (tokens,), values, features, chosen, scores, n, k, **order_options(k))
    return values, features


@triton.jit
def _as_integers(scores):
    """int32 in the order of the scores; -0 and 0 are equal and NaN is largest."""
    bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    ordered = tl.where(size == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(size > 0x7F800000, 0x7FFFFFFF, ordered)


@triton.jit
def _maxima(maxima, scores, n, groups, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Step 1: the largest score of each of some neighbouring groups, for one token."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    index = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    order = _as_integers(tl.load(scores + token * n + index, mask=index < n, other=float("-inf")))
    largest = tl.max(order, 1)
    largest = (largest ^ ((largest >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(maxima + token * groups + group, largest, mask=group < groups)


@_jit
def _candidates(scores, groups, token, n, k, candidate, GROUP: tl.constexpr, SPARE_BITS: tl.constexpr):
    """The features of the candidates numbered `candidate`, in ascending order, and their scores as integers. Without a
    candidate the integer is -2^(31 - SPARE_BITS), less than any score's."""
    index = candidate
    if GROUP > 0:
        group = tl.load(groups + token * k + candidate // GROUP, mask=candidate < k * GROUP, other=0)
        index = tl.where(candidate < k * GROUP, group * GROUP + candidate % GROUP, n)
    order = _as_integers(tl.load(scores + token * n + index, mask=index < n, other=0.0)) >> SPARE_BITS
    return index, tl.where(index < n, order, -(1 << (31 - SPARE_BITS)))


@triton.jit
def _choose(
    chosen,
    scores,
    groups,
    n,
    k,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SPARE_BITS: tl.constexpr,
):
    """Steps 2 and 3: the k best of one token by ascending feature, of all n or, with GROUP > 0, of k `groups`."""
    token = tl.program_id(0).to(tl.int64)
    _, everything = _candidates(scores, groups, token, n, k, tl.arange(0, CANDIDATES), GROUP, SPARE_BITS)
    kth = tl.where(tl.sum((everything >= 0).to(tl.int32)) >= k, 0, -(1 << (31 - SPARE_BITS)))
    for bit in range(31 - SPARE_BITS):
        higher = kth + (1 << (30 - SPARE_BITS - bit))
        kth = tl.where(tl.sum((everything >= higher).to(tl.int32)) >= k, higher, kth)
    room = k - tl.sum((everything > kth).to(tl.int32))

    # Read the candidates again, from the cache and in parts: a scan over all of them needs too many registers.
    larger_so_far, ties_so_far = room * 0, room * 0
    for first in range(0, CANDIDATES, AT_ONCE):
        candidate = first + tl.arange(0, AT_ONCE)
        index, order = _candidates(scores, groups, token, n, k, candidate, GROUP, SPARE_BITS)
        larger, tie = order > kth, order == kth
        seen = tl.cumsum(larger.to(tl.int32) + (tie.to(tl.int32) << 16))  # two counts in one scan
        ties = ties_so_far + (seen >> 16)
        slot = larger_so_far + (seen & 0xFFFF) + tl.minimum(ties, room) - 1
        tl.store(chosen + token * k + slot, index, mask=larger | (tie & (ties <= room)))
        larger_so_far += tl.sum(larger.to(tl.int32))
        ties_so_far += tl.sum(tie.to(tl.int32))


@triton.jit
def _order(values, features, chosen, scores, n, k, SLOTS: tl.constexpr, OTHERS: tl.constexpr):
    """Step 4: the k chosen of one token by descending score; the rank of each is the number that come before it."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    feature = tl.load(chosen + token * k + slot, mask=slot < k, other=0)
    score = tl.load(scores + token * n + feature)
    mine = _as_integers(score)[None, :]
    rank = tl.zeros([SLOTS], tl.int32)
    for first in range(0, k, OTHERS):
        other = first + tl.arange(0, OTHERS)
        their_feature = tl.load(chosen + token * k + other, mask=other < k, other=0)
        theirs = _as_integers(tl.load(scores + token * n + their_feature))[:, None]
        before = (theirs > mine) | ((theirs == mine) & (other[:, None] < slot[None, :]))
        rank += tl.sum((before & (other < k)[:, None]).to(tl.int32), 0)
    tl.store(values + token * k + rank, score, mask=slot < k)
    tl.store(features + token * k + rank, feature.to(tl.int64), mask=slot < k)


def group_size(n: int, k: int) -> int:
    """Features per group, a power of two near sqrt(n / k) and at least 4; 0 if step 3 reads all features."""
    if n <= DIRECT or n < 4 * k or not k:
        return 0
    return max(4, 2 ** round(math.log2(n / k) / 2))


def maxima_launch(tokens: int, groups: int, group: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and compile-time options of step 1: 4096 scores per program."""
    per_program = max(1, 4096 // group)
    return (tokens, -(-groups // per_program)), {"GROUP": group, "GROUPS": per_program, "num_warps": 4}


def choose_options(candidates: int, group: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time options of step 2 (group 0, all candidates) and step 3 (the `candidates` in k groups)."""
    size = max(16, triton.next_power_of_2(candidates))
    sizes = {"GROUP": group, "CANDIDATES": size, "AT_ONCE": min(size, 2048)}
    return {**sizes, "SPARE_BITS": _SPARE_BITS[dtype], "num_warps": max(1, min(16, size // 512))}


def order_options(k: int) -> dict[str, Any]:
    """Compile-time options of step 4."""
    slots = max(16, triton.next_power_of_2(k))
    return {"SLOTS": slots, "OTHERS": min(8, 4096 // slots), "num_warps": max(1, min(8, slots // 128))}
