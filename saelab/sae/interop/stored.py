"""The tensors of a file, which anyone may have made: names, shapes and dtypes first, numbers only after checks.

Safetensors files have a header, and so has each array of an ``.npz`` file. Files of torch.save are opened with
``weights_only=True``, which runs no code, and mapped into memory, so their numbers are not read either.
"""

import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelab.errors import SaelabError, brief, printable
from saelab.tensors import DTYPES

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
_EXPANDED = 8
"""How many times larger than its file the content of a compressed ``.npz`` file may be; weights compress little. Of
files of torch.save it may not be larger at all: torch compresses nothing."""
_NPZ_ERRORS = (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
_OF_NUMPY = {name: getattr(torch, name) for name in ("float16", "float32", "float64", "int32", "int64")}


@dataclass(frozen=True)
class Kind:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None: one that torch has no name for, such as an 8-bit float."""

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Stored:
    """The content of one file."""

    path: Path
    kinds: dict[str, Kind]
    """The tensors by name."""
    read: Callable[[str], Tensor]
    """Reads the tensor of that name, on the CPU."""
    other: Mapping[str, Any] = field(default_factory=dict)
    """What else the file has, by name, such as numbers and text."""

    def found(self) -> str:
        """The tensors of the file in words, for a message."""
        names = [f"{printable(name)[:60]} {kind}" for name, kind in sorted(self.kinds.items())]
        return ", ".join(names[:12] + ["..."] * (len(names) > 12)) or "no tensor"


def open_file(path: Path) -> Stored:
    """The content of the safetensors file, ``.npz`` file or file of torch.save `path`.

    Raises SaelabError if it is none of them, or if it needs code to be run to be read.
    """
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_npz(path) if path.suffix == ".npz" else _open_pickle(path)


def _open_safetensors(path: Path) -> Stored:
    try:
        file = safe_open(path, framework="pt", device="cpu")
        kinds = {}
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            part = file.get_slice(name)
            kinds[name] = Kind(tuple(part.get_shape()), _OF_NAME.get(part.get_dtype()))
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error

    def read(name: str) -> Tensor:
        try:
            return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error

    return Stored(path, kinds, read)


def _open_npz(path: Path) -> Stored:
    kinds: dict[str, Kind] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            _check_expanded(path, archive, _EXPANDED)  # before a header is read, which may be as long as the content
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    first = np.lib.format.read_magic(file) == (1, 0)
                    header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                    shape, _, dtype = header(file)
                if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > member.file_size:
                    raise SaelabError(f"{path}: {printable(name)[:60]} is {list(shape)}, more than the file holds")
                kinds[name] = Kind(shape, _OF_NUMPY.get(dtype.name))
    except _NPZ_ERRORS as error:
        raise _damaged(path, error) from error

    def read(name: str) -> Tensor:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return torch.from_numpy(np.ascontiguousarray(arrays[name]))
        except _NPZ_ERRORS as error:
            raise _damaged(path, error) from error

    return Stored(path, kinds, read)


def _check_expanded(path: Path, archive: zipfile.ZipFile, times: int) -> None:
    """Raises SaelabError if the content of `archive` is more than `times` as large as its file `path`."""
    size, most = sum(member.file_size for member in archive.infolist()), times * path.stat().st_size
    if size > most:
        raise SaelabError(f"{path}: its content would be {size:,} bytes, more than the file holds; use another copy")


def _open_pickle(path: Path) -> Stored:
    try:
        size, zipped = path.stat().st_size, zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                _check_expanded(path, archive, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle of another protocol, which it then refuses
            # torch maps only its present format, a zip file
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except SaelabError:
        raise
    except Exception as error:  # unpickling a file of anyone's may raise anything; torch's advice would run its code
        if path.suffix in (".json", ".npy", ".txt", ".yaml", ".md"):
            raise SaelabError(f"{path}: is no file of weights; name one, or the folder of a checkpoint") from error
        raise SaelabError(
            f"{path}: cannot be read by torch.load with weights_only=True: it is no file of torch.save, or damaged, or "
            "needs code to be run, which is never done; save the state_dict alone, or use another copy"
        ) from error
    if not isinstance(content, dict):
        raise SaelabError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return _of_dict(path, content, size)


def _of_dict(path: Path, content: dict[Any, Any], size: int) -> Stored:
    """`content` of a file of `size` bytes. Raises SaelabError if a tensor is not one of numbers that the file has."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        # strides can make a huge tensor of few stored numbers
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.itemsize > size:
            raise SaelabError(f"{path}: {printable(name)[:60]} is {list(tensor.shape)}, more than the file holds")
    kinds = {name: Kind(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    other = {str(name): value for name, value in content.items() if not isinstance(value, Tensor)}
    return Stored(path, kinds, tensors.__getitem__, other)


def inner(stored: Stored, name: str) -> Stored:
    """The dict of tensors `name` in a file of torch.save, as a file of its own."""
    content = stored.other[name]
    if not isinstance(content, dict):
        raise SaelabError(f"{stored.path}: {name} is not a dict of tensors")
    return _of_dict(stored.path, content, stored.path.stat().st_size)


def _damaged(path: Path, error: Exception) -> SaelabError:
    return SaelabError(f"{path}: the file is damaged ({brief(error)}); use another copy")


class Config:
    """A JSON object of a configuration, whose values are checked as they are read."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    @classmethod
    def read(cls, path: Path) -> "Config":
        """The object in `path`. Raises SaelabError if there is none."""
        if not path.is_file():
            raise SaelabError(f"{path}: is missing; it must be beside the weights")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise SaelabError(f"{path}: cannot be read as JSON ({brief(error)}); use another copy") from error
        if not isinstance(values, dict):
            raise SaelabError(f"{path}: is not a JSON object but {type(values).__name__}; use another copy")
        return cls(path, values)

    def section(self, name: str) -> "Config":
        """The object `name`; empty if it is missing or null."""
        value = self.values.get(name)
        if not isinstance(value, dict | None):
            raise self.wrong(name, "an object")
        return Config(self.path, value or {})

    def flag(self, name: str, default: bool) -> bool:
        """The bool `name`."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def size(self, name: str, default: int | None = None) -> int | None:
        """The whole number `name`, at least 1; `default` if it is missing or null."""
        value = self.values.get(name)
        if value is None:
            return default
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not 1 <= value < 2**31:
            raise self.wrong(name, "a whole number from 1 to 2^31 - 1")
        return int(value)

    def text(self, name: str, default: str = "") -> str:
        """The text `name`; `default` if it is missing or null."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "text")
        return value

    def wrong(self, name: str, right: str) -> SaelabError:
        """The error that the value of `name` is not `right`."""
        return SaelabError(f"{self.path}: {name} is {_shown(self.values.get(name))}, not {right}")


def _shown(value: object) -> str:
    whole = printable(repr(value))
    return whole if len(whole) <= 80 else whole[:80] + "..."
