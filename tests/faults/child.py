"""A process that writes caches of made-up activations, or feature databases, and is killed at a given call.

Started once, as ``child.py cache`` or ``child.py index``, it forks for every writing, so that torch is imported once.
Lines of JSON on stdin say what to write: ``{"folder": PATH, "facts": which one, "calls": how many it lives to see, or
null}``; each is answered on stdout with ``{"calls": how many there were}``, or ``{"signal": what killed it}``.
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

from saelab.sae.initial import initialise

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


Write = Callable[[str, dict[str, Any], int | None], dict[str, int]]
"""Writes or continues something in a folder; returns the number of calls, and what else there is to report."""


def writer_of_caches() -> Write:
    from tests.activations.cache import made

    def write(folder: str, facts: dict[str, Any], calls: int | None) -> dict[str, int]:
        with counted(kill_at(calls)) as seen:
            made.write(Path(folder), facts)
        assert "transformer_lens" not in sys.modules, "the child would be slow to start"
        return {"calls": seen()}

    return write


def writer_of_databases() -> Write:
    """The first row that was encoded is reported too. Databases of different ``{"seed": ...}`` have other weights."""
    import torch

    from saelab.features import shards
    from saelab.features.settings import FeatureSettings
    from saelab.sae.model import SparseAutoencoder
    from tests.features import made
    from tests.tiny import CONTEXT, language_model, random_rows

    lm, site = language_model("gpt2"), "blocks.1.hook_resid_post"
    rows = random_rows(lm, 30)
    shards.SHARD_PLACES = 8 * CONTEXT

    def write(folder: str, facts: dict[str, Any], calls: int | None) -> dict[str, int]:
        torch.manual_seed(facts["seed"])
        sae = SparseAutoencoder(32, 48, 3)
        initialise(sae, torch.randn(100, 32))
        settings = FeatureSettings(rows_per_forward=4)
        with counted(kill_at(calls)) as seen:
            first_row, _ = made.index(sae, lm, rows, site, Path(folder), settings, str(facts))
        return {"calls": seen(), "first_row": first_row}

    return write


def main() -> None:
    import torch

    torch.set_num_threads(1)
    write = {"cache": writer_of_caches, "index": writer_of_databases}[sys.argv[1]]()  # before forking, once for all
    os.fsync = lambda handle: None  # a kill does not need it, and it takes most of the time
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            failed = 1
            try:
                os.write(writing, json.dumps(write(**json.loads(line))).encode())
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
