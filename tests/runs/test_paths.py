"""Paths that a user gives: `~` and environment variables are replaced, in settings, options and arguments."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import saelab
from saelab.errors import SaelabError, SettingError
from saelab.files import expanded
from saelab.runs import folder
from tests.faults.tools import command
from tests.runs.test_stages import small
from tests.tiny import model_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, with a model, a text and a config that names both; tests stand in an empty folder."""
    path = tmp_path / "home"
    path.mkdir()
    shutil.copytree(model_folder("gpt2"), path / "model")
    config: dict[str, Any] = small(path) | {"out": "~/runs/a", "model": "~/model"}
    config["corpus"] |= {"source": "$BOOKS/book.txt"}
    (path / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("BOOKS", str(path))
    return path


def test_every_path_of_every_command_is_expanded(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell leaves `out=~/x` and `--out=~/x` as they are."""

    def saelab_command(*arguments: object) -> str:
        code, out, error = command(monkeypatch, capsys, *arguments)
        assert code == 0, error
        return out + error

    config = "~/config.json"
    saelab_command("cache", config, "--out=~/caches/c", "--tokens=5000")
    assert "all as they were written" in saelab_command("cache", "--verify", "--out", "~/caches/c")
    saelab_command("plan", config, "--out=~/caches/d")
    saelab_command("train", config, "out=${BOOKS}/runs/b", "activations.cache=~/caches/c", "training.tokens=2000")
    saelab_command("run", config, "training.tokens=2000")
    saelab_command("train", "--resume=~/runs/a", "training.tokens=2200")
    saelab_command("eval", "~/runs/a", "corpus=~/book.txt")
    saelab_command("index", "~/runs/a")
    code, _, error = command(monkeypatch, capsys, "app", "~/nowhere")
    assert code == 2 and f"{home / 'nowhere'}: no such folder" in error

    assert [run.name for run in folder.find_runs("~/runs")] == ["a", "b"]
    assert saelab.load("~/runs/a").n_features == 64
    assert saelab.open_cache("$BOOKS/caches/c").tokens >= 5000
    assert folder.evaluations(home / "runs/a") == [home / "runs/a/eval.json"]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "{home}"),
        ("~/a", "{home}/a"),
        ("~root/a", str(Path("~root").expanduser() / "a")),
        ("$BOOKS/a", "{home}/a"),
        ("${BOOKS}2", "{home}2"),
        ("runs/~/a~", "runs/~/a~"),
        ("./demo", "./demo"),
        ("org/name", "org/name"),
        ("a$5", "a$5"),
    ],
)
def test_what_is_replaced(path: str, expected: str, home: Path) -> None:
    assert expanded(path) == expected.format(home=home)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "$SAELAB_NOT_SET/x", "${SAELAB_NOT_SET}/x"])
def test_an_unknown_user_or_variable_is_an_error_that_names_the_setting(
    path: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "there is no user nobody-of-this-name" if "~" in path else "the environment variable SAELAB_NOT_SET is not"
    for setting, name in {
        "out": "out",
        "model": "model.name",
        "corpus": "corpus.source",
        "activations.cache": "activations.cache.path",
    }.items():
        with pytest.raises(SaelabError, match=rf"config: {name}: .*/x: {reason}"):
            saelab.settings_of({"out": "x", "site": "s"}, [f"{setting}={path}"])
    with pytest.raises(SettingError, match=f"name: .*{reason}"):
        saelab.ModelSettings(path)
    for arguments in (["eval", path], ["train", "--resume", path], ["cache", "--verify", "--out", path], ["app", path]):
        code, _, error = command(monkeypatch, capsys, *arguments)
        assert code == 2 and reason in error
    assert not list(Path().iterdir())
