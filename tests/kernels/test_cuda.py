"""On a real GPU: the host never waits, and sizes for which the interpreter is too slow. The other tests of this folder
run there too, for the back-end `triton`."""

import pytest
import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.kernels import sddmm, spmm, topk
from tests.kernels.problems import INTERPRETED, assert_rounded

pytestmark = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


def step(scores: Tensor, k: int, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """A training step's work on codes: select, values, decode, backward, firing counts."""
    left, w_enc, bias, centre, w_dec = leaves
    pattern = Codes.from_topk(*topk(scores, k), scores.shape[1])
    values = sddmm(pattern, left, w_enc, bias, centre=centre).relu()
    codes = pattern.with_values(values)
    loss = (spmm(codes, w_dec) - left.detach()).square().mean()
    return codes.firing_counts(), codes.l0(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_waits_for_the_gpu_and_two_give_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, n_features, d, k = 512, 12_345, 700, 33
    scores = torch.randn(tokens, n_features, device="cuda", dtype=dtype)
    shapes = ((tokens, d), (n_features, d), (n_features,), (d,), (n_features, d))
    leaves = [torch.randn(s, device="cuda", dtype=dtype).requires_grad_() for s in shapes]
    first = step(scores, k, leaves)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step(scores, k, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_real_size_equals_the_dense_product(table_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, n_features, d, k = 1024, 24_576, 768, 32
    values, features = topk(torch.randn(tokens, n_features, device="cuda"), k)
    features[:, 0] = 0  # a dense feature: its segment is split
    codes = Codes.from_topk(values, features, n_features)
    table = torch.randn(n_features, d, device="cuda").to(table_dtype).requires_grad_()
    out = spmm(codes, table)
    dense, wide = codes.to_dense().double(), table.detach().double()
    assert_rounded(out, dense @ wide, dense.abs() @ wide.abs(), k)
    grad = torch.randn_like(out)
    (d_table,) = torch.autograd.grad(out, table, grad)
    assert_rounded(d_table, dense.T @ grad.double(), dense.abs().T @ grad.double().abs(), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, k", [(65_536, 64), (131_071, 8), (2**18, 512)])
def test_topk_of_wide_rows(dtype: torch.dtype, n: int, k: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(64, n, device="cuda").to(dtype)
    values, features = topk(scores, k)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :k]) and torch.equal(features, expected.indices[:, :k])


def test_no_more_memory_than_the_result_and_the_pieces() -> None:
    tokens, n_features, d, k = 4096, 32_768, 1024, 64
    values, features = topk(torch.randn(tokens, n_features, device="cuda"), k)
    codes = Codes.from_topk(values.requires_grad_(), features, n_features)
    table = torch.randn(n_features, d, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spmm(codes, table).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    results = 4 * (2 * tokens * d + n_features * d + tokens * k)  # decoded, its gradient, dW, d values
    pieces = 4 * 2 * tokens * k // 256 * d
    indices = 16 * 8 * tokens * k
    assert peak < results + pieces + indices
