"""Files of tensors: the library's bytes, by our writer."""

import errno
import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from saelab.errors import SaelabError
from saelab.tensors import DTYPES, Rows, raw, write_part, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, in no order; scalars, empty tensors, and one whose entries do not lie in its order."""
    generator = torch.Generator().manual_seed(0)
    found = {f"{n}": (torch.rand(3, n, generator=generator) * 100).to(dtype) for n, dtype in enumerate(DTYPES)}
    return found | {'é "': torch.tensor(3.0), "none": torch.zeros(0, 4), "another": torch.rand(5, generator=generator)}


@pytest.mark.parametrize("metadata", [None, {}, {"n_features": '3 "é"'}])
def test_the_bytes_are_those_of_safetensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    write_tensors(tmp_path / "file", tensors(), metadata)
    assert (tmp_path / "file").read_bytes() == save(tensors(), metadata)


@pytest.mark.parametrize("cuts", [(0, 2, 3, 7), (0, 0, 7, 7)], ids=["three parts", "empty parts"])
def test_processes_that_have_some_rows_each_write_the_bytes_of_one_that_has_all(
    tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    """In any order, the first process last."""
    rows = {"matrix": torch.rand(7, 3), "vector": torch.rand(7).double(), "turned": torch.rand(3, 7).T}
    write_tensors(tmp_path / "whole", tensors() | rows)
    for process, (begin, end) in reversed(list(enumerate(pairwise(cuts)))):
        own = {name: Rows(tensor[begin:end], begin, 7) for name, tensor in rows.items()}
        write_part(tmp_path / "parts", tensors() | own, first=process == 0)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4).requires_grad_()
    views = {"transposed": matrix.T, "expanded": matrix[0, :1].expand(7), "strided": matrix[:, 1]}
    write_tensors(tmp_path / "file", views)
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], view) for name, view in views.items()) and len(found) == 3


def test_others_may_read_the_file_as_the_users_mask_says(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {"a": torch.zeros(2)})
    (tmp_path / "plain").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "plain")]
    assert modes[0] == modes[1]


def test_a_full_disk_is_an_error_that_has_the_bytes_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, content: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_tensors(tmp_path / "file", {"a": torch.zeros(1000)})
    before = (tmp_path / "file").read_bytes()
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SaelabError, match=f"disk is full: .* has {len(before):,} bytes"):
        write_tensors(tmp_path / "file", {"a": torch.ones(1000)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": before}


def test_raw_is_the_tensor_itself() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.bfloat16)
    raw(tensor)[:2] = b"\x80\x3f"
    assert tensor[0, 0] == 1 and sum(raw(tensor)) == 0x80 + 0x3F
