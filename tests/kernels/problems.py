"""Shared by the tests of the kernels: the back-ends that can run here, random problems, and the dense formulas."""

import os

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from saelab.codes import Codes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Set by `test_triton_without_a_gpu.py`, which runs these tests again in Triton's interpreter."""
DEVICES = {"reference": "cpu", "cpu": "cpu", "dense": "cpu"}
if INTERPRETED:
    DEVICES = {"triton": "cpu"}
elif torch.cuda.is_available():
    DEVICES["triton"] = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def some(examples: int) -> settings:
    """Settings for this many examples, or a quarter of them in the interpreter."""
    return settings(max_examples=examples // 4 if INTERPRETED else examples, deadline=None)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Codes, Tensor, Tensor]:
    """Ragged float64 codes (empty rows, no rows, no entries, unfilled slots), a table and a left factor, on the CPU."""
    tokens, n_features, d = draw(st.integers(0, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(0, n_features), min_size=tokens, max_size=tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = [torch.randperm(n_features, generator=generator)[:c] for c in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    values = torch.randn(int(offsets[-1]), dtype=torch.float64, generator=generator)
    values[torch.rand(len(values), generator=generator) < 0.1] = 0
    table = torch.randn(n_features, d, dtype=torch.float64, generator=generator)
    left = torch.randn(tokens, d, dtype=torch.float64, generator=generator)
    index = draw(st.sampled_from([torch.int32, torch.int64]))
    joined = torch.cat([torch.zeros(0, dtype=torch.long), *features]).to(index)
    return Codes(values, joined, offsets.to(index), n_features), table, left


def ragged(tokens: int, n_features: int, seed: int = 0, share: float = 0.3) -> Codes:
    """Float64 codes with about `share` of all entries, an empty row among them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, n_features, generator=generator) < share
    mask[tokens // 2] = False
    return Codes.from_mask(mask, torch.randn(tokens, n_features, generator=generator, dtype=torch.float64))


def at_pattern(codes: Codes, dense: Tensor) -> Tensor:
    return dense[codes.row_of_entry(), codes.features]


def assert_rounded(got: Tensor, exact: Tensor, terms: Tensor, count: int) -> None:
    """`got` equals the float64 `exact`, up to one rounding to its dtype and the roundings of sums in at least float32.

    `terms` is the sum of the absolute values of the terms, of which there are at most `count`.
    """
    accumulator = torch.promote_types(got.dtype, torch.float32)
    rounding = torch.finfo(got.dtype).eps * exact.abs() + (count + 2) * torch.finfo(accumulator).eps * terms
    error = (got.double() - exact).abs().cpu()
    assert bool((error <= rounding.cpu() + torch.finfo(got.dtype).tiny).all()), f"off by {error.max()}"
