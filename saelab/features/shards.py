"""The codes of a pass on disk, in shards that are whole or not there, so that a stopped pass continues (FORMAT.md).

Memory: a shard takes 12 bytes per entry while it is filled and about 44 while it is sorted.

A file of sorted entries (`write_sorted`) has the tensors ``offsets`` (of the entries of each key), ``indices`` and
``values``. A shard is one whose keys are features and whose indices are places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.features.layout import IDENTITY
from saelab.features.ordering import offsets_of, stable_order
from saelab.files import make_folder, read_json, translate_errors, write_json
from saelab.tensors import write_tensors

SHARD_PLACES = 1 << 16
SHARD_ENTRIES = 1 << 22
"""A shard ends after the forward pass with which it reaches either."""


class Entries(NamedTuple):
    """The entries of consecutive keys, sorted by key, then by index."""

    counts: np.ndarray
    """Number of entries of each key, int64."""
    indices: np.ndarray
    """int32"""
    values: np.ndarray
    """float32"""

    def owners(self) -> np.ndarray:
        """Number of each entry's key among these keys, ``[entries]`` int64."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


@dataclass(frozen=True)
class SortedFile:
    """A finished file of entries that are sorted by key, then by index."""

    path: Path

    def entries(self, first: int, stop: int) -> Entries:
        """The entries of the keys from `first` up to `stop`."""
        with safe_open(self.path, "pt") as file:  # its slices may be empty, unlike those of "np"
            offsets = file.get_slice("offsets")[first : stop + 1].numpy()
            part = slice(int(offsets[0]), int(offsets[-1]))
            indices, values = (file.get_slice(name)[part].numpy() for name in ("indices", "values"))
            return Entries(np.diff(offsets), indices, values)


@dataclass(frozen=True)
class Shard(SortedFile):
    """A finished shard: the entries of the rows from `first` up to `stop`, by feature and place."""

    first: int
    stop: int
    tokens: int
    """Ordinary tokens of these rows."""

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of entries and maximum of each feature, both ``[n_features]``."""
        with safe_open(self.path, "np") as file:
            return np.diff(file.get_tensor("offsets")), file.get_tensor("maxima")


@dataclass(frozen=True, eq=False)
class Totals:
    """Sums and maxima over all shards."""

    counts: np.ndarray
    """Number of entries of each feature, ``[n_features]`` int64."""
    maxima: np.ndarray
    """Largest activation of each feature, ``[n_features]`` float32; 0 if it is never active."""
    tokens: int
    """Ordinary tokens of the text."""


def total(shards: Sequence[Shard]) -> Totals:
    """The sums and maxima over `shards`, of which there is at least one."""
    counts, maxima = shards[0].totals()
    for shard in shards[1:]:
        more, larger = shard.totals()
        counts, maxima = counts + more, np.maximum(maxima, larger)
    return Totals(counts, maxima, sum(shard.tokens for shard in shards))


def write_sorted(
    path: Path,
    keys: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    n_keys: int,
    more: Mapping[str, np.ndarray],
    facts: Mapping[str, int],
) -> np.ndarray:
    """Write entries, whose indices rise for each key, sorted by key; returns the number of each key's, ``[n_keys]``.

    Raises SaelabError if the file cannot be written.
    """
    order = stable_order(keys)
    counts = np.bincount(keys, minlength=n_keys)
    arrays = {"offsets": offsets_of(counts), "indices": indices[order], "values": values[order], **more}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    write_tensors(path, tensors, {name: str(number) for name, number in facts.items()})
    return counts


class ShardWriter:
    """Collects the blocks of a pass into shards in `folder`: `add` from row `first_row` on, then `finish`.

    Shards that a stopped pass over the same text with the same `identity` finished are kept. Raises SaelabError if a
    shard cannot be written, or if an activation is infinite.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self._folder, self._n_features = folder, identity["n_features"]
        self._rows, self._context = identity["rows"], identity["context"]
        self._shards = open_shards(folder, identity)
        self.first_row = self._stop = self._shards[-1].stop if self._shards else 0
        """The first row that is in no finished shard."""
        self._start_shard()

    def _start_shard(self) -> None:
        self._values: list[Tensor] = []
        self._features: list[Tensor] = []
        self._places: list[Tensor] = []
        self._tokens = self._entries = 0

    def add(self, block: Block) -> None:
        """Add the next block of the pass."""
        active = block.codes.values > 0
        self._values.append(block.codes.values[active].float().cpu())
        self._features.append(block.codes.features[active].int().cpu())
        self._places.append(block.positions[block.codes.row_of_entry()[active]].int().cpu())
        self._tokens += len(block.x)
        self._entries += len(self._values[-1])
        self._stop = block.first_row + len(block.rows)
        places = (self._stop - (self._shards[-1].stop if self._shards else 0)) * self._context
        if places >= SHARD_PLACES or self._entries >= SHARD_ENTRIES:
            self._write()

    def finish(self) -> list[Shard]:
        """All shards, after the last block. Raises SaelabError if the text has no ordinary token."""
        if not self._shards or self._shards[-1].stop < self._rows:
            self._stop = self._rows  # blocks without an ordinary token are not added
            self._write()
        if not any(shard.tokens for shard in self._shards):
            raise SaelabError("features: the rows hold no ordinary token, only special ones; use another text")
        return self._shards

    def _write(self) -> None:
        first = self._shards[-1].stop if self._shards else 0
        empty = torch.empty(0)
        values, places = torch.cat([*self._values, empty]), torch.cat([*self._places, empty.int()])
        features = torch.cat([*self._features, empty.int()])
        shard = Shard(self._folder / _name(len(self._shards)), first, self._stop, self._tokens)
        self._start_shard()
        maxima = torch.zeros(self._n_features).scatter_reduce_(0, features.long(), values, "amax")
        if not maxima.isfinite().all():
            raise SaelabError(
                f"features: feature {int(maxima.argmax())} has an infinite activation on rows {first} to "
                f"{shard.stop - 1} of the held-out text: its weights are too large for float32. Train it again"
            )
        facts = {"first": first, "stop": shard.stop, "tokens": shard.tokens}
        columns = (features.numpy(), places.numpy(), values.numpy())
        write_sorted(shard.path, *columns, self._n_features, {"maxima": maxima.numpy()}, facts)
        self._shards.append(shard)


def open_shards(folder: Path, identity: Mapping[str, Any]) -> list[Shard]:
    """The finished shards of `identity` in `folder`, in order and without gaps.

    Makes the folder, and empties it first if it holds shards of another identity. Raises SaelabError if it cannot.
    """
    try:
        same = read_json(folder / IDENTITY, "") == identity
    except SaelabError:
        same = False
    if not same:
        with translate_errors(folder):
            make_folder(folder)
            for path in folder.iterdir():
                path.unlink()
        write_json(folder / IDENTITY, identity)
    shards: list[Shard] = []
    while (shard := _open(folder / _name(len(shards)))) and shard.first == (shards[-1].stop if shards else 0):
        shards.append(shard)
    return shards


def _name(index: int) -> str:
    return f"{index:05d}.safetensors"


def _open(path: Path) -> Shard | None:
    """The shard at `path`; None if there is none, or a damaged one, which is then written again."""
    try:
        with safe_open(path, "pt") as file:  # compares the length of the file with its header
            facts = file.metadata()
        return Shard(path, int(facts["first"]), int(facts["stop"]), int(facts["tokens"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
