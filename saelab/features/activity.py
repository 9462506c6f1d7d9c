"""Every activation of every feature on some text, collected from the blocks of a pass and sorted by feature.

Memory: 16 bytes per active feature and token, 512 bytes per token at k = 32 (154 MB for 300 k tokens), and
about three times as much during the sort.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.encoded import Block
from saelab.errors import SaelabError


@dataclass(frozen=True)
class Activity:
    """Every activation of every feature on the evaluated text, sorted by feature, then by position.

    values ``[nnz]`` float32, features ``[nnz]`` int32, positions ``[nnz]`` int64 (row * context + position in the row);
    offsets ``[n_features + 1]``: the entries of feature f are ``offsets[f]`` up to ``offsets[f + 1]``.
    """

    values: Tensor
    features: Tensor
    positions: Tensor
    offsets: Tensor
    n_tokens: int
    """Ordinary tokens evaluated, active or not."""

    @property
    def n_features(self) -> int:
        return len(self.offsets) - 1


class ActivityBuilder:
    """Collects the codes of a pass (`add`); `build` sorts them."""

    def __init__(self, n_features: int) -> None:
        self._n_features, self._n_tokens = n_features, 0
        self._values: list[Tensor] = []
        self._features: list[Tensor] = []
        self._positions: list[Tensor] = []

    def add(self, block: Block) -> None:
        """Add the next block of the pass."""
        codes = block.codes
        self._values.append(codes.values.cpu())
        self._features.append(codes.features.int().cpu())
        self._positions.append(block.positions[codes.row_of_entry()].cpu())
        self._n_tokens += len(block.x)

    def build(self) -> Activity:
        """The activations of all blocks. Raises SaelabError if no block was added."""
        if not self._n_tokens:
            raise SaelabError("features: the rows hold no ordinary token, only special ones; use another text")
        features = torch.cat(self._features)
        order = torch.argsort(features, stable=True)  # reading order stays within a feature
        counts = torch.bincount(features, minlength=self._n_features)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        values, positions = torch.cat(self._values)[order], torch.cat(self._positions)[order]
        return Activity(values, features[order], positions, offsets, self._n_tokens)
