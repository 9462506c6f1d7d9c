"""Polysemantic heads (claim T5): whether the features of a head do one thing or several.

The paper's authors read the ten features with the largest decoder share of a head, and call a head monosemantic if they
all do one task. Here, without a reader: two features are alike if they are active on the same tokens, or read from the
same tokens. That is, if the cosine of their token profiles is at least `ALIKE`:

    active     activation of the feature on each token id, summed over text
    read       positive direct attribution to each source's token id, summed over sampled tokens; position 0 left out

Features that are alike, directly or through others, form a cluster. A head is monosemantic if one cluster has at least
`ONE_TASK` of its features, else polysemantic. The control is as many "heads" of features drawn at random from the same
ones: if the control is as low as the heads, a head's features are no more alike than any.
"""

from typing import NamedTuple

import numpy as np

from saelab.analysis.attention.report import ONE_TASK, TOP

ALIKE = 0.5


class Profiles:
    """Token profiles of some features; `add` fills them. Takes 8 bytes per feature and token id."""

    def __init__(self, features: np.ndarray, n_features: int, vocabulary: int) -> None:
        """`features` are unique and rising."""
        self.index = np.full(n_features, -1)
        self.index[features] = np.arange(len(features))
        self.active, self.read = np.zeros((2, len(features), vocabulary), np.float32)

    def add_active(self, ids: np.ndarray, features: np.ndarray, activations: np.ndarray) -> None:
        """Entries of the codes: token id, feature and activation, ``[n]`` each."""
        which = self.index[features]
        here = which >= 0
        np.add.at(self.active, (which[here], ids[here]), activations[here])

    def add_read(self, ids: np.ndarray, features: np.ndarray, shares: np.ndarray) -> None:
        """The shares of the sources ``[n, context]`` in some features ``[n]``, and the token id of each source."""
        which = self.index[features]
        here = which >= 0
        np.add.at(self.read, (which[here, None], ids[None, 1:]), shares[here, 1:])


class Polysemanticity(NamedTuple):
    """Clusters among each head's features."""

    features: np.ndarray
    """The features of each head, the largest decoder share first, ``[heads, TOP]`` int64; -1 if there are fewer."""
    clusters: np.ndarray
    """Clusters among them, ``[heads]`` int64"""
    largest: np.ndarray
    """Share of them in the largest cluster, ``[heads]``"""
    control: np.ndarray
    """`largest` of features drawn at random, ``[draws]``"""

    @property
    def polysemantic(self) -> np.ndarray:
        """``[heads]`` bool"""
        return self.largest < ONE_TASK


def polysemanticity(
    top: np.ndarray, profiles: tuple[np.ndarray, ...], alive: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> Polysemanticity:
    """Clusters among the first `TOP` living features of each row of `top` ``[heads, candidates]``.

    `profiles` are ``[candidates in order of np.unique(top), vocabulary]``, one for each way of being alike; `alive` is
    bool ``[n_features]``.
    """
    which = np.unique(top)
    same = np.zeros((len(which), len(which)), bool)
    for profile in profiles:
        norms = np.linalg.norm(profile, axis=1, keepdims=True)
        unit = profile / np.where(norms > 0, norms, 1)
        same |= unit @ unit.T >= ALIKE
    chosen = [[feature for feature in head if alive[feature]][:TOP] for head in top]
    features = np.full((len(top), TOP), -1)
    clusters, largest = np.zeros(len(top), np.int64), np.full(len(top), np.nan)
    for i, head in enumerate(chosen):
        features[i, : len(head)] = head
        if head:
            sizes = cluster_sizes(same, np.searchsorted(which, head))
            clusters[i], largest[i] = len(sizes), max(sizes) / len(head)
    pool = np.searchsorted(which, np.unique([feature for head in chosen for feature in head]))
    numbers = np.random.default_rng(seed)
    n = min(TOP, len(pool))
    drawn = [cluster_sizes(same, numbers.choice(pool, n, replace=False)) for _ in range(draws if n else 0)]
    return Polysemanticity(features, clusters, largest, np.array([max(sizes) / n for sizes in drawn]))


def cluster_sizes(same: np.ndarray, members: np.ndarray) -> list[int]:
    """Sizes of the connected clusters among `members`, given which are alike ``[n, n]`` bool."""
    left, sizes = set(members.tolist()), []
    while left:
        reached = [left.pop()]
        for one in reached:
            near = {other for other in left if same[one, other]}
            left -= near
            reached += near
        sizes.append(len(reached))
    return sizes
