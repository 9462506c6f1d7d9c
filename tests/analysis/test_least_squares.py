"""Maps fitted to sums equal those fitted to all tokens at once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from saelab.analysis.least_squares import RIDGES, LinearMap, Moments, best_ridge, fit, mean_r2, r2, squared_error

D, K = 6, 3


def problem(tokens: int, noise: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs with a mean and unequal spreads, targets that are linear in them plus noise; neighbours differ."""
    truth = torch.Generator().manual_seed(99)
    weights, mix = torch.randn(D, K, generator=truth), torch.randn(D, D, generator=truth)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=generator) @ mix + 2
    return x, x @ weights + 1 + noise * torch.randn(tokens, K, generator=generator)


def moments(x: Tensor, y: Tensor, parts: int = 3) -> Moments:
    found = Moments(x.shape[1], y.shape[1])
    for part in torch.arange(len(x)).chunk(parts):
        found.add(x[part], y[part])
    return found


def dense(x: Tensor, y: Tensor, ridge: float, intercept: bool) -> LinearMap:
    """By the normal equations of all tokens, with a column of ones; the scale is that of the definition."""
    x, y = x.double(), y.double()
    centred = x - x.mean(0) if intercept else x
    scale = centred.square().sum() / D
    columns = torch.cat([x, torch.ones(len(x), 1)], 1) if intercept else x
    penalty = torch.eye(columns.shape[1], dtype=torch.float64) * ridge * scale
    if intercept:
        penalty[-1, -1] = 0
    solved = torch.linalg.solve(columns.T @ columns + penalty, columns.T @ y)
    return LinearMap(solved[:D], solved[D] if intercept else torch.zeros(K, dtype=torch.float64))


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_a_fit_equals_the_dense_one(ridge: float, intercept: bool) -> None:
    x, y = problem(200)
    found, expected = fit(moments(x, y), ridge, intercept=intercept), dense(x, y, ridge, intercept)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.bias, expected.bias, rtol=1e-9, atol=1e-9)
    if ridge == 0 and not intercept:
        torch.testing.assert_close(found.weights, torch.linalg.lstsq(x.double(), y.double()).solution)
    one = fit(moments(x, y).of_targets(slice(1, 2)), ridge, intercept=intercept)
    torch.testing.assert_close(one.weights, found.weights[:, 1:2])
    other = problem(50, seed=1)
    error = (other[1].double() - found(other[0])).square().sum(0)
    torch.testing.assert_close(squared_error(found, moments(*other)), error, rtol=1e-9, atol=1e-9)


def test_inputs_of_lower_rank_have_the_smallest_map() -> None:
    x, y = problem(100)
    x = torch.cat([x[:, :4], x[:, :2]], 1)
    found = fit(moments(x, y)).weights
    torch.testing.assert_close(found, torch.linalg.pinv(x.double()) @ y.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tokens", "noise", "is_zero"), [(4000, 0.0, True), (9, 30.0, False)])
def test_validation_asks_for_a_ridge_only_if_there_is_too_little_data(tokens: int, noise: float, is_zero: bool) -> None:
    train, validation = problem(tokens, noise), problem(500, noise, seed=1)
    found = best_ridge(moments(*train), moments(*validation), intercept=True)
    assert (found == 0) == is_zero
    errors = [(validation[1] - dense(*train, ridge, True)(validation[0])).square().sum().item() for ridge in RIDGES]
    assert found == RIDGES[int(np.argmin(errors))]


def test_r2_equals_its_formula() -> None:
    x, y = problem(80)
    error = (y - fit(moments(x, y), intercept=True)(x)).square().double()
    y = y.double()
    expected = 1 - error.sum(0) / (y - y.mean(0)).square().sum(0)
    sums = torch.cat([error.sum(0), y.sum(0), y.square().sum(0), torch.tensor([80.0])])
    np.testing.assert_allclose(mean_r2(sums.numpy()), expected.mean())
    for i in range(K):
        np.testing.assert_allclose(r2(sums[[i, K + i, 2 * K + i, -1]].numpy()), expected[i])
