"""The comparison over widths: planted laws and planted norms are found, and R2 equals its formula."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from saelab.analysis.dark_widths import power_law, widths
from saelab.analysis.intervals import Interval
from saelab.errors import SaelabError

WIDTHS = np.array([1024, 2048, 4096, 8192, 16384])


def test_a_planted_power_law_is_found_with_a_band_around_it() -> None:
    values = 0.1 + 3 * WIDTHS**-0.5
    drawn = values * (1 + 0.01 * np.random.default_rng(0).standard_normal((200, 5)))
    law = power_law(WIDTHS, values, drawn)
    assert law.m.value == pytest.approx(0.5, rel=0.01)
    assert law.c.value == pytest.approx(0.1, rel=0.01) and law.a.value == pytest.approx(3, rel=0.05)
    assert law.r2 > 1 - 1e-5 and (law.low < values).all() and (values < law.high).all()
    assert law.c.low < 0.1 < law.c.high and (law.high - law.low < 0.1 * values).all()
    steep = power_law(WIDTHS, 3 * WIDTHS**-0.5 - 0.01, drawn[:0])
    assert steep.c.value == 0 and np.isnan(steep.low).all()  # c is not negative


def result(n_features: int, error: np.ndarray, nonlinear: np.ndarray, deviation: np.ndarray) -> Any:
    """The fields of a `DarkMatter` that a comparison reads."""

    def near(value: float) -> Interval:
        return Interval(value, value - 0.01, value + 0.01)

    total = (deviation**2).sum()
    whole, rest = (error**2).sum() / total, (nonlinear**2).sum() / total
    decomposition = SimpleNamespace(
        context=8,
        token=np.arange(len(error)) + 40,
        fvu=near(whole),
        fvu_linear=near(whole - rest),
        fvu_nonlinear=near(rest),
        error_norm=error,
        nonlinear_norm=nonlinear,
        deviation=deviation,
    )
    return SimpleNamespace(n_features=n_features, site="here", decomposition=decomposition)


def made_up() -> list[Any]:
    """A wider one whose error norm is that of the narrower one and half of its nonlinear norm, and some noise."""
    numbers = np.random.default_rng(1)
    nonlinear = 1 + numbers.random(400)
    error = np.sqrt(nonlinear**2 + 1 + numbers.random(400))
    wider = 0.5 * error + 0.5 * nonlinear + 0.02 * numbers.standard_normal(400)
    deviation = np.full(400, 3.0)
    return [result(2048, wider, 0.9 * nonlinear, deviation), result(1024, error, nonlinear, deviation)]


def test_error_norms_of_the_narrower_one_predict_those_of_the_wider_and_the_nonlinear_norm_adds_to_it() -> None:
    found = widths(made_up())
    assert found.n_features == (1024, 2048) and len(found.scaling) == 1
    scaling = found.scaling[0]
    assert (scaling.narrower, scaling.wider) == (1024, 2048)
    wider, narrower = (each.decomposition for each in made_up())
    half = (narrower.token // 8) % 2 == 1  # the first row is row 5
    x = np.stack([narrower.error_norm, np.ones(400)], 1)
    off = wider.error_norm - x @ np.linalg.lstsq(x[half], wider.error_norm[half], rcond=None)[0]
    scored = wider.error_norm[~half]
    r2 = 1 - (off[~half] ** 2).sum() / ((scored - scored.mean()) ** 2).sum()
    assert scaling.r2.value == pytest.approx(r2, abs=1e-6) and scaling.r2.low < r2 < scaling.r2.high
    assert scaling.r2_with_nonlinear.value > 0.95
    added = (scaling.r2_with_nonlinear.value - r2) / (1 - r2)
    assert scaling.added.value == pytest.approx(added, abs=1e-6) and added > 0.3

    assert found.law.low[0] <= found.fvu[0].value <= found.law.high[0]
    assert "R2 of the error norm, 1,024 to 2,048" in found.figures() and "FVU, nonlinear: c" in found.figures()
    assert [trace["name"] for trace in found.plot().to_dict()["data"] if "name" in trace] == ["FVU", "FVU, nonlinear"]


def test_results_that_do_not_compare_are_errors() -> None:
    one, other = made_up()
    with pytest.raises(SaelabError, match="two or more"):
        widths([one])
    with pytest.raises(SaelabError, match="two or more"):
        widths([one, one])
    other.decomposition.token = other.decomposition.token + 1
    with pytest.raises(SaelabError, match="different sites or tokens"):
        widths([one, other])
