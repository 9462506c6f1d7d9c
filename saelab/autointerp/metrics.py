"""Figures of judged examples, with intervals.

auroc              the chance that an example with the feature is given a higher value than one without; ties count half
balanced accuracy  the mean of the share of examples with the feature that are recognised and the share of those without

Intervals: of a share Wilson's; of AUROC and of balanced accuracy a bootstrap over examples, drawn within those with
and those without the feature.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import norm, rankdata

from saelab.analysis.intervals import Interval, between, draws
from saelab.autointerp.records import Judged

RESAMPLES = 1000


def auroc(values: np.ndarray, truth: np.ndarray) -> float:
    """AUROC of `values` for `truth` bool, both ``[examples]``; NaN if all are true or none is."""
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    if not n_true or not n_false:
        return math.nan
    above = rankdata(values)[truth].sum() - n_true * (n_true + 1) / 2
    return float(above / (n_true * n_false))


def auroc_interval(values: np.ndarray, truth: np.ndarray, *, seed: int = 0) -> Interval:
    """AUROC with its 95% interval. Memory: 8 bytes for each pair of an example with the feature and one without."""
    pairs = values[truth][:, None] - values[~truth]
    above, (with_it, without) = (pairs > 0) + 0.5 * (pairs == 0), _draws(truth, seed)
    return between(auroc(values, truth), ((with_it @ above) * without).sum(1) / max(1, pairs.size))


def balanced_accuracy_interval(said: np.ndarray, truth: np.ndarray, *, seed: int = 0) -> Interval:
    """Balanced accuracy of the answers `said` bool with its 95% interval; NaN if all are true or none is."""
    if not truth.any() or truth.all():
        return Interval(math.nan, math.nan, math.nan)
    right, (with_it, without) = (said == truth).astype(float), _draws(truth, seed)
    drawn = with_it @ right[truth] / truth.sum() + without @ right[~truth] / (~truth).sum()
    return between(float(right[truth].mean() + right[~truth].mean()) / 2, drawn / 2)


def _draws(truth: np.ndarray, seed: int) -> list[np.ndarray]:
    """How often each resample has each example with the feature, and without it; none if one of them is single."""
    return _draws_of(int(truth.sum()), int((~truth).sum()), seed)


@lru_cache(8)  # most features have as many examples, and drawing takes longer than all else
def _draws_of(with_it: int, without: int, seed: int) -> list[np.ndarray]:
    rng, sizes = np.random.default_rng(seed), (with_it, without)
    return [draws(size, RESAMPLES, rng) if min(sizes) > 1 else np.zeros((0, size)) for size in sizes]


def wilson(hits: int, n: int, level: float = 0.95) -> Interval:
    """A share with Wilson's interval (Wilson 1927); NaN of none."""
    if not n:
        return Interval(math.nan, math.nan, math.nan)
    z, share = float(norm.ppf((1 + level) / 2)), hits / n
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(share, (middle - width) / scale if hits else 0.0, (middle + width) / scale if hits < n else 1.0)


def confusion(judged: Sequence[Judged], bar: float = 0.5) -> dict[str, float]:
    """Counts, and what follows from them, of the examples whose answer could be read.

    `true_positive` ..., `accuracy`, `balanced_accuracy`, `precision`, `recall`, `F1`, and `recall: q` of each part q of
    the feature's windows. An example counts as recognised if the judge said more than `bar`.
    """
    read = [each for each in judged if each.said is not None]
    said = np.array([each.said > bar for each in read if each.said is not None], bool)
    truth = np.array([each.truth for each in read], bool)
    tp, fp = int((said & truth).sum()), int((said & ~truth).sum())
    fn, tn = int((~said & truth).sum()), int((~said & ~truth).sum())

    def share(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    recall, specificity = share(tp, tp + fn), share(tn, tn + fp)
    figures = {
        "true_positive": float(tp),
        "false_positive": float(fp),
        "false_negative": float(fn),
        "true_negative": float(tn),
        "accuracy": share(tp + tn, len(read)),
        "balanced_accuracy": (recall + specificity) / 2,
        "precision": share(tp, tp + fp),
        "recall": recall,
        "F1": share(2 * tp, 2 * tp + fp + fn),
    }
    for part in sorted({each.quantile for each in read if each.quantile >= 0}):
        of_part = np.array([each.quantile == part for each in read])
        figures[f"recall: {part}"] = share(int((said & truth & of_part).sum()), int((truth & of_part).sum()))
    return figures
