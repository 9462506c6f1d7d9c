"""Which features come back in every training: decoders of several seeds, paired one to one.

    found = stability([decoder_rows(run) for run in runs])
    found.counterparts[0]       # for each feature of the first, the number of other runs that have it

A feature has a counterpart in another run if `assign_decoders` pairs the two at a cosine of at least `threshold`. By
chance: the same with `random_rows` in the place of the other run's. Figures of pairs of runs are means over all pairs,
with the smallest and the largest beside them: with few seeds that range is all that is known about other seeds.

Needs numpy and scipy, no torch. All runs must read the same site of the same model (similarity.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saelab.analysis.intervals import Interval
from saelab.analysis.matching import Assignment, assign_decoders
from saelab.analysis.result import Result
from saelab.analysis.similarity import random_rows
from saelab.errors import SaelabError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class SeedPair(NamedTuple):
    """Two of the runs; a share is of the features of the smaller one."""

    first: int
    second: int
    mean_cosine: float
    """Mean cosine of their one-to-one pairs (`Assignment.mean_cosine`)."""
    mean_cosine_by_chance: float
    share: float
    """Share of features with a counterpart."""
    share_by_chance: float


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Result):
    """How much of a decoder comes back with another seed; the head of the file defines it."""

    threshold: float
    """Cosine from which two paired features are counterparts."""
    pairs: tuple[SeedPair, ...]
    counterparts: tuple[np.ndarray, ...]
    """For each run the number of other runs in which each feature has a counterpart, ``[its features]`` int64."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        others = len(self.counterparts) - 1
        found: dict[str, int | float | str | Interval] = {
            "runs": others + 1,
            "counterpart from a cosine of": self.threshold,
        }
        for name, title in (("mean_cosine", "mean cosine of one-to-one pairs"), ("share", "share with a counterpart")):
            values = [getattr(pair, name) for pair in self.pairs]
            found[title] = float(np.mean(values))
            found[f"{title}, smallest and largest"] = f"{min(values):.4g} to {max(values):.4g}"
            found[f"{title}, by chance"] = float(np.mean([getattr(pair, f"{name}_by_chance") for pair in self.pairs]))
        every, none = (np.mean([(each == n).mean() for each in self.counterparts]) for n in (others, 0))
        return found | {"share with one in every other run": float(every), "share with one in none": float(none)}

    def to_pairs(self) -> "pd.DataFrame":
        """A line per pair of runs."""
        import pandas as pd

        return pd.DataFrame(self.pairs, columns=list(SeedPair._fields))

    def plot(self) -> "go.Figure":
        """Share of each run's features by the number of other runs with a counterpart."""
        import plotly.graph_objects as go

        runs = len(self.counterparts)
        layout = {"xaxis_title": "other runs with a counterpart", "yaxis_title": "share of features", "xaxis_dtick": 1}
        figure = go.Figure(layout=layout)
        for i, each in enumerate(self.counterparts):
            figure.add_bar(x=np.arange(runs), y=np.bincount(each, minlength=runs) / len(each), name=f"run {i}")
        return figure


def stability(decoders: Sequence[np.ndarray], threshold: float = 0.7, seed: int = 0) -> Stability:
    """How much of the decoders ``[features, d]`` of several runs, at least two, is the same in each.

    Takes two `assign_decoders` for each pair of runs. Raises SaelabError if there is one run, or if widths differ.
    """
    if len(decoders) < 2:
        raise SaelabError("stability: a single decoder has nothing to come back in; give at least two")
    numbers = np.random.default_rng(seed)
    counterparts, pairs = tuple(np.zeros(len(rows), np.int64) for rows in decoders), []
    for first, second in combinations(range(len(decoders)), 2):
        a, b = decoders[first], decoders[second]
        found: Assignment = assign_decoders(a, b)
        by_chance = assign_decoders(a, random_rows(b, numbers))
        for run, features in zip((first, second), found.pairs[found.cosine >= threshold].T, strict=True):
            counterparts[run][features] += 1
        shares = found.share(threshold), by_chance.share(threshold)
        pairs.append(SeedPair(first, second, found.mean_cosine, by_chance.mean_cosine, *shares))
    return Stability(threshold, tuple(pairs), counterparts)
