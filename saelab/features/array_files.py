"""Writes the arrays of a feature database part by part, so that none is in memory whole (FORMAT.md)."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np

from saelab.features.layout import arrays


@dataclass(frozen=True)
class ArrayWriter:
    """Writes arrays into the empty folder `folder`. Methods raise OSError."""

    folder: Path
    sizes: dict[str, int]
    """`layout.SIZES`; a size must be right when the first array that it belongs to is opened."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Length and checksum of each finished file, by its name."""

    @contextmanager
    def open(self, names: Iterable[str]) -> Iterator[dict[str, "ArrayFile"]]:
        """The files of some arrays; all parts of each must be appended within the block."""
        shapes = arrays(self.sizes)
        with ExitStack() as stack:
            files = {name: stack.enter_context(ArrayFile(self.folder, name, *shapes[name])) for name in names}
            yield files
            self.files.update({f"{name}.npy": file.record() for name, file in files.items()})

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a whole array."""
        with self.open([name]) as files:
            files[name].append(array)

    def write_columns(self, names: Sequence[str], blocks: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Write columns of the table from blocks of consecutive features, feature 0 first."""
        with self.open(f"table.{name}" for name in names) as files:
            for block in blocks:
                for name in names:
                    files[f"table.{name}"].append(block[name])

    def mapped(self, *groups: str) -> dict[str, np.ndarray]:
        """The finished arrays of some groups, such as ``by_feature``, mapped from their files."""
        names = [name.removesuffix(".npy") for name in self.files]
        return {
            name: np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="r")
            for name in names
            if name.split(".")[0] in groups
        }


class ArrayFile:
    """The file of an array, written part by part. `record` once all parts are there."""

    def __init__(self, folder: Path, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        header = BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
        self._name, self._dtype, self._digest, self._bytes = name, np.dtype(dtype), hashlib.sha256(), 0
        self._whole = len(header.getvalue()) + self._dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self._handle = os.open(folder / f"{name}.npy", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(header.getbuffer())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)

    def append(self, part: np.ndarray) -> None:
        """Write the next elements, converted to the array's dtype."""
        self._write(np.ascontiguousarray(part, self._dtype).reshape(-1).view(np.uint8).data)

    def record(self) -> dict[str, Any]:
        """Length and checksum of the finished file."""
        assert self._bytes == self._whole, f"the parts do not make up {self._name}"
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def _write(self, content: memoryview) -> None:
        self._digest.update(content)
        self._bytes += len(content)
        while content:
            content = content[os.write(self._handle, content) :]
