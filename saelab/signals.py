"""Signals that ask a process to stop: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (a closed terminal).

A process that a signal stopped exits with 128 + its number, as shells report it: 130, 143 and 129. A signal that was
ignored when the process started stays ignored: `nohup` ignores SIGHUP, and scripts ignore SIGINT in background jobs.
"""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_NUMBERS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]  # Windows has no SIGHUP


def stop(number: int) -> NoReturn:
    """Raise what ends this process with exit code 128 + `number` unless it is caught; its `finally` blocks run."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def stopping() -> Iterator[None]:
    """In this block each of the signals ends the process by `stop`.

    The block's end repeats it: a library may catch what `stop` raises, and fail later in another way.
    """
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        stop(number)

    try:
        with _handled(on_signal):
            yield
    finally:
        if received:
            stop(received[0])


@contextmanager
def interruptible(say: Callable[[str], None]) -> Iterator[Callable[[], int | None]]:
    """In this block the first signal only sets a flag: the yielded function returns its number, else None.

    A second signal ends the process by `stop`.
    """
    received: list[int] = []

    def on_signal(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            stop(number)
        with suppress(OSError):  # nobody reads the output
            say("finishing the step, then saving (Ctrl-C again stops at once)")

    with _handled(on_signal):
        yield lambda: received[0] if received else None


@contextmanager
def _handled(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each signal during the block; only in the main thread, which gets signals."""

    def on_signal(number: int, frame: Any) -> None:
        _leave_closed_terminal()
        handler(number)

    here = _NUMBERS if threading.current_thread() is threading.main_thread() else []
    previous = {number: signal.getsignal(number) for number in here}
    previous = {number: found for number, found in previous.items() if found not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, found in previous.items():
            signal.signal(number, found)


def _leave_closed_terminal() -> None:
    """Send output that went to a terminal which is closed to /dev/null: writing to it is an error."""
    for output in (1, 2):
        try:
            closed = stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output)
        except OSError:  # there is no such output
            continue
        if closed:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)
