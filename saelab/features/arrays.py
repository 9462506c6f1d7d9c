"""Opens the arrays of a feature database, mapped from disk. FORMAT.md specifies the files."""

import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saelab.errors import SaelabError, printable
from saelab.features.layout import EARLIER, FORMAT, MANIFEST, NOT_SIZES, SIZES, VERSION, arrays
from saelab.files import current_folder, read_json, translate_read_errors


@dataclass(frozen=True, eq=False)
class Arrays:
    """The manifest and the arrays of a database; `open_arrays` makes it. ``arrays[name]`` is an array."""

    folder: Path
    manifest: dict[str, Any]
    found: dict[str, np.ndarray]

    def __repr__(self) -> str:
        return f"Arrays({printable(str(self.folder))})"

    def __getitem__(self, name: str) -> np.ndarray:
        return self.found[name]

    def read_ahead(self, name: str, first: int = 0, stop: int | None = None) -> None:
        """Ask the system to read the elements from `first` up to `stop`, counted along the first axis, from the disk.

        Without it, each page is read when it is first used (`_map`).
        """
        array = self.found[name]
        pages = array.base
        length = array[first:stop].nbytes
        if isinstance(pages, mmap.mmap) and length > mmap.PAGESIZE:
            header = len(pages) - array.nbytes
            begin = (header + array[:first].nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            pages.madvise(mmap.MADV_WILLNEED, begin, min(length + mmap.PAGESIZE, len(pages) - begin))

    def verify(self) -> None:
        """Raises SaelabError if a file differs from its sha256 in the manifest. Reads all files."""
        for name, file in self.manifest["files"].items():
            path = self.folder / name
            with translate_read_errors(path, "an array of the feature database", self.remedy), path.open("rb") as read:
                digest = hashlib.file_digest(read, "sha256").hexdigest()
            if digest != file["sha256"]:
                raise self.damaged(name.removesuffix(".npy"), "does not match its sha256")

    def damaged(self, name: str, what: str) -> SaelabError:
        """The error for a damaged array."""
        return SaelabError(f"{self.folder / name}.npy is damaged: it {what}. {self.remedy}")

    @property
    def remedy(self) -> str:
        return _remake(self.folder)


def open_arrays(folder: Path | str) -> Arrays:
    """The arrays of the feature database in `folder`, `features` in a run folder. Reads sizes only.

    Raises SaelabError if the database is missing, damaged or of another version.
    """
    folder = current_folder(Path(folder))
    path = folder / MANIFEST
    if not path.is_file() and any((folder / name).exists() for name in EARLIER):
        raise SaelabError(f"{folder}: made by an earlier saelab, in a format that is not read. {_remake(folder)}")
    if not path.is_file():
        raise SaelabError(f"There is no feature database in {folder}. `saelab index {folder.parent}` makes it.")
    manifest = read_json(path, _remake(folder))
    if manifest.get("format") != FORMAT:
        raise SaelabError(f"{path} is not the manifest of a feature database. {_remake(folder)}")
    if manifest.get("version") != VERSION:
        raise SaelabError(
            f"{path}: written in version {manifest.get('version')!r} of the format, and this saelab reads version "
            f"{VERSION}. {_remake(folder)}"
        )
    try:
        expected = arrays({size: int(manifest[size]) for size in SIZES})
        lengths = {name: int(manifest["files"][f"{name}.npy"]["bytes"]) for name in expected}
        [str(manifest["files"][f"{name}.npy"]["sha256"]) for name in expected]
        [manifest[name] for name in NOT_SIZES]
    except (KeyError, TypeError, ValueError) as error:
        raise SaelabError(f"{path} is not a whole manifest: {error!r}. {_remake(folder)}") from error
    return Arrays(folder, manifest, {name: _map(folder, name, *expected[name], lengths[name]) for name in expected})


def _map(folder: Path, name: str, dtype: str, shape: tuple[int, ...], length: int) -> np.ndarray:
    """The array in a file, mapped into memory. Raises SaelabError if it is not of this dtype, shape and length."""
    path = folder / f"{name}.npy"
    with translate_read_errors(path, "an array of the feature database", _remake(folder)):
        if path.stat().st_size != length:
            raise ValueError(f"it has {path.stat().st_size:,} bytes instead of {length:,}")
        found = np.lib.format.open_memmap(path, mode="r")
        if isinstance(found.base, mmap.mmap):
            # Most questions read a few bytes of many files. The system would read some 100 KB around each of them.
            found.base.madvise(mmap.MADV_RANDOM)
        if found.shape != shape or found.dtype != dtype:
            raise ValueError(f"it is {found.dtype}{list(found.shape)} instead of {dtype}{list(shape)}")
    return found


def _remake(folder: Path) -> str:
    return f"`saelab index {folder.parent}` makes it again."
