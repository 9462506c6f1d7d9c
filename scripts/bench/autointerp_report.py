"""The tables of the study of explanations: the scores, and how far they are above each control."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from table import table

from saelab.analysis.intervals import Interval
from saelab.autointerp.summary import Difference, Line, ScoreTable
from saelab.runs.config import RunSettings

SLOW = ("surprisal", "intervention")
"""Scores that run the language model."""
LEXICAL = "**A lexical judge on lexical explanations checks the pipeline and answers no claim.**"


class Study(NamedTuple):
    """What the tables are made from."""

    run: str
    """Name of the run."""
    settings: RunSettings
    scores: ScoreTable
    trained: Mapping[str, int]
    """Training tokens of the run and its controls, by name."""
    seconds: Mapping[str, Mapping[str, Sequence[float]]]
    """By run and step: by a clock, of the processor, whether finished."""


def report(study: Study) -> str:
    """The study as Markdown."""
    s, lines = study.settings, [line for line in study.scores.lines if line.lexical or not line.explainer]
    tokens = {name: n for name, n in study.trained.items() if n}
    every = f"{max(tokens.values(), default=0):,}"
    same = f"{every} training tokens each" if len(set(tokens.values())) < 2 else f"at most {every} training tokens"
    about = (
        f"`{s.site}` of the model {s.model.name}: {s.sae.n_features:,} features, k {s.sae.k}, {same} for "
        f"{', '.join(tokens)}. Mean over features with its 95% interval."
    )
    return "\n\n".join([LEXICAL, about, _scores(study, lines), *_controls(lines), _not_beaten(lines), _time(study)])


def _scores(study: Study, lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        seconds = study.seconds.get(study.run, {}).get(line.score)
        spread = f"{min(line.seeds):.3f} to {max(line.seeds):.3f} ({len(line.seeds)})" if line.seeds else "-"
        cells = [line.score, line.unit, str(line.n), f"{line.median:.3f}", _interval(line.mean), spread]
        rows.append([*cells, *(f"{each:.1f}" for each in (seconds or [])[:2])] + ["-", "-"] * (seconds is None))
    head = ["score", "unit", "features", "median", "mean", "means of the seeds", "seconds", "of the processor"]
    return table(head, rows)


def _controls(lines: Sequence[Line]) -> list[str]:
    """What the differences are, and a table of them for all scores but `SLOW`, and one for these."""
    about = (
        "How far each score is above that of a control: mean difference over pairs of features matched by density, "
        "with its interval. `!`: the control is not beaten. Reseeds are no controls to beat."
    )
    parts = [[line for line in lines if (line.score in SLOW) == slow] for slow in (False, True)]
    return [about, *(_differences(part) for part in parts if part)]


def _differences(lines: Sequence[Line]) -> str:
    """A row for each control, a column for each score."""
    names = list(dict.fromkeys(each.control for line in lines for each in line.differences))
    rows = []
    for name in names:
        by_line = [next((each for each in line.differences if each.control == name), None) for line in lines]
        there = [each for each in by_line if each is not None]
        pairs = _range([each.pairs for each in there])
        rows.append([name, pairs, _ratios(there), *(_difference(each) for each in by_line)])
    return table(["control", "pairs", "density ratio", *(line.score for line in lines)], rows)


def _ratios(there: Sequence[Difference]) -> str:
    """The median ratio of the densities of a pair, and the largest."""
    largest = max(each.largest_ratio for each in there)
    return "same features" if largest == 1 else f"{max(each.ratio for each in there):.3f}, at most {largest:.2f}"


def _difference(each: Difference | None) -> str:
    if each is None:
        return "-"
    return f"{_interval(each.value)}{' !' * (not each.reseed and not each.value.low > 0)}"


def _not_beaten(lines: Sequence[Line]) -> str:
    """In words, the scores that do not beat a control."""
    found = [
        f"{line.score}: {', '.join(names)}"
        for line in lines
        if (names := [d.control for d in line.differences if not d.reseed and not d.value.low > 0])
    ]
    return f"Controls that are not beaten: {'; '.join(found)}." if found else "Every control is beaten."


def _time(study: Study) -> str:
    """In words, the time of the run, and of all of its controls together."""
    parts = []
    for what, names in ((study.run, [study.run]), ("its controls", [n for n in study.seconds if n != study.run])):
        steps = [each for name in names for each in study.seconds.get(name, {}).values()]
        if steps:
            wall, processor = (sum(each[i] for each in steps) for i in (0, 1))
            parts.append(f"{what}: {wall:,.0f} s by the clock, {processor:,.0f} s of the processor")
    return f"Time of explaining and scoring. {'; '.join(parts)}." if parts else "Times were not measured."


def _interval(value: Interval) -> str:
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"


def _range(numbers: Sequence[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}" if len(set(numbers)) > 1 else str(numbers[0])
