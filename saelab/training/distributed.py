"""torchrun's processes, connected and arranged in a mesh: some share the tokens of a batch, some the features."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from saelab.errors import SaelabError
from saelab.ranks import ALONE, Axis, Ranks, exchanged
from saelab.torchrun import announce, meet, processes
from saelab.training.settings import ParallelSettings


def own_device(device: str) -> str:
    """The device of this process: under torchrun, a GPU of its own if there are GPUs and `device` names none."""
    if "LOCAL_RANK" in os.environ and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def mesh_shape(settings: ParallelSettings, world: int) -> tuple[int, int]:
    """Processes that share the tokens, and that share the features, of `world` in all.

    Raises SaelabError if their product is another number.
    """
    features = settings.features
    data = settings.data or max(1, world // features)
    if data * features != world:
        number = "there is 1 process" if world == 1 else f"torchrun started {world}"
        raise SaelabError(
            f"parallel: data {data} times features {features} is {data * features} processes, and {number}; start "
            f"`torchrun --nproc-per-node {data * features} -m saelab train ...`, or set parallel.data=null "
            f"parallel.features=1, which fits any number"
        )
    return data, features


@contextmanager
def connected(settings: ParallelSettings, device: torch.device | str = "cpu") -> Iterator[Ranks]:
    """Connect the processes of torchrun during the block; without torchrun there is one, `ALONE`.

    They exchange CPU tensors, and those on the type of `device`. Raises SaelabError as `mesh_shape` does.
    """
    rank, world, _ = processes()
    shape, device = mesh_shape(settings, world), torch.device(device)
    if world == 1:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store = meet()
    # One may have to wait for long while another writes; the end of a process is noticed at once.
    patience = timedelta(days=30)
    exchanged(lambda: dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience))
    try:
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "features"))
        data, features = (
            Axis(mesh.get_local_rank(name), size, mesh.get_group(name) if size > 1 else None)
            for name, size in zip(("data", "features"), shape, strict=True)
        )
        yield Ranks(data, features, Axis(rank, world, dist.group.WORLD))
    except BaseException as error:
        announce(error)
        if backend == "gloo":  # NCCL would wait for the process that has ended
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
