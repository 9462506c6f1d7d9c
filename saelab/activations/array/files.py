"""The files of an array: ``.npy``, ``.safetensors``, or a folder of them in the order of their names.

Each holds a matrix ``[rows, d_in]`` of float16, bfloat16 (``.safetensors`` only), float32 or float64; together they are
one array. Files are mapped into memory and read a part at a time. Nothing is unpickled.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelab.errors import SaelabError, did_you_mean
from saelab.files import translate_read_errors

KINDS = (".npy", ".safetensors")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_TAKEN = "float16, bfloat16 (in .safetensors), float32 and float64 are taken"
_REMEDY = "Write the file again."
_LONGEST_HEADER = 10_000
"""Bytes of the header of a ``.npy`` file; numpy refuses longer ones too, but only after it has read them whole."""


@dataclass(frozen=True)
class Part:
    """The matrix in a file."""

    path: Path
    rows: int
    width: int
    dtype: torch.dtype
    numbers: np.dtype
    """How numpy reads the file: in its byte order; bfloat16 as int16."""
    offset: int
    """First byte of the matrix in the file."""
    order: Literal["C", "F"]
    """Whether rows or columns are contiguous."""
    stamp: tuple[int, int]
    """Size of the file, and when it was last written (`_stamp`)."""

    def take(self, rows: np.ndarray) -> Tensor:
        """Some rows in their own dtype, ``[rows, width]``, in new memory. Raises SaelabError if the file is not what
        it was when it was opened."""
        with translate_read_errors(self.path, "an array", _REMEDY):
            if _stamp(self.path) != self.stamp:
                raise SaelabError(f"{self.path}: was changed while it is in use; start again")
            shape = (self.rows, self.width)
            mapped = np.memmap(self.path, self.numbers, "r", self.offset, shape, self.order)
            found = np.ascontiguousarray(mapped[rows]).astype(self.numbers.newbyteorder("="), copy=False)
        return torch.from_numpy(found).view(self.dtype)


def open_parts(path: Path, tensor: str | None = None) -> list[Part]:
    """The matrices of the file or folder `path`, in order; all have the same width.

    `tensor` names the one in a ``.safetensors`` file that has several. Raises SaelabError, with the file, if there is
    none, if one cannot be read, and if dtypes or shapes are not those of an array.
    """
    files = [path]
    if path.is_dir():
        if (path / "manifest.json").exists():
            raise SaelabError(
                f"activations: {path} looks like a folder of `saelab cache`; write `activations: {{cache: {path}}}`"
            )
        files = sorted(file for file in path.iterdir() if file.suffix in KINDS and file.is_file())
        if not files:
            raise SaelabError(
                f"activations: {path} has no {' or '.join(KINDS)} file; name an array or a folder of some"
            )
    elif not path.exists():
        raise SaelabError(f"activations: {path}: no such file or folder; name a {' or '.join(KINDS)} file")
    elif path.suffix not in KINDS:
        raise SaelabError(f"activations: {path} is no {' or '.join(KINDS)} file; save the array as one of these")
    parts = [_open_npy(file) if file.suffix == ".npy" else _open_safetensors(file, tensor) for file in files]
    for part in parts:
        if part.width != parts[0].width:
            raise SaelabError(
                f"activations: {part.path} has rows of {part.width:,} numbers, and {parts[0].path.name} of "
                f"{parts[0].width:,}; all files of an array have rows of one width"
            )
    return parts


def shared_dtype(parts: Iterable[Part]) -> torch.dtype:
    """The dtype that holds all parts: float32, unless all are float16 or all bfloat16."""
    first, *others = {part.dtype for part in parts}
    return first if first.itemsize == 2 and not others else torch.float32


def _open_npy(path: Path) -> Part:
    with translate_read_errors(path, "a .npy array", _REMEDY, (OSError, ValueError, EOFError)):
        with path.open("rb") as file:
            start = file.read(12)  # 6 bytes of magic, 2 of the version, then the length of the header
        length = int.from_bytes(start[8 : 10 if start[6:7] == b"\x01" else 12], "little")
        is_npy = start.startswith(np.lib.format.MAGIC_PREFIX)  # numpy advises to load other files as pickles
        if is_npy and length > _LONGEST_HEADER:
            raise ValueError(f"its header has {length:,} bytes")
        found = np.load(path, mmap_mode="r", allow_pickle=False) if is_npy else None
    if not isinstance(found, np.memmap) or found.offset is None:
        raise SaelabError(f"{path}: is no .npy array. {_REMEDY}")
    rows, width = _two(path, found.shape)
    if found.dtype.kind != "f" or found.dtype.itemsize not in (2, 4, 8):
        raise SaelabError(f"{path}: holds {found.dtype}; {_TAKEN}")
    order: Literal["C", "F"] = "C" if found.flags.c_contiguous else "F"
    dtype = torch.from_numpy(np.empty(0, found.dtype.newbyteorder("="))).dtype
    return Part(path, rows, width, dtype, found.dtype, found.offset, order, _stamp(path))


def _open_safetensors(path: Path, tensor: str | None) -> Part:
    with translate_read_errors(path, "a .safetensors file", _REMEDY, (OSError, SafetensorError, ValueError)):
        with safe_open(path, "pt") as file:  # compares the size of the file with its header
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with path.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(size))
    name = tensor
    if name is None:
        matrices = [each for each, shape in shapes.items() if len(shape) == 2]
        if len(matrices) != 1:
            raise SaelabError(
                f"{path}: holds {len(matrices)} matrices ({', '.join(sorted(shapes)[:10]) or 'no tensor'}); name one "
                "with activations.array.tensor=NAME"
            )
        name = matrices[0]
    elif name not in shapes:
        raise SaelabError(
            f"{path}: holds no tensor {name!r} ({', '.join(sorted(shapes)[:10])}).{did_you_mean(name, shapes)}"
        )
    rows, width = _two(path, shapes[name])
    facts = header[name]
    if facts["dtype"] not in _DTYPES:
        raise SaelabError(f"{path}: {name} is {facts['dtype']}; {_TAKEN}")
    dtype = _DTYPES[facts["dtype"]]
    numbers = np.dtype("<i2") if dtype == torch.bfloat16 else np.dtype(f"<f{dtype.itemsize}")
    offset = 8 + size + facts["data_offsets"][0]
    return Part(path, rows, width, dtype, numbers, offset, "C", _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _two(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """`shape`, if it is that of a matrix. Raises SaelabError if not, or if the matrix is empty."""
    if len(shape) != 2:
        raise SaelabError(
            f"{path}: has the shape {shape}, and an array has two dimensions, rows x numbers; save it as "
            "array.reshape(-1, d)"
        )
    if not shape[1] or not shape[0]:
        raise SaelabError(f"{path}: has the shape {shape}, so there is no activation in it; leave the file out")
    return shape[0], shape[1]
