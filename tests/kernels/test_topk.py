"""topk is the beginning of a stable sort, with any ties, zeros, infinities and NaNs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saelab.kernels import topk
from tests.kernels.problems import DTYPES, INTERPRETED, some


def check(scores: Tensor, k: int) -> None:
    values, features = topk(scores, k)
    assert values.shape == features.shape == (len(scores), k)
    assert values.dtype == scores.dtype and features.dtype == torch.long
    expected = scores.double().cpu().sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(features.cpu(), expected)
    assert torch.equal(values.nan_to_num(7.0), scores.gather(1, features).nan_to_num(7.0))


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Scores with ties, and k."""
    tokens, n = draw(st.integers(0, 3)), draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(tokens, n, generator=generator) * draw(st.sampled_from([0.0, 1.0, 3.0, 1e4, 1e-6]))
    if draw(st.booleans()):
        scores = scores.round()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-37, -1e-37])
    replaced = torch.rand(tokens, n, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    scores[replaced] = special[torch.randint(len(special), (int(replaced.sum()),), generator=generator)]
    return scores, draw(st.integers(0, n))


@given(problem=rows(), dtype=st.sampled_from(DTYPES))
@some(150)
def test_topk_is_the_beginning_of_a_stable_sort(
    backend: str, device: str, problem: tuple[Tensor, int], dtype: torch.dtype
) -> None:
    scores, k = problem
    check(scores.to(dtype).to(device), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(5000, 1), (5000, 33), (4097, 513), (6001, 512), (5000, 1300), (20_000, 100)])
def test_topk_of_long_rows_with_ties_across_groups(device: str, dtype: torch.dtype, n: int, k: int) -> None:
    if INTERPRETED and k > 1000 and dtype != torch.float32:
        pytest.skip("takes the interpreter too long")
    torch.manual_seed(n + k)
    scores = torch.randn(4, n)
    scores[1] = (scores[1] * 2).round()
    scores[2] = 0
    scores[2, ::2] = -0.0
    scores[3] = scores[3].sort().values  # the k largest are all in the last groups
    if INTERPRETED:
        scores = scores[1:3] if k < 1000 else scores[1:2]
    check(scores.to(dtype).to(device), k)


def test_topk_of_rows_that_are_not_contiguous(device: str) -> None:
    torch.manual_seed(0)
    check(torch.randn(4500, 3, device=device).T, 5)


@pytest.mark.parametrize("shape, k", [((3, 4), 5), ((3, 4), -1), ((4,), 1)])
def test_a_k_that_does_not_fit_is_refused(device: str, shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(ValueError, match="topk"):
        topk(torch.zeros(shape, device=device), k)


def test_topk_has_no_gradient(device: str) -> None:
    values, _ = topk(torch.randn(2, 5, device=device, requires_grad=True), 2)
    assert not values.requires_grad
