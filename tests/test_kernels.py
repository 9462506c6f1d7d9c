"""spmm and sddmm equal their dense formulas, forward and backward, on random ragged patterns in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.codes import Codes
from saelab.kernels import sddmm, spmm
from saelab.kernels.cpu import spmm_transposed


@st.composite
def problems(draw: st.DrawFn) -> tuple[Codes, torch.Tensor, torch.Tensor]:
    """Ragged codes (empty rows, repeated counts, nnz 0 included), a table and a left factor."""
    tokens, n_features, d = draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(0, n_features), min_size=tokens, max_size=tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = [torch.randperm(n_features, generator=generator)[:c] for c in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    values = torch.randn(int(offsets[-1]), dtype=torch.float64, generator=generator)
    table = torch.randn(n_features, d, dtype=torch.float64, generator=generator)
    left = torch.randn(tokens, d, dtype=torch.float64, generator=generator)
    return Codes(values, torch.cat(features), offsets, n_features), table, left


@given(problems())
@settings(max_examples=60, deadline=None)
def test_products_equal_the_dense_formulas(problem: tuple[Codes, torch.Tensor, torch.Tensor]) -> None:
    codes, table, left = problem
    dense = codes.to_dense()
    torch.testing.assert_close(spmm(codes, table), dense @ table)
    torch.testing.assert_close(spmm_transposed(codes, left), dense.T @ left)
    bias = table.sum(1)
    at_pattern = (left @ table.T + bias)[codes.row_of_entry(), codes.features]
    torch.testing.assert_close(sddmm(codes, left, table, bias), at_pattern)


@given(problems())
@settings(max_examples=15, deadline=None)
def test_gradients_are_those_of_finite_differences(problem: tuple[Codes, torch.Tensor, torch.Tensor]) -> None:
    codes, table, left = problem
    bias = table.sum(1)

    def decode(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return spmm(Codes(values, codes.features, codes.offsets, codes.n_features), table)

    def encode(left: torch.Tensor, table: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return sddmm(codes, left, table, bias)

    leaves = [t.clone().requires_grad_() for t in (codes.values, table, left, bias)]
    assert torch.autograd.gradcheck(decode, leaves[:2])
    assert torch.autograd.gradcheck(encode, (leaves[2], leaves[1], leaves[3]))


def test_known_products_are_returned_and_still_differentiated() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    pattern = Codes(torch.zeros(6), torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 2, 4, 6]), 5)
    known = torch.arange(6.0)
    out = sddmm(pattern, a, b, known=known)
    assert torch.equal(out, known)
    out.sum().backward()
    computed = torch.autograd.grad(sddmm(pattern, a, b).sum(), (a, b))
    torch.testing.assert_close((a.grad, b.grad), computed)


def test_one_feature_on_every_token_and_blocks_of_the_pattern() -> None:
    n = 20_000  # more entries than one block of sddmm
    codes = Codes(torch.rand(n), torch.zeros(n, dtype=torch.long), torch.arange(n + 1), 3)
    table, left = torch.randn(3, 8), torch.randn(n, 8)
    torch.testing.assert_close(spmm(codes, table), codes.values[:, None] * table[0])
    torch.testing.assert_close(sddmm(codes, left, table), left @ table[0])
    torch.testing.assert_close(spmm_transposed(codes, left)[0], codes.values @ left, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("times", [5])
def test_the_transposed_product_is_the_same_every_time(times: int) -> None:
    torch.manual_seed(0)
    codes = Codes.from_topk(*torch.randn(512, 64).topk(8), n_features=64)
    rows = torch.randn(512, 33)
    first = spmm_transposed(codes, rows)
    assert all(torch.equal(first, spmm_transposed(codes, rows)) for _ in range(times))
