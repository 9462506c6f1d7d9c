"""Shared by the commands here: one message for missing packages, the option --json, exit codes.

Import it first, so that an interpreter without saelab gives the message and no traceback.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if missing := [name for name in ("saelab", "torch", "numpy") if importlib.util.find_spec(name) is None]:
    sys.exit(
        f"error: {sys.executable} has no {', '.join(missing)}; run `make install` in the checkout, then "
        f"`.venv/bin/python {sys.argv[0]}`"
    )

from saelab.errors import SaelabError


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option --json, which every command here has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=_new_file, metavar="FILE", help="also write every figure to this file")
    return made


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def device(name: str) -> str:
    """`name`. Raises SaelabError if it is not the CPU and torch finds no GPU."""
    import torch

    if name != "cpu" and not torch.cuda.is_available():
        raise SaelabError(f"--device {name}: this torch ({torch.__version__}) finds no GPU")
    return name


def _new_file(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(text).parent}: no such folder")
    return Path(text)


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Write `record` to `path`, the file of --json, if it was given."""
    if path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check(record: dict[str, Any]) -> None:
    """Exit with code 1 if a peer failed, after everything else was measured and reported."""
    if record["failures"]:
        raise SystemExit(1)


def run(main: Callable[[], None]) -> None:
    """Call `main`; print an error for the user as one message and exit with code 2."""
    try:
        main()
    except SaelabError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
