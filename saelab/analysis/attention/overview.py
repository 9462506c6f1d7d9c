"""The heads of a model and the features of one layer's attention output, over held-out text, in one pass.

What each head attends to (scores.py), the families of features by what they read (families.py), and whether a head's
features do one thing or several (polysemantic.py). A feature is alive if it is active on at least `ALIVE` tokens.
`agreement` is the share of living features whose head with the largest decoder share is also the one with the largest
share of direct attribution.

Memory: a layer's pattern of one forward pass, 8 bytes per candidate feature and token id, 28 bytes x `RESAMPLES` per
feature. Intervals are over rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.attention.families import FAMILIES, FamilyShares, families
from saelab.analysis.attention.heads import head_shares, top_features
from saelab.analysis.attention.polysemantic import ONE_TASK, TOP, Profiles, polysemanticity
from saelab.analysis.attention.prompt import check_heads
from saelab.analysis.attention.scores import CHANCE, SCORES, HeadScores
from saelab.analysis.intervals import Interval, between, draws
from saelab.analysis.result import Result
from saelab.analysis.settings import AttentionSettings
from saelab.errors import SaelabError
from saelab.lm.attention import Heads, read_heads, recorded_heads, site_of
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RESAMPLES = 200
ALIVE = 10


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Result):
    """Heads and families of features; the files named at the head of this one define the figures."""

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
    families: dict[str, float]
    """Share of the living features in each family. Without intervals: rows that are drawn twice make features with few
    tokens look more one-sided than they are."""
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
    groups: np.ndarray
    """Groups among them, ``[heads]``."""
    largest: np.ndarray
    """Share of them in the largest group, ``[heads]``."""
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
        columns = {"features": own, "groups": self.groups, "largest group": self.largest}
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
        figure.add_bar(x=list(self.families), y=list(self.families.values()), row=1, col=2)
        figure.update_yaxes(title_text="head", autorange="reversed", type="category", row=1, col=1)
        figure.update_yaxes(title_text="share of living features", row=1, col=2)
        return figure.update_layout(showlegend=False)


@torch.no_grad()
def attention(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    settings: AttentionSettings,
    site: str | None = None,
    *,
    seed: int = 0,
    track: Track = silent,
) -> Attention:
    """The heads of `lm` and the features of `sae` on `rows` ``[rows, context]``.

    `site` defaults to the one the autoencoder was trained at. One full pass of the model with eager attention. Raises
    SaelabError if the site is not ``blocks.N.attn.hook_z``, or if the model's attention cannot be taken apart.
    """
    layer = check_heads(sae, lm, site)
    site = site_of(layer)
    layers = sorted(n for n in range(lm.shape().layers) if site_of(n) in lm.sites)
    if rows.shape[1] < 2 or not bool(lm.ordinary(rows[:, 1:]).any()):
        raise SaelabError("attention: the rows have no token after their first that is not special")
    n_heads = read_heads(lm, rows[:1], [layer])[0][layer].n_heads
    drawn = draws(len(rows), RESAMPLES, np.random.default_rng(seed))
    scores = HeadScores.empty(len(rows), layers, n_heads)
    found = FamilyShares.empty(sae.n_features, n_heads, drawn, settings.per_feature)
    shares = head_shares(sae.W_dec, n_heads)
    candidates = top_features(shares, min(3 * TOP, sae.n_features)).cpu().numpy()
    profiles = Profiles(np.unique(candidates), sae.n_features, lm.embeddings)
    counts, tokens = np.zeros(sae.n_features, np.int64), 0

    def parts(start: int) -> int:
        return rows[start : start + settings.rows_per_forward].numel()

    lm.measure([site_of(layers[-1]), site])
    for start in track(iter(range(0, len(rows), settings.rows_per_forward)), "attention", rows.numel(), parts):
        ids = rows[start : start + settings.rows_per_forward].to(lm.device).long()
        ordinary = lm.ordinary(ids)
        here: list[Heads] = []

        def take(n: int, heads: Heads, ids: Tensor = ids, start: int = start, here: list[Heads] = here) -> None:
            scores.add(ids, lm.ordinary(ids), n, heads, start)
            if n == layer:
                here.append(heads)

        with recorded_heads(lm, layers, take):
            z = lm.activations(ids, [site_of(layers[-1]), site])[site]
        for i in range(len(ids)):
            at = ordinary[i].nonzero().squeeze(1)
            if not len(at):
                continue
            codes = sae.encode(z[i, at].float())
            counts += codes.firing_counts().cpu().numpy()
            tokens += len(at)
            row, token_ids = Heads(*(part[i : i + 1].float() for part in here[0])), ids[i].cpu().numpy()
            features, sources = found.add(sae, ids[i], at, codes, row, start + i)
            profiles.add_read(token_ids, features.cpu().numpy(), sources.cpu().numpy())
            entries = ids[i, at][codes.row_of_entry()]
            profiles.add_active(*(t.cpu().numpy() for t in (entries, codes.features, codes.values.float())))
    return _result(layer, scores, found, shares.cpu().numpy(), candidates, profiles, counts, tokens)


def _result(
    layer: int,
    scores: HeadScores,
    found: FamilyShares,
    decoder_shares: np.ndarray,
    candidates: np.ndarray,
    profiles: Profiles,
    counts: np.ndarray,
    tokens: int,
) -> Attention:
    alive = counts >= ALIVE
    if not alive.any():
        raise SaelabError(f"attention: no feature is active on {ALIVE} of the {tokens} tokens; use more text")
    drawn = found.drawn[:, alive, :]
    with np.errstate(invalid="ignore"):  # a feature may be in no row of a resample
        drawn_reads = np.nanmean(drawn / drawn[..., :5].sum(-1, keepdims=True), 1)
    reads, family = found.shares()[alive].mean(0), families(found.shares())
    poly = polysemanticity(candidates, (profiles.active, profiles.read), alive)
    direct = found.head_shares()
    same = decoder_shares[alive].argmax(1) == direct[alive].argmax(1)
    n_rows, n_layers, n_heads, n_scores = scores.sums.shape
    sums, often = scores.sums.reshape(n_rows, n_layers * n_heads, n_scores), found.draws
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = np.tensordot(often, sums, 1) / (often @ scores.counts)[:, None]
    ends = np.quantile(resampled, [0.025, 0.975], axis=0) if len(often) else np.full((2, *sums.shape[1:]), np.nan)
    low, high = ends.reshape(2, n_layers, n_heads, n_scores)

    return Attention(
        site=site_of(layer),
        layer=layer,
        tokens=tokens,
        rows=n_rows,
        n_features=len(counts),
        alive=int(alive.sum()),
        layers=np.array(sorted(scores.layer_index)),
        scores=scores.mean(),
        low=low,
        high=high,
        chance={name: scores.chance_of(name) for name in CHANCE},
        reads={name: between(float(reads[i]), drawn_reads[:, i]) for i, name in enumerate(FAMILIES)},
        families={name: float((family[alive] == i).mean()) for i, name in enumerate(FAMILIES)},
        family=family,
        shares=found.shares(),
        counts=counts,
        decoder_shares=decoder_shares,
        direct_shares=direct,
        agreement=float(same.mean()),
        top=poly.features,
        groups=poly.groups,
        largest=poly.largest,
        polysemantic=poly.polysemantic,
        control=float((poly.control < ONE_TASK).mean()),
    )
