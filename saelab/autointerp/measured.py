"""The scores of a run as arrays, by score, judge and the explanations that are scored. Needs no torch."""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saelab.autointerp.constant import Answers, Same
from saelab.autointerp.records import Score
from saelab.autointerp.store import EXPLANATIONS, lines_from, scores
from saelab.features.database import Database

ABOVE = "above "
"""What the name of a figure begins with that is the difference to a control in the score itself."""


class Group(NamedTuple):
    """What the scores of a line have in common."""

    score: str
    judge: str
    explainer: str
    """"" for scores without an explanation, as `kind`."""
    kind: str
    unit: str


@dataclass(frozen=True, eq=False)
class Column:
    """A score of several features, the latest of each: 16 bytes for a feature, and 8 for each control in the score."""

    features: np.ndarray
    """``[n]`` int64, rising."""
    values: np.ndarray
    """``[n]``; NaN for a feature without a value."""
    unread: int
    tokens: int
    above: Mapping[str, np.ndarray]
    """What the value has above each control that is in the score itself, ``[n]``."""
    same: Same | None = None
    """The judge's most frequent answer."""

    @property
    def finite(self) -> "Column":
        """The features with a value."""
        kept = np.isfinite(self.values)
        above = {name: each[kept] for name, each in self.above.items()}
        return replace(self, features=self.features[kept], values=self.values[kept], above=above)


@dataclass(frozen=True, eq=False)
class Measured:
    """The scores of a run, by group."""

    name: str
    scores: Mapping[Group, Column]
    density: np.ndarray
    """``[n_features]``"""
    reseed: bool = False
    """Whether the run is the same training as the measured one from another seed."""


def measured(name: str, folder: Path, database: Database) -> Measured:
    """The scores in `folder` for this feature database. Raises SaelabError if a line is damaged."""
    inputs = database.arrays.manifest["inputs"]
    source_of = _sources(folder, inputs)
    found: dict[Group, _Rows] = {}
    for score, _, _ in scores(folder, inputs, judged=False):
        group = Group(score.score, score.model, *source_of(score.explanation), score.unit)
        found.setdefault(group, _Rows()).add(score)
    columns = {group: rows.column() for group, rows in found.items()}
    return Measured(name, columns, np.asarray(database.table["density"]))


def _sources(folder: Path, inputs: str) -> Callable[[str], tuple[str, str]]:
    """A function from the key of an explanation to its explainer and kind; "" and "" if there is none."""
    keys, numbers, names = array("Q"), array("q"), dict[tuple[str, str], int]()
    for _, _, (key, *name) in lines_from(folder / EXPLANATIONS, inputs, build=itemgetter("key", "model", "kind")):
        keys.append(int(key, 16))
        numbers.append(names.setdefault((name[0], name[1]), len(names)))
    order = np.argsort(np.array(keys, np.uint64))
    known, sources, listed = np.array(keys, np.uint64)[order], np.array(numbers, np.int64)[order], [*names]

    def source_of(key: str) -> tuple[str, str]:
        i = int(np.searchsorted(known, np.uint64(int(key or "0", 16))))
        return listed[sources[i]] if key and i < len(known) and int(known[i]) == int(key, 16) else ("", "")

    return source_of


class _Rows:
    """A `Column` that is being read."""

    def __init__(self) -> None:
        self.features, self.values = array("q"), array("d")
        self.unread, self.tokens = array("q"), array("q")
        self.above: dict[str, array[float]] = {}
        self.same = Answers()

    def add(self, score: Score) -> None:
        self.same.add(score.figures)
        for name, value in score.figures.items():
            if name.startswith(ABOVE) and not name.endswith((", low", ", high")):
                missing = [np.nan] * len(self.features)
                self.above.setdefault(name.removeprefix(ABOVE), array("d", missing)).append(value)
        self.features.append(score.feature)
        self.values.append(score.value.value)
        self.unread.append(score.unread)
        self.tokens.append(score.tokens)

    def column(self) -> Column:
        features, last = np.unique(np.array(self.features)[::-1], return_index=True)
        values, unread, tokens = (np.array(each)[::-1][last] for each in (self.values, self.unread, self.tokens))
        above = {name: np.array(each)[::-1][last] for name, each in self.above.items()}
        return Column(features, values, int(unread.sum()), int(tokens.sum()), above, self.same.most_frequent())
