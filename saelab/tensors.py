"""Tensors written as safetensors files, with the writer of all other files (`saelab.files`).

The library's `save_file` opens its own file: its errors are not OSErrors, a kill leaves a file with a random name, and
only its owner may read the result. The bytes are the same.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from saelab.files import translate_errors, write_whole

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors`, of any device and layout, as the safetensors file `path`, whole or not at all.

    Host memory: a copy of one tensor at a time, if it is on another device or not contiguous. Raises SaelabError if
    the file cannot be written; an earlier file at `path` is then unchanged.
    """
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text

    def parts() -> Iterator[memoryview]:
        yield memoryview(start)
        for name in names:
            yield raw(tensors[name].detach().cpu().contiguous())

    with translate_errors(path.parent, len(start) + end):
        write_whole(path, parts())


def kind(tensor: Tensor) -> str:
    """Dtype and device of a tensor, such as ``float32 on cpu``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.reshape(-1)
    assert flat.data_ptr() == tensor.data_ptr() or not len(flat)
    return flat.view(torch.uint8).numpy().data.cast("B") if len(flat) else memoryview(b"")
