"""A feature's activations from the weakest to the strongest: ten intervals with examples, and the tokens of a range.

The strongest examples make a feature look cleaner than it is: half of its activations, or more, may lie on something
else.
"""

from typing import NamedTuple

import numpy as np

from saelab.features.examples import Example, check_positive, drawn, example_at, in_range, strongest_first, top_places
from saelab.features.facts import Facts
from saelab.features.layout import BINS, QUANTILES
from saelab.features.table import Table
from saelab.features.vocabulary import Vocabulary

DECILES = tuple(tenth / 10 for tenth in range(1, 10))
FAR = 5
"""An activation is far above others if it is above this many times theirs."""


class Interval(NamedTuple):
    """A range of a feature's activations."""

    low: float
    """The smallest of its activations."""
    high: float
    """The largest."""
    share: float
    """Share of the feature's activations that lie in it."""
    examples: list[Example]
    """Drawn at random from it; strongest first."""


class Histogram(NamedTuple):
    """A feature's activations in bins, to be drawn."""

    counts: np.ndarray
    """Activations in each bin, ``[bins]``."""
    edges: np.ndarray
    """``[bins + 1]``; a bin has its lower edge and not its upper one, the last bin both."""
    logarithmic: bool
    """Whether the bins are equal on a logarithmic scale, from the smallest activation on, and not from 0 on."""


class RangeTokens(NamedTuple):
    """The tokens on which a feature's activations in a range lie."""

    n: int
    """Activations in the range."""
    peak_share: float
    """Share of them on the token id of the feature's strongest activation; 0 if there are none."""
    tokens: np.ndarray
    """Their most frequent token ids, most frequent first, ``[m]`` int64; ties go to the lower id."""
    shares: np.ndarray
    """Share of them on each of `tokens`, ``[m]`` float64."""


def intervals(facts: Facts, vocabulary: Vocabulary, feature: int, n: int, window: int) -> list[Interval]:
    """The activations between two neighbouring deciles, strongest interval first, each with `n` examples.

    The ranges are disjoint and cover all activations of the feature. An activation that equals a decile lies below it;
    so there are fewer than ten intervals if many activations are equal. Raises SaelabError if there is no such feature,
    or if `n` or `window` is below 1.
    """
    check_positive(n=n, window=window)
    active = facts.activations(feature)
    if not len(active.values):
        return []
    group = np.searchsorted(np.quantile(active.values, DECILES, method="inverted_cdf"), active.values)
    found = []
    for inside in (group == k for k in reversed(range(len(DECILES) + 1))):
        if inside.any():
            values = active.values[inside]
            chosen = strongest_first(active, drawn(active.places[inside], feature, n))
            examples = [example_at(facts, vocabulary, active, place, window) for place in chosen.tolist()]
            found.append(Interval(float(values.min()), float(values.max()), len(values) / len(group), examples))
    return found


def tokens_in_range(facts: Facts, table: Table, feature: int, low: float, high: float, n: int) -> RangeTokens:
    """The tokens of a feature's activations from `low` up to `high`, both included; the `n` most frequent ones.

    Raises SaelabError if there is no such feature.
    """
    active = facts.activations(feature)
    ids = facts.rows.reshape(-1)
    inside = ids[active.places[in_range(active, low, high)]]
    if not len(inside):
        return RangeTokens(0, 0.0, np.empty(0, np.int64), np.empty(0))
    tokens, counts = np.unique(inside, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:n]
    peak = ids[top_places(table, feature)[0]]
    return RangeTokens(
        len(inside), float((inside == peak).mean()), tokens[most].astype(np.int64), counts[most] / len(inside)
    )


def usual_maximum(facts: Facts, table: Table, feature: int) -> float:
    """The largest activation of a feature; if a few are far above all others, the largest of the others.

    A model gives some tokens, mostly the first of a text, vectors hundreds of times as long as others (attention
    sinks). On a scale that ends at such an activation, all others are next to 0. Left out are activations above `FAR`
    times the 90% quantile, if the maximum is above `FAR` times the largest that is left. 0 if the feature is never
    active. Raises SaelabError if there is no such feature.
    """
    facts.check(feature)
    maximum = float(facts.maxima[feature])
    far = FAR * float(table["quantiles"][feature, QUANTILES.index(0.9)])
    if maximum <= far:
        return maximum
    values = facts.activations(feature).values
    usual = float(values[values <= far].max(initial=0))
    return usual if maximum > FAR * usual > 0 else maximum


def histogram(facts: Facts, table: Table, feature: int) -> Histogram:
    """A feature's activations in bins: its histogram, or one with logarithmic bins if a few are far above all others.

    Raises SaelabError if there is no such feature.
    """
    maximum = float(facts.maxima[feature])
    if usual_maximum(facts, table, feature) == maximum:
        return Histogram(np.array(table["histogram"][feature]), np.linspace(0, maximum, BINS + 1), False)
    values = facts.activations(feature).values
    edges = np.geomspace(float(values.min()), maximum, BINS + 1).astype(np.float32)
    return Histogram(np.histogram(values, edges)[0], edges, True)
