"""The result of steering_effects.py, which defines its figures. Needs numpy, no torch: a page reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, get_args

import numpy as np

from saelab.analysis.intervals import Interval, between, interval
from saelab.analysis.result import Result
from saelab.analysis.settings import Mode

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CONTEXTS = ("own", "random")
MODES: tuple[Mode, ...] = get_args(Mode)
DIRECTIONS = ("feature", "random direction")
PASSES = 1 + 2 * len(MODES)
"""Passes over each context: the clean one, and one for each mode and direction."""
EFFECTS = ("kl", "logits", "next_token", "changed")
_RESAMPLES = 500


@dataclass(frozen=True, eq=False, repr=False)
class SteeringEffects(Result):
    """Effects of steering single features; the head of steering_effects.py defines them.

    Effects are ``[features, 2, 3, 2]`` float32, means over the contexts: by feature, kind of context (`CONTEXTS`), mode
    (`MODES`), and feature or random direction (`DIRECTIONS`).
    """

    site: str
    tokens: int
    """Ordinary tokens of the text."""
    contexts: int
    """Contexts of each kind of each feature."""
    features: np.ndarray
    """``[features]`` int64"""
    share: np.ndarray
    """Activation share of each feature, ``[features]`` float64."""
    row: np.ndarray
    """Row of the text of each steered token, ``[features, 2, contexts]`` int64, by feature and kind of context."""
    position: np.ndarray
    """Its position in the row, ``[features, 2, contexts]`` int64."""
    length: np.ndarray
    """Mean norm of the change of the activation, of the feature and of its random direction, ``[features, 2, 3]``."""
    kl: np.ndarray
    logits: np.ndarray
    next_token: np.ndarray
    changed: np.ndarray
    targets: np.ndarray
    """Target tokens of each feature and of its random direction, ``[features, 2, targets]`` int64."""
    score: np.ndarray
    """Steering score of each feature and of its random direction, ``[features, 2]`` float32."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        found: dict[str, int | float | str | Interval] = {
            "site": self.site,
            "tokens": self.tokens,
            "features": len(self.features),
            "contexts of each kind per feature": self.contexts,
            "steering score (logits)": mean_of(self.score[:, 0]),
            "steering score of random directions (logits)": mean_of(self.score[:, 1]),
            "steering score less that of random directions": mean_of(self.score[:, 0] - self.score[:, 1]),
        }
        for (c, context), (m, mode), (d, direction) in product(*map(enumerate, (CONTEXTS, MODES, DIRECTIONS))):
            found[f"KL of {mode}, {context} contexts, {direction} (nats)"] = mean_of(self.kl[:, c, m, d])
        return found | {"rank correlation of activation share and effect of ablation": self.share_against_effect()}

    def share_against_effect(self) -> Interval:
        """Spearman's correlation of activation share with the change of logits that ablation makes at own contexts."""
        effect, n = self.logits[:, 0, MODES.index("ablate"), 0], len(self.share)
        if n < 3:
            return Interval(np.nan, np.nan, np.nan)
        drawn = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
        varied = [each for each in drawn if np.ptp(self.share[each]) > 0 and np.ptp(effect[each]) > 0]
        resampled = np.array([_rank_correlation(self.share[each], effect[each]) for each in varied])
        return between(_rank_correlation(self.share, effect), resampled)

    def by_feature(self) -> "pd.DataFrame":
        """A line per feature, kind of context, mode and direction, with the effects."""
        import pandas as pd

        n = len(self.features)
        names = ["feature", "contexts", "mode", "direction"]
        index = pd.MultiIndex.from_product([range(n), CONTEXTS, MODES, DIRECTIONS], names=names)
        frame = pd.DataFrame({name: getattr(self, name).ravel() for name in EFFECTS}, index=index).reset_index()
        frame["share"] = self.share[frame["feature"]]
        frame["feature"] = self.features[frame["feature"]]
        return frame

    def plot(self) -> "go.Figure":
        """A point per feature: activation share against the change of logits that ablation makes at own contexts."""
        import plotly.graph_objects as go

        figure = go.Figure(layout={"title": f"{self.site}: ablation at the {self.contexts} strongest contexts"})
        for d, name in enumerate(DIRECTIONS):
            effect = self.logits[:, 0, MODES.index("ablate"), d]
            text = [f"feature {feature}" for feature in self.features]
            figure.add_scatter(x=self.share, y=effect, mode="markers", name=name, text=text)
        figure.update_xaxes(type="log", title="share of the sum of all activations")
        return figure.update_yaxes(type="log", title="change of the logits, root mean square")


def mean_of(of_features: np.ndarray) -> Interval:
    """Mean over features with its interval."""
    return interval(np.stack([of_features, np.ones(len(of_features))], 1))


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; equal values have their mean rank."""
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
