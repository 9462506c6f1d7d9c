"""The feature database of a run, opened once: what the explorer, notebooks and analyses read.

    database = open_database("runs/quickstart/features")
    database.feature(7)                                # draws itself in a notebook
    database.table.page({"density": (1e-4, 1e-2)}, sort="maximum")
    database.search("import numpy").features           # the features that are active on this text
    database.examples(7)                               # windows of text around its strongest activations
    database.intervals(7)                              # its activations between deciles, each with examples
    database.near_misses(7)                            # text on which it could be active and is not
    database.at(3, 100)                                # the features on token 100 of row 3

Everything was computed when the database was written. Reading needs numpy, no torch and no language model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saelab.activations.sites import Sites
from saelab.errors import printable
from saelab.features import card
from saelab.features.arrays import Arrays, open_arrays
from saelab.features.examples import Example, Kind, find_examples
from saelab.features.facts import ActiveFeatures, Facts
from saelab.features.layout import QUANTILES
from saelab.features.near_misses import NearMisses, near_misses
from saelab.features.ranges import (
    Histogram,
    Interval,
    RangeTokens,
    histogram,
    intervals,
    tokens_in_range,
    usual_maximum,
)
from saelab.features.search import Found, search
from saelab.features.table import Table
from saelab.features.vocabulary import Vocabulary
from saelab.lm.settings import models_in_words

NEIGHBOURS = {
    "decoder": ("decoder_neighbours", "decoder_cosines"),
    "encoder": ("encoder_neighbours", "encoder_cosines"),
    "coactive": ("coactive_neighbours", "coactive_phi"),
}
"""Kinds of neighbours, with their columns of features and scores."""


class TokenValue(NamedTuple):
    """A token and a number: its logit, or its share of a feature's activation."""

    token: int
    text: str
    value: float


class Neighbour(NamedTuple):
    """Another feature, and how similar it is: a cosine, or phi of co-activation."""

    feature: int
    value: float
    jaccard: float | None = None
    """Tokens on which both are active, as a share of those on which either is; for co-activation."""


class Neuron(NamedTuple):
    """A dimension of the site that a feature writes to."""

    index: int
    weight: float
    share: float
    """Share of the sum of absolute weights of the feature's decoder row."""


@dataclass(frozen=True, eq=False)
class Feature:
    """One feature. Lists are strongest first."""

    index: int
    n_tokens: int
    """N: ordinary tokens of the text."""
    n_active: int
    density: float
    """Fraction of the N tokens on which the feature is active."""
    mean: float
    """Mean activation over the tokens on which the feature is active; 0 if there is none."""
    maximum: float
    mean_square: float
    """Mean of the squared activation over all N tokens."""
    skew: float
    """Third standardised moment of the activation over all N tokens; 0 if it is constant."""
    kurtosis: float
    """Fourth standardised moment of the activation over all N tokens; 3 for a normal one, 0 if it is constant."""
    quantiles: dict[float, float]
    """Activation at or below which this share of the feature's activations lie."""
    histogram: np.ndarray
    """Tokens in each of equal bins of activation from 0 to `maximum`, ``[bins]``; zeros are not counted."""
    first: tuple[int, int] | None
    """Row and position of the first activation in the text."""
    last: tuple[int, int] | None
    token_entropy: float
    """Entropy of the feature's activation over token ids, in bits; 0 if it is active on one token id only."""
    top_tokens: list[TokenValue]
    """Token ids with the largest shares of the sum of its activations."""
    encoder_norm: float
    decoder_norm: float
    encoder_decoder_cosine: float
    top_logits: list[TokenValue]
    """Tokens whose logits the decoder row raises most; empty if `Database.lens` is None."""
    bottom_logits: list[TokenValue]
    logit_histogram: np.ndarray
    """Tokens of the vocabulary in equal bins of logit over `logit_range`, ``[bins]``."""
    logit_range: tuple[float, float]
    neighbours: dict[str, list[Neighbour]]
    """By kind: decoder, encoder (cosines of rows), coactive (phi)."""
    neurons: list[Neuron]
    database: "Database" = field(repr=False)
    """The database that it was read from."""

    @property
    def never_active(self) -> bool:
        return self.n_active == 0

    @property
    def usual_maximum(self) -> float:
        """`maximum`; if a few activations are far above all others, the largest of the others."""
        return usual_maximum(self.database.facts, self.database.table, self.index)

    @property
    def bars(self) -> Histogram:
        """`histogram` with its edges; if a few activations are far above all others, one with logarithmic bins."""
        return histogram(self.database.facts, self.database.table, self.index)

    def _repr_html_(self) -> str:
        return card.STYLE + card.card(self)


@dataclass(frozen=True, eq=False)
class Database:
    """An open feature database; `open_database` makes it. Methods raise SaelabError if a file is damaged."""

    arrays: Arrays
    facts: Facts
    """The text and all activations."""
    table: Table
    vocabulary: Vocabulary

    def __repr__(self) -> str:
        features = f"{self.n_features:,} features of {printable(self.site)} of {printable(self.model)}"
        return f"Database({printable(str(self.folder))}: {features}, {self.n_tokens:,} tokens)"

    @property
    def folder(self) -> Path:
        return self.arrays.folder

    @property
    def n_tokens(self) -> int:
        """N: ordinary held-out tokens, encoded in inference mode. Densities are fractions of N."""
        return self.facts.n_tokens

    @property
    def n_features(self) -> int:
        return len(self.table)

    @property
    def sites(self) -> Sites:
        manifest = self.arrays.manifest
        return Sites(manifest["site"], manifest.get("target"), tuple(manifest.get("more_sites", ())))

    @property
    def site(self) -> str:
        """All sites in words."""
        return str(self.sites)

    @property
    def model(self) -> str:
        """The name of the model, or the names of two."""
        return models_in_words(self.arrays.manifest["model"], self.arrays.manifest.get("second_model"))

    @property
    def of_array(self) -> bool:
        """Whether the activations come from an array; each row of it then stands as a row of one token."""
        return "first_row" in self.arrays.manifest

    @property
    def first_row(self) -> int:
        """The number of row 0 for readers: in the array that the activations come from; 0 for text."""
        return int(self.arrays.manifest.get("first_row", 0))

    @property
    def origin(self) -> str:
        """What the activations come from, in words."""
        return f"the {'array' if self.of_array else 'model'} {self.model}"

    @property
    def lens(self) -> str | None:
        """What of the final norm the logits include, in words; None if there are no logits (docs/models.md)."""
        return self.arrays.manifest["lens"]

    def feature(self, index: int) -> Feature:
        """One feature. Raises SaelabError if there is no feature of that index."""
        self.facts.check(index)
        columns = {name: self.table[name] for name in self.table.names}
        row = {name: column[index] for name, column in columns.items()}
        context = self.facts.rows.shape[1]

        def tokens(ids: str, values: str) -> list[TokenValue]:
            if row[ids].max() >= len(self.vocabulary):
                raise self.arrays.damaged(f"table.{ids}", f"has token ids above {len(self.vocabulary) - 1}")
            pairs = zip(row[ids].tolist(), row[values].tolist(), strict=True)
            return [TokenValue(token, self.vocabulary.text(token), value) for token, value in pairs if token >= 0]

        def where(place: int) -> tuple[int, int] | None:
            return divmod(place, context) if place >= 0 else None

        def neighbours(kind: str) -> list[Neighbour]:
            features, values = NEIGHBOURS[kind]
            jaccard = row["coactive_jaccard"].tolist() if kind == "coactive" else [None] * len(row[values])
            found = zip(row[features].tolist(), row[values].tolist(), jaccard, strict=True)
            return [Neighbour(*each) for each in found if each[0] >= 0]

        neurons = zip(*(row[name].tolist() for name in ("neurons", "neuron_weights", "neuron_shares")), strict=True)
        n_active, low_high = int(row["n_active"]), row["logit_range"].tolist()
        return Feature(
            index=index,
            n_tokens=self.n_tokens,
            n_active=n_active,
            density=n_active / self.n_tokens,
            mean=float(row["mass"]) / max(1, n_active),
            maximum=float(self.facts.maxima[index]),
            mean_square=float(row["mean_square"]),
            skew=float(row["skew"]),
            kurtosis=float(row["kurtosis"]),
            quantiles=dict(zip(QUANTILES, row["quantiles"].tolist(), strict=True)),
            histogram=np.array(row["histogram"]),
            first=where(int(row["first_place"])),
            last=where(int(row["last_place"])),
            token_entropy=float(row["token_entropy"]),
            top_tokens=tokens("top_tokens", "top_token_shares"),
            encoder_norm=float(row["encoder_norm"]),
            decoder_norm=float(row["decoder_norm"]),
            encoder_decoder_cosine=float(row["encoder_decoder_cosine"]),
            top_logits=tokens("top_logit_tokens", "top_logits"),
            bottom_logits=tokens("bottom_logit_tokens", "bottom_logits"),
            logit_histogram=np.array(row["logit_histogram"]),
            logit_range=(low_high[0], low_high[1]),
            neighbours={kind: neighbours(kind) for kind in NEIGHBOURS},
            neurons=[Neuron(*neuron) for neuron in neurons if neuron[0] >= 0],
            database=self,
        )

    def examples(
        self,
        feature: int,
        kind: Kind = "top",
        n: int = 20,
        window: int = 32,
        low: float = 0.0,
        high: float = np.inf,
        distinct: bool = False,
    ) -> list[Example]:
        """Windows of text around some activations of a feature.

        See `saelab.features.examples.find_examples`. Raises SaelabError if there is no such feature.
        """
        distinct = distinct and not self.of_array  # rows with one label differ in what the label leaves out
        return find_examples(self.facts, self.table, self.vocabulary, feature, kind, n, window, low, high, distinct)

    def intervals(self, feature: int, n: int = 5, window: int = 32) -> list[Interval]:
        """A feature's activations between two neighbouring deciles, strongest first, each with `n` examples.

        See `saelab.features.ranges.intervals`. Raises SaelabError if there is no such feature.
        """
        return intervals(self.facts, self.vocabulary, feature, n, window)

    def tokens_in_range(self, feature: int, low: float, high: float, n: int = 10) -> RangeTokens:
        """The token ids of a feature's activations from `low` up to `high`, both included.

        See `saelab.features.ranges.tokens_in_range`. Raises SaelabError if there is no such feature.
        """
        return tokens_in_range(self.facts, self.table, feature, low, high, n)

    def near_misses(self, feature: int, n: int = 10, window: int = 32) -> NearMisses:
        """Windows of text on which a feature could be active and is not, `n` of each of two kinds.

        See `saelab.features.near_misses.near_misses`. Raises SaelabError if there is no such feature.
        """
        return near_misses(self.facts, self.table, self.vocabulary, feature, n, window)

    def search(self, query: str) -> Found:
        """The features that a query names; see `saelab.features.search.search`."""
        return search(self.facts, self.table, self.vocabulary, query)

    def at(self, row: int, position: int) -> ActiveFeatures:
        """The features that are active on a token. Raises SaelabError if there is no such row or position."""
        return self.facts.at(row, position)

    def verify(self) -> None:
        """Raises SaelabError if a file differs from its sha256 in the manifest. Reads all files."""
        self.arrays.verify()


def open_database(folder: Path | str) -> Database:
    """The feature database in `folder`, `features` in a run folder. Reads sizes only.

    Raises SaelabError if it is missing, damaged or of another version.
    """
    arrays = open_arrays(folder)
    return Database(arrays, Facts(arrays), Table(arrays), Vocabulary(arrays))
