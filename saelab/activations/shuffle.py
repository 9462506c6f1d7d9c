"""The one way of shuffling activations, used for those from the model and those from a cache.

Tokens come in groups. A group is collected in memory, permuted as a whole, cut into batches and handed out; nothing is
carried to the next group. The permutation depends on the seed and on which group it is, and on nothing else, so that
the group and the number of its tokens handed out are all it takes to go on from any batch.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from saelab.activations.stream import ActivationBatch
from saelab.errors import SaelabError


def generator(seed: int, *identity: int) -> np.random.Generator:
    """A random generator for one epoch, or one group: independent of those with another seed or identity."""
    return np.random.default_rng(np.random.SeedSequence(seed % 2**64, spawn_key=identity))


def cut_group(tokens: int, batch_tokens: int, seed: int, *group: int, offset: int = 0) -> list[np.ndarray]:
    """The batches of a group of `tokens` tokens: the indices of each batch's tokens, int64 ``[batch]``.

    They are the fewest batches of at most `batch_tokens` tokens, equal to within one token. `group` identifies the
    group. The batches that make up the first `offset` tokens handed out are left out. Raises SaelabError if no batch
    begins at `offset`.
    """
    batches = np.array_split(generator(seed, *group).permutation(tokens), -(-tokens // batch_tokens))
    begins = np.cumsum([0, *map(len, batches)])[:-1].tolist()
    if offset not in begins:
        raise SaelabError(
            f"activations: no batch of {batch_tokens} tokens begins at {offset} of a group of {tokens} tokens; go on "
            "with the `training.batch` and `buffer_tokens` of before, or begin again"
        )
    return batches[begins.index(offset) :]


def group_tokens(buffer_tokens: int, batch_tokens: int) -> int:
    """Tokens of a group from the model: the whole batches that fit into `buffer_tokens`, at least two."""
    return max(2, buffer_tokens // batch_tokens) * batch_tokens


class Group:
    """Memory for `capacity` tokens: filled in reading order, then read in any order, then filled again.

    ``capacity * (4 * d_in + 24)`` bytes, ``capacity * (8 * d_in + 24)`` with gradients, where the batches are.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = 0
        """Tokens added so far."""
        self._memory: ActivationBatch | None = None

    @property
    def content(self) -> ActivationBatch:
        """The tokens added so far, in that order; not a copy. Raises ValueError before the first."""
        if self._memory is None:
            raise ValueError("nothing has been added to this group")
        return self._memory[: self.tokens]

    def add(self, batch: ActivationBatch) -> ActivationBatch:
        """Copies as many tokens of `batch` as there is room for; returns those that are left."""
        if self._memory is None:
            empty = (field.new_empty(self.capacity, *field.shape[1:]) for field in batch.fields)
            self._memory = ActivationBatch(*empty)
        n = min(len(batch), self.capacity - self.tokens)
        for target, new in zip(self._memory.fields, batch.fields, strict=True):
            target[self.tokens : self.tokens + n] = new[:n]
        self.tokens += n
        return batch[n:]

    def clear(self) -> None:
        """Makes room again; the memory is kept."""
        self.tokens = 0


def shuffled(
    batches: Iterable[ActivationBatch], batch_tokens: int, buffer_tokens: int, seed: int
) -> Iterator[ActivationBatch]:
    """The same tokens in batches of `batch_tokens`, shuffled in groups of `group_tokens`.

    Every token comes once. The last group may be smaller, and so may its batches. To go on from some batch later, use a
    `Source` (source.py).
    """
    group, number = Group(group_tokens(buffer_tokens, batch_tokens)), 0
    for batch in batches:
        while len(batch):
            batch = group.add(batch)
            if group.tokens == group.capacity:
                yield from _shuffled(group, batch_tokens, seed, number)
                group.clear()
                number += 1
        del batch  # the next pass of the model needs the room
    if group.tokens:
        yield from _shuffled(group, batch_tokens, seed, number)


def _shuffled(group: Group, batch_tokens: int, seed: int, number: int) -> Iterator[ActivationBatch]:
    for index in cut_group(group.tokens, batch_tokens, seed, number):
        yield group.content[torch.from_numpy(index)]
