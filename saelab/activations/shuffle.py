"""The one way of shuffling activations, for the model and for a cache.

Tokens come in groups. A group is collected in memory, permuted as a whole, cut into batches and handed out; nothing is
carried to the next group. The permutation depends only on the seed and on the number of the group, so this number and
the tokens handed out from the group are enough to continue from any batch.
"""

import numpy as np

from saelab.activations.stream import ActivationBatch
from saelab.errors import SaelabError


def generator(seed: int, *identity: int) -> np.random.Generator:
    """A random generator for one epoch or group, independent of generators with another seed or identity."""
    return np.random.default_rng(np.random.SeedSequence(seed % 2**64, spawn_key=identity))


def cut_group(tokens: int, batch_tokens: int, seed: int, *group: int, offset: int = 0) -> list[np.ndarray]:
    """The batches of a group of `tokens` tokens: the indices of each batch's tokens, int64 ``[batch]``.

    They are the fewest batches of at most `batch_tokens` tokens, equal to within one token. `group` identifies the
    group. The batches of the first `offset` tokens handed out are left out. Raises SaelabError if no batch begins at
    `offset`.
    """
    batches = np.array_split(generator(seed, *group).permutation(tokens), -(-tokens // batch_tokens))
    begins = np.cumsum([0, *map(len, batches)])[:-1].tolist()
    if offset not in begins:
        raise SaelabError(
            f"activations: no batch of {batch_tokens} tokens begins at {offset} of a group of {tokens} tokens; use "
            "the earlier `training.batch` and `buffer_tokens`, or start again"
        )
    return batches[begins.index(offset) :]


def group_tokens(buffer_tokens: int, batch_tokens: int) -> int:
    """Tokens of a group from the model: the whole batches that fit into `buffer_tokens`, at least two."""
    return max(2, buffer_tokens // batch_tokens) * batch_tokens


class Group:
    """Memory for `capacity` tokens: filled in reading order, then read in any order, then filled again.

    ``capacity * (4 * d_in + 24)`` bytes, ``capacity * (8 * d_in + 24)`` with gradients, on the device of the batches.
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
        """Copies as many tokens of `batch` as there is room for; returns the others."""
        if self._memory is None:
            empty = (field.new_empty(self.capacity, *field.shape[1:]) for field in batch.fields)
            self._memory = ActivationBatch(*empty)
        n = min(len(batch), self.capacity - self.tokens)
        for target, new in zip(self._memory.fields, batch.fields, strict=True):
            target[self.tokens : self.tokens + n] = new[:n]
        self.tokens += n
        return batch[n:]

    def clear(self) -> None:
        """Empties the group; its memory stays allocated."""
        self.tokens = 0
