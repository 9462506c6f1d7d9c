"""Checks that a source continues from any batch as if it had never stopped."""

import json
from collections.abc import Callable

import torch

from saelab.activations.source import Source
from saelab.activations.stream import ActivationBatch


def walk(source: Source, n: int) -> tuple[list[str], list[ActivationBatch]]:
    states, batches = [], []
    for _ in range(n):
        states.append(json.dumps(source.state()))
        batches.append(next(source))
    return states, batches


def same(a: ActivationBatch, b: ActivationBatch) -> bool:
    return len(a.fields) == len(b.fields) and all(map(torch.equal, a.fields, b.fields))


def check_going_on(open_source: Callable[..., Source], n: int) -> None:
    """A source opened at any of `n` batches gives the same later batches and states."""
    states, batches = walk(open_source(), n)
    assert len(set(states)) == n
    for at in range(n):
        again = open_source(json.loads(states[at]))
        found_states, found = walk(again, n - at)
        again.close()
        assert found_states == states[at:]
        assert all(map(same, found, batches[at:])), f"from batch {at}"
