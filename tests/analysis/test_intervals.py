"""Intervals cover the truth as often as they say when tokens of a row are correlated; intervals over tokens do not."""

import numpy as np
import pytest

from saelab.analysis.intervals import Interval, add_by_row, between, draws, interval, ratio

ROWS, TOKENS, REPEATS = 150, 24, 200
TRUE_ERROR = np.exp((0.7**2 + 0.5**2) / 2)
TRUE_SPREAD = 4 * np.exp((0.3**2 + 0.7**2) / 2)


def made_up(numbers: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors and deviations ``[ROWS, TOKENS]``: skewed, and alike within a row."""
    row = numbers.normal(size=(ROWS, 1))
    error = np.exp(0.7 * row + 0.5 * numbers.normal(size=(ROWS, TOKENS)))
    return error, 4 * np.exp(0.3 * row + 0.7 * numbers.normal(size=(ROWS, TOKENS)))


def coverage(figure: str, by: str) -> float:
    """Share of repeats in which the interval of the mean error, or of FVU, contains the truth."""
    numbers, hits, repeats = np.random.default_rng(0), 0, REPEATS if by == "row" else 40
    truth = TRUE_ERROR if figure == "mean" else TRUE_ERROR / TRUE_SPREAD
    for _ in range(repeats):
        error, spread = made_up(numbers)
        pair = np.stack([error, np.ones_like(error) if figure == "mean" else spread], 2)
        sums = pair.sum(1) if by == "row" else pair.reshape(-1, 2)
        found = interval(sums, ratio, resamples=500 if by == "row" else 100)
        hits += found.low <= truth <= found.high
    return hits / repeats


@pytest.mark.parametrize("figure", ["mean", "fvu"])
def test_95_percent_intervals_over_rows_contain_the_truth_in_90_to_98_percent(figure: str) -> None:
    assert 0.90 <= coverage(figure, by="row") <= 0.98


def test_intervals_over_tokens_are_too_narrow() -> None:
    assert coverage("mean", by="token") < 0.6


def test_a_resample_equals_the_statistic_of_the_rows_drawn() -> None:
    numbers = np.random.default_rng(1)
    error, spread = made_up(numbers)
    sums = np.stack([error.sum(1), spread.sum(1)], 1)
    drawn = draws(ROWS, 300, np.random.default_rng(7))
    assert drawn.shape == (300, ROWS) and (drawn.sum(1) == ROWS).all()
    slow = []
    for counts in drawn:
        rows = np.repeat(np.arange(ROWS), counts)
        slow.append(error[rows].sum() / spread[rows].sum())
    low, high = np.quantile(slow, [0.025, 0.975])
    assert interval(sums, resamples=300, seed=7) == pytest.approx(Interval(error.sum() / spread.sum(), low, high))
    assert interval(sums, resamples=300, seed=8) != interval(sums, resamples=300, seed=7)


def test_a_difference_on_the_same_rows_is_narrower_than_its_parts() -> None:
    error, spread = made_up(np.random.default_rng(2))
    sums = np.stack([error.sum(1), spread.sum(1), 1.1 * error.sum(1), spread.sum(1)], 1)
    both = interval(sums, lambda s: ratio(s[..., 2:]) - ratio(s))
    one = interval(sums[:, :2])
    assert both.low > 0 and both.high - both.low < 0.2 * (one.high - one.low)


def test_sums_by_row_equal_a_loop_and_rows_without_tokens_are_zero() -> None:
    numbers = np.random.default_rng(3)
    row, figures, sums = numbers.integers(0, 5, 40), numbers.normal(size=(40, 3)), np.zeros((7, 3))
    add_by_row(sums, row[:25], figures[:25])
    add_by_row(sums, row[25:], figures[25:])
    assert sums == pytest.approx(np.stack([figures[row == i].sum(0) for i in range(7)]))


def test_a_single_row_or_none_has_no_interval_and_undefined_resamples_are_left_out() -> None:
    alone = interval(np.array([[3.0, 4.0]]))
    assert alone.value == 0.75 and np.isnan(alone.low) and np.isnan(alone.high)
    assert np.isnan(interval(np.zeros((0, 2)))).all()
    assert between(1.0, np.array([np.nan, 1.0, np.inf, 3.0])).high == pytest.approx(2.95)
    assert str(Interval(0.12345, 0.1, 0.2)) == "0.1235 [0.1, 0.2]"
