"""The table of a run's scores over its features, each beside its controls.

A line is a score by one judge of the explanations of one kind by one explainer. Over the features with a value:

    median, mean    the mean with its 95% interval, bootstrapped over features
    difference      the mean of (score - control) over pairs, with its interval over pairs

The controls of an explanation's score are `shuffled`, the same feature's score with the explanation of another feature
of similar density, and the same scores in other runs, paired by density within a factor of 1.5. A score without an
explanation is compared with chance, and with other runs. Intervention has controls in each score. An interval that
includes 0 means that the score does not beat its control. A reseed is another training, not a control to beat: the
means of the run and its reseeds show how much a training changes them. `same` says if the judge answers the same
whatever it is shown. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from saelab.analysis.intervals import Interval, interval
from saelab.analysis.result import Result
from saelab.autointerp import lexical
from saelab.autointerp.choice import pairs
from saelab.autointerp.constant import Same
from saelab.autointerp.measured import Column, Group, Measured
from saelab.autointerp.records import SHUFFLED
from saelab.autointerp.scoring import CHANCE

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


MANY = 2_000
"""Features above which intervals are not bootstrapped."""


@dataclass(frozen=True)
class Difference:
    """How much higher a score is than in a control."""

    control: str
    pairs: int
    value: Interval
    """Mean of score - control."""
    ratio: float = 1.0
    """Median ratio, at least 1, of the densities of a pair."""
    largest_ratio: float = 1.0
    reseed: bool = False
    """Whether it is the same training from another seed, and no control to beat."""

    @property
    def verdict(self) -> str:
        """In words, from the interval."""
        if np.isnan(self.value.low):
            return "too few pairs"
        if self.reseed:
            return "is above it" if self.value.low > 0 else "is below it" if self.value.high < 0 else "no difference"
        if self.value.low > 0:
            return "beats its control"
        return "is below its control" if self.value.high < 0 else "does not beat its control"


@dataclass(frozen=True)
class Line:
    """A score over features."""

    score: str
    judge: str
    explainer: str
    kind: str
    unit: str
    n: int
    """Features with a value."""
    without: int
    """Features without one, mostly as there are too few windows."""
    median: float
    mean: Interval
    unread: int
    """Answers of the judge that could not be read."""
    tokens: int
    """Tokens of all prompts and answers of the judge."""
    differences: tuple[Difference, ...]
    missing: tuple[str, ...] = ()
    """Controls that have no such score."""
    seeds: tuple[float, ...] = ()
    """Means of the run and of each of its reseeds; empty without reseeds."""
    same: Same | None = None
    """The judge's most frequent answer; None for a score without such questions."""

    @property
    def tokens_per_feature(self) -> float:
        """Tokens of a feature; 0 if the judge is no language model."""
        return self.tokens / max(1, self.n + self.without)

    @property
    def warning(self) -> str:
        """That the judge answers the same whatever it is shown; "" if it does not."""
        return str(self.same) if self.same is not None and self.same.constant else ""

    @property
    def lexical(self) -> bool:
        """Whether explainer or judge is the offline one, so that the line is about the pipeline only."""
        return lexical.NAME in (self.judge, self.explainer)


@dataclass(frozen=True, eq=False, repr=False)
class ScoreTable(Result):
    """All scores of a run."""

    lines: tuple[Line, ...]

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        found: dict[str, int | float | str | Interval] = {}
        for line in self.lines:
            of = f", explained by {line.explainer} ({line.kind})" if line.kind else ""
            name = f"{line.score} by {line.judge}{of}"
            found[f"{name}: {line.unit}"] = line.mean
            found |= {f"{name}: above {each.control}": each.value for each in line.differences}
        return found

    def to_frame(self) -> "pd.DataFrame":
        """A row for each score and control."""
        import pandas as pd

        rows = []
        for line in self.lines:
            own = {name: getattr(line, name) for name in ("score", "judge", "explainer", "kind", "unit", "n")}
            own |= {"without value": line.without, "median": line.median}
            own |= {"mean": line.mean.value, "low": line.mean.low, "high": line.mean.high}
            own |= {"unread": line.unread, "tokens": line.tokens, "tokens per feature": line.tokens_per_feature}
            own |= {"warning": line.warning}
            own |= {"lowest seed": min(line.seeds, default=np.nan), "highest seed": max(line.seeds, default=np.nan)}
            for each in line.differences:
                of = {"control": each.control, "pairs": each.pairs, "difference": each.value.value}
                of |= {"difference low": each.value.low, "difference high": each.value.high, "verdict": each.verdict}
                of |= {"density ratio": each.ratio, "largest density ratio": each.largest_ratio}
                rows.append(own | of)
            if not line.differences:
                rows.append(own)
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        return f"<b>ScoreTable</b>{self.to_frame().to_html(border=0, index=False)}"  # pandas escapes

    def plot(self) -> "go.Figure":
        """The mean of each score with its interval."""
        import plotly.graph_objects as go

        names = [f"{line.score}, {line.judge} {line.kind}".strip() for line in self.lines]
        means = [line.mean for line in self.lines]
        error = {
            "type": "data",
            "symmetric": False,
            "array": [each.high - each.value for each in means],
            "arrayminus": [each.value - each.low for each in means],
        }
        points = go.Scatter(x=[each.value for each in means], y=names, mode="markers", error_x=error)
        return go.Figure(points, {"xaxis": {"title": "mean over features, with its 95% interval"}})


def summarised(run: Measured, controls: Sequence[Measured] = ()) -> ScoreTable:
    """The table of a run's scores."""
    lines = []
    for group, every in run.scores.items():
        if group.kind.startswith(SHUFFLED):
            continue
        found, shuffled = every.finite, run.scores.get(group._replace(kind=SHUFFLED + group.kind))
        differences = [_paired("shuffled", found, shuffled) if group.kind else _above_chance(group, found)]
        differences += [_difference(name, above) for name, above in found.above.items()]
        there = [(each, each.scores[group].finite) for each in controls if group in each.scores]
        there = [(control, column) for control, column in there if len(column.values)]
        differences += [_matched(run, found, control, column) for control, column in there]
        means = [float(column.values.mean()) for control, column in there if control.reseed]
        line = Line(
            *group,
            n=len(found.values),
            without=len(every.values) - len(found.values),
            median=float(np.median(found.values)) if len(found.values) else np.nan,
            mean=mean_interval(found.values),
            unread=every.unread,
            tokens=every.tokens,
            differences=tuple(differences),
            missing=tuple(each.name for each in controls if each not in [control for control, _ in there]),
            seeds=(float(found.values.mean()), *means) if means and len(found.values) else (),
            same=every.same,
        )
        lines.append(line)
    return ScoreTable(tuple(lines))


def mean_interval(values: np.ndarray) -> Interval:
    """The mean of `values` ``[n]`` with its 95% interval over them; NaN of none.

    Bootstrapped, or for more than `MANY` values, with which a bootstrap takes minutes, 1.96 standard errors.
    """
    if not len(values):
        return Interval(np.nan, np.nan, np.nan)
    if len(values) > MANY:
        mean, half = float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
        return Interval(mean, mean - half, mean + half)
    return interval(np.stack([values, np.ones(len(values))], 1))


def _paired(name: str, found: Column, other: Column | None) -> Difference:
    if other is None:
        return _difference(name, np.zeros(0))
    _, own, of_other = np.intersect1d(found.features, other.features, assume_unique=True, return_indices=True)
    return _difference(name, found.values[own] - other.values[of_other])


def _above_chance(group: Group, found: Column) -> Difference:
    return _difference(f"chance ({CHANCE[group.unit]:g})", found.values - CHANCE[group.unit])


def _matched(run: Measured, found: Column, control: Measured, other: Column) -> Difference:
    a, b = run.density[found.features], control.density[other.features]
    own, of_other = np.array(pairs(a, b), int).reshape(-1, 2).T
    made = _difference(control.name, found.values[own] - other.values[of_other])
    if len(own):
        ratios = np.exp(np.abs(np.log(a[own] / b[of_other])))
        made = replace(made, ratio=float(np.median(ratios)), largest_ratio=float(ratios.max()))
    return replace(made, reseed=control.reseed)


def _difference(name: str, differences: np.ndarray) -> Difference:
    differences = differences[np.isfinite(differences)]
    return Difference(name, len(differences), mean_interval(differences))
