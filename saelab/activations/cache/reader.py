"""Reads a cache: shuffled for training (blocks.py), in the order written for all else; every block's checksum on
every read."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelab.activations.blocks import BEGINNING, Cursor, Shuffled, capacity
from saelab.activations.cache.layout import (
    DIGITS,
    ORIGIN,
    TOKENS,
    File,
    Manifest,
    activations_file,
    checksum,
    gradients_file,
    read_manifest,
    token_bytes,
)
from saelab.activations.stream import ActivationBatch, names_of, side_by_side
from saelab.errors import SaelabError, did_you_mean
from saelab.files import expanded
from saelab.tensors import raw


class _Block(NamedTuple):
    shard: dict[str, Any]
    number: int
    start: int
    """First token, within the shard."""
    end: int


class Cache:
    """A finished cache. Made by `open_cache`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.identity: dict[str, Any] = manifest.identity
        """What the cache is of (FORMAT.md)."""
        self.tokens = manifest.tokens
        """Tokens stored."""
        self._block_tokens: int = self.identity["block_tokens"]
        counts = [-(-shard["tokens"] // self._block_tokens) for shard in manifest.shards]
        self._first_blocks = np.cumsum([0, *counts])
        """The number of the first block of each shard in the cache; the last entry is the number of blocks."""
        self._checked: set[str] = set()

    def __repr__(self) -> str:
        sites = ", ".join(f"{site} {d_in:,}" for site, d_in in self.sites.items())
        gradients = ", with gradients" * bool(self.identity["gradients"])
        return f"Cache({self.folder}: {self.tokens:,} tokens, {self.identity['dtype']}, {sites}{gradients})"

    @property
    def sites(self) -> dict[str, int]:
        """d_in of each site."""
        return self.identity["sites"]

    def batches(
        self,
        site: str | Sequence[str],
        batch_tokens: int,
        *,
        seed: int,
        buffer_tokens: int = 131_072,
        gradients: bool = False,
        start: Cursor = BEGINNING,
    ) -> "Shuffled":
        """Every token once per epoch, globally shuffled, epoch after epoch without end, from `start` on.

        A group is cut into the fewest batches of at most `batch_tokens`, equal to within one token. The order does not
        depend on the sites. Memory: ``2 * buffer_tokens * (d_in * bytes of the dtype + 12)``, with d_in the sum of the
        sites' widths, and more with `gradients`. Raises SaelabError where the
        cache has no such site, or no gradients.
        """
        columns = _Columns(self, self._files(site, gradients), gradients)
        return Shuffled(columns, batch_tokens, seed, buffer_tokens, start)

    def token_bytes(self, site: str | Sequence[str], *, gradients: bool = False) -> int:
        """Bytes of a token in the buffers of `batches`. Raises SaelabError as it does."""
        return token_bytes(self._files(site, gradients))

    def group_capacity(self, buffer_tokens: int) -> int:
        """Tokens in each of the two buffers of `batches`: whole blocks, no more than there are."""
        return capacity(_Columns(self, [], False), buffer_tokens)

    def in_order(self, site: str, *, gradients: bool = False) -> Iterator[ActivationBatch]:
        """Every token once, in the order written, a block at a time."""
        files = self._files(site, gradients)
        for block in map(self._block, range(self.n_blocks)):
            held = _buffer(files, block.end - block.start)
            self._read(block, files, held, 0)
            yield _batch(held, gradients)

    @property
    def n_blocks(self) -> int:
        return int(self._first_blocks[-1])

    def _block(self, number: int) -> _Block:
        at = int(np.searchsorted(self._first_blocks, number, side="right")) - 1
        shard, within = self.manifest.shards[at], number - int(self._first_blocks[at])
        start = within * self._block_tokens
        return _Block(shard, within, start, min(start + self._block_tokens, shard["tokens"]))

    def _files(self, site: str | Sequence[str], gradients: bool) -> list[File]:
        """The file of the tokens, then the activations of each site, then the gradients of each."""
        sites, dtype = names_of(site), self.identity["dtype"]
        for name in sites:
            if name not in self.sites:
                raise SaelabError(
                    f"{self.folder}: holds {', '.join(self.sites)}, not {name!r}.{did_you_mean(name, self.sites)}"
                )
        if gradients and not self.identity["gradients"]:
            raise SaelabError(f"{self.folder}: holds no gradients; `cache.gradients=true` writes them")
        files = [TOKENS, *(activations_file(name, self.sites[name], dtype) for name in sites)]
        return files + [gradients_file(name, self.sites[name], dtype) for name in sites if gradients]

    def _read(self, block: _Block, files: list[File], held: list[Tensor], at: int) -> None:
        """Read `block` into `held` from token `at` on. Raises SaelabError where it is not as it was written."""
        targets, n = iter(held), block.shard["tokens"]
        for file in files:
            path = file.path(block.shard["name"])
            parts = [raw(next(targets)[at : at + block.end - block.start]) for _ in file.columns]
            said = block.shard["files"][path]["blocks"][DIGITS * block.number : DIGITS * (block.number + 1)]
            try:
                handle = os.open(self.folder / path, os.O_RDONLY)
                try:
                    self._check_header(handle, file, path, n)
                    for column, part in zip(file.columns, parts, strict=True):
                        _read_fully(handle, part, file.offset(column.name, n, block.start))
                finally:
                    os.close(handle)
            except OSError as error:
                raise self._damaged(path, f"cannot be read ({error.strerror})") from error
            except EOFError:
                raise self._damaged(path, "ends too early") from None
            if checksum(parts) != said:
                tokens = f"tokens {block.start:,} to {block.end - 1:,} of the shard"
                raise self._damaged(path, f"block {block.number} ({tokens}) does not match its checksum")

    def _announce(self, block: _Block, files: list[File]) -> None:
        """Ask the system to read `block` ahead, if it can; `_read` finds out what is wrong with the block."""
        shard = block.shard
        for file in files:
            with suppress(OSError, AttributeError):
                handle = os.open(self.folder / file.path(shard["name"]), os.O_RDONLY)
                try:
                    for column in file.columns:
                        at = file.offset(column.name, shard["tokens"], block.start)
                        length = (block.end - block.start) * column.token_bytes
                        os.posix_fadvise(handle, at, length, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)

    def _check_header(self, handle: int, file: File, path: str, n: int) -> None:
        if path not in self._checked:
            wanted = file.header(n)
            if os.pread(handle, len(wanted), 0) != wanted:
                raise self._damaged(path, "its header does not say what was written")
            self._checked.add(path)

    def _damaged(self, path: str, what: str) -> SaelabError:
        return SaelabError(
            f"{self.folder / path}: {what}; run `saelab cache` again, as when it was written: it rewrites this shard"
        )


def open_cache(folder: str | Path) -> Cache:
    """The cache in `folder`. Raises SaelabError where it is unfinished or of another version, or a file is of another
    length than it was written."""
    folder = Path(expanded(folder))
    cache = Cache(folder, read_manifest(folder))
    for shard in cache.manifest.shards:
        del shard["start"]  # of use only to write it again, and a fifth of the manifest's memory
        for path, facts in shard["files"].items():
            try:
                size = (folder / path).stat().st_size
            except OSError as error:
                raise cache._damaged(path, f"cannot be read ({error.strerror})") from error
            if size != facts["bytes"]:
                raise cache._damaged(path, f"{size:,} bytes long instead of {facts['bytes']:,}")
    return cache


@dataclass(frozen=True)
class _Columns:
    """The blocks of a cache, of which some files are read (`blocks.Blocks`)."""

    cache: Cache
    files: list[File]
    gradients: bool

    @property
    def folder(self) -> Path:
        return self.cache.folder

    @property
    def block_tokens(self) -> int:
        return self.cache.identity["block_tokens"]

    @property
    def n_blocks(self) -> int:
        return self.cache.n_blocks

    def memory(self, tokens: int) -> list[Tensor]:
        return _buffer(self.files, tokens)

    def announce(self, number: int) -> None:
        self.cache._announce(self.cache._block(number), self.files)

    def read(self, number: int, columns: list[Tensor], at: int) -> int:
        block = self.cache._block(number)
        self.cache._read(block, self.files, columns, at)
        return block.end - block.start

    def batch(self, columns: list[Tensor]) -> ActivationBatch:
        return _batch(columns, self.gradients)


def _buffer(files: list[File], tokens: int) -> list[Tensor]:
    return [torch.empty(column.shape(tokens), dtype=column.dtype) for file in files for column in file.columns]


def _batch(columns: list[Tensor], gradients: bool) -> ActivationBatch:
    """A batch of the columns of `Cache._files`."""
    tokens, rows, positions = (column.long() for column in columns[: len(ORIGIN)])
    parts = columns[len(ORIGIN) :]
    sites = len(parts) // (1 + gradients)
    slopes = side_by_side(parts[sites:]) if gradients else None
    return ActivationBatch(side_by_side(parts[:sites]), tokens, rows, positions, slopes)


def _read_fully(handle: int, target: memoryview, at: int) -> None:
    while len(target):
        read = os.preadv(handle, [target], at)
        if read == 0:
            raise EOFError
        target, at = target[read:], at + read
