"""Shuffled batches of activations that are stored in blocks: a cache (cache/reader.py) or an array (array.py).

The shuffle, per epoch: all blocks are permuted and cut into groups of about ``buffer_tokens / block_tokens`` blocks;
shuffle.py does the rest, group by group, so (epoch, group, offset) is all there is to know about where one is. The
order follows from seed and buffer size alone. On the disk a group's blocks are read in the order they lie there, the
next group's while this one is handed out.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from saelab.activations.shuffle import cut_group, generator
from saelab.activations.stream import ActivationBatch
from saelab.errors import SaelabError

_AHEAD = 4
"""Blocks announced to the system before they are read: a disk answers several requests sooner than one by one."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the width of a dtype, for numpy, which has no bfloat16."""


@dataclass(frozen=True)
class Cursor:
    """A place in the shuffled order."""

    epoch: int = 0
    group: int = 0
    offset: int = 0
    """Tokens of the group that have been handed out."""


BEGINNING = Cursor()


class Blocks(Protocol):
    """Stored activations in numbered blocks; all have `block_tokens` tokens or fewer."""

    @property
    def folder(self) -> Path:
        """Where they are, for messages."""
        ...

    @property
    def block_tokens(self) -> int: ...

    @property
    def n_blocks(self) -> int: ...

    def memory(self, tokens: int) -> list[Tensor]:
        """Empty columns for `tokens` tokens, on the CPU, each ``[tokens, ...]``."""
        ...

    def announce(self, number: int) -> None:
        """Ask the system to read a block ahead, if it can."""
        ...

    def read(self, number: int, columns: list[Tensor], at: int) -> int:
        """Read a block into `columns` from token `at` on; returns its tokens. Raises SaelabError if it is damaged."""
        ...

    def batch(self, columns: list[Tensor]) -> ActivationBatch:
        """The batch of some tokens of the columns."""
        ...


def capacity(blocks: Blocks, buffer_tokens: int) -> int:
    """Tokens in each of the two buffers of `Shuffled`: whole blocks, no more than there are."""
    return min(max(1, buffer_tokens // blocks.block_tokens), blocks.n_blocks) * blocks.block_tokens


class Shuffled:
    """Every token once per epoch, shuffled, epoch after epoch. `close` it, or use it in a `with`: that ends its
    threads."""

    def __init__(self, blocks: Blocks, batch_tokens: int, seed: int, buffer_tokens: int, start: Cursor) -> None:
        self.cursor = start
        """Where the next batch begins."""
        self._blocks, self._batch_tokens, self._seed = blocks, batch_tokens, seed
        self._per_group = max(1, buffer_tokens // blocks.block_tokens)
        self._loader = ThreadPoolExecutor(1, "saelab reader")
        self._buffers = [blocks.memory(capacity(blocks, buffer_tokens)) for _ in range(2)]
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
        batch = self._blocks.batch([_take(column, index) for column in self._group])
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
            n = self._blocks.n_blocks
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
            raise SaelabError(f"{self._blocks.folder}: there is no group {group}; an epoch has {len(groups)}")
        numbers, columns = groups[group].tolist(), self._buffers[buffer]

        def read() -> int:
            at = 0
            for number in numbers[:_AHEAD]:
                self._blocks.announce(number)
            for number, later in zip_longest(numbers, numbers[_AHEAD:]):
                if later is not None:
                    self._blocks.announce(later)
                at += self._blocks.read(number, columns, at)
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


def _take(column: Tensor, index: np.ndarray) -> Tensor:
    """The rows of `column` at `index`, in new memory.

    numpy does it in one thread, and beside the threads that read that is faster than torch in two: those of OpenMP wait
    for each other where a processor is busy, which can cost tenfold.
    """
    bits = column.view(_BITS[column.dtype.itemsize]).numpy()
    return torch.from_numpy(bits.take(index, axis=0, mode="clip")).view(column.dtype)
