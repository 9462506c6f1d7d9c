"""Examples of a feature: windows of text around some of its activations."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from saelab.errors import SaelabError
from saelab.features.facts import Activations, Facts
from saelab.features.table import Table
from saelab.features.vocabulary import Vocabulary

Kind = Literal["top", "range", "random"]

_AROUND = 3
"""Examples repeat each other if they have the same tokens up to this many before and after the marked one."""


@dataclass(frozen=True, eq=False)
class Example:
    """A token of the text and a window around it, in one row."""

    row: int
    position: int
    """Position of the token in its row."""
    activation: float
    """Activation of the feature on the token; 0 for a near miss."""
    index: int
    """Index of the token in the window."""
    token_ids: np.ndarray
    """``[window]`` int32"""
    tokens: list[str]
    """The text of each token of the window."""
    activations: np.ndarray
    """Activation of the feature on each token of the window, ``[window]`` float32; 0 if inactive."""
    repeats: int = 0
    """Weaker examples that repeat this one and were left out."""

    @property
    def start(self) -> int:
        """Position of the window in its row."""
        return self.position - self.index


def find_examples(
    facts: Facts,
    table: Table,
    vocabulary: Vocabulary,
    feature: int,
    kind: Kind,
    n: int,
    window: int,
    low: float,
    high: float,
    distinct: bool,
) -> list[Example]:
    """At most `n` examples of a feature, of a kind.

    - "top": its strongest activations, one per row of text, strongest first; the database lists 20 of them.
    - "range": activations from `low` up to `high`, both included, drawn at random; strongest first.
    - "random": any activations, drawn at random, in the order of the draw.

    A draw is the same every time, and a larger n adds to it. `distinct` leaves out examples that repeat the 7 tokens
    around the marked token of an earlier one, and counts them there. Raises SaelabError if there is no such feature, or
    if `n` or `window` is below 1.
    """
    check_positive(n=n, window=window)
    active = facts.activations(feature)
    if kind == "top":
        chosen = top_places(table, feature)
    elif kind == "range":
        chosen = drawn(active.places[in_range(active, low, high)], feature, n)
        chosen = strongest_first(active, chosen)
    elif kind == "random":
        chosen = drawn(active.places, feature, n)
    else:
        raise SaelabError(f"There are no examples of the kind {kind!r}: the kinds are top, range and random.")
    found = [example_at(facts, vocabulary, active, place, window) for place in chosen.tolist()]
    return (_distinct(found) if distinct else found)[:n]


def check_positive(**numbers: int) -> None:
    """Raises SaelabError if one of `numbers`, which their names say, is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise SaelabError(f"{name}: {number} is not a positive number.")


def example_at(
    facts: Facts, vocabulary: Vocabulary, active: Activations, place: int, window: int, start: int | None = None
) -> Example:
    """The example at a place of the text; `active` are all activations of the feature.

    `start` is the position of the window in the row; None: two thirds of the window lie before the token, if they can.
    """
    context = facts.rows.shape[1]
    window = min(window, context)
    row, position = divmod(place, context)
    start = window_start(position, window, context) if start is None else start
    shown = row * context + start
    first, stop = np.searchsorted(active.places, [shown, shown + window])
    activations = np.zeros(window, np.float32)
    activations[active.places[first:stop] - shown] = active.values[first:stop]
    token_ids = np.array(facts.rows[row, start : start + window])
    index = position - start
    return Example(
        row, position, float(activations[index]), index, token_ids, vocabulary.window(token_ids), activations
    )


def window_start(position: int, window: int, context: int) -> int:
    """Position in the row of the window around a token: text before an activation explains more than text after it."""
    return min(max(0, position - window * 2 // 3), context - window)


def top_places(table: Table, feature: int) -> np.ndarray:
    """Places of a feature's strongest activations, one per row of text, strongest first."""
    places = table["top_places"][feature]
    return places[places >= 0]


def in_range(active: Activations, low: float, high: float) -> np.ndarray:
    """Whether each activation lies in a range, both ends included, ``[n]`` bool."""
    return (active.values >= low) & (active.values <= high)


def drawn(places: np.ndarray, feature: int, n: int) -> np.ndarray:
    """`n` of the places, drawn at random: the same every time, and a larger n adds to them."""
    return places[np.argsort(shuffled(places, feature), kind="stable")[:n]]


def shuffled(places: np.ndarray, feature: int) -> np.ndarray:
    """A number for each place, uniform and without order (the finaliser of splitmix64), another for each feature."""
    x = places.astype(np.uint64) + (np.uint64(feature + 1) << np.uint64(32))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def strongest_first(active: Activations, places: np.ndarray) -> np.ndarray:
    """The places, on which the feature is active, by falling activation; ties go to the earlier place."""
    values = active.values[np.searchsorted(active.places, places)]
    return places[np.lexsort((places, -values))]


def _distinct(examples: Iterable[Example]) -> list[Example]:
    """The examples that repeat no earlier one."""
    found: dict[tuple[bytes, int], Example] = {}
    for example in examples:
        before = min(example.index, _AROUND)
        around = example.token_ids[example.index - before : example.index + _AROUND + 1]
        earlier = found.get(key := (around.tobytes(), before))
        found[key] = replace(earlier, repeats=earlier.repeats + 1) if earlier else example
    return list(found.values())
