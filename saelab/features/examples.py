"""Examples of a feature: windows of text around some of its activations, or where it could be active and is not."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from saelab.errors import SaelabError
from saelab.features.facts import Activations, Facts
from saelab.features.table import Table
from saelab.features.vocabulary import Vocabulary

Kind = Literal["top", "range", "random", "near misses"]


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
) -> list[Example]:
    """At most `n` examples of a feature, of a kind.

    - "top": its strongest activations, one per row of text, strongest first.
    - "range": activations from `low` up to `high`, both included, drawn at random; strongest first.
    - "random": any activations, drawn at random, in the order of the draw.

    A draw is the same every time, and a larger n adds to it. Raises SaelabError if there is no such feature.
    """
    active = facts.activations(feature)
    if kind == "top":
        places = table["top_places"][feature]
        chosen = np.searchsorted(active.places, places[places >= 0])[:n]
    elif kind == "range":
        inside = np.flatnonzero((active.values >= low) & (active.values <= high))
        chosen = _drawn(active, inside, feature, n)
        chosen = chosen[np.lexsort((chosen, -active.values[chosen]))]
    elif kind == "random":
        chosen = _drawn(active, np.arange(len(active.places)), feature, n)
    else:
        raise SaelabError(f"There are no examples of the kind {kind!r}.")
    return [example_at(facts, vocabulary, active, int(active.places[entry]), window) for entry in chosen]


def example_at(facts: Facts, vocabulary: Vocabulary, active: Activations, place: int, window: int) -> Example:
    """The example at a place of the text; `active` are all activations of the feature."""
    context = facts.rows.shape[1]
    window = min(window, context)
    row, position = divmod(place, context)
    start = min(max(0, position - window * 2 // 3), context - window)  # text before a peak explains more
    shown = row * context + start
    first, stop = np.searchsorted(active.places, [shown, shown + window])
    activations = np.zeros(window, np.float32)
    activations[active.places[first:stop] - shown] = active.values[first:stop]
    token_ids = np.array(facts.rows[row, start : start + window])
    index = position - start
    return Example(
        row, position, float(activations[index]), index, token_ids, vocabulary.window(token_ids), activations
    )


def _drawn(active: Activations, entries: np.ndarray, feature: int, n: int) -> np.ndarray:
    """`n` of the entries, drawn at random."""
    return entries[np.argsort(_shuffled(active.places[entries], feature), kind="stable")[:n]]


def _shuffled(places: np.ndarray, feature: int) -> np.ndarray:
    """A number for each place, uniform and without order (the finaliser of splitmix64), another for each feature."""
    x = places.astype(np.uint64) + (np.uint64(feature + 1) << np.uint64(32))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
