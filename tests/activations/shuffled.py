"""Shuffles a finite stream of activations with the parts that sources are made of."""

from collections.abc import Iterable, Iterator

import torch

from saelab.activations.shuffle import Group, cut_group, group_tokens
from saelab.activations.stream import ActivationBatch


def shuffled(
    batches: Iterable[ActivationBatch], batch_tokens: int, buffer_tokens: int, seed: int
) -> Iterator[ActivationBatch]:
    """Every token once, in batches of `batch_tokens`, shuffled in groups of `group_tokens`; the last may be smaller."""
    group, number = Group(group_tokens(buffer_tokens, batch_tokens)), 0

    def cut() -> Iterator[ActivationBatch]:
        for index in cut_group(group.tokens, batch_tokens, seed, number):
            yield group.content[torch.from_numpy(index)]

    for batch in batches:
        while len(batch):
            batch = group.add(batch)
            if group.tokens == group.capacity:
                yield from cut()
                group.clear()
                number += 1
    if group.tokens:
        yield from cut()
