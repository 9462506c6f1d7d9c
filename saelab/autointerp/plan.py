"""Which scores of a run are still to be made: of each feature's explanation, and of another's as a control.

Explanations stay in their file and are read when they are needed, so that memory grows by some 100 bytes for each.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from saelab.autointerp.choice import strangers
from saelab.autointerp.contexts import contexts
from saelab.autointerp.jobs import Job
from saelab.autointerp.llm.protocol import Reply
from saelab.autointerp.records import SHUFFLED, About, Explanation, Score, about_of, score_key
from saelab.autointerp.scoring import SCORERS, Judges, Scorer
from saelab.autointerp.settings import ContextSettings, ScoreSettings
from saelab.autointerp.store import EXPLANATIONS, SCORES, Explained, asked_of, contexts_of, explanation_at, lines_from
from saelab.features.database import Database

Source = tuple[str, str]
"""Model and kind of an explanation; of a control, those of what it is the control of."""
Control = tuple[int, str, str]
"""A feature, and model and kind of the explanation whose control is named."""
_LINE = np.dtype([("feature", "i8"), ("place", "i8"), ("source", "i8"), ("text", "i8")])
"""An explanation in the file. `source` is an index; `text` stands for the text: equal ones are equal, and "" is 0."""


class Stored(Mapping[int, Explained]):
    """The latest explanation of each feature, by feature, rising; without the explainer's answer."""

    def __init__(self, folder: Path, lines: np.ndarray, sources: Sequence[Source]) -> None:
        """`lines` ``[n]`` are `_LINE`, one for each feature, by feature."""
        self.folder, self.lines, self.sources = folder, lines, sources

    @property
    def features(self) -> np.ndarray:
        """``[n]`` int64, rising."""
        return self.lines["feature"]

    @property
    def explained(self) -> np.ndarray:
        """Whether the explanation has a text, ``[n]`` bool."""
        return self.lines["text"] != 0

    def __getitem__(self, feature: int) -> Explained:
        return _at(self.folder, int(self.lines["place"][_index(self.features, feature)]))

    def __iter__(self) -> Iterator[int]:
        return map(int, self.features)

    def __len__(self) -> int:
        return len(self.lines)


class Controls(Mapping[Control, Explained]):
    """Shuffled explanations, stored ones and new ones: the explanation of the feature nearest in density.

    A new one is that of another feature of the same model and kind, with another text.
    """

    def __init__(self, latest: Stored, chosen: np.ndarray, places: np.ndarray, new: np.ndarray) -> None:
        """For each of `chosen`, indices of `latest.lines`, the place of its control, or -1, and whether it is new."""
        self.latest, self.new = latest, new
        self._lines, self._places = latest.lines[chosen], places

    def __getitem__(self, control: Control) -> Explained:
        feature, *source = control
        i = _index(self._lines["feature"], feature)
        if self._places[i] < 0 or self.latest.sources[self._lines["source"][i]] != tuple(source):
            raise KeyError(control)
        found, of = _at(self.latest.folder, int(self._places[i]))
        if self.new[i]:
            note = f"the explanation of feature {found.feature}"
            found = replace(found, feature=feature, kind=SHUFFLED + found.kind, tokens=0, note=note)
            of = self.latest[feature].contexts
        return Explained(found, of)

    def __iter__(self) -> Iterator[Control]:
        for line, place in zip(self._lines, self._places, strict=True):
            if place >= 0:
                yield (int(line["feature"]), *self.latest.sources[line["source"]])

    def __len__(self) -> int:
        return int((self._places >= 0).sum())

    def new_one(self, feature: int) -> Explained | None:
        """The control of a feature that is to be written; None if there is none."""
        i = int(np.searchsorted(self._lines["feature"], feature))
        if i == len(self._lines) or self._lines["feature"][i] != feature or not self.new[i] or self._places[i] < 0:
            return None
        return self[(feature, *self.latest.sources[self._lines["source"][i]])]


_BRIEF = itemgetter("feature", "kind", "model", "text")


def stored(folder: Path, inputs: str, about: About = "context") -> tuple[Stored, Stored]:
    """The latest explanation of each feature, and the latest control of each explanation (feature and source)."""
    own, shuffled = array("q"), array("q")
    sources: dict[Source, int] = {}
    for place, _, (feature, kind, model, text) in lines_from(folder / EXPLANATIONS, inputs, build=_BRIEF):
        if about_of(kind) == about:
            source = sources.setdefault((model, kind.removeprefix(SHUFFLED)), len(sources))
            line = (feature, place, source, (hash(text) or 1) if text else 0)
            (shuffled if kind.startswith(SHUFFLED) else own).extend(line)
    names = [*sources]
    return Stored(folder, _last(own, len(names), by_source=False), names), Stored(
        folder, _last(shuffled, len(names), by_source=True), names
    )


def _last(values: array, sources: int, *, by_source: bool) -> np.ndarray:
    """The last line of each feature, or of each feature and source."""
    lines = np.frombuffer(values, _LINE)[::-1]
    keys = lines["feature"] * max(1, sources) + lines["source"] if by_source else lines["feature"]
    return lines[np.unique(keys, return_index=True)[1]]


def controls(database: Database, latest: Stored, shuffled: Stored, subjects: np.ndarray) -> Controls:
    """For the explanation of each of the features `subjects` a control, if there is one with another text.

    `latest` and `shuffled` are those of `stored`; `subjects` rise.
    """
    chosen = np.flatnonzero(np.isin(latest.features, subjects) & latest.explained)
    lines, n = latest.lines[chosen], max(1, len(latest.sources))
    places, new = np.full(len(lines), -1), np.zeros(len(lines), bool)
    if len(shuffled):
        known = shuffled.features * n + shuffled.lines["source"]
        i = np.searchsorted(known, lines["feature"] * n + lines["source"]).clip(0, len(known) - 1)
        there = (known[i] == lines["feature"] * n + lines["source"]) & (shuffled.lines["text"][i] != lines["text"])
        places[there] = shuffled.lines["place"][i[there]]
    density = np.asarray(database.table["density"])[lines["feature"]]
    for source in np.unique(lines["source"]):
        group = np.flatnonzero(lines["source"] == source)
        partner = strangers(density[group], lines["text"][group])
        missing = (places[group] < 0) & (partner >= 0)
        new[group[missing]] = True
        places[group[missing]] = lines["place"][group[partner[missing]]]
    return Controls(latest, chosen, places, new)


Known = tuple[str, ContextSettings, ScoreSettings]
"""The key of a score, and its settings."""


def known_scores(folder: Path, inputs: str) -> Iterator[Known]:
    """The scores in `folder` for the feature database `inputs`. Raises SaelabError if a line is damaged."""

    def brief(line: dict[str, Any]) -> Known:
        return line["key"], contexts_of(line["contexts"]), asked_of(line["asked"])

    return (known for _, _, known in lines_from(folder / SCORES, inputs, build=brief))


class Plan:
    """What is to be scored."""

    def __init__(
        self,
        database: Database,
        names: Sequence[str],
        latest: Mapping[int, Explained],
        controls: Mapping[Control, Explained],
        judges: Judges,
        known: Iterable[Known],
    ) -> None:
        """`names` are keys of `SCORERS`; the scores `known` are not made again."""
        self.database, self.latest, self.controls, self.judges = database, latest, controls, judges
        self.scorers = [(SCORERS[name].record or name, SCORERS[name]) for name in dict.fromkeys(names)]
        keys: dict[ContextSettings, array] = {}
        for key, of, asked in known:
            if asked == judges.settings:
                keys.setdefault(of, array("Q")).append(int(key, 16))
        self.done = {of: np.sort(np.frombuffer(found, np.uint64)) for of, found in keys.items()}
        """Keys of scores by the settings of their windows."""

    def missing(self, feature: int) -> list[tuple[Explanation, Scorer]]:
        """The scores of a feature that are still to be made: of which explanation, and by what."""
        own = self.latest.get(feature)
        of, itself = own.contexts if own else ContextSettings(), Explanation(feature, "", "", "")
        explanations, found = self._explanations(own), []
        for name, scorer in self.scorers:
            for each in explanations if scorer.about else [itself]:
                explanation = each.key if scorer.about else ""
                key = score_key(feature, name, explanation, scorer.model(self.judges))
                if scorer.about in (None, each.about) and not self._made(key, of):
                    found.append((each, scorer))
        return found

    def jobs(self, feature: int, write: Callable[[Score, ContextSettings], None]) -> Iterator[Job]:
        """The jobs that make and write the missing scores of a feature."""
        own = self.latest.get(feature)
        of = own.contexts if own else ContextSettings()
        found = contexts(self.database, feature, of)
        for explanation, scorer in self.missing(feature):
            requests, make = scorer.asked(found, explanation, self.judges)
            yield Job(requests, partial(_finish, make, write, of))

    def _made(self, key: str, of: ContextSettings) -> bool:
        known = self.done.get(of, _NONE)
        i = int(np.searchsorted(known, np.uint64(int(key, 16))))
        return i < len(known) and int(known[i]) == int(key, 16)

    def _explanations(self, own: Explained | None) -> list[Explanation]:
        if own is None or not own.explanation.text:
            return []
        explanation = own.explanation
        control = self.controls.get((explanation.feature, explanation.model, explanation.kind))
        return [explanation, *([control.explanation] if control else [])]


_NONE = np.zeros(0, np.uint64)


def _at(folder: Path, place: int) -> Explained:
    found, of = explanation_at(folder, place)
    return Explained(replace(found, answer=""), of)


def _index(features: np.ndarray, feature: int) -> int:
    """Index of a feature among rising ones. Raises KeyError if it is not there."""
    i = int(np.searchsorted(features, feature))
    if i == len(features) or features[i] != feature:
        raise KeyError(feature)
    return i


def _finish(
    make: Callable[[Sequence[Reply]], Score],
    write: Callable[[Score, ContextSettings], None],
    of: ContextSettings,
    replies: Sequence[Reply],
) -> None:
    write(make(replies), of)
