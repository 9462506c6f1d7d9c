"""The result of overview.py, and the names of its figures. Needs no torch: a page reads it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from saelab.analysis.intervals import Interval
from saelab.analysis.result import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SCORES = ("previous", "self", "first", "duplicate", "induction", "entropy", "distance")
"""What scores.py measures of a head."""
CHANCE = ("duplicate", "induction")
"""Scores that have a chance level."""
DISTANCES = ("current", "previous", "short", "long", "start")
"""Kinds of sources (families.py)."""
FAMILIES = (*DISTANCES, "induction")
ALIVE = 10
"""Tokens on which a living feature is active, at least."""
TOP = 10
"""Features of a head that are compared (polysemantic.py)."""
ONE_TASK = 0.9
"""Share of them in one cluster from which on a head is monosemantic."""


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Result):
    """Heads and families of features; scores.py, families.py, polysemantic.py and overview.py define the figures."""

    site: str
    layer: int
    tokens: int
    """Ordinary tokens read."""
    rows: int
    n_features: int
    alive: int
    """Living features."""
    layers: np.ndarray
    """The layers of `scores`, ``[layers]`` int64."""
    scores: np.ndarray
    """``[layers, heads, 7]`` float64, in the order of `SCORES`."""
    low: np.ndarray
    """Lower ends of their intervals."""
    high: np.ndarray
    chance: dict[str, float]
    """Scores of attention that is equal on all sources."""
    reads: dict[str, Interval]
    """Mean over living features of the share of direct attribution by kind of source, and of induction."""
    families: dict[str, Interval]
    """Share of the living features in each family, with intervals over rows and features."""
    family: np.ndarray
    """Index in `FAMILIES` of each feature, ``[n_features]`` int64; -1 if it was never active."""
    shares: np.ndarray
    """Shares by kind of source, of induction, and its chance, ``[n_features, 7]``; NaN if never active."""
    counts: np.ndarray
    """Tokens on which each feature is active, ``[n_features]`` int64."""
    decoder_shares: np.ndarray
    """Share of each head in each decoder row, ``[n_features, heads]``."""
    direct_shares: np.ndarray
    """Share of each head in positive direct attribution, ``[n_features, heads]``; NaN if never active."""
    agreement: float
    top: np.ndarray
    """Living features with the largest decoder share of each head of the layer, ``[heads, TOP]``; -1 if too few."""
    clusters: np.ndarray
    """Clusters among them, ``[heads]``."""
    largest: np.ndarray
    """Share of them in the largest cluster, ``[heads]``."""
    polysemantic: np.ndarray
    """``[heads]`` bool"""
    control: float
    """Share of random draws of features that count as polysemantic."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        best = np.unravel_index(self.scores[..., SCORES.index("induction")].argmax(), self.scores.shape[:2])
        induction = (*best, SCORES.index("induction"))
        reads = {f"direct attribution to {name} (mean share)": share for name, share in self.reads.items()}
        found = {f"living features of family {name} (share)": share for name, share in self.families.items()}
        return {
            "tokens": self.tokens,
            "features": self.n_features,
            "living features": self.alive,
            **reads,
            **found,
            "polysemantic heads (share)": float(self.polysemantic.mean()),
            "polysemantic draws of random features (share)": self.control,
            "head of decoder share is head of direct attribution (share of living features)": self.agreement,
            "largest induction score": Interval(*(float(a[induction]) for a in (self.scores, self.low, self.high))),
            "head with it": f"{self.layers[best[0]]}.{best[1]}",
            "induction score of equal attention": self.chance["induction"],
        }

    def heads(self) -> "pd.DataFrame":
        """One line per head of the model: scores, and for the autoencoder's layer its features."""
        import pandas as pd

        n_layers, n_heads, _ = self.scores.shape
        frame = pd.DataFrame(
            {"layer": np.repeat(self.layers, n_heads), "head": np.tile(np.arange(n_heads), n_layers)}
            | {name: self.scores[..., i].ravel() for i, name in enumerate(SCORES)}
        )
        here = (frame["layer"] == self.layer).to_numpy()
        own = np.bincount(self.decoder_shares[self.counts >= ALIVE].argmax(1), minlength=n_heads)
        columns = {"features": own, "clusters": self.clusters, "largest cluster": self.largest}
        for name, values in (columns | {"polysemantic": self.polysemantic.astype(float)}).items():
            frame.loc[here, name] = values
        return frame

    def features(self) -> "pd.DataFrame":
        """One line per feature that was active: family, shares by kind of source, heads."""
        import pandas as pd

        which = np.flatnonzero(self.counts)
        columns = {"feature": which, "family": [FAMILIES[i] if i >= 0 else None for i in self.family[which]]}
        columns |= {name: self.shares[which, i] for i, name in enumerate(FAMILIES)}
        columns |= {"head by decoder": self.decoder_shares[which].argmax(1)}
        columns |= {"head by attribution": np.nan_to_num(self.direct_shares[which]).argmax(1)}
        return pd.DataFrame(columns | {"tokens": self.counts[which]})

    def plot(self) -> "go.Figure":
        """Scores of the heads that are shares of attention, one line per head, and families of the living features."""
        from plotly.subplots import make_subplots

        figure = make_subplots(1, 2, column_widths=[0.65, 0.35], subplot_titles=["Heads", "Features"])
        names = SCORES[:5]
        labels = [f"{layer}.{head}" for layer in self.layers for head in range(self.scores.shape[1])]
        z = self.scores[..., :5].reshape(-1, 5)
        figure.add_heatmap(z=z, x=list(names), y=labels, zmin=0, zmax=1, colorscale="Blues", row=1, col=1)
        figure.add_bar(x=list(self.families), y=[share.value for share in self.families.values()], row=1, col=2)
        figure.update_yaxes(title_text="head", autorange="reversed", type="category", row=1, col=1)
        figure.update_yaxes(title_text="share of living features", row=1, col=2)
        return figure.update_layout(showlegend=False)
