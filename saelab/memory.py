"""Memory and disk: how much is free, and the peak memory of a computation."""

import contextlib
import ctypes
import logging
import math
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Place = Literal["memory", "gpu", "disk"]


@dataclass(frozen=True)
class Need:
    """Bytes that a part of a computation needs. Each room states its own (needs.py); runs/plan.py adds them up."""

    what: str
    bytes: int
    where: Place
    how: str
    """The sum that gives `bytes`, in words."""
    phases: tuple[str, ...] = ()
    """The phases in which it is there; none: in all. One phase of a computation ends before the next one begins."""

    def less(self, present: int) -> "Need":
        """The rest of this need once `present` bytes of it are there."""
        if not present:
            return self
        return replace(self, bytes=max(0, self.bytes - present), how=f"{self.how}, less {size(present)} that are there")


BEGINNING, RESUMING, READING, STEP, THRESHOLDS = "beginning", "resuming", "reading", "step", "thresholds"
"""Phases of a training: the first activations and the initialisation, or states that are read; groups of activations
that are read from the model; steps; thresholds of inference that are set."""


def fullest(needs: Iterable[Need]) -> tuple[str, list[Need]]:
    """The phase in which most bytes are needed, and all that is there then; the phase is "" if no need names one."""
    needs = list(needs)
    phases = list(dict.fromkeys(phase for need in needs for phase in need.phases)) or [""]
    found = [(phase, [need for need in needs if not need.phases or phase in need.phases]) for phase in phases]
    return max(found, key=lambda of_phase: sum(need.bytes for need in of_phase[1]))


def give_back() -> None:
    """Return memory that is free, but that the C library keeps, to the system. Does nothing except with glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_on_disk(folder: Path) -> int | None:
    """Free bytes on the disk of `folder`, which need not exist yet; None if the system does not report them."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate: the system's available memory, or less if a cgroup sets a limit.

    None if the system does not report them. `root` is the folder that contains /proc and /sys.
    """
    lines = _read(root / "proc/meminfo").splitlines()
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = mount / path.lstrip("/")
        while True:  # the limits of outer groups apply too; inside a container only the mount may be visible
            free += _left_in(group, *names)
            if group == mount:
                break
            group = group.parent
    return max(0, min(free)) if free else None


def _left_in(group: Path, limit: str, usage: str, reclaimable: str) -> list[int]:
    """Bytes left below the limit of a cgroup, with droppable page cache counted as free; empty if it has no limit."""
    most, used = _read(group / limit).strip(), _read(group / usage).strip()
    if not most.isdecimal() or not used.isdecimal():
        return []
    stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
    return [int(most) - int(used) + int(stat.get(reclaimable, 0))]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak bytes of the tensors made during `run()`, which may use fake tensors, without numbers."""
    with _Count() as count:
        run()
    return count.most


@contextlib.contextmanager
def no_numbers() -> Iterator[None]:
    """A context in which tensors have a shape, dtype and device but no memory; they are valid only inside it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    log = logging.getLogger("torch._subclasses.fake_tensor")  # it logs a traceback of every error that it raises
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode():
            yield
    finally:
        log.setLevel(level)


class _Count(TorchDispatchMode):
    """Counts the memory of all tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs), new=False)  # existed before if unknown, so that views of it count as 0 bytes
        result = function(*args, **kwargs)
        self._see(result, new=True)
        return result

    def _see(self, tree: Any, new: bool) -> None:
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            name = storage._cdata
            if name not in self._known:
                taken = storage.nbytes() if new else 0
                self._known.add(name)
                self.now += taken
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._forget, name, taken)

    def _forget(self, name: int, n: int) -> None:
        self._known.discard(name)
        self.now -= n


def size(n: int) -> str:
    """Bytes for people, with three digits: 137 MB, 1.05 GB."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= unit:
            digits = max(0, 2 - int(math.log10(n / unit)))
            return f"{n / unit:,.{digits}f} {name}"
    return f"{n} bytes"
