"""Tensors written as safetensors files, with the writer of all other files (`saelab.files`).

The library's `save_file` opens its own file: its errors are not OSErrors, a kill leaves a file with a random name, and
only its owner may read the result. The bytes are the same.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saelab.files import translate_errors, write_at, write_whole

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of dtypes in safetensors, in the order in which it sorts them."""


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a tensor of which other processes have the other rows."""

    tensor: Tensor
    """The rows of this process, ``[rows, ...]``."""
    first: int
    """Number of the first one in the whole tensor."""
    total: int
    """Rows of the whole tensor."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors`, of any device and layout, as the safetensors file `path`, whole or not at all.

    Host memory: a copy of one tensor at a time, if it is on another device or not contiguous. Raises SaelabError if
    the file cannot be written; an earlier file at `path` is then unchanged.
    """
    start, begins, end = _layout(tensors, metadata)

    def parts() -> Iterator[memoryview]:
        yield memoryview(start)
        for name in begins:
            yield _content(tensors[name])

    with translate_errors(path.parent, end):
        write_whole(path, parts())


def write_part(path: Path, tensors: Mapping[str, Tensor | Rows], *, first: bool) -> None:
    """Write what this process has of a safetensors file: its `Rows`; the `first` one writes all else.

    Once every process has done so, `path` has the bytes that `write_tensors` writes if one process has all rows. Until
    then the file is there in part: make it in a folder that is replaced whole. Raises SaelabError if it cannot be
    written.
    """
    start, begins, end = _layout(tensors, None)

    def parts() -> Iterator[tuple[int, memoryview]]:
        if first:
            yield 0, memoryview(start)
        for name, begin in begins.items():
            value = tensors[name]
            if isinstance(value, Rows):
                row = value.tensor[:1].numel() * value.tensor.itemsize
                yield begin + value.first * row, _content(value.tensor)
            elif first:
                yield begin, _content(value)

    with translate_errors(path.parent, end):
        write_at(path, parts())


def _layout(
    tensors: Mapping[str, Tensor | Rows], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """The beginning of the file, the offset of each tensor in their order, and the length of the file."""
    order, shapes = list(DTYPES), {name: _shape(value) for name, value in tensors.items()}
    dtypes = {name: (value.tensor if isinstance(value, Rows) else value).dtype for name, value in tensors.items()}
    names = sorted(tensors, key=lambda name: (-order.index(dtypes[name]), name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begins, end = {}, 0
    for name in names:
        begins[name] = end
        end += math.prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": shapes[name], "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + begin for name, begin in begins.items()}, len(start) + end


def _shape(value: Tensor | Rows) -> list[int]:
    return [value.total, *value.tensor.shape[1:]] if isinstance(value, Rows) else list(value.shape)


def _content(tensor: Tensor) -> memoryview:
    return raw(tensor.detach().cpu().contiguous())


def kind(tensor: Tensor) -> str:
    """Dtype and device of a tensor, such as ``float32 on cpu``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.reshape(-1)
    assert flat.data_ptr() == tensor.data_ptr() or not len(flat)
    return flat.view(torch.uint8).numpy().data.cast("B") if len(flat) else memoryview(b"")
