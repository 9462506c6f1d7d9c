"""The activations of some features, exact and in memory: what the statistics and contexts are computed from."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activity:
    """Activations of consecutive features, sorted by feature, then by place (FORMAT.md).

    values ``[entries]`` float32, places ``[entries]`` int32; feature `first` + i has the entries from ``offsets[i]`` up
    to ``offsets[i + 1]``.
    """

    values: Tensor
    places: Tensor
    offsets: Tensor
    first: int = 0

    @property
    def stop(self) -> int:
        """The feature after the last one."""
        return self.first + len(self.offsets) - 1

    @cached_property
    def features(self) -> Tensor:
        """The feature of each entry, ``[entries]`` int64."""
        features = torch.arange(self.first, self.stop)
        return features.repeat_interleave(self.offsets.diff(), output_size=len(self.values))
