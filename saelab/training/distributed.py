"""The processes that torchrun started: their number, the device of each, and a barrier."""

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
    """Number of processes."""
    local: int
    """Number of processes on this machine."""


def processes() -> Processes:
    """This process and the number of torchrun's processes; without torchrun it is the only one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in (*names, "MASTER_ADDR", "MASTER_PORT")):
        return Processes(0, 1, 1)  # other launchers set some of these variables too
    return Processes(*(int(os.environ[name]) for name in names))


def own_device(device: str) -> str:
    """The device of this process: under torchrun, a GPU of its own if there are GPUs and `device` names none."""
    if "LOCAL_RANK" in os.environ and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def process_barrier(world: int) -> Iterator[Callable[[], object]]:
    """Connect the processes of torchrun and yield a barrier: a function that returns when all have called it.

    The barrier raises SaelabError if another process ends early.
    """
    if world == 1:
        yield lambda: None
        return
    import torch.distributed as distributed

    # The processes exchange only barriers, and one may have to wait while another writes a whole lane.
    distributed.init_process_group("gloo", timeout=timedelta(days=30))

    def barrier() -> None:
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise SaelabError("another process ended early; its own message says why") from error

    try:
        yield barrier
    finally:
        distributed.destroy_process_group()
