"""The processes that torchrun started, and one message for an error of several of them.

They share a store of numbers, which torchrun keeps while it restarts or ends them. Imports no torch until it is used:
the command line asks for the number of processes first.
"""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from saelab.errors import SaelabError

PATIENCE = 3.0
"""Seconds in which an error that all processes raise has been raised by each."""
_FAILED, _LOST, _CONNECTING = "failed", "lost", "connecting"
_connections = 0
"""How often this process has been connected to the others."""


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


def restarted() -> bool:
    """Whether torchrun started these processes again after one of them had failed."""
    return processes().world > 1 and _restarts() > 0


def meet() -> Any:
    """Wait until every process has called this; returns the store that they share, a torch.distributed.Store.

    Raises ElsewhereError if another process fails before. Unlike torch's own functions, signals interrupt it.
    """
    from saelab.ranks import ElsewhereError

    global _connections
    _connections += 1
    store = _store()
    store.add(_CONNECTING, 1)
    while store.add(_CONNECTING, 0) < processes().world:
        if store.add(_FAILED, 0):
            raise ElsewhereError("another process failed; its own message says why")
        time.sleep(0.02)
    return store


def announce(error: BaseException) -> None:
    """Make known that this process ends with `error` and will print it, before the others lose it."""
    from saelab.ranks import LostProcessError

    if not any(isinstance(each, LostProcessError) for each in _chain(error)):
        with suppress(RuntimeError):  # torchrun, and the store with it, has ended
            _store().add(_FAILED, 1)


def everywhere(error: BaseException) -> bool:
    """Whether every process calls this with the same error, in time."""
    from saelab.ranks import LostProcessError

    if isinstance(error, LostProcessError):
        return False
    key = f"{_key(error)}/raised"
    _store().add(key, 1)
    return _soon(lambda: _store().add(key, 0) == processes().world)


def message(error: BaseException) -> str | None:
    """The message of `error` if this process prints it; None if another one does.

    An error of all processes is printed by one of them. One that not all raise begins with the number of its process.
    """
    from saelab.ranks import ElsewhereError, LostProcessError

    rank, world, _ = processes()
    if world == 1:
        return str(error)
    numbered = f"process {rank}: {error}"
    if isinstance(error, ElsewhereError):
        return None
    try:
        if isinstance(error, LostProcessError):
            return str(error) if not _store().add(_FAILED, 0) and _store().add(_LOST, 1) == 1 else None
        announce(error)
        key = f"{_key(error)}/printed"
        if rank and _soon(lambda: _store().add(key, 0) > 0):  # by process 0
            return None
        return None if _store().add(key, 1) > 1 else numbered if rank else str(error)
    except RuntimeError:  # there is no store (any more)
        return numbered


def outlast() -> None:
    """Ignore SIGTERM from now on: torchrun sends it as soon as another process has ended, and this one has to say why.

    It waits half a minute for the end of this process.
    """
    if processes().world > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def cut_short(ended: BaseException) -> SaelabError | None:
    """The error that this process was about to report when torchrun's signal `ended` it; None if there is none."""
    if processes().world == 1:
        return None
    return next((error for error in _chain(ended) if isinstance(error, SaelabError)), None)


def _store() -> Any:
    """The store, with new names for each connection, and after a restart.

    torchrun keeps the store when it starts processes again: the addresses of those that have ended are still in it.
    """
    from torch.distributed import PrefixStore

    return PrefixStore(f"saelab/{_restarts()}/{_connections}", _torchruns_store())


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@cache
def _torchruns_store() -> Any:
    from torch.distributed import rendezvous

    return next(rendezvous("env://"))[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, and the errors during whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__context__


def _key(error: BaseException) -> str:
    return hashlib.sha256(str(error).encode()).hexdigest()


def _soon(condition: Callable[[], bool]) -> bool:
    """Whether `condition` becomes true in time."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
