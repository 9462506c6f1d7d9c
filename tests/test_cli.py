"""The command as a user types it: a mistake is one message and exit code 2, and nothing is left behind."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from saelab import cli, cli_tables
from saelab.errors import SaelabError


def saelab(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "saelab.cli", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def the_one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The message of a mistake: one line, and nothing beside it but what is being loaded."""
    lines = [
        line
        for line in result.stderr.splitlines()
        if not line.startswith(("model: ", "corpus: ", "memory: ", "disk: "))
    ]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def test_every_command_has_help_with_an_example(tmp_path: Path) -> None:
    top = saelab("--help", cwd=tmp_path)
    assert top.returncode == 0
    for command in (
        "demo",
        "run",
        "train",
        "cache",
        "plan",
        "eval",
        "index",
        "explain",
        "score",
        "export",
        "push",
        "app",
    ):
        assert command in top.stdout
        assert f"Example: saelab {command}" in saelab(command, "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "quickstart", "sae.k=0"], "sae.k: 0 is not between"),
        (["train", "quickstart", "sae.k=5000"], "sae.k: 5000 is not between 1 and n_features"),
        (["train", "quickstart", "sae.kk=5"], "sae.kk: no such setting. Nearest: k"),
        (["train", "quickstart", "site=blocks.2.hook_residpost"], "Nearest: blocks.2.hook_resid_post"),
        (["train", "nowhere.yaml"], "no such file"),
        (["train", "binary.yaml"], "not a text file"),
        (["train", "quickstart", "corpus=binary.yaml"], "binary.yaml"),
        (["train", "quickstart", "corpus=missing.txt"], "missing.txt"),
        (["cache", "quickstart"], "--out: name a folder"),
        (["cache", "--out", "new"], "CONFIG: name a config"),
        (["cache", "--verify", "--out", "new"], "new: no activation cache"),
        (["cache", "quickstart", "--out", "binary.yaml"], "binary.yaml"),
        (["cache", "quickstart", "--out", "new", "cache.dtype=int8"], "cache.dtype: 'int8'"),
        (["cache", "quickstart", "--out", "new", "cache.sites=[blocks.9.hook_resid_post]"], "blocks.9.hook_resid_post"),
        (["train", "quickstart", "activations.cache=new"], "new: no activation cache"),
        (["eval", "."], "not a run folder"),
        (["index", "runs"], "not a run folder"),
        (["export", "runs", "--to", "csv"], "runs: not a run folder"),
        (["export", "runs", "--to", "pickle"], "--to: there is no 'pickle'"),
        (["app", "missing"], "no such folder"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\x00\xff\xfe\x80" * 40)
    result = saelab(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in the_one_error(result)
    assert [p.name for p in tmp_path.iterdir()] == ["binary.yaml"]


def test_a_model_that_cannot_be_reached_is_said_soon_and_without_a_librarys_log(
    tmp_path: Path, no_network: Path
) -> None:
    result = saelab("train", "quickstart", "model=nobody/nothing", cwd=tmp_path)
    no_network.unlink(missing_ok=True)  # the attempt is what this is about
    assert result.returncode == 2
    assert "the Hub cannot be reached" in the_one_error(result)
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = saelab("app", ".", "--port", port, cwd=tmp_path)
    assert result.returncode == 2 and f"try --port {port + 1}" in the_one_error(result)


@pytest.mark.usefixtures("no_network")
def test_the_demos_steps_need_no_network(tmp_path: Path) -> None:
    small = [
        "sae.n_features=256",
        "sae.k=8",
        "training.tokens=20000",
        "activations.stream.buffer_tokens=8192",
        "eval.tokens=4000",
        "eval.ce_tokens=2000",
        "features.tokens=4000",
    ]
    result = saelab("demo", "--no-app", *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "quickstart"
    assert json.loads((run / "train.json").read_text())["complete"]
    assert json.loads((run / "eval.json").read_text())["fvu"] < 1
    assert (run / "features" / "manifest.json").is_file()
    assert "FVU" in result.stdout and "c_dec" in result.stdout and "never active on 4," in result.stdout
    begin = time.monotonic()
    again = saelab("run", "quickstart", *small, cwd=tmp_path)  # what demo is, but for the explorer
    assert again.stderr.count("up to date") == 3, again.stderr
    assert again.stdout == result.stdout
    assert time.monotonic() - begin < 120
    taken = saelab("train", "quickstart", *small, cwd=tmp_path)
    assert taken.returncode == 2 and "--force" in taken.stderr


def test_an_evaluation_of_an_earlier_version_is_printed_and_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = ("fvu", "l0", "cosine", "ce_clean", "ce_spliced", "delta_ce", "ce_zero_ablated", "ce_mean_ablated", "kl")
    shares = ("loss_recovered_zero", "loss_recovered_mean", "never_active_share", "share_below_1e4")
    counts = {"tokens": 10, "ce_tokens": 9, "never_active": 1, "n_features": 4, "site": "s"}
    written = dict.fromkeys((*figures, *shares), 0.5) | counts | {"loss_recovered_mean": None}
    cli_tables.print_evaluation(tmp_path, written)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("│")[2].strip() for line in lines if "c_dec" in line] == ["not measured yet: saelab eval"]
    assert [line.split("│")[2].strip() for line in lines if "recovered, mean" in line] == ["undefined"]
    assert any("cosine(x, reconstruction)" in line for line in lines)
    cli_tables.print_evaluation(tmp_path, written | {"site": "s -> t"})
    assert "cosine(target, reconstruction)" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [{"tokens": "x"}, {"ce_tokens": None}, {"fvu": [1]}])
def test_a_damaged_evaluation_is_one_message(damage: dict, tmp_path: Path) -> None:
    found = {"tokens": 10, "ce_tokens": 9, "never_active": 1, "n_features": 4, "site": "s", "never_active_share": 0.5}
    (tmp_path / "eval.json").write_text(json.dumps(found | damage))
    with pytest.raises(SaelabError, match=r"eval.json cannot be read as an evaluation: .* makes it again"):
        cli_tables.show_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a" * 300, "File name too long"), ("\x1b[2J\n\udcff", "error: \\x1b[2J\\n\\udcff: no such file")],
)
def test_names_that_the_system_or_a_terminal_does_not_take(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["saelab", "plan", name])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and message in error


def test_a_stream_that_takes_text_only_gets_the_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.runs.train.train", lambda *_, **__: Path("runs/one"))
    monkeypatch.setattr(sys, "argv", ["saelab", "train", "quickstart"])
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and out.getvalue() == "runs/one\n"


def test_the_old_name_of_index_still_works_and_says_so(tmp_path: Path) -> None:
    result = saelab("features", "runs", cwd=tmp_path)
    assert result.returncode == 2 and "`saelab features` is now `saelab index`" in result.stderr
    assert "not a run folder" in result.stderr
