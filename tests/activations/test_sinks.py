"""Sinks and large dimensions are found where they are planted; their shares are the formulas, whatever the blocks."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saelab.activations.sinks import Concentration, SinkSums, concentration, largest_norm, measure, within


def planted(n: int = 5000, d_in: int = 300, every: int = 50, times: float = 100.0) -> Tensor:
    """Tokens about a mean; every 50th is a hundred times as long."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d_in, generator=generator) + 0.5 * torch.randn(d_in, generator=generator)
    x[::every] *= times
    return x


def by_formula(x: Tensor) -> dict[str, float]:
    X = x.double().numpy()
    norms, squares = np.linalg.norm(X, axis=1), (X - X.mean(0)) ** 2
    sinks = norms > 10 * np.sort(norms)[(len(norms) - 1) // 2]
    others = ((X[~sinks] - X[~sinks].mean(0)) ** 2).sum(0)
    largest = np.sort(others)[::-1][: math.ceil(0.01 * X.shape[1])]
    return {
        "sink_share": sinks.mean(),
        "sink_variance": squares[sinks].sum() / squares.sum(),
        "top_variance": largest.sum() / others.sum(),
    }


def assert_is(found: Concentration, x: Tensor) -> None:
    for name, expected in by_formula(x).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-6), name


def test_planted_sinks_hold_almost_all_of_the_variance() -> None:
    x = planted()
    found = measure(x)
    assert_is(found, x)
    assert found.sink_share == 1 / 50 and found.sink_variance > 0.99
    assert found.median_norm == pytest.approx(np.median(x.norm(dim=1)), rel=1e-3)
    scaled = measure(x * 7)
    assert scaled.sink_variance == pytest.approx(found.sink_variance), "shares do not depend on the unit"


def test_planted_dimensions_hold_almost_all_of_the_variance_without_a_sink() -> None:
    x = planted(times=1.0)
    x[:, [7, 200, 201]] *= 100
    found = measure(x)
    assert_is(found, x)
    assert found.sink_share == found.sink_variance == 0 and found.top_dimensions == 3 and found.top_variance > 0.98
    assert measure(planted(times=1.0)).top_variance < 0.02
    x = planted(times=1e4)
    x[::50, 3:] = 0
    assert measure(x).top_variance < 0.02, "the sinks' dimensions are those of the sinks alone"


def test_sums_do_not_depend_on_the_blocks() -> None:
    """The median is that of the first tokens, also if they come in blocks of any size; sinks may come first or last."""
    x = torch.cat([planted(), planted(3000, every=7)])
    figures = torch.stack([torch.arange(len(x)), torch.ones(len(x))], 1).double()
    sinks = x.norm(dim=1) > 10 * x[:1000].norm(dim=1).median()
    for size in (7, 640, 999, 1000, 10**5):
        sums = SinkSums(1000)
        for block, values in zip(x.split(size), figures.split(size), strict=True):
            sums.add(block, values)
        found, expected = sums.result(), (x[~sinks].double(), x[sinks].double())
        assert [part.tokens for part in found] == [len(part) for part in expected]
        for part, exact, chosen in zip(found, expected, (~sinks, sinks), strict=True):
            torch.testing.assert_close(part.mean, exact.mean(0))
            torch.testing.assert_close(part.deviation, (exact - exact.mean(0)).square().sum(0))
            assert part.figures.tolist() == figures[chosen].sum(0).tolist()


def test_fewer_tokens_than_the_median_asks_for_and_none() -> None:
    x, sums = planted(300), SinkSums()
    sums.add(x[:100])
    sums.add(x[100:])
    assert_is(concentration(sums), x)
    with pytest.raises(ValueError, match="no token"):
        SinkSums().result()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_equal_activations_have_no_variance_to_share(value: float) -> None:
    found = measure(torch.full((3000, 7), value))
    assert (found.sink_share, found.sink_variance, found.top_variance) == (0, 0, 0)


def test_where_most_tokens_have_no_activation_none_is_a_sink() -> None:
    x = torch.zeros(100, 5)
    x[:40] = 3.0
    assert largest_norm(0.0, 10) == math.inf and measure(x).sink_share == 0
    assert within([x], [math.inf]) is None and within([x], [10.0]) is None
    keep = within([x], [5.0])
    assert keep is not None and keep.tolist() == [False] * 40 + [True] * 60
