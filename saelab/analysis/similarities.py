"""An autoencoder beside others on the same model: the same features, the same codes, the same structure of decoders.

For each of the others, and each figure beside its value by chance:

decoders           rows of W_dec matched by their cosine, both ways and one to one (similarity.py); only if the other
                   autoencoder is of the same site, because rows of different sites are vectors of different spaces
cka                linear CKA of the codes on the same held-out tokens (cka.py); sites may differ
c_dec              mean absolute cosine of two different decoder rows of one autoencoder (decoder.py)
meta               variance of decoder rows that a small autoencoder of them explains (meta_structure.py), if asked for

A feature comes back in another run if a one-to-one pair with a cosine of at least 0.7 has it (stability.py compares all
pairs of several runs). Intervals of cka and meta are over rows of text and over decoder rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from saelab.analysis.affine import check_reconstructs
from saelab.analysis.cka import Cka, PairedCodes
from saelab.analysis.decoder import mean_absolute_cosine
from saelab.analysis.intervals import Interval
from saelab.analysis.meta_structure import MetaStructure, meta_structure
from saelab.analysis.result import Result
from saelab.analysis.settings import SimilaritySettings
from saelab.analysis.similarity import Similarity, absolute_cosine_by_chance, compare_decoders, training_of
from saelab.encoded import Block, encoded
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

THRESHOLDS = (0.7, 0.9)
"""Cosines from which a share of paired features is reported; a feature comes back from the first one on."""


class Other(NamedTuple):
    """An autoencoder to compare with."""

    name: str
    sae: SparseAutoencoder
    site: str


@dataclass(frozen=True, eq=False)
class Weights:
    """What follows from the weights of one of the autoencoders."""

    name: str
    site: str
    n_features: int
    training: str | None
    """Which training the weights are of: `inputs` and `tokens` of the checkpoint; None if it does not say."""
    c_dec: float
    c_dec_by_chance: float
    meta: MetaStructure | None


@dataclass(frozen=True, eq=False)
class Compared:
    """One of the others, beside the run."""

    weights: Weights
    decoders: Similarity | None
    """A is the run, B the other; None if the two are not of the same site."""
    cka: Cka


@dataclass(frozen=True, eq=False, repr=False)
class Similarities(Result):
    """An autoencoder beside others; the head of the file defines the figures."""

    run: Weights
    others: tuple[Compared, ...]
    counterparts: np.ndarray
    """Number of the others of the same site in which each feature comes back, ``[n_features]`` int64."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        found = {"site": self.run.site, "features": self.run.n_features, **_of_weights(self.run)}
        same_site = sum(other.decoders is not None for other in self.others)
        if same_site > 1:
            found[f"share that comes back in each of {same_site}"] = float((self.counterparts == same_site).mean())
            found[f"share that comes back in none of {same_site}"] = float((self.counterparts == 0).mean())
        for other in self.others:
            found |= {f"{other.weights.name}: {title}": value for title, value in _of_other(other).items()}
        return found

    def by_run(self) -> "pd.DataFrame":
        """A line per other run, with its figures as columns; an interval is its value."""
        import pandas as pd

        def value(figure: int | float | str | Interval) -> int | float | str:
            return figure.value if isinstance(figure, Interval) else figure

        lines = [
            {"run": each.weights.name} | {title: value(figure) for title, figure in _of_other(each).items()}
            for each in self.others
        ]
        return pd.DataFrame(lines)

    def plot(self) -> "go.Figure":
        """For each other run the mean cosine of one-to-one pairs and the CKA, each beside chance."""
        import plotly.graph_objects as go

        names = [escape(other.weights.name) for other in self.others]
        bars = {"cosine of pairs": [], "cosine of pairs, by chance": [], "CKA": [], "CKA, by chance": []}
        for other in self.others:
            found = other.decoders
            values = (
                found and found.one_to_one.mean_cosine,
                found and found.one_to_one_by_chance.mean_cosine,
                other.cka.cka.value,
                other.cka.by_chance,
            )
            for bar, value in zip(bars.values(), values, strict=True):
                bar.append(value)
        figure = go.Figure(layout={"barmode": "group", "yaxis_range": [0, 1]})
        for name, values in bars.items():
            figure.add_bar(x=names, y=values, name=name)
        return figure


def similarities(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    others: Sequence[Other],
    settings: SimilaritySettings = SimilaritySettings(),  # noqa: B008 (frozen)
    *,
    name: str = "run",
    track: Track = silent,
) -> Similarities:
    """`sae` beside each of `others`, their codes on the text `rows` ``[rows, context]``.

    Takes a pass of the model, and one more for each of the others at another site; `compare_decoders` and `PairedCodes`
    say what the rest takes. Raises SaelabError as these do.
    """
    for each in (sae, *(other.sae for other in others)):
        if len(each.site_widths) > 1:
            check_reconstructs(each, "similarity")
    codes = [PairedCodes() for _ in others]
    for i, other in enumerate(others):
        if other.site != site:
            pairs = zip(
                encoded(sae, lm, rows, site, settings.rows_per_forward, track=track),
                encoded(other.sae, lm, rows, other.site, settings.rows_per_forward),
                strict=True,
            )
            for block, of_other in pairs:
                codes[i].add(block.codes, of_other.codes, block.row_of_token().numpy())
    here = [i for i, other in enumerate(others) if other.site == site]
    blocks: Iterator[Block] = encoded(sae, lm, rows, site, settings.rows_per_forward, track=track) if here else iter(())
    for block in blocks:
        row = block.row_of_token().numpy()
        for i in here:
            codes[i].add(block.codes, others[i].sae.encode(block.x), row)
    decoder = sae.W_dec.detach().float().cpu().numpy()
    found, counterparts = [], np.zeros(sae.n_features, np.int64)
    for other, paired in zip(others, codes, strict=True):
        comparable = other.site == site and _written(other.sae) == _written(sae)
        decoders = compare_decoders(decoder, other.sae.W_dec.detach().float().cpu().numpy()) if comparable else None
        if decoders is not None:
            pairs = decoders.one_to_one
            counterparts[pairs.pairs[pairs.cosine >= THRESHOLDS[0], 0]] += 1
        found.append(Compared(_weights(other, settings), decoders, paired.cka()))
    return Similarities(_weights(Other(name, sae, site), settings), tuple(found), counterparts)


def _written(sae: SparseAutoencoder) -> tuple[Any, ...]:
    """The space that decoder rows lie in, for autoencoders that read the same site."""
    return sae.transcodes, sae.d_out, sae.metadata.get("hook_name_out")


def _weights(of: Other, settings: SimilaritySettings) -> Weights:
    sae, facts = of.sae, of.sae.metadata.get("saelab") or {}
    return Weights(
        name=of.name,
        site=of.site,
        n_features=sae.n_features,
        training=training_of(facts),
        c_dec=mean_absolute_cosine(sae.W_dec),
        c_dec_by_chance=absolute_cosine_by_chance(sae.d_out),
        meta=meta_structure(sae.W_dec, rows_seen=settings.meta_rows) if settings.meta_rows else None,
    )


def _of_weights(weights: Weights) -> dict[str, int | float | str | Interval]:
    found: dict[str, int | float | str | Interval] = {
        "c_dec": weights.c_dec,
        "c_dec, by chance": weights.c_dec_by_chance,
    }
    if weights.meta is not None:
        found["variance of decoder rows explained"] = weights.meta.explained
        found["variance of decoder rows explained, by chance"] = weights.meta.explained_by_chance
    return found


def _of_other(other: Compared) -> dict[str, int | float | str | Interval]:
    found: dict[str, int | float | str | Interval] = {"site": other.weights.site}
    if other.decoders is not None:
        figures, decoders = other.decoders.figures(), other.decoders
        found |= {title: figure for title, figure in figures.items() if "mean" in title or "best" in title}
        for threshold in THRESHOLDS:
            found[f"share paired at a cosine of {threshold:g}"] = decoders.one_to_one.share(threshold)
            chance = decoders.one_to_one_by_chance.share(threshold)
            found[f"share paired at a cosine of {threshold:g}, by chance"] = chance
    found |= {"linear CKA of codes": other.cka.cka, "linear CKA of codes, by chance": other.cka.by_chance}
    return found | _of_weights(other.weights)
