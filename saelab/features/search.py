"""Search in a feature database: features by the text where they are active, by tokens, or by their index."""

import re
from dataclasses import dataclass

import numpy as np

from saelab.errors import SaelabError
from saelab.features.facts import Facts
from saelab.features.table import Table
from saelab.features.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Found:
    """The features that a query names, best first."""

    features: np.ndarray
    """``[n]`` int64"""
    shares: np.ndarray | None = None
    """Share of each feature's total activation that lies on the matched text, ``[n]`` float32; None for other queries.
    """
    places: np.ndarray | None = None
    """The matched token on which the feature is most active, ``[n]`` int64: row * context + position."""


def search(facts: Facts, table: Table, vocabulary: Vocabulary, query: str) -> Found:
    """The features that a query names.

    - ``id:7`` or ``id:7,12,40-50``: features by index.

    Raises SaelabError if the query cannot be read.
    """
    if query.startswith("id:"):
        return Found(_indices(query.removeprefix("id:"), len(table)))
    raise SaelabError(f"{query!r}: cannot be searched for yet")


def _indices(text: str, n_features: int) -> np.ndarray:
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,12})\s*(?:-\s*([0-9]{1,12})\s*)?", part)
        if not ends:
            raise SaelabError(f"id:{text}: {part!r} is not a feature or a range of features, such as id:7,12,40-50")
        first = int(ends[1])
        found += range(first, min(int(ends[2]) if ends[2] else first, n_features - 1) + 1)
    return np.array(found, np.int64)
