"""Are two autoencoders alike in what their features are about? Features in pairs, and their explanations compared.

After arXiv 2410.13928, section 5.5. Features are paired one to one by the Hungarian algorithm (`analysis/matching.py`):

    decoder       by the cosine of their decoder rows, which must be vectors of one space
    explanation   by the cosine of their explanations' embeddings

Over the pairs of which both features have an explanation:

    similarity    mean cosine of the two explanations' embeddings
    by chance     the same if the same features were paired at random: its mean over all such pairings
    difference    similarity less chance; embeddings of any two explanations have much in common
    share         of pairs with a cosine of at least a threshold, and the same by chance

Pairs by explanation have the largest cosines that there are, so even unrelated autoencoders are then above chance:
compare with those of an untrained one. Intervals are over pairs. Needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saelab.analysis.intervals import Interval
from saelab.analysis.matching import assign_decoders, blocks_of, unit_rows
from saelab.analysis.result import Result
from saelab.autointerp.embedders import Embedder
from saelab.autointerp.plan import stored
from saelab.autointerp.summary import mean_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Described:
    """An autoencoder and its explanations."""

    texts: Mapping[int, str]
    """By feature; features without one are left out."""
    rows: np.ndarray
    """Decoder rows of all its features, ``[n_features, d]``."""
    explainers: str = ""
    """Who wrote them."""


@dataclass(frozen=True, eq=False)
class PairedExplanations:
    """One autoencoder, A, beside another, B; the head of the file defines the figures."""

    name: str
    """B's."""
    site: str
    matched_by: str
    """`decoder` or `explanation`."""
    explainers: str
    """Who wrote B's explanations."""
    explained: int
    """Features of B with an explanation."""
    pairs: np.ndarray
    """Features of A and B, those with the most similar decoder rows or explanations first, ``[n, 2]`` int64."""
    cosine: np.ndarray
    """Cosine of the two explanations, ``[n]`` float32."""
    expected: np.ndarray
    """What that cosine is on average if A's and B's features are paired at random, half from each's side, ``[n]``."""
    threshold: float
    share_by_chance: float

    def figures(self) -> dict[str, int | float | str | Interval]:
        pairs = f"share of pairs with a cosine of at least {self.threshold:g}"
        return {
            "site": self.site,
            "features with an explanation": self.explained,
            "explained by": self.explainers,
            "paired by": self.matched_by,
            "pairs": len(self.pairs),
            "similarity of explanations": mean_interval(self.cosine),
            "similarity, by chance": float(self.expected.mean()) if len(self.pairs) else np.nan,
            "similarity less chance": mean_interval(self.cosine - self.expected),
            pairs: mean_interval(self.cosine >= self.threshold),
            f"{pairs}, by chance": self.share_by_chance,
        }


@dataclass(frozen=True, eq=False, repr=False)
class ExplanationSimilarities(Result):
    """An autoencoder's explanations beside those of others."""

    site: str
    explained: int
    explainers: str
    embedder: str
    others: tuple[PairedExplanations, ...]

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        found: dict[str, int | float | str | Interval] = {"site": self.site, "embedded by": self.embedder}
        found |= {"features with an explanation": self.explained, "explained by": self.explainers}
        for other in self.others:
            found |= {f"{other.name}: {title}": value for title, value in other.figures().items()}
        return found

    def plot(self) -> "go.Figure":
        """The similarity to each of the others, with its interval, beside chance."""
        import plotly.graph_objects as go

        figure = go.Figure(layout={"barmode": "group", "yaxis_title": "mean cosine of explanations"})
        names, means = (
            [escape(other.name) for other in self.others],
            [mean_interval(other.cosine) for other in self.others],
        )
        error = {
            "type": "data",
            "symmetric": False,
            "array": [each.high - each.value for each in means],
            "arrayminus": [each.value - each.low for each in means],
        }
        figure.add_bar(x=names, y=[each.value for each in means], error_y=error, name="pairs")
        chance = [other.figures()["similarity, by chance"] for other in self.others]
        return figure.add_bar(x=names, y=chance, name="by chance")


def described(folder: Path, inputs: str, rows: np.ndarray) -> Described:
    """An autoencoder by its decoder rows and the latest explanations in `folder` for the feature database `inputs`."""
    latest, _ = stored(folder, inputs)
    made = [each.explanation for each in latest.values() if each.explanation.text]
    explainers = ", ".join(sorted({each.model for each in made}))
    return Described({each.feature: each.text for each in made}, rows, explainers)


def compare_explanations(
    a: Described,
    b: Described,
    embed: Embedder,
    *,
    by: str = "decoder",
    threshold: float = 0.5,
    name: str = "B",
    site: str = "",
) -> PairedExplanations:
    """The features of `a` and `b` paired `by` ``decoder`` or ``explanation``, and their explanations compared.

    Pairs by decoder are made of all features; those with an explanation on both sides count. Memory: the embeddings,
    in float64, besides what `assign_decoders` takes. Raises SaelabError as that does, if decoder rows differ in width.
    """
    of_a, of_b = (np.array(sorted(each.texts), np.int64) for each in (a, b))
    pairs = np.zeros((0, 2), np.int64)
    if len(of_a) and len(of_b):
        if by == "decoder":
            found = assign_decoders(a.rows, b.rows).pairs
            pairs = found[np.isin(found[:, 0], of_a) & np.isin(found[:, 1], of_b)]
        else:
            found = assign_decoders(_embedded(a, of_a, embed), _embedded(b, of_b, embed)).pairs
            pairs = np.stack([of_a[found[:, 0]], of_b[found[:, 1]]], 1)
    cosine, expected, share = np.zeros(0, np.float32), np.zeros(0), np.nan
    if len(pairs):
        left, right = _embedded(a, pairs[:, 0], embed), _embedded(b, pairs[:, 1], embed)
        cosine = np.einsum("nd,nd->n", left, right).astype(np.float32)
        expected = (left @ right.mean(0) + right @ left.mean(0)) / 2
        at_least = sum(int((left[block] @ right.T >= threshold).sum()) for block in blocks_of(left))
        share = at_least / len(pairs) ** 2
    return PairedExplanations(
        name=name,
        site=site,
        matched_by=by,
        explainers=b.explainers,
        explained=len(of_b),
        pairs=pairs,
        cosine=cosine,
        expected=expected,
        threshold=threshold,
        share_by_chance=share,
    )


def _embedded(of: Described, features: np.ndarray, embed: Embedder) -> np.ndarray:
    return unit_rows(np.asarray(embed([of.texts[int(feature)] for feature in features])))
