"""The writer of every file that saelab keeps: a file, or a folder of files, is there whole or not at all.

Content goes to a temporary name first (`temporary`), is synced to the disk, and then gets its own name by a rename. An
error removes the temporary file and leaves the earlier content as it was; a kill may leave a temporary file, which the
next write replaces. A folder is replaced in steps that `replace_folder` describes.

All changes to the disk go through functions of `os`, so that tests can count and interrupt them.
"""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from saelab.errors import SaelabError, SettingError, WriteError

PAGE = 4096
"""Memory and file offsets that are multiples of it can go to the disk without a copy."""
_AT_ONCE = 1 << 23
"""Bytes given to one write."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # not everywhere
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expanded(path: str | Path, what: str = "") -> str:
    """`path` with `~`, `~user` and environment variables (`$SCRATCH`, `${SCRATCH}`) replaced.

    Every path that a user gives goes through here. Raises SettingError, which begins with the setting `what`, if there
    is no such user or variable.
    """
    name = f"{what}: {path}" if what else str(path)

    def value(found: re.Match[str]) -> str:
        variable = found[1] or found[2]
        if variable not in os.environ:
            raise SettingError(f"{name}: the environment variable {variable} is not set; set it, or write the path out")
        return os.environ[variable]

    result = os.path.expanduser(_VARIABLE.sub(value, os.fspath(path)))
    if result.startswith("~"):
        raise SettingError(f"{name}: there is no user {result[1:].split('/')[0]}; write the path out")
    return result


def temporary(path: Path) -> Path:
    """The name that a file or folder has until it is complete."""
    return path.with_name(f"{path.name}.tmp")


def write_whole(path: Path, content: str | bytes | Iterable[memoryview]) -> None:
    """Write `content` (text as UTF-8; several parts one after the other) to the file `path`.

    Raises OSError; what `path` held before is then unchanged.
    """
    if isinstance(content, str):
        content = content.encode()
    with _renamed(path):
        _settle(write_temporary(path, [memoryview(content)] if isinstance(content, bytes) else content))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON to the file `path`.

    Raises SaelabError if the file cannot be written; what `path` held before is then unchanged.
    """
    content = (json.dumps(value, indent=2) + "\n").encode()
    with translate_errors(path.parent, len(content)):
        write_whole(path, content)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields the temporary name of `path`, for a library to write to; at the end the file gets its own name.

    If the block or the rename fails, the temporary file is removed, and what `path` held before is unchanged.
    """
    with _renamed(path):
        yield temporary(path)
        sync(temporary(path))


@contextmanager
def _renamed(path: Path) -> Iterator[None]:
    """Give the file at the temporary name of `path` its own name at the end of the block, or remove it on an error."""
    try:
        yield
        os.replace(temporary(path), path)
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to write files into; at the end it takes the place of the folder `path`, if there is one.

    Three names: NAME; NAME.old.tmp, the folder that is being replaced; NAME.tmp, which nobody reads. NAME.tmp is filled
    and synced; NAME becomes NAME.old.tmp; NAME.tmp becomes NAME; NAME.old.tmp becomes NAME.tmp, and is removed. A
    folder gets one of the first two names only when all of its content is on the disk, and loses it by a rename, so
    whenever a process is killed, NAME or NAME.old.tmp is a complete folder, the old or the new one. `current_folder`
    finds it, and the next `replace_folder` removes what is left over. One writer at a time (`locked`).

    If the block fails, `path` is unchanged. Raises OSError.
    """
    recover_folder(path)
    unfinished = temporary(path)
    try:
        make_folder(unfinished)
        yield unfinished
        for folder, _, names in os.walk(unfinished):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        if path.exists():
            os.replace(path, _old(path))
        os.replace(unfinished, path)
    finally:
        recover_folder(path)


def recover_folder(path: Path) -> None:
    """Remove what a killed `replace_folder` left beside `path`, or give `path` its earlier content back.

    Only for the process that writes `path`; readers use `current_folder`, which changes nothing.
    """
    if temporary(path).exists():
        shutil.rmtree(temporary(path))
    if _old(path).exists() and not path.exists():
        os.replace(_old(path), path)
    if path.parent.exists():
        sync(path.parent)  # the name `path` is on the disk before another folder is given up for it
    if _old(path).exists():
        os.replace(_old(path), temporary(path))  # never half of a folder under a name that is read
        shutil.rmtree(temporary(path))


def remove_folder(path: Path) -> None:
    """Remove the folder `path`, which never is there in part. Raises OSError."""
    os.replace(path, temporary(path))
    shutil.rmtree(temporary(path))


def current_folder(path: Path) -> Path:
    """Where the content of `path`, a folder that `replace_folder` writes, is now: `path`, or after a kill NAME.old.tmp.

    `path` if there is neither.
    """
    return path if path.exists() or not _old(path).exists() else _old(path)


def _old(path: Path) -> Path:
    """The name of a folder that is being replaced; not NAME.old, which may be a copy that the user made."""
    return path.with_name(f"{path.name}.old.tmp")


def write_temporary(path: Path, parts: Iterable[memoryview]) -> int:
    """Write `parts` to the temporary name of `path`; returns the open file, to be synced before it is renamed.

    Aligned pages go to the disk past the system's page cache: copies in memory that nobody reads soon take most of a
    processor, and the memory of what is read.
    """
    handle = os.open(temporary(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        offset = 0
        for part in parts:
            pages = len(part) - len(part) % PAGE
            there = bool(pages) and offset % PAGE == 0 and np.frombuffer(part, np.uint8).ctypes.data % PAGE == 0
            at = _write_directly(handle, part[:pages]) if there else 0
            while at < len(part):
                at += os.write(handle, part[at : at + _AT_ONCE])
            offset += len(part)
    except BaseException:
        os.close(handle)
        raise
    return handle


def write_at(path: Path, parts: Iterable[tuple[int, memoryview]]) -> None:
    """Write each part at its offset in the file `path`, made if it is missing, and sync it to the disk.

    Several processes may do so at once, in a folder that one of them replaces whole. Raises OSError.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for offset, part in parts:
            os.lseek(handle, offset, os.SEEK_SET)
            at = 0
            while at < len(part):
                at += os.write(handle, part[at : at + _AT_ONCE])
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_directly(handle: int, pages: memoryview) -> int:
    """Write `pages` past the page cache; returns how many bytes the file system took that way, which may be none."""
    flags, at = fcntl.fcntl(handle, fcntl.F_GETFL), 0
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | _DIRECT)
        while at < len(pages):
            at += os.write(handle, pages[at : at + _AT_ONCE])
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system does not support it, or needs other sizes
            raise
    finally:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)
    return at


def _settle(handle: int) -> None:
    """Sync an open file to the disk, and close it."""
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Sync a file's content, or the names in a folder, to the disk. Raises OSError."""
    _settle(os.open(path, os.O_RDONLY))


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it if they are missing, and sync their names to the disk. Raises OSError."""
    made = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.is_dir()]
    if made:
        folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync(path.parent)


@contextmanager
def translate_read_errors(
    path: Path, what: str, remedy: str, errors: tuple[type[Exception], ...] = (OSError, ValueError, RecursionError)
) -> Iterator[None]:
    """Turn `errors` from reading `path` as `what` into a SaelabError: which file, why, and then `remedy`."""
    try:
        yield
    except errors as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise SaelabError(f"{path} cannot be read as {what}: {reason}. {remedy}") from error


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises SaelabError, which ends with `remedy`, if there is none."""
    with translate_read_errors(path, "a JSON object", remedy):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise SaelabError(f"{path} is not a JSON object. {remedy}")
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other writers of `path`, a file or folder that need not exist, out during the block.

    Raises SaelabError if another process has locked it, or if nothing can be made there. What is locked is an empty
    file beside it, `.NAME.lock`: `replace_folder` gives `path` to another folder, and NFS does not lock folders. The
    block's end removes the file; one that a kill leaves locks nothing.
    """
    path = path.resolve()
    if not path.name:
        raise SaelabError(f"{path}: is the root of all folders, which cannot be replaced; choose another folder")
    lock = path.with_name(f".{path.name}.lock")
    made = [folder for folder in lock.parents if not folder.exists()]
    handle = None
    try:
        handle = _lock(lock)
    except BlockingIOError:
        raise SaelabError(f"{path}: another process is writing into it; wait for it, or end it") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            with translate_errors(path.parent):
                raise
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):  # `path` itself may still be writable
            reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
            raise SaelabError(f"{path}: cannot be made ({reason}); choose another folder") from error
    try:
        yield
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)
        for folder in made:
            with suppress(OSError):  # it is in use
                folder.rmdir()


def _lock(path: Path) -> int:
    """The file `path`, made if it is missing, opened and locked. Raises BlockingIOError if it is locked already."""
    removed = 0
    while True:
        make_folder(path.parent)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the folder, or, as in /proc, nothing can be made
            removed += 1
            if removed == 100:
                raise
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:
            return handle  # a file system without locks: its user must not start two writers
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # the process that had locked it has just removed it


@contextmanager
def appended(path: Path) -> Iterator[Callable[[str | bytes], None]]:
    """Yields a function that writes a line, or bytes, to the end of the file `path`, at once. Raises WriteError."""
    with translate_errors(path.parent):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(line: str | bytes) -> None:
        content = f"{line}\n".encode() if isinstance(line, str) else line
        with translate_errors(path.parent):
            while content:
                content = content[os.write(handle, content) :]

    try:
        yield write
    finally:
        os.close(handle)


@contextmanager
def translate_errors(
    folder: Path, size: int | None = None, *, kept: str = "", elsewhere: str = "choose another folder"
) -> Iterator[None]:
    """Turn an OSError from writing `size` bytes (None: unknown) into `folder` into a WriteError that says what to do.

    `kept` says what is finished and stays, if the same command then continues from it; `elsewhere`, how the user names
    another folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            denied = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            advice = f"{elsewhere}, or see to its permissions" if denied else "run again" + " to continue" * bool(kept)
            raise WriteError(f"{error.filename or folder}: cannot be written: {error.strerror}; {advice}") from error
        free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
        room = f"{free:,} bytes are free"
        if size is not None:
            room = f"what was to be written next has {size:,} bytes, and {free:,} are free"
        advice = f"{kept}: make room and run again to continue" if kept else "make room and run again"
        raise WriteError(f"{folder}: the disk is full: {room}; {advice}") from error
