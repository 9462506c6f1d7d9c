"""A disk that is full, or fails, while a cache, a run or a feature database is written."""

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from saelab import progress
from saelab.activations.cache.layout import MANIFEST, UNFINISHED
from saelab.activations.cache.reader import open_cache
from saelab.errors import SaelabError
from saelab.features import layout, shards
from saelab.files import current_folder
from saelab.runs.resume import states
from tests.activations.cache import made
from tests.faults.child import counted, writer_of_databases
from tests.faults.tools import (
    command,
    finished_files,
    finished_shards_are_whole,
    made_by_command,
    read_an_epoch,
    stamps,
    the_one_error,
    tree,
)

FACTS = made.identity(gradients=True, lanes=2, tokens=400)
LARGER = made.identity(gradients=True, tokens=3000)
"""Some 520 kB in shards of 31 kB."""
FULL = re.compile(r"the disk is full: what was to be written next has ([\d,]+) bytes, and ([\d,]+) are free; .*again")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that makes a tmpfs of a given size and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def size(size: str) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        if shutil.which("mount") is None:
            pytest.skip("there is no mount command here")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted = True
        return folder

    try:
        yield size
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def numbers(error: SaelabError) -> tuple[int, int]:
    """Bytes needed and bytes free, as the message has them."""
    found = FULL.search(str(error))
    assert found, error
    needed, free = (int(number.replace(",", "")) for number in found.groups())
    return needed, free


def test_a_full_disk_costs_only_the_unfinished_shard(small_disk: Callable[[str], Path], tmp_path: Path) -> None:
    """Guaranteed: if the disk fills up while a cache is written, the error says how many bytes the next shard needs
    and how many are free; every shard finished before is whole, nothing half-written is left; as long as there is no
    room, writing again says the same; once there is, it goes on without touching what is finished, and ends with the
    bytes of a cache that was never interrupted."""
    whole = made.write(tmp_path / "whole", LARGER)
    sizes = [sum(file["bytes"] for file in shard["files"].values()) for shard in whole.shards]
    cache = small_disk("300k") / "cache"
    for _ in range(2):
        with pytest.raises(SaelabError) as error:
            made.write(cache, LARGER)
        needed, free = numbers(error.value)
        finished = finished_shards_are_whole(cache) // 5
        assert 2 < finished < len(sizes) and needed == sizes[finished]
        # free when the writing failed, while the shard before was perhaps being recorded
        assert abs(free - shutil.disk_usage(cache).free) <= 2 * 4096 and free < needed + 5 * 4096
        assert not list(cache.rglob("*.tmp"))
        with pytest.raises(SaelabError, match="not finished"):
            open_cache(cache)
    kept = {path: stamp for path, stamp in stamps(cache).items() if path in finished_files(cache)}
    small_disk("2m")
    made.write(cache, LARGER)
    assert tree(cache) == tree(tmp_path / "whole")
    assert {path: stamps(cache)[path] for path in kept} == kept


def test_a_disk_without_any_room_is_an_error_before_the_model_runs(small_disk: Callable[[str], Path]) -> None:
    """Guaranteed: if not even the folder can be created, the error says so before anything is computed."""
    disk = small_disk("64k")
    (disk / "ballast").write_bytes(bytes(64 << 10))

    def no_pass(ids: Any) -> Any:
        raise AssertionError("the model ran")

    with pytest.raises(SaelabError) as error:
        made.write(disk / "cache", LARGER, no_pass)
    needed, free = numbers(error.value)
    assert needed > free == 0


def test_repair_on_a_full_disk_leaves_the_cache_as_it_was(small_disk: Callable[[str], Path], tmp_path: Path) -> None:
    """Guaranteed: if there is no room to write a damaged shard again, the error has the numbers and the
    cache is left as it was; with room, it is repaired."""
    cache = small_disk("2m") / "cache"
    shard = made.write(cache, LARGER).shards[1]
    whole = tree(cache)
    (damaged := cache / made.SITE / "00-00001.safetensors").write_bytes(b"")
    small_disk(f"{(os.statvfs(cache).f_blocks - os.statvfs(cache).f_bfree + 2) * 4}k")
    before = tree(cache)
    with pytest.raises(SaelabError) as error:
        made.write(cache, LARGER)
    assert numbers(error.value)[0] == sum(file["bytes"] for file in shard["files"].values())
    assert tree(cache) == before and damaged.stat().st_size == 0
    small_disk("2m")
    made.write(cache, LARGER)
    assert tree(cache) == whole


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "cannot be written: Disk quota"),
        (errno.EIO, "cannot be written: Input/"),
    ],
)
def test_a_call_that_fails_anywhere_costs_only_the_unfinished_shard(number: int, message: str, tmp_path: Path) -> None:
    """Guaranteed: whichever call of the system fails while a cache is written, because the disk is full or
    broken, is an error for the user; finished shards are whole, and writing again ends with the bytes of a cache that
    was never interrupted."""
    with counted(lambda *call: None) as seen:
        made.write(tmp_path / "whole", FACTS)
    whole, total = tree(tmp_path / "whole"), seen()
    for k in range(1 + number % 7, total, 23):
        folder = tmp_path / str(k)

        def fail(at: int, name: str, arguments: tuple[Any, ...], k: int = k) -> None:
            if at == k:
                raise OSError(number, os.strerror(number))

        with counted(fail), pytest.raises(SaelabError, match=message) as error:
            made.write(folder, FACTS)
        assert str(folder) in str(error.value)
        if message == "the disk is full":
            assert numbers(error.value)[1] > 0
        finished_shards_are_whole(folder)
        if (folder / MANIFEST).exists():
            read_an_epoch(folder)
        else:
            assert (folder / UNFINISHED).is_dir() or not folder.exists() or not any(folder.iterdir())
        made.write(folder, FACTS)
        assert tree(folder) == whole, k
        shutil.rmtree(folder)


def test_writes_that_take_only_a_part_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guaranteed: if the system writes only a part of the bytes at once, the rest follows."""
    made.write(tmp_path / "whole", FACTS)
    whole = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: whole(handle, content[: 1 + len(content) // 3]))
    made.write(tmp_path / "cache", FACTS)
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_a_disk_that_cannot_hold_the_cache_is_refused_beforehand(
    small_disk: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guaranteed: `saelab cache` on a disk with less room than the cache will take ends with exit code 2 and one
    message that has both numbers, before anything is written."""
    disk = small_disk("300k")
    code, _, stderr = command(monkeypatch, capsys, "cache", made_by_command(tmp_path), "--out", disk / "cache")
    assert code == 2 and re.search(r"error: .*disk.*[\d,.]+ ?[kKMG]?B", the_one_error(stderr))
    assert not list(disk.iterdir())


def test_a_disk_that_cannot_hold_the_run_is_refused_beforehand(
    small_disk: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guaranteed: `saelab train` on a disk with less room than states and checkpoint will take ends with exit code 2
    and one message that names both numbers and both needs, before anything is written."""
    disk = small_disk("300k")
    code, _, stderr = command(monkeypatch, capsys, "train", made_by_command(tmp_path), f"out={disk / 'run'}")
    message = the_one_error(stderr)
    assert code == 2 and re.search(
        r"error: disk: .*\([\d,]+ bytes\) are needed, and .*\([\d,]+ bytes\) are free", message
    )
    assert "states " in message and "checkpoint " in message and not list(disk.iterdir())


def test_a_disk_that_fills_up_while_a_run_trains(
    small_disk: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guaranteed: if something else fills the disk, the training ends with exit code 2 and one message that says how to
    go on; the last state is whole, and with room the training continues from it."""
    disk = small_disk("2m")
    config = json.loads(made_by_command(tmp_path).read_text())
    config |= {"out": str(disk / "run")}
    config["training"] |= {"log_every": 1, "checkpoint": {"tokens": 1000}}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def filling(
        items: Iterator[Any], label: str, total: int, size: Callable[[Any], int], note: Any = None
    ) -> Iterator[Any]:
        for number, item in enumerate(items):
            if label == "training" and number == 7:
                with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
                    while True:
                        ballast.write(bytes(4096))
            yield item

    monkeypatch.setattr(progress, "bar", filling)
    code, _, stderr = command(monkeypatch, capsys, "train", tmp_path / "config.json")
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in stderr
    assert "the disk is full" in errors[0] and f"`saelab train --resume {disk / 'run'}` goes on" in errors[0]
    assert [path.name for path in states(disk / "run")] == ["000000005"]
    (disk / "ballast").unlink()
    monkeypatch.setattr(progress, "bar", progress.silent)
    assert command(monkeypatch, capsys, "train", "--resume", disk / "run")[0] == 0
    assert json.loads((disk / "run" / "train.json").read_text())["complete"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_index_that_cannot_write_keeps_the_earlier_database_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Guaranteed: whichever call fails while a feature database is made, an error says why; the earlier database is
    there, or if only the last steps fail the new one; and the next run ends with the bytes of an undisturbed one."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(shards, "SHARD_PLACES", shards.SHARD_PLACES)  # the writer changes it
    write = writer_of_databases()
    for seed in (1, 2):
        total = write(str(tmp_path / str(seed)), {"seed": seed}, None)["calls"]
    databases = [tree(tmp_path / "1"), tree(tmp_path / "2")]
    found = []
    for k in range(1, total + 1, total // 16):
        folder = shutil.copytree(tmp_path / "1", tmp_path / f"fails at {k}")

        def fail(at: int, name: str, arguments: tuple[Any, ...], k: int = k) -> None:
            if at == k:
                raise OSError(number, os.strerror(number))

        with counted(fail), pytest.raises(SaelabError, match=r"the disk is full: |cannot be (written|made)"):
            write(str(folder), {"seed": 2}, None)
        there = {
            name: content for name, content in tree(current_folder(folder)).items() if layout.UNFINISHED not in name
        }
        found.append(databases.index(there))
        write(str(folder), {"seed": 2}, None)
        assert tree(folder) == databases[1], k
    assert found == sorted(found) and 0 in found
