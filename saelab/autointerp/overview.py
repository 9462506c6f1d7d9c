"""All explanations and scores of a run at a glance, for tables, charts and search: 44 bytes for a score.

`overview` reads the files of records once; given what it returned before, it reads only what was added since. Judged
examples are not parsed. Needs no torch.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saelab.autointerp import store
from saelab.autointerp.records import EFFECT, SHUFFLED, Explanation
from saelab.autointerp.store import EXPLANATIONS, SCORES, lines_from

_SCORE = np.dtype(
    [("key", "u8"), ("feature", "i8"), ("explanation", "u8"), ("measure", "i4"), ("value", "f8"), ("offset", "u8")]
)
_PACKED = struct.Struct("=QqQidQ")


class Source(NamedTuple):
    """How an explanation was made; the fields are those of `records.Explanation`."""

    kind: str
    model: str
    author: str

    @property
    def control(self) -> bool:
        return self.kind.startswith(SHUFFLED)

    @property
    def effect(self) -> bool:
        """Whether it says what comes after the feature, not when the feature is active."""
        return self.kind.removeprefix(SHUFFLED) == EFFECT


def is_control(control: Explanation, of: Explanation) -> bool:
    """Whether the first explanation is a control of the second one."""
    return (control.feature, control.kind, control.model) == (of.feature, SHUFFLED + of.kind, of.model)


class Measure(NamedTuple):
    """A score, by its name, its judge and its unit."""

    score: str
    judge: str
    unit: str

    @property
    def label(self) -> str:
        return f"{self.score} by {self.judge}"


class Explained(NamedTuple):
    """The explanation of a feature."""

    feature: int
    text: str
    """"" if the explainer's answer could not be read, and for a control."""
    source: Source
    offset: int
    """The first byte of its line."""


class Points(NamedTuple):
    """Scores by one measure: of explanations from one source, or of the features themselves, if there is none."""

    source: Source | None
    features: np.ndarray
    """``[n]`` int64"""
    values: np.ndarray
    """``[n]`` float64, none of them NaN"""


@dataclass(frozen=True, eq=False)
class Overview:
    """The explanations and scores of a run; of lines with the same key, the last."""

    n_features: int
    measures: tuple[Measure, ...] = ()
    explanations: Mapping[int, Explained] = field(default_factory=dict)
    """By key, in the order of writing."""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, _SCORE))
    """A line per score; `explanation` is the key, 0 for a score of the feature; `measure` indexes `measures`."""
    read: tuple[tuple[int, int], ...] = ((0, 0), (0, 0))
    """The inode of each file, and how many bytes of it were read."""

    @cached_property
    def latest(self) -> dict[int, int]:
        """By feature: the key of its latest explanation that has a text and says when the feature is active."""
        kinds = {each.source: not each.source.control and not each.source.effect for each in self.explanations.values()}
        return {each.feature: key for key, each in self.explanations.items() if each.text and kinds[each.source]}

    @cached_property
    def keys_of(self) -> dict[int, list[int]]:
        """By feature: the keys of all its explanations, controls too."""
        found: dict[int, list[int]] = {}
        for key, each in self.explanations.items():
            found.setdefault(each.feature, []).append(key)
        return found

    def explanation(self, feature: int) -> Explained | None:
        """The latest explanation of a feature; None if it has none."""
        key = self.latest.get(feature)
        return None if key is None else self.explanations[key]

    def search(self, words: str) -> np.ndarray:
        """The features whose latest explanation contains this text, in any case, ``[n]`` int64, rising."""
        asked = " ".join(words.casefold().split())
        found = [f for f, key in self.latest.items() if asked in self.explanations[key].text.casefold()]
        return np.sort(np.array(found, np.int64))

    @cached_property
    def columns(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By the label of each measure: the score of each feature's latest explanation, and of the control of that.

        Both are ``[n_features]`` float64, NaN where there is none. Scores of the feature itself have no control.
        """
        latest, control = (self._keys(by_feature) for by_feature in (self.latest, self._controls))
        found = {}
        for index, measure in enumerate(self.measures):
            own = self.scores[self.scores["measure"] == index]
            values = np.full((2, self.n_features), np.nan)
            for line, keys in zip(values, (latest, control), strict=True):
                right = own[own["explanation"] == keys[own["feature"]]]
                line[right["feature"]] = right["value"]
            itself = own[own["explanation"] == 0]
            values[0, itself["feature"]] = itself["value"]
            found[measure.label] = (values[0], values[1])
        return found

    def _keys(self, by_feature: Mapping[int, int]) -> np.ndarray:
        """Keys ``[n_features]``; 1, which no explanation has in practice, where there is none."""
        found = np.ones(self.n_features, np.uint64)
        found[np.array(list(by_feature), np.int64)] = np.array(list(by_feature.values()), np.uint64)
        return found

    @cached_property
    def _controls(self) -> dict[int, int]:
        """By feature: the key of the control of its latest explanation."""
        controls = {
            (each.feature, each.source.kind, each.source.model): key
            for key, each in self.explanations.items()
            if each.source.control
        }
        found = {}
        for feature, key in self.latest.items():
            of = self.explanations[key].source
            if (feature, SHUFFLED + of.kind, of.model) in controls:
                found[feature] = controls[feature, SHUFFLED + of.kind, of.model]
        return found

    def points(self, label: str) -> list[Points]:
        """All scores by a measure, those of earlier explanations and of controls too, by source."""
        own = [index for index, measure in enumerate(self.measures) if measure.label == label]
        scores = self.scores[np.isin(self.scores["measure"], own) & np.isfinite(self.scores["value"])]
        groups: dict[Source | None, list[int]] = {}
        for line, key in enumerate(scores["explanation"].tolist()):
            of = self.explanations.get(key)
            groups.setdefault(of.source if of else None, []).append(line)
        return [Points(source, scores["feature"][lines], scores["value"][lines]) for source, lines in groups.items()]


def records(folder: Path, known: Overview, feature: int) -> tuple[list[store.Explained], list[store.Scored]]:
    """All explanations and scores of a feature, without judged examples, in the order of writing.

    Raises SaelabError if a line is damaged.
    """
    own = known.scores[known.scores["feature"] == feature]
    explained = [store.explanation_at(folder, known.explanations[key].offset) for key in known.keys_of.get(feature, ())]
    return explained, [store.score_at(folder, offset, judged=False) for offset in np.sort(own["offset"]).tolist()]


def overview(folder: Path, inputs: str, n_features: int, before: Overview | None = None) -> Overview:
    """The overview of the records in `folder` of the feature database `inputs`, which has `n_features`.

    `before` is what this function returned for them earlier, and is not changed. Raises SaelabError if a line is
    damaged.
    """
    files = [folder / name for name in (EXPLANATIONS, SCORES)]
    stats = [path.stat() if path.is_file() else None for path in files]
    inodes = [found.st_ino if found else 0 for found in stats]
    known = before or Overview(n_features)
    for found, (inode, read) in zip(stats, known.read, strict=True):
        if read and (found is None or found.st_ino != inode or found.st_size < read):  # another file of this name
            known = Overview(n_features)
    starts = [read for _, read in known.read]
    explanations, explanations_end = _explanations(files[0], inputs, n_features, known, starts[0])
    scores, measures, scores_end = _scores(files[1], inputs, n_features, known, starts[1])
    ends = (explanations_end, scores_end)
    return Overview(n_features, measures, explanations, scores, tuple(zip(inodes, ends, strict=True)))


def _explanations(
    path: Path, inputs: str, n_features: int, known: Overview, start: int
) -> tuple[Mapping[int, Explained], int]:
    found, sources, end = dict(known.explanations), dict[Source, Source](), start
    for offset, stop, line in lines_from(path, inputs, start):
        end = stop
        source, key = Source(line["kind"], line["model"], line["author"]), int(line["key"], 16)
        found.pop(key, None)  # to the end
        if line["feature"] < n_features:
            text = "" if source.control else line["text"]
            found[key] = Explained(line["feature"], text, sources.setdefault(source, source), offset)
    return found, end


def _scores(
    path: Path, inputs: str, n_features: int, known: Overview, start: int
) -> tuple[np.ndarray, tuple[Measure, ...], int]:
    measures, end = {measure: index for index, measure in enumerate(known.measures)}, start
    new = bytearray()
    for offset, stop, line in lines_from(path, inputs, start):
        end = stop
        if line["feature"] >= n_features:
            continue
        measure = measures.setdefault(Measure(line["score"], line["model"], line["unit"]), len(measures))
        explanation, value = int(line["explanation"] or "0", 16), line["value"][0]
        value = math.nan if value is None else value
        new += _PACKED.pack(int(line["key"], 16), line["feature"], explanation, measure, value, offset)
    added = np.frombuffer(new, _SCORE)
    both = np.concatenate([known.scores, added])
    last = len(both) - 1 - np.unique(both["key"][::-1], return_index=True)[1]
    return both[np.sort(last)], tuple(measures), end
