"""Sparse codes: which features are active on each token, and how strongly. The common currency of all rooms."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codes:
    """A ragged CSR matrix ``[tokens, n_features]``: token t holds entries ``offsets[t]`` up to ``offsets[t + 1]``.

    values    ``[nnz]``         activations
    features  ``[nnz]`` int64   which feature each value belongs to
    offsets   ``[tokens + 1]`` int64
    """

    values: Tensor
    features: Tensor
    offsets: Tensor
    n_features: int

    @classmethod
    def from_topk(cls, values: Tensor, features: Tensor, n_features: int) -> Self:
        """Equally long rows, ``[tokens, k]`` each; zero values are kept (`compact` drops them)."""
        tokens, k = values.shape
        offsets = torch.arange(0, tokens * k + 1, k, device=values.device) if k else values.new_zeros(tokens + 1).long()
        return cls(values.flatten(), features.flatten(), offsets, n_features)

    @property
    def tokens(self) -> int:
        return len(self.offsets) - 1

    @property
    def nnz(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Self:
        """The codes of a contiguous run of tokens."""
        start, stop, step = rows.indices(self.tokens)
        if step != 1:
            raise ValueError("codes are sliced with step 1")
        stop = max(start, stop)
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        offsets = self.offsets[start : stop + 1] - first
        return type(self)(self.values[first:last], self.features[first:last], offsets, self.n_features)

    def row_of_entry(self) -> Tensor:
        """The token each entry belongs to, ``[nnz]`` int64."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(self.tokens, device=counts.device), counts, output_size=self.nnz)

    def compact(self) -> Self:
        """The same matrix without entries of value zero."""
        keep = self.values != 0
        kept = torch.cat([self.offsets.new_zeros(1), keep.cumsum(0)])
        return type(self)(self.values[keep], self.features[keep], kept[self.offsets], self.n_features)

    def l0(self) -> Tensor:
        """Active features per token, ``[tokens]`` int64: entries with a value above zero."""
        active = torch.cat([self.offsets.new_zeros(1), (self.values > 0).cumsum(0)])
        return active[self.offsets].diff()

    def firing_counts(self) -> Tensor:
        """On how many tokens each feature is active (value above zero), ``[n_features]`` int64."""
        return torch.zeros(self.n_features, dtype=torch.long, device=self.values.device).index_add_(
            0, self.features, (self.values > 0).long()
        )

    def to_dense(self) -> Tensor:
        """``[tokens, n_features]``."""
        dense = self.values.new_zeros(self.tokens, self.n_features)
        return dense.index_put((self.row_of_entry(), self.features), self.values, accumulate=True)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.values.to(device), self.features.to(device), self.offsets.to(device), self.n_features)


def concatenate(parts: list[Codes]) -> Codes:
    """The codes of all tokens of `parts`, in order. All parts share n_features."""
    shifts = torch.tensor([0] + [part.nnz for part in parts[:-1]]).cumsum(0).tolist()
    offsets = [part.offsets[:-1] + shift for part, shift in zip(parts, shifts, strict=True)]
    end = torch.tensor([sum(part.nnz for part in parts)], device=parts[0].offsets.device)
    return Codes(
        torch.cat([part.values for part in parts]),
        torch.cat([part.features for part in parts]),
        torch.cat([*offsets, end]),
        parts[0].n_features,
    )
