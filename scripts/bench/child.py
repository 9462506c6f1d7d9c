"""Call one function of a file in this process; processes.py starts it, with our interpreter or with the peers'.

    python scripts/bench/child.py scripts/bench/ours_step.py step '{"case": "fp32", "shape": [2048, 768, 24576, 32]}'

prints the result of the function as JSON, or its error on one line, and nothing else. OMP_NUM_THREADS is the number of
threads. Standard library only: the peers' interpreter has no saelab.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """Versions by name, of the `distributions` that this interpreter has."""
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def call(file: str, name: str, arguments: dict[str, Any]) -> Any:
    """The result of ``name(**arguments)``, a function of `file`."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return getattr(module, name)(**arguments)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    # Peers print to stdout: from Python, from C, at exit. Their file descriptor becomes stderr's, and only the result
    # goes to the real one.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        try:
            stdout.write(json.dumps(call(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
        except Exception as error:  # on stderr a peer's progress bar may follow it
            stdout.write(" ".join(f"{type(error).__name__}: {error}".split()))
            raise
