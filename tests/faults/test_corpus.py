"""Text that cannot be read, met by the commands that read it: one message that says what is wrong, where, and what to
do; exit code 2; nothing written that could be taken for a result."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.corpus.made import TEXTS, write
from tests.faults.tools import command, the_one_error
from tests.tiny import CONTEXT, model_folder

STAGES = pytest.mark.parametrize("stage", ["train", "cache"])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a stage on a corpus, in an empty folder; returns the exit code, stdout and stderr."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(stage: str, corpus: object, *overrides: str) -> tuple[int, str, str]:
        config = {
            "model": str(model_folder("gpt2")),
            "site": "blocks.1.hook_resid_post",
            "context": CONTEXT,
            "out": "run",
            "device": "cpu",
            "corpus": str(corpus),
            "sae": {"n_features": 64, "k": 4},
            "training": {"tokens": 6000, "batch": 200},
        }
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        out = ["--out", "cache"] if stage == "cache" else []
        return command(monkeypatch, capsys, stage, tmp_path / "config.yaml", *overrides, *out)

    return run


@pytest.fixture
def fails(run):
    """Runs a stage that fails; returns its only message, after checking for exit code 2."""

    def fail(stage: str, corpus: object, *overrides: str) -> str:
        code, out_text, error = run(stage, corpus, *overrides)
        message = the_one_error(error)
        assert code == 2 and out_text == "" and message.startswith("error: corpus: ")
        return message

    return fail


def written() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


@STAGES
def test_no_text_column(stage, fails, tmp_path):
    """The message names the file, the column looked for, those there are, and the setting that chooses one."""
    path = write(tmp_path / "a.jsonl", column="body")
    message = fails(stage, path)
    assert all(word in message for word in (str(path), "'text'", "id, body", "`text_column`"))
    message = fails(stage, path, "corpus.text_column=bdy")
    assert all(word in message for word in ("'bdy'", "id, body", "Nearest: body"))
    assert not written()


@STAGES
@pytest.mark.parametrize(
    "name, content", [("a.txt", b""), ("a.jsonl", b""), ("a.csv", b"id,text\n"), ("a.txt", b" \n")]
)
def test_an_empty_file(stage, fails, tmp_path, name, content):
    """No bytes, no rows, nothing but blanks: the file is named as one without text."""
    path = tmp_path / name
    path.write_bytes(content)
    message = fails(stage, path)
    assert str(path) in message and any(word in message for word in ("is empty", "holds no rows", "holds no text"))
    assert not written()


@STAGES
def test_a_row_that_is_not_text_at_the_beginning(stage, fails, tmp_path):
    """The message names the line and its content, before anything is written."""
    path = write(tmp_path / "a.jsonl", [7, *TEXTS])
    message = fails(stage, path)
    assert all(word in message for word in (f"{path}, line 1:", "int", "not text", "repair or remove that row"))
    assert not written()


@STAGES
def test_invalid_utf8_at_the_beginning(stage, fails, tmp_path):
    """The message names the byte, its position and a way to convert the file, before anything is written."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9\n" + "\n\n".join(TEXTS).encode())
    message = fails(stage, path)
    assert all(word in message for word in (str(path), "UTF-8", "0xe9 at byte 3", "iconv"))
    assert not written()


@STAGES
@pytest.mark.parametrize("fault", ["a row that is not text", "invalid UTF-8"])
def test_trouble_far_into_the_text(stage, fault, fails, tmp_path):
    """A fault past the beginning is found when it is read. It is named too, and the text before it gives no result:
    no checkpoint, no shard, no manifest."""
    path = write(tmp_path / "a.jsonl", [*TEXTS, 7 if fault == "a row that is not text" else "text", *TEXTS])
    if fault == "invalid UTF-8":
        path.write_bytes(path.read_bytes() + b'{"text": "caf\xe9"}\n')
    message = fails(stage, path)
    assert (
        "line 201: 'text' is a value of type int, not text" if fault == "a row that is not text" else "0xe9 at byte"
    ) in message
    assert str(path) in message
    assert not [name for name in written() if name.endswith((".safetensors", "manifest.json", "train.json"))]


@STAGES
def test_empty_documents_are_reported_at_the_end(stage, run, tmp_path):
    """They do not stop a stage; with a corpus without any there is no such line."""
    empty = write(tmp_path / "empty.jsonl", [text for text in TEXTS for text in (text, None)])
    code, _, output = run(stage, empty)
    assert code == 0 and "corpus: 200 of 400 documents are empty (null, missing or blank) and were left out" in output
    shutil.rmtree("run" if stage == "train" else "cache")
    code, _, output = run(stage, write(tmp_path / "a.jsonl"))
    assert code == 0 and "are empty" not in output


@STAGES
def test_a_split_that_is_not_there(stage, fails, tmp_path):
    """The message names the splits of the folder, and a plain text has none."""
    (tmp_path / "data").mkdir()
    for name in ("train.csv", "test.csv"):
        write(tmp_path / "data" / name)
    message = fails(stage, tmp_path / "data", "corpus.split=no_such_split")
    assert "corpus: split: " in message and "its splits are train, test" in message
    message = fails(stage, write(tmp_path / "a.txt"), "corpus.split=test")
    assert f"the file {tmp_path / 'a.txt'} has no splits" in message
    assert not written()


@STAGES
def test_a_hub_that_cannot_be_reached(stage, fails, monkeypatch, no_network):
    """The message says so, and what can be read without a network: the demo, local files, a copy made elsewhere."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    message = fails(stage, "someone/texts")
    no_network.unlink()  # it tried to connect, as it should
    assert "someone/texts cannot be reached" in message
    assert all(word in message for word in ("`corpus: demo`", "local file", "hf download someone/texts"))
    assert not written()


@STAGES
def test_offline_mode_is_named_as_the_reason(stage, fails, monkeypatch):
    """If a variable keeps the libraries offline, the message names it, and no connection is tried."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = fails(stage, "someone/texts")
    assert "HF_HUB_OFFLINE is set" in message and "hf download someone/texts" in message
    assert not written()
