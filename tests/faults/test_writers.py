"""Every writer of files, killed or failing at each of its system calls."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from saelab import codes
from saelab.errors import SaelabError
from saelab.files import current_folder, replace_file, replace_folder, write_json, write_whole
from saelab.sae.checkpoint import save_sae
from saelab.sae.initial import initialise
from saelab.sae.model import SparseAutoencoder
from saelab.tensors import write_tensors
from tests.faults.child import counted
from tests.faults.tools import tree

Write = Callable[[Path, int], None]


class Killed(BaseException):
    """The process is dead: every later system call raises it too, so that nothing is cleaned up."""


def dead_from(last: int) -> Callable[[int, str, tuple[Any, ...]], None]:
    """No call from the `last` on is made; half of a write is."""
    really_write = os.write

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if number == last and name == "write":
            really_write(arguments[0], arguments[1][: len(arguments[1]) // 2])
        if number >= last:
            raise Killed

    return before


def autoencoder(version: int) -> SparseAutoencoder:
    torch.manual_seed(version)
    sae = SparseAutoencoder(32, 16, 2)
    initialise(sae, torch.randn(100, 32))
    return sae


def some_codes(version: int) -> codes.Codes:
    return codes.Codes.from_topk(torch.full((3, 2), float(version)), torch.tensor([[0, 1]] * 3), 4)


def parquet(path: Path, version: int) -> None:
    with replace_file(path) as unfinished:
        pq.write_table(pa.table({"version": [version] * 100}), unfinished)


def checkpoint(path: Path, version: int) -> None:
    with replace_folder(path) as unfinished:
        save_sae(autoencoder(version), unfinished)


def nested(path: Path, version: int) -> None:
    with replace_folder(path) as unfinished:
        (unfinished / f"only {version}").mkdir()
        write_whole(unfinished / f"only {version}" / "a", str(version))
        (unfinished / "b").write_text(str(version))


WRITERS: dict[str, Write] = {
    "bytes": lambda path, version: write_whole(path, bytes([version]) * 5000),
    "parts": lambda path, version: write_whole(path, (memoryview(bytes([n, version])) for n in range(3))),
    "json": lambda path, version: write_json(path, {"version": version}),
    "parquet": parquet,
    "tensors": lambda path, version: write_tensors(path, {"a": torch.full((5,), version)}),
    "codes": lambda path, version: codes.save(some_codes(version), path),
    "checkpoint": checkpoint,
    "nested": nested,
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a kill does not need it


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Write:
    return WRITERS[request.param]


def versions(write: Write, root: Path) -> list[dict[str, bytes | None]]:
    """The folder without `thing`, and with its versions 1 to 3."""
    found: list[dict[str, bytes | None]] = [{}]
    for version in (1, 2, 3):
        folder = start(write, root, version)
        found.append(tree(folder))
        assert content(folder) == tree(folder) not in found[:-1]
    return found


def start(write: Write, folder: Path, version: int) -> Path:
    """A new folder in `folder` with a version of `thing`; 0: none."""
    folder.mkdir(exist_ok=True)
    made = folder / f"{len(list(folder.iterdir()))}"
    made.mkdir()
    if version:
        write(made / "thing", version)
    return made


def content(folder: Path) -> dict[str, bytes | None]:
    """`thing` as a reader finds it, file or folder, in the form of `tree`."""
    thing = current_folder(folder / "thing")
    if thing.is_dir():
        return {"thing": None} | {f"thing/{name}": data for name, data in tree(thing).items()}
    return {"thing": thing.read_bytes()} if thing.exists() else {}


def calls(write: Write, folder: Path) -> range:
    """The numbers of the calls that writing version 2 makes in `folder`."""
    with counted(lambda *call: None) as seen:
        write(folder / "thing", 2)
    return range(1, seen() + 1)


@pytest.mark.parametrize("before", [0, 1])
def test_a_kill_at_any_call_leaves_the_earlier_or_the_new_content(write: Write, before: int, tmp_path: Path) -> None:
    """Guaranteed: whichever call of the system a writer is killed in, a reader finds what was there before, or what was
    to be written, complete; writing again leaves that and nothing else."""
    known = versions(write, tmp_path / "known")
    outcomes = []
    for k in calls(write, start(write, tmp_path / "runs", before)):
        folder = start(write, tmp_path / "runs", before)
        with counted(dead_from(k)), pytest.raises(Killed):
            write(folder / "thing", 2)
        outcomes.append(known.index(content(folder)))
        write(folder / "thing", 3)
        assert tree(folder) == content(folder) == known[3], k
    assert set(outcomes) == {before, 2} and outcomes == sorted(outcomes)


@pytest.mark.parametrize("name", ["bytes", "nested"])
def test_kill_after_kill(name: str, tmp_path: Path) -> None:
    """Guaranteed: even if the write after a kill is killed too, at any call, a complete version is found."""
    write = WRITERS[name]
    known = versions(write, tmp_path / "known")
    total = 40
    for first in range(1, total, 2):
        for second in range(1 + first % 3, total, 3):
            folder = start(write, tmp_path / "runs", 1)
            ended = []
            for k, version in ((first, 2), (second, 3)):
                with counted(dead_from(k)) as seen:
                    try:
                        write(folder / "thing", version)
                    except Killed:
                        pass
                    else:
                        ended.append(version)
                assert known.index(content(folder)) in range(max([1, *ended]), version + 1), (first, second)
                assert not ended or seen() < total, "more calls than are tried here"
            write(folder / "thing", 3)
            assert tree(folder) == known[3], (first, second)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_call_that_fails_leaves_the_earlier_content_and_no_temporary_file(
    write: Write, number: int, tmp_path: Path
) -> None:
    """Guaranteed: if the disk is full or broken while content is written, an error says so, and the folder is as it
    was, without temporary files; if only the last steps fail, the new content is there, complete."""
    known = versions(write, tmp_path / "known")
    named = set()
    for k in calls(write, start(write, tmp_path / "runs", 1)):
        folder = start(write, tmp_path / "runs", 1)
        swapped = False

        def fail(at: int, name: str, arguments: tuple[Any, ...], k: int = k, folder: Path = folder) -> None:
            nonlocal swapped
            if at == k:
                named.add(name)
                raise OSError(number, os.strerror(number))
            swapped |= name == "replace" and at < k and Path(arguments[1]) == folder / "thing"

        with counted(fail), pytest.raises((OSError, SaelabError), match=r"full|space|cannot be written|Input/output"):
            write(folder / "thing", 2)
        assert content(folder) == known[2 if swapped else 1], k
        if not swapped:
            assert tree(folder) == known[1], k
        write(folder / "thing", 3)
        assert tree(folder) == known[3], k
    assert named >= {"fsync", "replace"}


def test_an_error_in_the_block_is_passed_on_and_nothing_is_replaced(tmp_path: Path) -> None:
    WRITERS["bytes"](tmp_path / "file", 1)
    WRITERS["nested"](tmp_path / "folder", 1)
    before = tree(tmp_path)

    def half_a_file() -> None:
        with replace_file(tmp_path / "file") as unfinished:
            unfinished.write_text("half")
            raise RuntimeError("no more")

    def half_a_folder() -> None:
        with replace_folder(tmp_path / "folder") as unfinished:
            (unfinished / "b").write_text("half")
            raise RuntimeError("no more")

    for write in (half_a_file, half_a_folder):
        with pytest.raises(RuntimeError, match="no more"):
            write()
        assert tree(tmp_path) == before
