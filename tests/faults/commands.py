"""A process that runs `saelab` commands, each in a fork, so that the libraries are imported once.

Lines of JSON on stdin: ``{"arguments": [...], "cwd": ..., "output": file for stdout and stderr, "ignore": numbers of
signals that the command ignores, "terminal": device to run it on}`` is answered with ``{"pid": ...}``, and ``{"wait":
pid}`` with ``{"code": exit code, or minus the signal that killed it}``.
"""

import fcntl
import json
import os
import signal
import sys
import termios
from typing import Any


def run(arguments: list[str], cwd: str, output: str, ignore: list[int], terminal: str | None) -> int:
    """`saelab ARGUMENTS`; returns its exit code."""
    from saelab import cli

    os.setsid()
    if terminal is None:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    else:
        handle = os.open(terminal, os.O_RDWR)
        fcntl.ioctl(handle, termios.TIOCSCTTY, 0)
    for stream in (1, 2):
        os.dup2(handle, stream)
    for number in ignore:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(cwd)
    sys.argv = ["saelab", *arguments]
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.stdout.flush()
    return 0


def answer(asked: dict[str, Any]) -> dict[str, int]:
    if "wait" in asked:
        return {"code": os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])}
    child = os.fork()
    if not child:
        code = 1
        try:
            code = run(**asked)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            os._exit(code)
    return {"pid": child}


def main() -> None:
    import torch
    import transformers  # noqa: F401  (before forking, once for all)

    import saelab.lm.load
    import saelab.runs.cache
    import saelab.runs.stages  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
