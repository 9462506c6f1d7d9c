"""Codes with many entries take the dense way, which gives what the sparse one gives, in tiles."""

import pytest
import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.kernels import dense, products, sddmm, spmm
from saelab.kernels.products import accumulate_in_place
from tests.kernels.problems import DTYPES, assert_rounded, at_pattern, ragged


@pytest.fixture(autouse=True)
def chosen_by_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAELAB_KERNELS", raising=False)


def backend(codes: Codes, device: str = "cpu") -> str:
    return products._backend(torch.empty(0, device=device), codes).__name__.rpartition(".")[2]


def test_the_density_chooses_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CROSSOVER", 0.25)
    at, above = (Codes.from_topk(torch.ones(5, k), torch.arange(k).repeat(5, 1), 8) for k in (2, 3))
    assert (backend(at), backend(above)) == ("cpu", "dense")
    assert backend(above, "meta") == "reference"
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    assert backend(above) == "cpu"


def test_half_of_all_entries_are_dense_and_the_usual_budgets_are_sparse() -> None:
    assert backend(ragged(40, 60, share=0.5)) == "dense"
    features = torch.arange(128).repeat(5, 1)
    assert backend(Codes.from_topk(torch.ones(5, 128), features, 4096)) == "cpu"  # 4 * k of quickstart
    assert backend(Codes.from_topk(torch.ones(5, 0), features[:, :0], 4096)) == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("in_place", [False, True])
def test_both_ways_give_the_same_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, in_place: bool
) -> None:
    pattern = ragged(30, 20, share=0.5)
    monkeypatch.setattr(dense, "TILE_ENTRIES", 7 * 20)  # tiles of 7 tokens, and a shorter last one

    def results(crossover: float) -> tuple[Tensor, ...]:
        monkeypatch.setattr(products, "CROSSOVER", crossover)
        codes = Codes(pattern.values.to(dtype), pattern.features, pattern.offsets, 20)
        assert backend(codes) == ("cpu" if crossover else "dense")
        torch.manual_seed(0)
        shapes = ((30, 9), (20, 9), (20, 9), (20,), (9,))
        leaves = x, w_enc, w_dec, bias, centre = [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]
        if in_place:
            for table in (w_enc, w_dec):
                accumulate_in_place(table)
        pre = sddmm(codes, x, w_enc, bias, centre=centre)
        decoded = spmm(codes.with_values(pre), w_dec)
        decoded.backward(torch.cos(torch.arange(270.0)).view(30, 9).to(dtype))
        return (pre, decoded, *(leaf.grad for leaf in leaves))

    tolerance = {"rtol": 0.05, "atol": 0.5} if dtype == torch.bfloat16 else {}  # pre is rounded on both ways
    for sparse, densely in zip(results(1.0), results(0.0), strict=True):
        assert sparse.dtype == densely.dtype == dtype
        torch.testing.assert_close(densely, sparse, **tolerance)


@pytest.mark.parametrize(
    "dtype, into_dtype",
    [*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16), (torch.float64, torch.float32)],
)
@pytest.mark.parametrize("entries", [1, 7 * 20, 10**6])
def test_tiles_add_up_in_place_whatever_their_size(
    monkeypatch: pytest.MonkeyPatch, entries: int, dtype: torch.dtype, into_dtype: torch.dtype
) -> None:
    monkeypatch.setattr(dense, "TILE_ENTRIES", entries)
    exact = ragged(30, 20, share=0.5)
    codes = exact.with_values(exact.values.to(dtype))
    rows, start = torch.randn(30, 9).to(dtype), torch.randn(20, 9).to(into_dtype)
    into = start.clone()
    assert dense.spmm_transposed(codes, rows, into) is into
    matrix, wide = exact.with_values(codes.values.double()).to_dense(), rows.double()
    expected, sizes = start + matrix.T @ wide, start.abs() + matrix.abs().T @ wide.abs()
    assert_rounded(into, expected, sizes, 30)
    table = torch.randn(20, 9).to(dtype)
    assert_rounded(dense.spmm(codes, table), matrix @ table.double(), matrix.abs() @ table.double().abs(), 20)
    products_at, sizes_at = (at_pattern(exact, f(wide) @ f(table.double()).T) for f in (lambda m: m, Tensor.abs))
    assert_rounded(dense.sddmm(codes, rows, table), products_at, sizes_at, 9)


def test_repeated_entries_add_up() -> None:
    codes = Codes(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 1, 0]), torch.tensor([0, 3]), 2)
    assert codes.to_dense().tolist() == [[4.0, 3.0]]
    assert dense.spmm(codes, torch.eye(2)).tolist() == [[4.0, 3.0]]
    assert dense.spmm_transposed(codes, torch.ones(1, 1)).tolist() == [[4.0], [3.0]]
