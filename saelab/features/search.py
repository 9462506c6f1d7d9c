"""Search in a feature database: features by the text where they are active, by tokens, or by their index."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from saelab.errors import SaelabError
from saelab.features.facts import Facts
from saelab.features.indices import EXAMPLE, indices
from saelab.features.matching import CHUNK, Matches, find_matches, regex_pattern, text_pattern
from saelab.features.ordering import ranges
from saelab.features.table import Table
from saelab.features.vocabulary import Vocabulary

ENTRIES = 1 << 20
"""Entries that are read at once."""
LONGEST = 1000
"""Most characters of a text or a regular expression: the time of a search grows with their square."""


class Match(NamedTuple):
    """Where to show that a feature is active on what was searched for; places are row * context + position."""

    place: int
    """The matched token on which the feature is most active."""
    first: int
    """The first token of this match."""
    last: int


@dataclass(frozen=True, eq=False)
class Found:
    """The features that a query names, best first."""

    features: np.ndarray
    """``[n]`` int64"""
    shares: np.ndarray | None = None
    """Share of each feature's mass that lies on the matched tokens, ``[n]`` float32; for text and ``token:``."""
    logits: np.ndarray | None = None
    """The largest logit of a matched token, ``[n]`` float32; for ``promotes:``."""
    matches: Matches | None = None
    """Where the text matches; for text."""
    tokens: np.ndarray | None = None
    """The token ids that match, ``[ids]`` int64; for ``token:``."""


def search(facts: Facts, table: Table, vocabulary: Vocabulary, query: str) -> Found:
    """The features that a query names.

    - ``import numpy``: features that are active on a token of this text, in any case.
    - ``/import \\w+/``: the same for a regular expression, in this case unless it begins with ``(?i)``. A match lies
      between two special tokens or ends of a row, and these are where ``^`` and ``$`` match.
    - ``token:import``: features that are active on a token that is this text, in any case and without white space
      around it.
    - ``promotes:import``: features with a token that contains this text, in any case, among their top logits.
    - ``id:7`` or ``id:7,12,40-50``: features by index, in this order.

    Text and tokens rank features by share: the mass on matched tokens, each counted once, over the feature's whole
    mass. Raises SaelabError if the query is empty, too long, cannot be read or takes too long.
    """
    kind, colon, text = query.partition(":")
    if colon and kind in ("id", "token", "promotes"):
        if not text.strip():
            raise SaelabError(f"{query!r} names nothing. Type more, as in {_EXAMPLES[kind]}.")
        if kind == "id":
            return Found(_indices(facts, text))
        find = _on_token if kind == "token" else _promoting
        return find(facts, table, vocabulary, text.casefold())
    if not query:
        raise SaelabError(f"The query is empty. Type a text, or one of {', '.join(_EXAMPLES.values())}.")
    if len(query) > LONGEST:
        raise SaelabError(f"The query has {len(query):,} characters, more than {LONGEST:,}. Type a part of it.")
    source = query[1:-1] if query[0] == query[-1] == "/" else ""
    pattern = regex_pattern(source) if source else text_pattern(query)
    return _on_matches(facts, table, vocabulary, find_matches(facts, vocabulary, pattern, literal=not source))


_EXAMPLES = {
    "regex": r"/import \w+/",
    "token": "token:import",
    "promotes": "promotes:import",
    "id": f"id:{EXAMPLE}",
}


def match_of(facts: Facts, found: Found, index: int) -> Match | None:
    """Where feature number `index` of `found` is most active on a match, the earliest of equals.

    Reads the feature's activations. None if the query is not about text: ``promotes:`` and ``id:``.
    """
    places, values = facts.activations(int(found.features[index]))
    if found.matches is not None:
        entries = _inside(places, found.matches)
        entries = entries[_has_bytes(facts, _ids(facts)[places[entries]])]
    elif found.tokens is not None:
        entries = np.flatnonzero(np.isin(_ids(facts)[places], found.tokens))
    else:
        return None
    place = places[entries[values[entries].argmax()]]
    if found.matches is None:
        return Match(int(place), int(place), int(place))
    match = _last_before(found.matches, place)
    return Match(int(place), int(found.matches.first[match]), int(found.matches.last[match]))


def _inside(places: np.ndarray, matches: Matches) -> np.ndarray:
    """Indices of the places, which rise, that lie in a match."""
    if len(matches.first) < len(places):
        starts = np.searchsorted(places, matches.first)
        return ranges(starts, np.searchsorted(places, matches.last, "right") - starts)
    match = _last_before(matches, places)
    return np.flatnonzero((match >= 0) & (places <= matches.last[match]))


def _last_before(matches: Matches, places: np.ndarray) -> np.ndarray:
    """The last match that begins at or before each place, and reaches as far as any that does; -1 if none does."""
    return np.searchsorted(matches.first, places, "right") - 1


def _indices(facts: Facts, text: str) -> np.ndarray:
    try:
        return indices(text, facts, cut=True)
    except SaelabError as error:
        raise SaelabError(f"id:{text}: {error}") from error


def _on_token(facts: Facts, table: Table, vocabulary: Vocabulary, text: str) -> Found:
    text = text.strip()
    tokens = np.array([i for i, other in enumerate(vocabulary.texts) if other.strip().casefold() == text], np.int64)
    features, shares = _ranked(table, _mass(facts, "by_vocabulary", tokens))
    return Found(features, shares, tokens=tokens)


def _promoting(facts: Facts, table: Table, vocabulary: Vocabulary, text: str) -> Found:
    if facts.arrays.manifest["lens"] is None:
        raise SaelabError(
            f"promotes:{text}: the features of {facts.arrays.folder} have no logits, because no linear map leads from "
            f"their site to logits. Search for the text where they are active, as in {_EXAMPLES['token']}."
        )
    contains = np.array([text in other.casefold() for other in vocabulary.texts])
    tokens = np.asarray(table["top_logit_tokens"])
    if tokens.size and not (tokens.min() >= -1 and tokens.max() < len(contains)):
        raise facts.arrays.damaged("table.top_logit_tokens", "has a token that the vocabulary lacks")
    matched = contains[tokens] & (tokens >= 0)
    features = np.flatnonzero(matched.any(1))
    logits = np.where(matched[features], table["top_logits"][features], -np.inf).max(1)
    order = np.argsort(-logits, kind="stable")
    return Found(features[order], logits=logits[order])


def _on_matches(facts: Facts, table: Table, vocabulary: Vocabulary, matches: Matches) -> Found:
    ids = _ids(facts)
    occurrences = np.zeros(len(vocabulary), np.int64)
    for places in _tokens_of(facts, matches):
        occurrences += np.bincount(ids[places], minlength=len(vocabulary))
    # All occurrences of most tokens with a match have one, and their mass is known.
    whole = (occurrences == vocabulary.counts) & (occurrences > 0)
    on_match = _mass(facts, "by_vocabulary", np.flatnonzero(whole))
    for places in _tokens_of(facts, matches):
        on_match += _mass(facts, "by_token", places[~whole[ids[places]]])
    features, shares = _ranked(table, on_match)
    return Found(features, shares, matches=matches)


def _tokens_of(facts: Facts, matches: Matches) -> Iterator[np.ndarray]:
    """The places of the tokens that matches overlap, each once and in order, in arrays of some 2^16 places."""
    first = matches.first.astype(np.int64)
    first[1:] = np.maximum(first[1:], matches.last[:-1] + 1)  # matches may overlap
    counts = np.maximum(matches.last + 1 - first, 0)
    ids = _ids(facts)
    for a, b in _parts(counts, CHUNK):
        places = ranges(first[a:b], counts[a:b])
        yield places[_has_bytes(facts, ids[places])]


def _mass(facts: Facts, order: Literal["by_token", "by_vocabulary"], indices: np.ndarray) -> np.ndarray:
    """Mass of each feature on some places (`by_token`) or token ids (`by_vocabulary`), ``[n_features]`` float64."""
    value = "values" if order == "by_token" else "mass"
    offsets, features, values = (np.asarray(facts.arrays[f"{order}.{name}"]) for name in ("offsets", "features", value))
    mass = np.zeros(facts.n_features)
    if not len(indices):
        return mass
    starts = offsets[indices]
    counts = offsets[indices + 1] - starts
    if not (starts.min() >= 0 and counts.min() >= 0 and (starts + counts).max() <= len(features)):
        raise facts.arrays.damaged(f"{order}.offsets", "does not rise from 0 to the number of entries")
    for a, b in _parts(counts, ENTRIES):
        entries = ranges(starts[a:b], counts[a:b])
        active = features[entries]
        if len(active) and not (active.min() >= 0 and active.max() < facts.n_features):
            raise facts.arrays.damaged(f"{order}.features", f"does not lie within 0 to {facts.n_features - 1}")
        mass += np.bincount(active, values[entries], facts.n_features)
    return mass * facts.maxima if order == "by_token" else mass  # values are shares of the maximum


def _ids(facts: Facts) -> np.ndarray:
    """The token id at each place."""
    return np.asarray(facts.rows).reshape(-1)


def _has_bytes(facts: Facts, ids: np.ndarray) -> np.ndarray:
    """Whether these tokens are not empty; an empty token overlaps no match."""
    offsets = np.asarray(facts.arrays["vocabulary.offsets"])
    return offsets[ids + 1] > offsets[ids]


def _parts(counts: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Cuts `counts` into slices whose sums are at most `most` and one more count."""
    part = np.cumsum(counts) // most
    return pairwise([0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(counts)])


def _ranked(table: Table, on_match: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features with mass on the match, and their shares, largest first; of equal shares, the larger mass."""
    features = np.flatnonzero(on_match)
    mass = on_match[features]
    shares = np.minimum(mass / table["mass"][features], 1).astype(np.float32)  # stored values are rounded
    order = np.lexsort((-mass, -shares))
    return features[order], shares[order]
