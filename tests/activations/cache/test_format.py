"""FORMAT.md describes the files on disk: a cache is read and checked with nothing else."""

import hashlib
import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open

from saelab.activations.cache import layout
from saelab.errors import SaelabError
from tests.activations.cache.made import BOS, SITES, Rows, contents, identity, values, write

EXAMPLE_SITE = "blocks.2.hook_resid_post"
BEFORE = """import sys
sys.modules["saelab"] = None  # importing it now is an ImportError
shards = []
"""
AFTER = """
    shards.append({"x": x.tolist(), "dtype": str(x.dtype)} | {name: of.tolist() for name, of in origin.items()})
json.dump(shards, sys.stdout)
"""
"""Code around the example of FORMAT.md, which ends inside its loop, to print what it has read."""


def test_the_example_of_the_format_reads_a_cache_without_saelab(tmp_path: Path) -> None:
    """It runs unchanged, in a folder where DIR is a cache of the site that it names."""
    text = (Path(layout.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example and len([line for line in example[1].splitlines() if line.strip()]) < 10
    manifest = write(tmp_path / "DIR", identity(sites={EXAMPLE_SITE: 8}))
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + example[1].rstrip() + AFTER],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shards = json.loads(done.stdout)
    assert [len(shard["x"]) for shard in shards] == [shard["tokens"] for shard in manifest.shards]
    assert len(shards) > 1 and {shard["dtype"] for shard in shards} == {"torch.float32"}
    found = {name: torch.tensor([value for shard in shards for value in shard[name]]) for name in ("x", *layout.ORIGIN)}
    ids = torch.from_numpy(np.stack(list(islice(Rows(0), sum(shard["rows"] for shard in manifest.shards)))))
    row, position = (ids != BOS).nonzero(as_tuple=True)
    for name, expected in (("rows", row), ("positions", position), ("tokens", ids[row, position].long())):
        assert torch.equal(found[name], expected), name
    assert torch.equal(found["x"], values(found["tokens"], 8, 0))


def test_the_format_names_what_is_on_the_disk() -> None:
    text = (Path(layout.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    for name in ("manifest.json", "unfinished/", "identity.json", "block_tokens", "first_row", "xxh3", "sha256"):
        assert name in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("gradients", [False, True])
def test_every_file_is_what_safetensors_reads_and_what_the_manifest_says(
    dtype: str, gradients: bool, tmp_path: Path
) -> None:
    facts = identity(dtype=dtype, gradients=gradients)
    manifest = write(tmp_path, facts)
    listed = {path for shard in manifest.shards for path in shard["files"]}
    assert listed | {layout.MANIFEST} == set(contents(tmp_path)), "no file more, none less"
    for shard in manifest.shards:
        n = shard["tokens"]
        for path, of in shard["files"].items():
            data = (tmp_path / path).read_bytes()
            assert len(data) == of["bytes"] and hashlib.sha256(data).hexdigest() == of["sha256"]
            header = 8 + int.from_bytes(data[:8], "little")
            assert header % 8 == 0
            entries = json.loads(data[8:header])
            digests = [xxhash.xxh3_64() for _ in range(0, n, facts["block_tokens"])]
            with safe_open(tmp_path / path, "pt") as file:
                assert set(file.keys()) == set(entries) and file.metadata() is None
                for name in entries:
                    tensor = file.get_tensor(name)
                    begin, end = entries[name]["data_offsets"]
                    raw = data[header + begin : header + end]
                    step = len(raw) // n
                    for digest, at in zip(digests, range(0, n, facts["block_tokens"]), strict=True):
                        digest.update(raw[at * step : min(n, at + facts["block_tokens"]) * step])
                    expected = torch.int32 if path.startswith("tokens/") else getattr(torch, dtype)
                    if name == "gradients" and dtype != "float32":
                        expected = torch.bfloat16
                    assert tensor.dtype == expected
                    assert tensor.shape == ((n,) if path.startswith("tokens/") else (n, SITES[path.split("/")[0]]))
            assert of["blocks"] == "".join(digest.hexdigest() for digest in digests)


def test_the_manifest_adds_up_its_shards(tmp_path: Path) -> None:
    facts = identity()
    manifest = write(tmp_path, facts)
    written = json.loads((tmp_path / layout.MANIFEST).read_bytes())
    for name in ("tokens", "rows", "skipped"):
        assert written[name] == sum(shard[name] for shard in manifest.shards)
    first = 0
    for shard in manifest.shards:
        assert shard["first_row"] == first == shard["start"]["row"]
        first += shard["rows"]
        assert shard["rows"] == facts["rows_per_forward"] * facts["passes_per_shard"] or shard is manifest.shards[-1]
        assert shard["rows"] % facts["rows_per_forward"] == 0, "shards end where passes end"
    assert manifest.tokens >= facts["tokens"] > manifest.tokens - facts["rows_per_forward"] * facts["context"]
    without = re.sub(rb'"checksum": "\w+"', b'"checksum": ""', (tmp_path / layout.MANIFEST).read_bytes())
    assert written["checksum"] == hashlib.sha256(without).hexdigest()


def test_equal_identities_give_equal_bytes_in_any_folder_at_any_time(tmp_path: Path) -> None:
    write(tmp_path / "here", identity(gradients=True))
    write(tmp_path / "elsewhere" / "and later", identity(gradients=True))
    assert contents(tmp_path / "here") == contents(tmp_path / "elsewhere" / "and later")
    assert str(tmp_path).encode() not in (tmp_path / "here" / layout.MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"version": 1', '"version": 2'), "version 2 of the format"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "does not match its own checksum"),
        (lambda text: text[: len(text) // 2], "does not match its own checksum"),
        (lambda text: "[]", "not the manifest of an activation cache"),
        (lambda text: text.replace("saelab activations", "other"), "not the manifest of an activation cache"),
    ],
)
def test_a_manifest_that_is_not_as_written_is_refused(damage, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / layout.MANIFEST
    path.write_text(damage(path.read_text()))
    with pytest.raises(SaelabError, match=message) as caught:
        layout.read_manifest(tmp_path)
    assert str(path) in str(caught.value)


def test_difference_names_the_field() -> None:
    found = {"a": 1, "b": {"c": 2, "d": 3}, "e": 5}
    assert layout.difference(found, {"a": 1, "b": {"c": 2, "d": 3}}) is None
    assert layout.difference(found, {"a": 2}) == "a 1, not 2"
    assert layout.difference(found, {"b": {"c": 2, "d": 4}}) == "b.d 3, not 4"
    assert layout.difference(found, {"b": {"c": 2}}) == "b.d 3, not None"
    assert layout.difference(found, {"b": {"c": 2, "d": 3, "f": 1}}) == "b.f None, not 1"
