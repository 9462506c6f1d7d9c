"""Activations straight from the model, shuffled across rows through a bounded buffer; nothing touches the disk.

The buffer fills up; a random half of it goes out as batches; new activations take the places that became free, and so
on until the rows end and the rest goes out. Every ordinary token of the rows comes out exactly once, in an order that
depends on the seed alone. Memory: ``buffer_tokens * (4 * d_in + 24)`` bytes, beside one forward pass and one batch; on
a GPU up to twice that while a run fills its first buffer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from saelab.errors import SaelabError, SettingError
from saelab.lm import LanguageModel


@dataclass(frozen=True)
class ActivationSettings:
    buffer_tokens: int = 131_072
    """Tokens that are shuffled together; at d_in 256, 137 MB."""
    rows_per_forward: int = 32
    """Rows in one forward pass of the language model."""

    def __post_init__(self) -> None:
        for name in ("buffer_tokens", "rows_per_forward"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}: {getattr(self, name)} is not a positive number")


@dataclass(frozen=True)
class ActivationBatch:
    """Activations of ordinary tokens and where each comes from."""

    values: Tensor
    """``[tokens, d_in]`` float32."""
    tokens: Tensor
    """Token ids, ``[tokens]`` int64."""
    rows: Tensor
    """Number of the row in the order read, ``[tokens]`` int64."""
    positions: Tensor
    """Position in the row, BOS being 0, ``[tokens]`` int64."""

    def __len__(self) -> int:
        return len(self.tokens)


def read_activations(
    lm: LanguageModel, rows: Iterable[np.ndarray], site: str, rows_per_forward: int
) -> Iterator[ActivationBatch]:
    """Activations of every ordinary token of `rows` in reading order, one batch per forward pass.

    Raises SaelabError, with site, row and position, where the model gives NaN or infinity.
    """
    rows = iter(rows)
    first = 0
    while block := list(islice(rows, rows_per_forward)):
        ids = torch.from_numpy(np.stack(block)).long().to(lm.device)
        values = lm.activations(ids, [site])[site].float()
        keep = lm.ordinary(ids)
        row, position = keep.nonzero(as_tuple=True)
        batch = ActivationBatch(values[keep], ids[keep], row + first, position)
        finite = torch.isfinite(batch.values).all(1)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise SaelabError(
                f"{site}: {lm.name} gives NaN or infinite activations at row {int(batch.rows[bad])}, position "
                f"{int(batch.positions[bad])}; a wider `model: {{dtype: float32}}` may help"
            )
        if len(batch):
            yield batch
        first += len(block)


def shuffled_batches(
    batches: Iterable[ActivationBatch], batch_tokens: int, buffer_tokens: int, seed: int
) -> Iterator[ActivationBatch]:
    """The same tokens in batches of `batch_tokens` (the last may be smaller), shuffled through the buffer."""
    generator = torch.Generator().manual_seed(seed)
    capacity = max(buffer_tokens, 2 * batch_tokens)
    outgoing = capacity // 2 // batch_tokens * batch_tokens  # whole batches: only the last of all may be smaller
    buffer: ActivationBatch | None = None
    free = torch.arange(capacity)
    for batch in batches:
        buffer = buffer or _empty_like(batch, capacity)
        while len(batch):
            if not len(free):
                free = torch.randperm(capacity, generator=generator)[:outgoing]
                yield from (_select(buffer, slots) for slots in free.split(batch_tokens))
            slots, free = free[: len(batch)], free[len(batch) :]
            for held, new in zip(_fields(buffer), _fields(batch), strict=True):
                held[slots] = new[: len(slots)]
            batch = _select(batch, slice(len(slots), None))
    if buffer is not None:
        taken = torch.ones(capacity, dtype=torch.bool).index_fill_(0, free, False).nonzero().squeeze(1)
        order = taken[torch.randperm(len(taken), generator=generator)]
        yield from (_select(buffer, slots) for slots in order.split(batch_tokens) if len(slots))


def _fields(batch: ActivationBatch) -> tuple[Tensor, ...]:
    return batch.values, batch.tokens, batch.rows, batch.positions


def _select(batch: ActivationBatch, index: Tensor | slice) -> ActivationBatch:
    return ActivationBatch(*(field[index] for field in _fields(batch)))


def _empty_like(batch: ActivationBatch, capacity: int) -> ActivationBatch:
    return ActivationBatch(*(field.new_empty(capacity, *field.shape[1:]) for field in _fields(batch)))
