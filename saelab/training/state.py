"""State of a training on disk, for exact resume: nested dictionaries as one safetensors and one JSON file.

Tensors keep their bits, and so do numbers: JSON writes enough digits of a float to read the same float back.
"""

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelab.errors import SaelabError
from saelab.files import write_json
from saelab.ranks import ALONE, Ranks
from saelab.tensors import Rows, write_part, write_tensors

TENSORS, VALUES = "state.safetensors", "state.json"
FORMAT = 2
_TENSOR = "$tensor"
"""In the JSON file, an object with only this key stands for the tensor that it names."""


def save_state(folder: Path, state: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
    """Write `state`, dictionaries of tensors, numbers, strings, lists and None, into the folder `folder`.

    Wrap it in `replace_folder` of saelab.files, so that both files are there or neither. All `ranks` call it: each
    writes its `Rows`, and the first one all else; the files are the same as if one process had all rows. Raises
    SaelabError if they cannot be written; of several processes one raises it, and the others ElsewhereError.
    """
    tensors: dict[str, Tensor | Rows] = {}
    values = _without_tensors(state, "", tensors)

    def write() -> None:
        if ranks.every.size > 1:
            check_common(folder)
        if ranks.features.size == 1 and ranks.first:
            write_tensors(folder / TENSORS, {name: _whole(value) for name, value in tensors.items()})
        elif ranks.features.size > 1 and ranks.data.rank == 0:  # the others along `data` have the same rows
            write_part(folder / TENSORS, tensors, first=ranks.first)

    ranks.every.barrier()  # the folder is there
    ranks.every.together(write)
    if ranks.first:
        write_json(folder / VALUES, {"format": FORMAT, "checksum": _checksum(values), "state": values})


def load_state(
    folder: Path,
    device: torch.device | str = "cpu",
    own: Callable[[str, int], slice] = lambda name, rows: slice(rows),
) -> dict[str, Any]:
    """The state that `save_state` wrote, its tensors on `device`; those whose names begin with rng stay on the CPU.

    `own` gives the rows that are copied of a tensor with a name, such as trainer/sae/W_enc, and a number of rows.
    Raises SaelabError if the state is missing, damaged, or of another version.
    """
    values = load_values(folder)
    with _readable(folder):
        with safe_open(folder / TENSORS, "pt") as file:  # maps the file into memory
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        parts = {name: x[own(name, len(x))] if x.ndim else x for name, x in tensors.items()}
        return _with_tensors(values, parts, torch.device(device))


def load_values(folder: Path) -> dict[str, Any]:
    """The state in `folder` without its tensors. Raises SaelabError as `load_state` does."""
    with _readable(folder):
        found = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        version, values = found["format"], found["state"]
        if version == FORMAT:
            if found["checksum"] != _checksum(values):
                raise ValueError(f"{VALUES} does not match its checksum")
            return values
    raise SaelabError(
        f"{folder}: has version {version}; this saelab reads {FORMAT}. Resume with the saelab that wrote it"
    )


def load_tensor(folder: Path, *names: str) -> Tensor | None:
    """The tensor under `names` of the state in `folder`, outermost first, on the CPU; None if it has none there.

    Raises SaelabError as `load_state` does.
    """
    with _readable(folder), safe_open(folder / TENSORS, "pt") as file:
        name = "/".join(names)
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (no mapping)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn what a damaged state raises into a SaelabError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SaelabError(
            f"{folder}: the state of the training cannot be read: {error!r}; delete this folder to go on from "
            "the state before it"
        ) from error


def _checksum(values: Any) -> str:
    """The sha256 of the values of a state, which are the same before and after they are written."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def check_common(folder: Path) -> None:
    """Raises SaelabError if this process does not see `folder`, which another one has made."""
    if not folder.is_dir():
        raise SaelabError(
            f"{folder}: is not there on {socket.gethostname()}, and another process has made it; all processes need "
            "a common file system for the run folder"
        )


def _whole(value: Tensor | Rows) -> Tensor:
    return value.tensor if isinstance(value, Rows) else value


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor | Rows]) -> Any:
    if isinstance(value, Tensor | Rows):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, f"{name}/{key}" if name else key, tensors) for key, item in value.items()}
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            name = value[_TENSOR]
            # copied: the file is mapped into memory, and is removed when newer states are there
            return tensors[name].clone() if name.startswith("rng") else tensors[name].to(device, copy=True)
        return {key: _with_tensors(item, tensors, device) for key, item in value.items()}
    return value
