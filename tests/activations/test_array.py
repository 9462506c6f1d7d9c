"""An array on disk: its files are read exactly and a part at a time, and each row is trained on once per epoch."""

import os
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saelab.activations.array import rows as array_rows
from saelab.activations.array.rows import Array, open_array
from saelab.activations.blocks import Cursor
from saelab.activations.settings import ArraySource
from saelab.activations.source import FromCache
from saelab.errors import SaelabError

X = np.random.default_rng(0).standard_normal((50, 6))


def opened(path: Path, held_out: float = 0.2, **settings: str) -> Array:
    return open_array(ArraySource(str(path), **settings), held_out)


def written(path: Path, values: np.ndarray = X) -> Path:
    np.save(path, values)
    return path


def all_rows(array: Array) -> torch.Tensor:
    return array.activations(torch.arange(array.rows)[:, None], ["x"])["x"][:, 0]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_npy_file_gives_its_rows_in_any_dtype_and_order(tmp_path: Path, dtype: str, order: str) -> None:
    values = np.asarray(X.astype(dtype), order=order)  # type: ignore[call-overload]
    array = opened(written(tmp_path / "x.npy", values))
    kept = torch.float16 if dtype == "<f2" else torch.float32
    assert (array.rows, array.d_in, array.dtype) == (50, 6, kept)
    assert torch.equal(all_rows(array), torch.from_numpy(values.astype(dtype[1:])).to(kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_safetensors_file_gives_the_rows_of_its_matrix(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.from_numpy(X).to(dtype)
    save_file({"bias": torch.zeros(3), "x": values}, tmp_path / "x.safetensors")
    array = opened(tmp_path / "x.safetensors")
    assert array.dtype == (dtype if dtype.itemsize == 2 else torch.float32)
    assert torch.equal(all_rows(array), values.to(array.dtype))


def test_a_folder_is_one_array_in_the_order_of_names(tmp_path: Path) -> None:
    save_file({"b": torch.from_numpy(X[20:35]).bfloat16()}, tmp_path / "b.safetensors")
    written(tmp_path / "c.npy", X[35:].astype(np.float16))
    written(tmp_path / "a.npy", X[:20])
    (tmp_path / "readme.txt").write_text("no array")
    array = opened(tmp_path)
    expected = torch.cat([torch.from_numpy(X[:20]).float(), torch.from_numpy(X[20:35]).bfloat16().float()])
    assert array.dtype == torch.float32 and array.rows == 50
    assert torch.equal(all_rows(array), torch.cat([expected, torch.from_numpy(X[35:]).half().float()]))
    some = torch.tensor([[49], [0], [20], [19], [34]])
    assert torch.equal(array.activations(some, ["x"])["x"], all_rows(array)[some])


def test_one_of_several_matrices_is_named(tmp_path: Path) -> None:
    both = {"layer1": torch.from_numpy(X).float(), "layer2": torch.from_numpy(X[:, :4].copy()).float()}
    save_file(both, tmp_path / "x.safetensors")
    assert torch.equal(all_rows(opened(tmp_path / "x.safetensors", tensor="layer2")), both["layer2"])
    with pytest.raises(SaelabError, match=r"holds 2 matrices \(layer1, layer2\); name one with"):
        opened(tmp_path / "x.safetensors")
    with pytest.raises(SaelabError, match=r"no tensor 'layer3'.*layer1"):
        opened(tmp_path / "x.safetensors", tensor="layer3")


def test_a_part_of_a_large_file_is_read_and_never_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GB of zeros, as a file with holes: opening, its identity and batches take less than 100 MB."""
    monkeypatch.setattr(array_rows, "HASHED_BYTES", 1 << 20)
    monkeypatch.setattr(array_rows, "_STRETCHES", 16)
    shape, path = (2_000_000, 1024), tmp_path / "large.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file,
            {"descr": "<f4", "fortran_order": False, "shape": shape},  # type: ignore[arg-type]
        )
        file.truncate(file.tell() + 4 * shape[0] * shape[1])
    tracemalloc.start()
    array = opened(path)
    assert array.identity["rows"] == shape[0]
    with array.batches("x", 256, seed=0, buffer_tokens=4096) as batches:
        assert next(batches).values.shape == (256, 1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (X[0], r"has the shape \(6,\), and an array has two dimensions"),
        (X.reshape(5, 10, 6), r"reshape\(-1, d\)"),
        (X[:0], "there is no activation in it"),
        (X.astype(np.int64), "holds int64; float16, bfloat16"),
        (X.astype(np.complex64), "holds complex64"),
        (np.array([[{}]], dtype=object), "cannot be read as a .npy array"),
        (X[:1], "has 1 rows, of which 1 are held out, so none is left"),
    ],
)
def test_what_is_no_array_is_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    with pytest.raises(SaelabError, match=message):
        opened(written(tmp_path / "x.npy", values))


def test_wrong_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    (tmp_path / "both").mkdir()
    written(tmp_path / "both" / "a.npy")
    written(tmp_path / "both" / "b.npy", X[:, :5])
    (tmp_path / "bad.npy").write_bytes(b"no array")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    whole = written(tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-100])
    save_file({"x": torch.zeros(4, 2, dtype=torch.int8)}, tmp_path / "int.safetensors")
    for name, message in [
        ("none.npy", "no such file or folder"),
        ("empty", "has no .npy or .safetensors file"),
        ("cache", "looks like a folder of `saelab cache`; write `activations: {cache: "),
        ("both", "b.npy has rows of 5 numbers, and a.npy of 6"),
        ("bad.npy", "bad.npy: is no .npy array"),
        ("bad.safetensors", "cannot be read as a .safetensors file"),
        ("cut.npy", "cut.npy cannot be read as a .npy array"),
        ("int.safetensors", "x is I8; float16"),
    ]:
        with pytest.raises(SaelabError, match=message):
            opened(tmp_path / name)


def test_a_header_that_claims_to_be_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        file.write(b"\x93NUMPY\x02\x00" + (10**8).to_bytes(4, "little"))
        file.truncate(10**8 + 100)  # without blocks on the disk
    tracemalloc.start()
    with pytest.raises(SaelabError, match="its header has 100,000,000 bytes"):
        opened(tmp_path / "x.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_a_number_that_is_not_finite_is_an_error_with_file_and_row(tmp_path: Path, bad: float) -> None:
    second = X[:20].copy()
    second[7, 3] = bad
    written(tmp_path / "a.npy")
    written(tmp_path / "b.npy", second)
    array = opened(tmp_path)
    assert len(array.activations(torch.arange(50)[:, None], ["x"])["x"]) == 50
    with pytest.raises(SaelabError, match=r"b\.npy: row 7 has NaN, infinity"):
        all_rows(array)


@pytest.mark.parametrize("values", [X[:40], X + 1])
def test_a_file_that_changed_is_an_error(tmp_path: Path, values: np.ndarray) -> None:
    array = opened(written(tmp_path / "x.npy"))
    written(tmp_path / "x.npy", values)
    later = (tmp_path / "x.npy").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "x.npy", ns=(later, later))  # the clock of a file system may be coarse
    with pytest.raises(SaelabError, match="was changed while it is in use"):
        all_rows(array)


# the rows of a run


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_rows, "BLOCK_TOKENS", 8)
    monkeypatch.setattr(Array, "block_tokens", 8)


def test_an_epoch_is_every_row_but_the_held_out_ones(tmp_path: Path, small_blocks: None) -> None:
    array = opened(written(tmp_path / "x.npy"))
    assert array.held_out_rows(100).tolist() == [[row] for row in range(40, 50)]
    assert array.held_out_rows(3).tolist() == [[40], [41], [42]]
    with array.batches("x", 7, seed=3, buffer_tokens=16) as batches:
        seen = []
        for batch in batches:
            if batches.cursor.epoch and not batches.cursor.group and batches.cursor.offset:
                break
            assert torch.equal(batch.values, torch.from_numpy(X[batch.tokens.numpy()]).float())
            seen += batch.tokens.tolist()
    assert sorted(seen) == list(range(40)) and seen != sorted(seen)


def test_from_every_batch_on_the_rest_is_the_same(tmp_path: Path, small_blocks: None) -> None:
    array = opened(written(tmp_path / "x.npy"))

    def source(start: dict | None = None) -> FromCache:
        return FromCache(array, "x", batch_tokens=7, seed=3, buffer_tokens=16, start=start)

    whole, states, batches = source(), [], []
    whole.sample()
    for _ in range(20):
        states.append(whole.state())
        batches.append(next(whole).tokens.tolist())
    assert {state["epoch"] for state in states} == {0, 1, 2} and states[0] == asdict(Cursor())
    for i, state in enumerate(states):
        again = source(state)
        assert [next(again).tokens.tolist() for _ in states[i:]] == batches[i:]


def test_an_array_has_one_site_and_no_gradients(tmp_path: Path) -> None:
    array = opened(written(tmp_path / "x.npy"))
    with pytest.raises(SaelabError, match="has no gradients"):
        array.batches("x", 7, seed=0, gradients=True)
    with pytest.raises(SaelabError, match="is one array, so a, b would all be the same"):
        array.batches(["a", "b"], 7, seed=0)


def test_the_identity_follows_content_and_split_and_not_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = X.copy()
    changed[0, 0] += 1
    first = opened(written(tmp_path / "x.npy")).fingerprint
    assert opened(written(tmp_path / "y.npy")).fingerprint == first
    assert opened(written(tmp_path / "z.npy", changed)).fingerprint != first
    assert opened(tmp_path / "x.npy", held_out=0.3).fingerprint != first
    monkeypatch.setattr(array_rows, "_STRETCHES", 4)
    monkeypatch.setattr(array_rows, "HASHED_BYTES", 8 * 6 * 8)  # 8 rows of 50, 2 at each of 4 places
    part = opened(tmp_path / "x.npy").fingerprint
    assert opened(tmp_path / "y.npy").fingerprint == part != first
    for row, noticed in ((0, True), (49, True), (5, False)):
        other = X.copy()
        other[row] += 1
        assert (opened(written(tmp_path / "z.npy", other)).fingerprint != part) == noticed


def test_labels_are_the_words_of_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "x.npy")
    held_out = opened(path).held_out_rows(3)
    ids, words = opened(path).words(held_out)
    assert (ids.tolist(), words) == ([[0], [1], [2]], ["row 40", "row 41", "row 42"])
    (tmp_path / "l.txt").write_text("".join(f"class {i % 2}\n" for i in range(50)))
    ids, words = opened(path, labels=str(tmp_path / "l.txt")).words(held_out)
    assert (ids.tolist(), words) == ([[0], [1], [0]], ["class 0", "class 1"])
    (tmp_path / "l.jsonl").write_text('"a\\nb"\n' * 40 + "3\n" * 10)
    assert opened(path, labels=str(tmp_path / "l.jsonl")).words(held_out)[1] == ["3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"a\n" * 49, "has 49 lines, and the array 50 rows"),
        ("l.txt", b"\xff\n" * 50, "cannot be read as labels"),
        ("l.jsonl", b"[1]\n" * 50, "line 41 is not one text or number"),
        ("l.jsonl", b"{\n" * 50, "cannot be read as labels"),
        ("l.jsonl", b'"a"\n' * 40 + b"[" * 100_000 + b"\n" * 10, "cannot be read as labels"),
    ],
)
def test_wrong_labels_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = written(tmp_path / "x.npy")
    (tmp_path / name).write_bytes(content)
    array = opened(path, labels=str(tmp_path / name))
    with pytest.raises(SaelabError, match=message):
        array.words(array.held_out_rows(3))
