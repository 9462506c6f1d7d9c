"""Files written under a temporary name: every byte, whichever way it goes to the disk, and in an order that keeps one.

What a kill or an error leaves is tested in faults/test_writers.py.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saelab import files
from saelab.activations.cache.layout import Column
from saelab.activations.cache.shard import _empty
from saelab.errors import SaelabError
from saelab.files import (
    PAGE,
    appended,
    locked,
    make_folder,
    read_json,
    replace_file,
    replace_folder,
    temporary,
    translate_errors,
    write_json,
    write_temporary,
    write_whole,
)
from saelab.tensors import raw

HEADER = memoryview(bytes(range(256)) * (PAGE // 256))


def content(size: int, shift: int = 0) -> memoryview:
    """`size` bytes that begin `shift` bytes after the start of a page."""
    held = _empty(Column("values", torch.uint8, None), size + shift)
    assert held.data_ptr() % PAGE == 0
    held.copy_(torch.randint(0, 256, held.shape, dtype=torch.uint8))
    return raw(held)[shift:]


def written(path: Path, parts: list[memoryview]) -> bytes:
    os.close(write_temporary(path, parts))
    return temporary(path).read_bytes()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """For every write, whether it bypasses the page cache, and its bytes."""
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


# in which order it is on the disk


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call by which names and content reach the disk, in their order, with the names of its files."""
    found: list[str] = []
    really = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "rmdir")}

    def fsync(handle: int) -> None:
        found.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        really["fsync"](handle)

    def replace(old: Path, new: Path) -> None:
        found.append(f"{Path(old).name} -> {Path(new).name}")
        really["replace"](old, new)

    def removing(name: str) -> Callable[..., None]:
        def remove(path: str, **named: int) -> None:
            found.append(f"{name} {Path(path).name}")
            really[name](path, **named)

        return remove

    for name, replacement in {"fsync": fsync, "replace": replace}.items():
        monkeypatch.setattr(os, name, replacement)
    for name in ("unlink", "rmdir"):
        monkeypatch.setattr(os, name, removing(name))
    return found


def by_a_library(path: Path) -> None:
    with replace_file(path) as unfinished:
        unfinished.write_text("content")


@pytest.mark.parametrize(
    "write", [lambda path: write_whole(path, "content"), lambda path: write_json(path, {}), by_a_library]
)
def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(
    write: Callable[[Path], None], tmp_path: Path, calls: list[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a")
    assert calls == ["fsync a.tmp", "a.tmp -> a", "fsync folder"]


def test_a_folder_is_on_the_disk_before_the_earlier_one_goes(tmp_path: Path, calls: list[str]) -> None:
    """Else a machine that stops could be left with neither."""
    folder = tmp_path / "runs" / "a"
    for content in ("first", "second"):
        calls.clear()
        with replace_folder(folder) as unfinished:
            (unfinished / "inner").mkdir()
            for name in ("file", "inner/file"):
                (unfinished / name).write_text(content)
    synced = calls[2 : calls.index("a -> a.old.tmp")]
    removed = calls[calls.index("a.old.tmp -> a.tmp") + 1 :]
    assert calls == [
        *["fsync runs"] * 2,  # a, from before, and a.tmp
        *synced,
        *["a -> a.old.tmp", "a.tmp -> a", "fsync runs", "a.old.tmp -> a.tmp"],
        *removed,
    ]
    assert sorted(synced) == ["fsync a.tmp", "fsync file", "fsync file", "fsync inner"]
    assert sorted(removed) == ["rmdir a.tmp", "rmdir inner", "unlink file", "unlink file"]
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    assert (folder / "file").read_text() == (folder / "inner" / "file").read_text() == "second"


def test_a_copy_that_the_user_made_of_a_folder_is_kept(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with replace_folder(tmp_path / "sae") as unfinished:
            (unfinished / "file").write_text(content)
        if content == "first":
            (tmp_path / "sae.old").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae", "sae.old"]


def test_every_folder_that_is_made_has_its_name_on_the_disk(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "there").mkdir()
    make_folder(tmp_path / "there" / "a" / "b")
    assert sorted(calls) == ["fsync a", "fsync there"]
    make_folder(tmp_path / "there" / "a" / "b")
    assert len(calls) == 2


# what errors say


def error_of(number: int, path: Path | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([str(path)] if path else []))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, r"^FOLDER/new: the disk is full: [\d,]+ bytes are free; make room and run again$"),
        (
            {"size": 12345, "kept": "finished shards are kept"},
            r"^FOLDER/new: the disk is full: what .* 12,345 bytes, and [\d,]+ are free; finished .* again to continue$",
        ),
    ],
)
def test_a_full_disk_is_told_with_what_is_needed_and_free(options: dict, expected: str, tmp_path: Path) -> None:
    with (
        pytest.raises(SaelabError, match=expected.replace("FOLDER", str(tmp_path))),
        translate_errors(tmp_path / "new", **options),
    ):
        raise error_of(errno.ENOSPC)


@pytest.mark.parametrize(
    ("number", "options", "expected"),
    [
        (errno.EACCES, {}, "file: cannot be written: Permission denied; choose another folder, or see to its perm"),
        (errno.EROFS, {"elsewhere": "choose another --out"}, "system; choose another --out, or see to its permissions"),
        (errno.EIO, {}, "file: cannot be written: Input/output error; run again$"),
        (errno.EIO, {"kept": "all"}, "file: cannot be written: Input/output error; run again to continue$"),
    ],
)
def test_other_errors_name_the_file_and_what_to_do(number: int, options: dict, expected: str, tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=expected), translate_errors(tmp_path, **options):
        raise error_of(number, tmp_path / "file")


def test_errors_of_other_kinds_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), translate_errors(tmp_path):
        _ = 1 / 0


def test_a_lock_keeps_others_out_and_leaves_nothing(tmp_path: Path) -> None:
    """Also from a folder that is replaced meanwhile, or that another path leads to. Folders made for it go again."""
    path = tmp_path / "runs" / "new" / "run"
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    with locked(path):
        with pytest.raises(SaelabError, match=r"new/run: another process is writing into it"), locked(path):
            pass
        with replace_folder(path) as unfinished:
            (unfinished / "content").write_text("")
        for same in (path, tmp_path / "link" / "new" / "run", path / ".." / "run"):
            with pytest.raises(SaelabError, match="another process"), locked(same):
                pass
        with locked(path.with_name("other")):
            pass
        assert {found.name for found in path.parent.iterdir()} == {"run", ".run.lock"}
    assert [found.name for found in path.parent.iterdir()] == ["run"]
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b" / "c"):
        _ = 1 / 0
    assert {found.name for found in tmp_path.iterdir()} == {"runs", "link"}


def test_a_lock_that_a_kill_left_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").write_text("")
    with locked(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_goes_while_it_is_waited_for_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that had locked the file removes it between our opening and our locking of it."""
    lock, tries = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not tries:
            (tmp_path / ".run.lock").unlink()
        tries.append(handle)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "run"):
        assert len(tries) == 2 and (tmp_path / ".run.lock").exists()
        with pytest.raises(SaelabError, match="another process"), locked(tmp_path / "run"):
            pass


def test_a_folder_that_may_not_be_written_to_can_be_locked_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in it may still be writable."""
    (tmp_path / "run").mkdir()

    def denied(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", denied)
    with locked(tmp_path / "run"):
        pass


def test_a_line_is_appended_whole_or_is_an_error_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "log", os.write
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[:3]))
    with appended(path) as line:
        line("a long line")
    with appended(path) as line:
        line("another")
        assert path.read_text() == "a long line\nanother\n"

        def full(handle: int, content: bytes) -> int:
            raise error_of(errno.ENOSPC, path)

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(SaelabError, match=r"the disk is full: .* make room and run again"):
            line("one more")


def test_a_folder_that_cannot_be_made_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SaelabError, match=r"file/folder: cannot be made \(Not a directory\)"),
        locked(tmp_path / "file" / "folder"),
    ):
        pass
    with pytest.raises(SaelabError, match=r"^/: is the root of all folders"), locked(Path("/")):
        pass


def test_a_folder_in_which_nothing_can_be_made_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In /proc the system answers as if the folder had just been removed."""

    def nothing(*arguments: object) -> int:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "open", nothing)
    with (
        pytest.raises(SaelabError, match=r"run: cannot be made \(No such file or directory\)"),
        locked(tmp_path / "run"),
    ):
        pass


def test_json_comes_back_and_what_is_no_json_object_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, "é"]})
    assert read_json(tmp_path / "a.json", "Do it again.") == {"a": [1, "é"]}
    for content in ("[1]", "{", ""):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(SaelabError, match=r"a\.json (is not|cannot be read as) a JSON object.*\. Do it again\.$"):
            read_json(tmp_path / "a.json", "Do it again.")
    with pytest.raises(SaelabError, match=r"b\.json cannot be read as a JSON object: .*No such file.*Do it again\.$"):
        read_json(tmp_path / "b.json", "Do it again.")
