"""AUROC, Wilson's interval and the figures of a confusion matrix equal their definitions and scikit-learn's."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, roc_auc_score

from saelab.autointerp.metrics import auroc, auroc_interval, balanced_accuracy_interval, confusion, wilson
from saelab.autointerp.records import Judged


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_scikit_learn_ties_included(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random(80) < 0.4
    values = np.round(rng.normal(truth, 1), 0 if seed % 2 else 8)
    assert auroc(values, truth) == pytest.approx(roc_auc_score(truth, values), abs=1e-12)
    assert math.isnan(auroc(values, np.ones(80, bool)))
    for few in (np.arange(80) < 1, np.zeros(80, bool)):
        assert math.isnan(auroc_interval(values, few).low) and math.isnan(balanced_accuracy_interval(few, few).low)


def test_intervals_cover_the_truth() -> None:
    """Normal values whose means differ by 1 have an AUROC of 0.76."""
    covered = {"auroc": 0, "balanced": 0}
    for repeat in range(100):
        rng = np.random.default_rng(repeat)
        truth = np.arange(100) < 50
        values = rng.normal(truth, 1)
        found = auroc_interval(values, truth)
        covered["auroc"] += found.low <= 0.7602 <= found.high
        found = balanced_accuracy_interval(values > 0.5, truth)
        covered["balanced"] += found.low <= 0.6915 <= found.high
    assert all(88 <= number <= 99 for number in covered.values()), covered


def test_wilson_is_that_of_the_formula_and_stays_in_0_to_1() -> None:
    found = wilson(8, 10)
    assert found == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10).low == 0 and wilson(10, 10).high == 1 and math.isnan(wilson(0, 0).value)


def test_the_confusion_matrix_leaves_out_what_could_not_be_read() -> None:
    rng = np.random.default_rng(0)
    truth, said = rng.random(60) < 0.5, rng.random(60)
    judged = [
        Judged(0, 0, 0, 8, i % 3 if truth[i] else -1, bool(truth[i]), None if i % 10 == 0 else float(said[i]))
        for i in range(60)
    ]
    found, read = confusion(judged), np.arange(60) % 10 != 0
    t, s = truth[read], said[read] > 0.5
    assert sum(found[name] for name in ("true_positive", "false_positive", "false_negative", "true_negative")) == 54
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(t, s))
    assert found["F1"] == pytest.approx(f1_score(t, s)) and found["precision"] == pytest.approx(precision_score(t, s))
    part = np.arange(60)[read] % 3 == 1
    assert found["recall: 1"] == pytest.approx(s[part & t].mean())
    assert all(math.isnan(value) for value in confusion([]).values() if value)
