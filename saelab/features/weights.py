"""The columns of the table that follow from the weights, without any text (`layout.WEIGHTS`)."""

from collections.abc import Iterator

import numpy as np

from saelab.features.layout import LIST_LENGTH, WEIGHTS
from saelab.sae.model import SparseAutoencoder

LOGIT_ROWS = 256
"""Features whose logits are computed at once."""
COSINES = 1 << 26
"""Most cosines computed at once, 256 MB."""


def weight_columns(sae: SparseAutoencoder, lens: None) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields the first of some consecutive features, and their columns; all features, in order."""
    for first in range(0, sae.n_features, 1024):
        n = min(1024, sae.n_features - first)
        yield first, {name: empty(dtype, (n, *width)) for name, (dtype, *width) in WEIGHTS.items()}


def empty(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    ids = dtype == "<i4" and shape[1:] in ((LIST_LENGTH,), (3,))
    return np.full(shape, -1 if ids else 0, dtype)
