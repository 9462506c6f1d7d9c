"""No package is installed while a model is loaded, whichever library asks for one.

TransformerLens runs pip if a model that also reads images needs torchvision. A package that arrives under a running job
can replace others, torch among them.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from saelab.errors import SaelabError

_INSTALLERS = frozenset({"pip", "pipx", "uv", "uvx", "conda", "mamba", "micromamba", "poetry", "easy_install"})
_IN_THIS_PROCESS = frozenset({"pip._internal", "ensurepip"})
_STARTERS = frozenset({"env", "sudo", "nice", "nohup", "timeout", "sh", "bash", "dash", "zsh", "python", "pypy"})
"""Programs that start another one, which their arguments name."""

_contexts: dict[object, list[str]] = {}
"""The commands refused in each open `no_installers`."""
_hooked = False


@contextmanager
def no_installers() -> Iterator[None]:
    """Within the context no package installer starts: not in a process of its own, and not in this one.

    The code that tries gets a SaelabError with the command. If that code swallows it, and an error follows for lack of
    the package, the context raises the SaelabError instead. Python's audit events report every way to start a program,
    even one that a library has imported before.
    """
    global _hooked
    if not _hooked:
        sys.addaudithook(_refuse)  # stays until the process ends, and does nothing outside the context
        _hooked = True
    context = object()
    refused = _contexts[context] = []
    try:
        yield
    except SaelabError:
        raise
    except Exception as error:
        if refused:
            raise _refusal(refused[0]) from error
        raise
    finally:
        del _contexts[context]


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if not _contexts or event not in _COMMANDS:
        return
    command = _installer(_COMMANDS[event](*args))
    if command:
        for refused in list(_contexts.values()):
            refused.append(command)
        raise _refusal(command)


_COMMANDS: Mapping[str, Callable[..., list[Any]]] = {
    "subprocess.Popen": lambda program, args, *_: [program, *args[1:]],
    "os.exec": lambda program, args, *_: [program, *args[1:]],
    "os.posix_spawn": lambda program, args, *_: [program, *args[1:]],
    "os.spawn": lambda mode, program, args, *_: [program, *args[1:]],
    "os.system": lambda command: ["sh", "-c", command],
    "import": lambda module, *_: ["pip"] if module in _IN_THIS_PROCESS else [],
}
"""The words of the command that an audit event reports, from its arguments, by event."""


def _installer(words: list[Any]) -> str:
    """The command of `words` from its package installer on; "" if it runs none."""
    words = [os.fsdecode(word) for word in words]
    for i, word in enumerate(words):
        name = re.sub(r"[\d.]*(\.exe)?$", "", os.path.basename(word))  # pip3.11 is pip
        if name in _INSTALLERS:
            return " ".join([name, *words[i + 1 :]])
        if i and words[i - 1] in ("-c", "-lc"):
            parts = (part.split() for part in re.split(r"[;&|\n(]", word))
            return next(filter(None, map(_installer, parts)), "")
        if not (name == "" or name in _STARTERS or word.startswith("-") or "=" in word):
            return ""
    return ""


def _refusal(command: str) -> SaelabError:
    return SaelabError(
        f"a library asked to install a package (`{command}`), and saelab never changes your environment; install the "
        "package yourself if the model needs it, and try again"
    )
