"""Capacities spend the budget exactly, fall with rank, never exceed the batch; a fit finds the curve again."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelab.sae.allocation.capacity import (
    draw_capacities,
    fit_zipf,
    ranks,
    zipf_capacities,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, int, float, float]:
    """(n_features, k, tokens, exponent, shift), where k * tokens is at most tokens * n_features."""
    n_features = draw(st.integers(1, 400))
    k = draw(st.integers(1, n_features))
    tokens = draw(st.integers(1, 300))
    exponent = draw(st.floats(0, 4))
    return n_features, k, tokens, exponent, draw(st.floats(0, 1e4))


def steps(real: Tensor, n: int) -> Tensor:
    """The capacities of n steps, ``[n, n_features]``."""
    carry, drawn = torch.zeros((), dtype=torch.float64), []
    for _ in range(n):
        capacities, carry = draw_capacities(real, carry)
        assert carry.shape == () and 0 <= carry < 1
        drawn.append(capacities)
    return torch.stack(drawn)


@given(problems())
def test_real_capacities_spend_the_budget_fall_with_rank_and_fit_the_batch(
    problem: tuple[int, int, int, float, float],
) -> None:
    n_features, k, tokens, exponent, shift = problem
    real = zipf_capacities(n_features, k * tokens, tokens, exponent, shift)
    assert real.shape == (n_features,) and real.dtype == torch.float64
    assert float(real.sum()) == pytest.approx(k * tokens, rel=1e-9)
    assert (real.diff() <= 1e-9 * tokens).all()
    assert (real >= 0).all() and (real <= tokens).all()


@given(problems())
def test_ranks_below_the_cap_follow_the_curve(problem: tuple[int, int, int, float, float]) -> None:
    n_features, k, tokens, exponent, shift = problem
    real = zipf_capacities(n_features, k * tokens, tokens, exponent, shift)
    free = real < tokens * (1 - 1e-9)
    rank = torch.arange(1, n_features + 1, dtype=torch.float64)
    ratio = real.log() + exponent * torch.log(rank + shift)
    if free.any():
        assert float(ratio[free].max() - ratio[free].min()) < 1e-6


def test_overflow_reaches_ranks_that_then_overflow_themselves() -> None:
    real = zipf_capacities(4, 25, 10, 1.0, 0.0)  # 12, 6, 4, 3 at first; 10, 15 * 6/13 ... once the first is full
    torch.testing.assert_close(real, torch.tensor([10.0, 15 * 6 / 13, 15 * 4 / 13, 15 * 3 / 13], dtype=torch.float64))
    twice = zipf_capacities(4, 32, 10, 1.0, 0.0)  # the overflow of the first fills the second, too
    torch.testing.assert_close(twice, torch.tensor([10.0, 10.0, 12 * 4 / 7, 12 * 3 / 7], dtype=torch.float64))


def test_exponent_0_is_uniform_and_too_large_a_budget_fills_everything() -> None:
    torch.testing.assert_close(zipf_capacities(7, 10, 5, 0.0, 3.0), torch.full((7,), 10 / 7, dtype=torch.float64))
    assert (zipf_capacities(7, 36, 5, 1.0, 0.0) == 5).all()


@settings(max_examples=30)
@given(problems())
def test_every_draw_spends_the_budget_and_each_feature_gets_its_capacity_in_the_long_run(
    problem: tuple[int, int, int, float, float],
) -> None:
    n_features, k, tokens, exponent, shift = problem
    real = zipf_capacities(n_features, k * tokens, tokens, exponent, shift)
    n = 200
    drawn = steps(real, n)
    assert (drawn.sum(1) == k * tokens).all()
    assert (drawn >= 0).all() and (drawn <= tokens).all()
    assert ((drawn >= real.floor()) & (drawn <= real.ceil())).all()
    so_far = torch.arange(1, n + 1)[:, None]
    off = (drawn.cumsum(0) - so_far * real).abs()
    assert (off <= 1 + so_far.log() / math.log(1.618)).all()
    assert float(off.max()) < 3


def test_a_feature_of_a_small_capacity_waits_no_longer_than_promised() -> None:
    real = zipf_capacities(5000, 1000, 100, 1.0, 5.0)  # the tail gets 0.03 of a match per step
    drawn = steps(real, 600)
    rare = real < 1
    assert int(rare.sum()) > 4000
    last = torch.full((5000,), -1)
    for step, capacities in enumerate(drawn):
        assert ((step - last)[rare] <= 4 / real[rare]).all()
        last[capacities > 0] = step
    torch.testing.assert_close(drawn.double().mean(0), real, atol=3 / 600, rtol=0)


def test_drawing_is_the_same_each_time() -> None:
    real = zipf_capacities(300, 64, 32, 1.1, 2.0)
    assert torch.equal(steps(real, 20), steps(real, 20))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_and_the_host_does_not_wait() -> None:
    real = zipf_capacities(30_000, 4096, 512, 1.1, 2.0)
    on_gpu, carry = real.cuda(), torch.zeros((), dtype=torch.float64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = []
        for _ in range(5):
            capacities, carry = draw_capacities(on_gpu, carry)
            drawn.append(capacities)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.stack(drawn).cpu(), steps(real, 5))


@pytest.mark.parametrize(("exponent", "shift"), [(1.0, 0.0), (1.2, 50.0), (0.8, 10.0), (1.5, 300.0), (2.0, 3.0)])
@pytest.mark.parametrize("n_features", [512, 8192])
def test_a_fit_finds_the_curve_again(exponent: float, shift: float, n_features: int) -> None:
    rank = torch.arange(1, n_features + 1, dtype=torch.float64)
    densities = (rank + shift).pow(-exponent)
    shuffled = densities[torch.randperm(n_features, generator=torch.Generator().manual_seed(0))]
    found = fit_zipf(0.4 * shuffled / shuffled.max())
    assert found.exponent == pytest.approx(exponent, rel=0.02)
    assert found.shift == pytest.approx(shift, rel=0.02, abs=0.02)
    assert found.r2 > 0.9999


def test_a_fit_leaves_out_the_dead_and_the_dying() -> None:
    rank = torch.arange(1, 4097, dtype=torch.float64)
    densities = 2.0 * (rank + 20).pow(-1.1)
    densities[3600:] *= 0.05
    densities[3900:] = 0
    found = fit_zipf(densities)
    assert found.exponent == pytest.approx(1.1, rel=0.02) and found.shift == pytest.approx(20, rel=0.02)


def test_a_fit_survives_counts_of_a_finite_sample() -> None:
    rank = torch.arange(1, 2049, dtype=torch.float64)
    true = 3 * (rank + 10).pow(-1.0)
    sample = torch.poisson(true * 200_000, generator=torch.Generator().manual_seed(1)) / 200_000
    found = fit_zipf(sample)
    assert found.exponent == pytest.approx(1.0, rel=0.05) and found.shift == pytest.approx(10, rel=0.1)


def test_a_fit_of_equal_densities_is_flat_and_a_fit_of_nothing_has_no_r2() -> None:
    assert fit_zipf(torch.full((100,), 0.01)).exponent == pytest.approx(0, abs=1e-9)
    nothing = fit_zipf(torch.zeros(100))
    assert (nothing.exponent, nothing.shift) == (1.0, 0.0) and math.isnan(nothing.r2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=50))
def test_ranks_order_by_density_and_ties_by_feature(values: list[int]) -> None:
    found = ranks(torch.tensor(values, dtype=torch.float64)).tolist()
    assert sorted(range(len(values)), key=lambda i: (-values[i], i)) == sorted(
        range(len(values)), key=found.__getitem__
    )
