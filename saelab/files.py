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
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from saelab.errors import SaelabError

PAGE = 4096
"""Memory and file offsets that are multiples of it can go to the disk without a copy."""
_AT_ONCE = 1 << 23
"""Bytes given to one write."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # not everywhere


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
    path: Path, what: str, remedy: str, errors: tuple[type[Exception], ...] = (OSError, ValueError)
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
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` if it is missing, and keep other writers out of it during the block.

    Raises SaelabError if another process has locked it, or if it cannot be made.
    """
    try:
        make_folder(folder)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise SaelabError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SaelabError(f"{folder}: another process is writing into it; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks: its user must not start two writers
        yield
    finally:
        os.close(handle)


@contextmanager
def translate_errors(
    folder: Path, size: int | None = None, *, kept: str = "", elsewhere: str = "choose another folder"
) -> Iterator[None]:
    """Turn an OSError from writing `size` bytes (None: unknown) into `folder` into a SaelabError that says what to do.

    `kept` says what is finished and stays, if the same command then continues from it; `elsewhere`, how the user names
    another folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            denied = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            advice = f"{elsewhere}, or see to its permissions" if denied else "run again" + " to continue" * bool(kept)
            raise SaelabError(f"{error.filename or folder}: cannot be written: {error.strerror}; {advice}") from error
        free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
        room = f"{free:,} bytes are free"
        if size is not None:
            room = f"what was to be written next has {size:,} bytes, and {free:,} are free"
        advice = f"{kept}: make room and run again to continue" if kept else "make room and run again"
        raise SaelabError(f"{folder}: the disk is full: {room}; {advice}") from error
