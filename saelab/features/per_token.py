"""L0 token by token: how an allocation spreads its active features over the text of a feature database."""

from dataclasses import dataclass

import numpy as np

from saelab.errors import SaelabError
from saelab.features.facts import Facts
from saelab.features.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class PerToken:
    """Active features on each ordinary token of the text."""

    mean: float
    """L0"""
    counts: np.ndarray
    """Number of ordinary tokens with 0, 1, 2 ... active features, ``[largest + 1]`` int64."""
    by_id: np.ndarray
    """Mean number of active features on each token id, ``[vocabulary]``; nan without an ordinary occurrence."""
    hardest: np.ndarray
    """The places with the most active features, most first, ``[n]`` int64; row * context + position."""
    hardest_l0: np.ndarray
    """Active features there, ``[n]`` int64."""

    @property
    def constant(self) -> bool:
        """Whether every token has the same number of active features, as with token choice."""
        return int(np.count_nonzero(self.counts)) <= 1


def active_per_token(facts: Facts, vocabulary: Vocabulary, n: int = 20) -> PerToken:
    """L0 over the ordinary tokens, with the `n` places of the largest; ties go to the earlier place.

    Raises SaelabError if the database is damaged.
    """
    arrays = facts.arrays
    for name in ("by_token.offsets", "tokens"):
        arrays.read_ahead(name)
    active = np.diff(arrays["by_token.offsets"])
    ids = facts.rows.reshape(-1)
    if len(active) and active.min() < 0:
        raise arrays.damaged("by_token.offsets", "does not rise from 0 to the number of entries")
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(vocabulary)):
        raise arrays.damaged("tokens", f"has token ids that are not within 0 to {len(vocabulary) - 1}")
    occurrences = vocabulary.counts
    places = np.flatnonzero(occurrences[ids] > 0)  # special tokens are not counted
    if len(places) != facts.n_tokens:
        raise SaelabError(
            f"{arrays.folder}: {len(places):,} ordinary tokens are in the text, and the manifest counts "
            f"{facts.n_tokens:,}. {arrays.remedy}"
        )
    active = active[places]
    order = np.argsort(-active, kind="stable")[:n]
    with np.errstate(invalid="ignore"):
        by_id = np.bincount(ids[places], active, len(vocabulary)) / occurrences
    return PerToken(
        mean=float(active.mean()) if len(active) else float("nan"),
        counts=np.bincount(active),
        by_id=by_id,
        hardest=places[order],
        hardest_l0=active[order],
    )
