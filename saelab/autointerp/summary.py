"""The table of a run's scores over its features, each beside its controls.

A line is a score by one judge of the explanations of one kind by one explainer. Over the features with a value:

    median, mean    the mean with its 95% interval, bootstrapped over features
    difference      the mean of (score - control) over pairs, with its interval over pairs

The controls of an explanation's score are `shuffled`, the same feature's score with the explanation of another feature
of similar density, and the same scores in other runs, paired by density within a factor of 1.5. A score without an
explanation is compared with chance, and with other runs. Intervals that include 0 mean that the score does not beat its
control. A reseed is another training, not a control to beat: the means of the run and its reseeds show how much a
training changes them. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saelab.analysis.intervals import Interval, interval
from saelab.analysis.result import Result
from saelab.autointerp import lexical
from saelab.autointerp.choice import pairs
from saelab.autointerp.records import SHUFFLED, Score
from saelab.autointerp.scoring import CHANCE
from saelab.autointerp.store import explanations, scores
from saelab.features.database import Database

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class Group(NamedTuple):
    """What the scores of a line have in common."""

    score: str
    judge: str
    explainer: str
    """"" for scores without an explanation, as `kind`."""
    kind: str
    unit: str


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
            own |= {"unread": line.unread, "tokens": line.tokens}
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


@dataclass(frozen=True)
class Measured:
    """The scores of a run, by group and feature."""

    name: str
    scores: Mapping[Group, Mapping[int, Score]]
    density: np.ndarray
    """``[n_features]``"""
    reseed: bool = False
    """Whether the run is the same training as the measured one from another seed."""


def measured(name: str, folder: Path, database: Database) -> Measured:
    """The scores in `folder` for this feature database. Raises SaelabError if a line is damaged."""
    inputs = database.arrays.manifest["inputs"]
    made = {each.key: (each.model, each.kind) for each, _ in explanations(folder, inputs)}
    found: dict[Group, dict[int, Score]] = {}
    for score, _, _ in scores(folder, inputs, judged=False):
        explainer, kind = made.get(score.explanation, ("", ""))
        group = Group(score.score, score.model, explainer, kind, score.unit)
        found.setdefault(group, {})[score.feature] = score
    return Measured(name, found, np.asarray(database.table["density"]))


def summarised(run: Measured, controls: Sequence[Measured] = ()) -> ScoreTable:
    """The table of a run's scores."""
    lines = []
    for group, found in run.scores.items():
        if group.kind.startswith(SHUFFLED):
            continue
        values = _values(found)
        shuffled = run.scores.get(group._replace(kind=SHUFFLED + group.kind), {})
        differences = [_paired("shuffled", values, shuffled) if group.kind else _above_chance(group, values)]
        there = {control.name: _values(control.scores.get(group, {})) for control in controls}
        for control in controls:
            if there[control.name]:
                differences.append(_matched(run, values, control, there[control.name]))
        means = [np.mean(list(there[each.name].values())) for each in controls if each.reseed and there[each.name]]
        numbers = np.array(list(values.values()))
        line = Line(
            *group,
            n=len(values),
            without=len(found) - len(values),
            median=float(np.median(numbers)) if len(numbers) else np.nan,
            mean=mean_interval(numbers),
            unread=sum(score.unread for score in found.values()),
            tokens=sum(score.tokens for score in found.values()),
            differences=tuple(differences),
            missing=tuple(name for name, values in there.items() if not values),
            seeds=tuple(map(float, (np.mean(numbers), *means))) if means and values else (),
        )
        lines.append(line)
    return ScoreTable(tuple(lines))


def mean_interval(values: np.ndarray) -> Interval:
    """The mean of `values` ``[n]`` with its 95% interval over them; NaN of none."""
    return interval(np.stack([values, np.ones(len(values))], 1)) if len(values) else Interval(np.nan, np.nan, np.nan)


def _paired(name: str, values: Mapping[int, float], other: Mapping[int, Score]) -> Difference:
    both = [(value, other[feature].value.value) for feature, value in values.items() if feature in other]
    return _difference(name, both)


def _above_chance(group: Group, values: Mapping[int, float]) -> Difference:
    return _difference(f"chance ({CHANCE[group.unit]:g})", [(value, CHANCE[group.unit]) for value in values.values()])


def _values(found: Mapping[int, Score]) -> dict[int, float]:
    """The value of each feature that has one."""
    return {feature: score.value.value for feature, score in found.items() if np.isfinite(score.value.value)}


def _matched(
    run: Measured, values: Mapping[int, float], control: Measured, of_control: Mapping[int, float]
) -> Difference:
    own, other = list(values), list(of_control)
    a, b = run.density[own], control.density[other]
    found = pairs(a, b) if own else []
    made = _difference(control.name, [(values[own[i]], of_control[other[j]]) for i, j in found])
    ratios = [max(a[i] / b[j], b[j] / a[i]) for i, j in found]
    if ratios:
        made = replace(made, ratio=float(np.median(ratios)), largest_ratio=float(max(ratios)))
    return replace(made, reseed=control.reseed)


def _difference(name: str, both: Sequence[tuple[float, float]]) -> Difference:
    differences = np.array([a - b for a, b in both if np.isfinite(b)])
    return Difference(name, len(differences), mean_interval(differences))
