"""The processes that torchrun started: how many there are, each one's device, and a barrier that all wait at."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch

from saelab.errors import SaelabError


class Processes(NamedTuple):
    rank: int
    """Number of this process, from 0."""
    world: int
    """How many there are."""
    local: int
    """How many of them run on this machine."""


def processes() -> Processes:
    """This process among those of torchrun; the only one without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in (*names, "MASTER_ADDR", "MASTER_PORT")):
        return Processes(0, 1, 1)  # other launchers set some of these, too
    return Processes(*(int(os.environ[name]) for name in names))


def own_device(device: str) -> str:
    """The device of this process: a GPU of its own under torchrun if `device` names none and there are GPUs."""
    if "LOCAL_RANK" in os.environ and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def together(world: int) -> Iterator[Callable[[], object]]:
    """Connects the processes of torchrun. The yielded function is a barrier: it returns once all have called it.

    Raises SaelabError if another process ends early.
    """
    if world == 1:
        yield lambda: None
        return
    import torch.distributed as distributed

    # Nothing but barriers goes between the processes, and one may have to wait for another's whole lane.
    distributed.init_process_group("gloo", timeout=timedelta(days=30))

    def barrier() -> None:
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise SaelabError("another of the processes has ended early; its own message says why") from error

    try:
        yield barrier
    finally:
        distributed.destroy_process_group()
