"""Shared by the fault tests: the files of a cache, the checksums in its records, and the command in this process."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saelab.activations.cache.layout import UNFINISHED
from saelab.activations.cache.reader import open_cache
from saelab.activations.stream import Pass
from tests.activations.cache import made
from tests.tiny import CONTEXT, model_folder, text


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below `folder` with its bytes, and every folder (None), by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file's last change: equal if a file was not touched."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def finished_files(folder: Path) -> dict[str, str]:
    """sha256 of each file of an unfinished cache, from the records of its finished shards."""
    found: dict[str, str] = {}
    for record in (folder / UNFINISHED).glob("??-[0-9]*.json"):
        files: dict[str, Any] = json.loads(record.read_bytes())["files"]
        found |= {path: facts["sha256"] for path, facts in files.items()}
    return found


def finished_shards_are_whole(folder: Path) -> int:
    """Check that every shard with a record has the recorded bytes; returns the number of files."""
    promised = finished_files(folder)
    for path, digest in promised.items():
        assert hashlib.sha256((folder / path).read_bytes()).hexdigest() == digest, path
    return len(promised)


def read_an_epoch(folder: Path) -> int:
    """Read all of a cache as training does; returns the number of tokens. Raises the errors of the reader."""
    cache = open_cache(folder)
    for site in cache.sites:
        tokens = 0
        with cache.batches(site, 64, seed=0, buffer_tokens=256, gradients=cache.identity["gradients"]) as batches:
            while batches.cursor.epoch == 0:
                tokens += len(next(batches))
        assert tokens == cache.tokens
    return cache.tokens


def interrupt_after(passes: int, folder: Path, facts: dict[str, Any], stop: int = 10**9) -> None:
    """Begin to write a cache of made-up activations; the model fails after `passes` passes."""
    run = made.forward(facts)
    left = [passes]

    def forward(ids: np.ndarray) -> Pass:
        if not left[0]:
            raise RuntimeError("interrupted")
        left[0] -= 1
        return run(ids)

    with pytest.raises(RuntimeError, match="interrupted"):
        made.write(folder, facts, forward, stop)


def made_by_command(folder: Path, **cache: Any) -> Path:
    """A config in `folder`: a tiny GPT-2 on a text file; two sites, with gradients, in shards of 24 rows."""
    (folder / "book.txt").write_text(text(4000))
    config = {
        "out": str(folder / "run"),
        "model": str(model_folder("gpt2")),
        "site": "blocks.1.hook_resid_post",
        "corpus": str(folder / "book.txt"),
        "context": CONTEXT,
        "device": "cpu",
        "sae": {"n_features": 64, "k": 4},
        "training": {"tokens": 4000, "batch": 200},
        "cache": {
            "sites": ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"],
            "gradients": True,
            "rows_per_forward": 8,
            "shard_tokens": 24 * CONTEXT,
            **cache,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """`saelab ARGUMENTS` in this process: exit code, stdout, stderr. A traceback would be an exception here."""
    from saelab.cli import main

    monkeypatch.setattr(sys, "argv", ["saelab", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


QUIET = ("model: ", "corpus: ", "verifying: ", "encoding: ", "memory: ", "disk: ")
"""Beginnings of the lines that report progress."""


def the_one_error(stderr: str) -> str:
    """The message of a fault: one line, and besides it only lines of progress."""
    lines = [line for line in stderr.splitlines() if not line.startswith(QUIET)]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]
