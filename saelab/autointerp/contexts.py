"""The windows of text that a feature is explained from and scored on, sampled from a feature database.

A feature's windows are those with an activation of it. Not centred: each row is divided into windows of equal length,
from its beginning, and what is left at its end is not used. Centred: the same windows, each moved so that its strongest
token lies in the middle, or as near to it as the row allows. They are ordered by their largest activation, strongest
first, and divided into `quantiles` parts with equal numbers of windows.

The explainer sees

    top        the strongest
    random     any, drawn at random
    quantiles  as many from each part, drawn at random
    mix        a fifth the strongest, the rest as in quantiles

and scores are measured on as many from each part of the remaining ones, and on windows in which the feature is silent:

    random      any
    coactive    windows of the features that are most often active together with it
    decoder     windows of the features with the nearest decoder rows
    same_token  windows with one of the tokens that hold most of its activation

No window is used twice, none overlaps another, and none has the same tokens as another: text that is repeated in the
corpus would otherwise be explained from and scored on. Everything is drawn from `seed` and the feature, so that it does
not depend on which features are asked for. A feature with too few windows gets those there are, and `lacking` says so.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saelab.autointerp.records import Judged
from saelab.autointerp.settings import ContextSettings
from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.features.examples import Example, example_at
from saelab.features.facts import Activations

_ROUNDS = 50
"""Draws of random windows before silent ones count as too few."""
_NEAR = {"coactive": "coactive_neighbours", "decoder": "decoder_neighbours"}


class Context(NamedTuple):
    """A window of text."""

    example: Example
    """Its marked token is the strongest; in a window without an activation, the one for which it was chosen."""
    quantile: int
    """The part of the feature's windows, 0 the strongest; -1 if the feature is silent."""

    def judged(
        self, said: float | None, *, truth: bool | None = None, marked: tuple[int, ...] = (), answer: str = ""
    ) -> Judged:
        """The record of what a judge said of the window; `truth` None: that the feature is active in it."""
        return Judged(
            row=self.example.row,
            position=self.example.position,
            start=self.example.start,
            length=len(self.example.tokens),
            quantile=self.quantile,
            truth=self.quantile >= 0 if truth is None else truth,
            said=said,
            marked=marked,
            answer=answer,
        )


@dataclass(frozen=True, eq=False)
class Contexts:
    """What a feature is explained from and scored on."""

    feature: int
    maximum: float
    """The feature's largest activation on the text."""
    explain: tuple[Context, ...]
    """Strongest first."""
    positives: tuple[Context, ...]
    """Strongest first."""
    negatives: tuple[Context, ...]
    windows: int
    """Windows of the text in which the feature is active."""
    lacking: str
    """Which of these are fewer than asked for, in words; "" if none."""


def contexts(database: Database, feature: int, settings: ContextSettings = ContextSettings()) -> Contexts:  # noqa: B008
    """The windows of `feature`, as the head of the file says. Raises SaelabError if there is no such feature."""
    active = database.facts.activations(feature)
    context = database.facts.rows.shape[1]
    if settings.window > context:
        raise SaelabError(f"window: {settings.window} is more than the {context} tokens of a row; give at most that")
    text = _Text(database, active, settings)
    rng = np.random.default_rng([settings.seed, feature])
    peaks = _peaks(active, settings.window, context)
    part = np.arange(len(peaks)) * settings.quantiles // max(1, len(peaks))
    explain = min(settings.explain, len(peaks) // 2)
    shown = text.take(_to_explain(part, explain, settings, rng), peaks, explain)
    rest = np.setdiff1d(np.arange(len(peaks)), shown)
    judged = text.take(_by_part(rest, part, settings.positives, settings.quantiles, rng), peaks, settings.positives)
    silent = list(text.silent(feature, settings.negatives, rng))

    def found(chosen: list[int]) -> tuple[Context, ...]:
        return tuple(Context(text.example(int(peaks[i])), int(part[i])) for i in sorted(chosen))

    counts = [("to explain", len(shown), settings.explain), ("positive", len(judged), settings.positives)]
    counts.append(("negative", len(silent), settings.negatives))
    return Contexts(
        feature=feature,
        maximum=float(database.facts.maxima[feature]),
        explain=found(shown),
        positives=found(judged),
        negatives=tuple(Context(text.example(place), -1) for place in silent),
        windows=len(peaks),
        lacking=", ".join(f"{have} of {asked} windows {name}" for name, have, asked in counts if have < asked),
    )


def _peaks(active: Activations, window: int, context: int) -> np.ndarray:
    """The place of the strongest activation of each window with one, strongest first; ties go to the earlier place."""
    position = active.places % context
    inside = position < context // window * window
    places, values = active.places[inside].astype(np.int64), active.values[inside]
    number = places // context * (context // window) + position[inside] // window
    order = np.lexsort((places, -values))
    first = np.sort(np.unique(number[order], return_index=True)[1])
    return places[order][first]


def _to_explain(part: np.ndarray, n: int, settings: ContextSettings, rng: np.random.Generator) -> Iterable[int]:
    """Indices of windows in the order in which the explainer is given them, `n` of them and then substitutes."""
    every = np.arange(len(part))
    if settings.sampling == "top":
        return every.tolist()
    if settings.sampling == "random":
        return rng.permutation(every).tolist()
    strongest = every[: -(-n // 5)] if settings.sampling == "mix" else every[:0]
    rest = _by_part(every[len(strongest) :], part, n - len(strongest), settings.quantiles, rng)
    return [*strongest.tolist(), *rest]


def _by_part(rest: np.ndarray, part: np.ndarray, n: int, parts: int, rng: np.random.Generator) -> Iterator[int]:
    """Indices from `rest` in turns: one of each part, then a second of each, so that any first n are spread evenly.

    Parts that run out are passed over.
    """
    of_part = [rng.permutation(rest[part[rest] == each]).tolist() for each in range(parts)]
    # the order of the parts within a turn, so that a last, incomplete turn is spread over strong and weak ones
    order = np.argsort(np.arange(parts) * 0.6180339887 % 1, kind="stable")
    while any(of_part):
        for each in order:
            if of_part[each]:
                yield of_part[each].pop()


class _Text:
    """The text, and the windows of it that were taken."""

    def __init__(self, database: Database, active: Activations, settings: ContextSettings) -> None:
        self.database, self.active, self.settings = database, active, settings
        self.rows, self.context = database.facts.rows, database.facts.rows.shape[1]
        self._taken: dict[int, list[int]] = {}
        """The starts of the windows taken in each row."""
        self._texts: set[bytes] = set()

    def start(self, place: int) -> int | None:
        """Position in its row at which the window of a place begins; None for the end of a row that has none."""
        position, window = place % self.context, self.settings.window
        if self.settings.centred:
            return min(max(0, position - window // 2), self.context - window)
        start = position // window * window
        return start if start + window <= self.context else None

    def example(self, place: int) -> Example:
        found = self.database.facts, self.database.vocabulary, self.active
        return example_at(*found, place, self.settings.window, self.start(place))

    def claim(self, place: int) -> bool:
        """Take the window of a place if it is new and overlaps none that was taken; returns whether it did."""
        start, row = self.start(place), place // self.context
        if start is None or any(abs(start - other) < self.settings.window for other in self._taken.get(row, ())):
            return False
        text = np.asarray(self.rows[row, start : start + self.settings.window]).tobytes()
        if text in self._texts:
            return False
        self._texts.add(text)
        self._taken.setdefault(row, []).append(start)
        return True

    def take(self, candidates: Iterable[int], peaks: np.ndarray, n: int) -> list[int]:
        """The first `n` of the candidates, indices of `peaks`, whose windows are free; takes them."""
        found: list[int] = []
        for each in candidates:
            if len(found) == n:
                break
            if self.claim(int(peaks[each])):
                found.append(each)
        return found

    def silent(self, feature: int, n: int, rng: np.random.Generator) -> Iterator[int]:
        """Places of at most `n` windows in which the feature is not active; takes the windows."""
        table, negative = self.database.table, self.settings.negative
        if negative == "random":
            sources = [self._anywhere(rng)]
        elif negative == "same_token":
            tokens = [token for token in table["top_tokens"][feature].tolist() if token >= 0]
            sources = [iter(rng.permutation(np.flatnonzero(self.rows.reshape(-1) == t)).tolist()) for t in tokens]
        else:
            near = [other for other in table[_NEAR[negative]][feature].tolist() if other >= 0]
            sources = [
                iter(rng.permutation(np.array(self.database.facts.activations(f).places)).tolist()) for f in near
            ]
        for _ in range(n):  # from each neighbour or token in turn, until it has no more
            while sources:
                source = sources.pop(0)
                place = next((place for place in source if self._silent(place) and self.claim(place)), None)
                if place is not None:
                    sources.append(source)
                    yield place
                    break

    def _anywhere(self, rng: np.random.Generator) -> Iterator[int]:
        """Random places in the middle of windows; ends after many draws."""
        per_row, window = self.context // self.settings.window, self.settings.window
        for _ in range(_ROUNDS):
            for number in rng.integers(len(self.rows) * per_row, size=4 * self.settings.negatives).tolist():
                yield number // per_row * self.context + number % per_row * window + window // 2

    def _silent(self, place: int) -> bool:
        start = self.start(place)
        if start is None:
            return False
        begin = place // self.context * self.context + start
        first, stop = np.searchsorted(self.active.places, [begin, begin + self.settings.window])
        return bool(first == stop)
