"""Reads a cache: shuffled for training, in the order written for all else; every block's checksum on every read.

The shuffle, per epoch: all blocks (`layout.BLOCK_TOKENS` tokens each) are permuted and cut into groups of about
``buffer_tokens / BLOCK_TOKENS`` blocks; shuffle.py does the rest, group by group, so (epoch, group, offset) is all
there is to know about where one is. The order follows from seed and buffer size alone. On the disk a group's blocks are
read in the order they lie there, the next group's while this one is handed out.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

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
from saelab.activations.shuffle import cut_group, generator
from saelab.activations.stream import ActivationBatch, names_of, side_by_side
from saelab.errors import SaelabError, did_you_mean
from saelab.files import expanded
from saelab.tensors import raw

_AHEAD = 4
"""Blocks announced to the system before they are read: a disk answers several requests sooner than one by one."""
_BITS = {2: torch.int16, 4: torch.int32}
"""Integers of the width of a dtype, for numpy, which has no bfloat16."""


@dataclass(frozen=True)
class Cursor:
    """A place in the shuffled order."""

    epoch: int = 0
    group: int = 0
    offset: int = 0
    """Tokens of the group that have been handed out."""


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
        start: Cursor = Cursor(),
    ) -> "Shuffled":
        """Every token once per epoch, globally shuffled, epoch after epoch without end, from `start` on.

        A group is cut into the fewest batches of at most `batch_tokens`, equal to within one token. The order does not
        depend on the sites. Memory: ``2 * buffer_tokens * (d_in * bytes of the dtype + 12)``, with d_in the sum of the
        sites' widths, and more with `gradients`. Raises SaelabError where the
        cache has no such site, or no gradients.
        """
        return Shuffled(self, self._files(site, gradients), gradients, batch_tokens, seed, buffer_tokens, start)

    def token_bytes(self, site: str | Sequence[str], *, gradients: bool = False) -> int:
        """Bytes of a token in the buffers of `batches`. Raises SaelabError as it does."""
        return token_bytes(self._files(site, gradients))

    def group_capacity(self, buffer_tokens: int) -> int:
        """Tokens in each of the two buffers of `batches`: whole blocks, no more than there are."""
        return min(max(1, buffer_tokens // self._block_tokens), self.n_blocks) * self._block_tokens

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


class Shuffled:
    """The iterator that `Cache.batches` gives. `close` it, or use it in a `with`: that ends its threads."""

    def __init__(
        self,
        cache: Cache,
        files: list[File],
        gradients: bool,
        batch_tokens: int,
        seed: int,
        buffer_tokens: int,
        start: Cursor,
    ) -> None:
        self.cursor = start
        """Where the next batch begins."""
        self._cache, self._files, self._gradients = cache, files, gradients
        self._batch_tokens, self._seed = batch_tokens, seed
        self._per_group = max(1, buffer_tokens // cache.identity["block_tokens"])
        self._loader = ThreadPoolExecutor(1, "saelab cache reader")
        self._buffers = [_buffer(files, cache.group_capacity(buffer_tokens)) for _ in range(2)]
        self._order: tuple[int, list[np.ndarray]] = (-1, [])
        self._group: list[Tensor] = []
        self._cuts: list[np.ndarray] = []
        self._next = self._load(start.epoch, start.group, 0)

    def __iter__(self) -> "Shuffled":
        return self

    def __next__(self) -> ActivationBatch:
        if not self._cuts:
            self._turn()
        index = self._cuts.pop()
        epoch, group, offset = self.cursor.epoch, self.cursor.group, self.cursor.offset + len(index)
        batch = _batch([_take(column, index) for column in self._group], self._gradients)
        if not self._cuts:
            epoch, group, offset = *self._after(epoch, group), 0
        self.cursor = Cursor(epoch, group, offset)
        return batch

    def __enter__(self) -> "Shuffled":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._buffers, self._group = [], []

    def groups(self, epoch: int) -> list[np.ndarray]:
        """The numbers of the blocks of each group of an epoch, in the order read."""
        if self._order[0] != epoch:
            n = self._cache.n_blocks
            order = generator(self._seed, epoch).permutation(n)
            groups = np.array_split(order, -(-n // self._per_group))
            self._order = (epoch, [np.sort(group) for group in groups])  # as they lie on the disk
        return self._order[1]

    def _after(self, epoch: int, group: int) -> tuple[int, int]:
        return (epoch, group + 1) if group + 1 < len(self.groups(epoch)) else (epoch + 1, 0)

    def _load(self, epoch: int, group: int, buffer: int) -> Future[int]:
        """Begin to read a group into one of the buffers; the future tells how many tokens it has."""
        groups = self.groups(epoch)
        if group >= len(groups):
            raise SaelabError(f"{self._cache.folder}: there is no group {group}; an epoch has {len(groups)}")
        blocks = [self._cache._block(int(number)) for number in groups[group]]
        held = self._buffers[buffer]

        def read() -> int:
            at = 0
            for block in blocks[:_AHEAD]:
                self._cache._announce(block, self._files)
            for block, later in zip_longest(blocks, blocks[_AHEAD:]):
                if later is not None:
                    self._cache._announce(later, self._files)
                self._cache._read(block, self._files, held, at)
                at += block.end - block.start
            return at

        return self._loader.submit(read)

    def _turn(self) -> None:
        """Take the group that was read, and begin to read the next."""
        epoch, group = self.cursor.epoch, self.cursor.group
        n = self._next.result()
        self._group = [column[:n] for column in self._buffers[0]]
        self._buffers.reverse()
        self._next = self._load(*self._after(epoch, group), 0)
        cuts = cut_group(n, self._batch_tokens, self._seed, epoch, group, offset=self.cursor.offset)
        self._cuts = cuts[::-1]


def _buffer(files: list[File], tokens: int) -> list[Tensor]:
    return [torch.empty(column.shape(tokens), dtype=column.dtype) for file in files for column in file.columns]


def _take(column: Tensor, index: np.ndarray) -> Tensor:
    """The rows of `column` at `index`, in new memory.

    numpy does it in one thread, and beside the threads that read that is faster than torch in two: those of OpenMP wait
    for each other where a processor is busy, which can cost tenfold.
    """
    bits = column.view(_BITS[column.dtype.itemsize]).numpy()
    return torch.from_numpy(bits.take(index, axis=0, mode="clip")).view(column.dtype)


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
