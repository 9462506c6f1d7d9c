"""A process that writes caches of made-up activations and is killed at a given call.

Started once, it forks for every writing, so that torch is imported once. Lines of JSON on stdin say what to write:
``{"folder": PATH, "facts": identity, "calls": how many it lives to see, or null}``; each is answered on stdout with
``{"calls": how many there were}``, or ``{"signal": what killed it}``.
"""

import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

CALLS = ("write", "fsync", "replace", "mkdir", "unlink", "rmdir")
"""The calls by which a writer changes what is on the disk."""


@contextmanager
def counted(before: Callable[[int, str, tuple[Any, ...]], None]) -> Iterator[Callable[[], int]]:
    """Call `before` with number, name and arguments before every call of CALLS; yields the count so far."""
    numbers, seen = count(1), [0]  # the calls come from several threads
    originals = {name: getattr(os, name) for name in CALLS}

    def replacement(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            seen[0] = number = next(numbers)
            before(number, name, arguments)
            return originals[name](*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, replacement(name))
    try:
        yield lambda: seen[0]
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def kill_at(last: int | None) -> Callable[[int, str, tuple[Any, ...]], None]:
    """Send SIGKILL to this process instead of its `last` call; half of a write is done first."""
    really_write = os.write

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == last:
            if name == "write":
                handle, content = arguments
                size = len(content) // 2
                if fcntl.fcntl(handle, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
                    size -= size % 4096  # past the system's cache go whole pages only
                really_write(handle, content[:size])
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

    return before


def write(folder: str, facts: dict[str, Any], calls: int | None) -> int:
    """Write or continue the cache; returns the number of calls."""
    from tests.activations.cache import made

    os.fsync = lambda handle: None  # a kill does not need it, and it takes most of the time
    with counted(kill_at(calls)) as seen:
        made.write(Path(folder), facts)
    assert "transformer_lens" not in sys.modules, "the child would be slow to start"
    return seen()


def main() -> None:
    import torch

    import tests.activations.cache.made  # noqa: F401  (before forking, once for all)

    torch.set_num_threads(1)
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            failed = 1
            try:
                os.write(writing, json.dumps({"calls": write(**json.loads(line))}).encode())
                failed = 0
            finally:
                sys.stderr.flush()
                if failed:
                    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(failed)
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            reply = json.loads(answer.read() or "{}")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(reply if code == 0 else {"signal": -code}), flush=True)


if __name__ == "__main__":
    main()
