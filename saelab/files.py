"""Files that are whole or not there: written under a temporary name, on the disk before they get their own.

All that is written goes through functions of `os`, so that tests can count and interrupt them.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from saelab.errors import SaelabError

PAGE = 4096
"""What lies at a multiple of it, in memory and in its file, can go to the disk without a copy."""
_AT_ONCE = 1 << 23
"""Bytes given to one write."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # not everywhere


def temporary(path: Path) -> Path:
    """The name that a file has in the making."""
    return path.with_name(f"{path.name}.tmp")


def write_whole(path: Path, content: bytes) -> None:
    """`content` under `path`, or nothing: through a temporary name, on the disk before it is renamed."""
    _settle(write_temporary(path, [memoryview(content)]))
    os.replace(temporary(path), path)
    sync_folder(path.parent)


def write_temporary(path: Path, parts: Iterable[memoryview]) -> int:
    """Write `parts` under the temporary name of `path`; the open file, to be synced before it is renamed.

    Pages that lie as the disk wants them go there past the system's cache: copies in memory that nobody reads soon take
    most of a processor, and the place of what is read.
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
    """Write `pages` past the system's cache; how many bytes of them the file system takes so, which may be none."""
    flags, at = fcntl.fcntl(handle, fcntl.F_GETFL), 0
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | _DIRECT)
        while at < len(pages):
            at += os.write(handle, pages[at : at + _AT_ONCE])
    except OSError as error:
        if error.errno != errno.EINVAL:  # it knows no such thing, or wants other sizes
            raise
    finally:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags)
    return at


def _settle(handle: int) -> None:
    """Have an open file on the disk, and close it."""
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk."""
    _settle(os.open(folder, os.O_RDONLY))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other writers out of `folder` meanwhile. Raises SaelabError where one is at work."""
    try:
        made = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            sync_folder(path.parent)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise SaelabError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SaelabError(f"{folder}: another process is writing this cache; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks: who starts two writers there has to know it
        yield
    finally:
        os.close(handle)


@contextmanager
def told(folder: Path, size: int) -> Iterator[None]:
    """What the system says against writing `size` bytes into `folder`, as a SaelabError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            allowed = error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)
            advice = "run again to continue" if allowed else "choose another --out, or see to its permissions"
            raise SaelabError(f"{error.filename or folder}: cannot be written: {error.strerror}; {advice}") from error
        free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
        raise SaelabError(
            f"{folder}: the disk is full: what was to be written next has {size:,} bytes, and {free:,} are free; "
            "finished shards are kept: make room and run again, and writing goes on behind them"
        ) from error
