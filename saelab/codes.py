"""Sparse codes: the features active on each token, and how strongly. All rooms exchange them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelab.errors import SaelabError, brief
from saelab.tensors import kind, write_tensors

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Codes:
    """A ragged CSR matrix ``[tokens, n_features]``: token t has the entries from ``offsets[t]`` to ``offsets[t + 1]``.

    values    ``[nnz]``         activations; an unfilled slot has value 0 and no effect
    features  ``[nnz]``         int64 or int32, the feature of each value
    offsets   ``[tokens + 1]``  int64 or int32
    """

    values: Tensor
    features: Tensor
    offsets: Tensor
    n_features: int
    _derived: dict[str, Any] = field(default_factory=dict, repr=False)
    """Cache of results that depend only on features and offsets (`once`)."""

    @classmethod
    def from_topk(cls, values: Tensor, features: Tensor, n_features: int) -> Self:
        """Codes with k entries per token, from two ``[tokens, k]``; keeps zero values (`compact` drops them)."""
        tokens, k = values.shape
        offsets = torch.arange(tokens + 1, device=values.device) * k
        return cls(values.flatten(), features.flatten(), offsets, n_features)

    @classmethod
    def from_mask(cls, mask: Tensor, scores: Tensor) -> Self:
        """The entries of `scores` at the true positions of `mask`, both ``[tokens, n_features]``, in order of feature.

        Waits for a GPU, because the host must know the number of entries.
        """
        rows, features = mask.nonzero(as_tuple=True)
        return cls(scores[rows, features], features, _ends(mask.sum(1)), mask.shape[1])

    @classmethod
    def from_triples(cls, tokens: Tensor, features: Tensor, values: Tensor, shape: tuple[int, int]) -> Self:
        """The matrix of `shape` with the entries ``(token, feature, value)``, ``[nnz]`` each, in any order.

        Entries of one token keep their order. Raises ValueError if an index is out of range.
        """
        n_tokens, n_features = shape
        for name, index, size in (("token", tokens, n_tokens), ("feature", features, n_features)):
            if len(index) and not (int(index.min()) >= 0 and int(index.max()) < size):
                raise ValueError(f"a {name} is out of range: there are {size}")
        order = tokens.argsort(stable=True)
        return cls(values[order], features[order], _ends(_histogram(tokens, n_tokens)), n_features)

    def __repr__(self) -> str:
        return f"Codes({self.tokens:,} tokens, {self.n_features:,} features, {self.nnz:,} entries, {kind(self.values)})"

    @property
    def tokens(self) -> int:
        return len(self.offsets) - 1

    @property
    def nnz(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Self:
        """The codes of consecutive tokens."""
        start, stop, step = rows.indices(self.tokens)
        if step != 1:
            raise ValueError("codes are sliced with step 1")
        stop = max(start, stop)
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        offsets = self.offsets[start : stop + 1] - first
        return type(self)(self.values[first:last], self.features[first:last], offsets, self.n_features)

    def with_values(self, values: Tensor) -> Self:
        """The same pattern with other values ``[nnz]``; both share one sort by feature (`transpose`)."""
        return type(self)(values, self.features, self.offsets, self.n_features, self._derived)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The result of `make()`, which is called once for all codes that share the pattern (`with_values`).

        It must depend only on features and offsets.
        """
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    def row_of_entry(self) -> Tensor:
        """The token each entry belongs to, ``[nnz]`` int64."""
        tokens = torch.arange(self.tokens, device=self.offsets.device)
        return self.once(
            "rows", lambda: torch.repeat_interleave(tokens, self.offsets.diff(), output_size=len(self.features))
        )

    def transpose(self) -> Self:
        """The transposed codes ``[n_features, tokens]``: for each feature the tokens it is active on, in order.

        The first call sorts the pattern for all codes that share it; later calls only gather the values.
        """
        order, pattern = self.once("transpose", self._sort_by_feature)
        return pattern.with_values(self.values[order])

    def _sort_by_feature(self) -> tuple[Tensor, Self]:
        order = self.features.int().argsort(stable=True)  # int32 sorts twice as fast as int64
        offsets = _ends(_histogram(self.features, self.n_features))
        return order, type(self)(self.values.new_empty(0), self.row_of_entry()[order], offsets, self.tokens)

    def compact(self) -> Self:
        """The same matrix without entries of value zero."""
        return self.where(self.values != 0)

    def where(self, keep: Tensor) -> Self:
        """The matrix with the entries for which `keep` ``[nnz]`` is true."""
        index = keep.nonzero().squeeze(1)  # found once for both
        return type(self)(self.values[index], self.features[index], _ends(keep)[self.offsets], self.n_features)

    def l0(self) -> Tensor:
        """Active features per token, ``[tokens]`` int64: entries with a value above zero."""
        return _ends(self.values > 0)[self.offsets].diff()

    def firing_counts(self) -> Tensor:
        """Number of tokens on which each feature is active (value above zero), ``[n_features]`` int64."""
        return _histogram(self.features, self.n_features, self.values > 0)

    def to_dense(self) -> Tensor:
        """``[tokens, n_features]``."""
        positions = self.row_of_entry() * self.n_features + self.features
        dense = self.values.new_zeros(self.tokens * self.n_features)
        return dense.scatter_add_(0, positions, self.values).view(self.tokens, self.n_features)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.values.to(device), self.features.to(device), self.offsets.to(device), self.n_features)


def concatenate(parts: list[Codes]) -> Codes:
    """The codes of all tokens of `parts`, in order. All parts share n_features."""
    if len({part.n_features for part in parts}) != 1:
        raise ValueError(f"codes of {sorted({part.n_features for part in parts})} features cannot be joined")
    offsets, nnz = [parts[0].offsets], parts[0].nnz
    for part in parts[1:]:
        offsets.append(part.offsets[1:] + nnz)
        nnz += part.nnz
    values, features = torch.cat([part.values for part in parts]), torch.cat([part.features for part in parts])
    return Codes(values, features, torch.cat(offsets), parts[0].n_features)


def save(codes: Codes, path: Path | str) -> None:
    """Write `codes` as a safetensors file: values, features and offsets, n_features in the metadata.

    A file is replaced only once the new one is complete. Raises SaelabError if it cannot be written.
    """
    tensors = {"values": codes.values, "features": codes.features, "offsets": codes.offsets}
    write_tensors(Path(path), tensors, {"n_features": str(codes.n_features)})


def load(path: Path | str) -> Codes:
    """The codes that `save` wrote to `path`. Raises SaelabError if the file is missing, damaged or not of codes."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("values", "features", "offsets")}
            codes = Codes(**tensors, n_features=int(metadata["n_features"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SaelabError(f"{path}: cannot be read as codes ({brief(error)}); write them again") from error
    wrong = _inconsistency(codes)
    if wrong:
        raise SaelabError(f"{path}: {wrong}; write the codes again")
    return codes


def _inconsistency(codes: Codes) -> str:
    """The reason why these tensors are not a CSR matrix, or ""."""
    index_types = (torch.int32, torch.int64)
    if any(t.ndim != 1 for t in (codes.values, codes.features, codes.offsets)) or not len(codes.offsets):
        return "values, features and offsets are not three one-dimensional tensors"
    if not codes.values.is_floating_point() or {codes.features.dtype, codes.offsets.dtype} - set(index_types):
        return "values are not floating-point numbers, or features and offsets not integers"
    if len(codes.values) != len(codes.features):
        return f"{len(codes.values)} values but {len(codes.features)} features"
    if int(codes.offsets[0]) != 0 or int(codes.offsets[-1]) != codes.nnz or bool((codes.offsets.diff() < 0).any()):
        return f"offsets do not rise from 0 to the {codes.nnz} entries"
    if codes.nnz and not (int(codes.features.min()) >= 0 and int(codes.features.max()) < codes.n_features):
        return f"a feature is out of range: there are {codes.n_features}"
    return ""


def _histogram(index: Tensor, size: int, counted: Tensor | None = None) -> Tensor:
    """Count of each number below `size` in `index`, at the positions where `counted` is true: ``[size]`` int64.

    Does not use bincount, which waits for a GPU. Sums of integers do not depend on their order.
    """
    ones = torch.ones_like(index, dtype=torch.long) if counted is None else counted.long()
    return torch.zeros(size, dtype=torch.long, device=index.device).scatter_add_(0, index.long(), ones)


def _ends(counts: Tensor) -> Tensor:
    """Offsets at which rows of these lengths begin, and the end of the last: ``[n]`` -> ``[n + 1]`` int64."""
    return torch.cat([torch.zeros(1, dtype=torch.long, device=counts.device), counts.cumsum(0)])
