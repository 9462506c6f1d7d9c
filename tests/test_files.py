"""Files written under a temporary name: every byte, whichever way it goes to the disk."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saelab import files
from saelab.activations.cache.layout import Column, raw
from saelab.activations.cache.shard import _empty
from saelab.files import PAGE, temporary, write_temporary

HEADER = memoryview(bytes(range(256)) * (PAGE // 256))


def content(size: int, shift: int = 0) -> memoryview:
    """`size` bytes that begin `shift` behind the beginning of a page."""
    held = _empty(Column("values", torch.uint8, None), size + shift)
    assert held.data_ptr() % PAGE == 0
    held.copy_(torch.randint(0, 256, held.shape, dtype=torch.uint8))
    return raw(held)[shift:]


def written(path: Path, parts: list[memoryview]) -> bytes:
    os.close(write_temporary(path, parts))
    return temporary(path).read_bytes()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Of every write: whether it goes past the system's cache, and its bytes."""
    found: list[tuple[bool, int]] = []
    really: Callable[[int, memoryview], int] = os.write

    def write(handle: int, part: memoryview) -> int:
        done = really(handle, part)
        found.append((bool(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT), done))
        return done

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(files, "_AT_ONCE", 3 * PAGE)
    return found


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 7 * PAGE, 7 * PAGE + 100])
def test_whole_pages_go_past_the_systems_cache_and_the_rest_through_it(
    size: int, tmp_path: Path, writes: list[tuple[bool, int]]
) -> None:
    part = content(size)
    assert written(tmp_path / "file", [HEADER, part]) == bytes(HEADER) + bytes(part)
    assert sum(done for direct, done in writes if direct) in (size // PAGE * PAGE, PAGE + size // PAGE * PAGE)
    assert all(done <= 3 * PAGE for _, done in writes)


@pytest.mark.parametrize(("before", "shift"), [(8, 0), (PAGE, 64), (PAGE + 8, 8)])
def test_what_does_not_lie_on_pages_goes_through_the_cache(
    before: int, shift: int, tmp_path: Path, writes: list[tuple[bool, int]]
) -> None:
    first, second = content(before, 8), content(5 * PAGE, shift)
    assert written(tmp_path / "file", [first, second]) == bytes(first) + bytes(second)
    assert not any(direct for direct, _ in writes)


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_a_file_system_that_takes_nothing_past_its_cache_gets_every_byte_through_it(
    refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused when it is asked for, at the first write, or at a later one."""
    part, really, ask, calls = content(7 * PAGE + 5), os.write, fcntl.fcntl, [0]

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    def write(handle: int, piece: memoryview) -> int:
        calls[0] += 1
        if ask(handle, fcntl.F_GETFL) & os.O_DIRECT and calls[0] >= refused:
            refuse()
        return really(handle, piece)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(files, "_AT_ONCE", 3 * PAGE)
    if refused == 1:
        monkeypatch.setattr(
            fcntl,
            "fcntl",
            lambda handle, what, *rest: refuse() if rest and rest[0] & os.O_DIRECT else ask(handle, what),
        )
    assert written(tmp_path / "file", [HEADER, part]) == bytes(HEADER) + bytes(part)


def test_a_full_disk_is_an_error_past_the_cache_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, piece: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    handles = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_temporary(tmp_path / "file", [content(PAGE)])
    assert set(os.listdir("/proc/self/fd")) <= handles
