"""What goes to TensorBoard and wandb: the lines of metrics.jsonl, once each, whatever stops the training."""

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

import saelab
from saelab.errors import SaelabError, WriteError
from saelab.runs import log
from saelab.runs.job import Job
from saelab.runs.sweep import sweep
from saelab.training.trainer import Trainer
from tests.runs.test_resume import config_of

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """30 steps, a histogram every 10, a state every 5."""
    monkeypatch.setattr(log, "HISTOGRAM_STEPS", 10)
    return config_of(tmp_path) | {"out": str(tmp_path / "project" / "run")}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb without a network, and with a key that must stay in the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb.teardown()
    yield
    wandb.teardown()


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events_of(run: Path) -> EventAccumulator:
    """What TensorBoard shows of a run, all of it."""
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    return found.Reload()


def check_events(run: Path) -> None:
    """Asserts that TensorBoard shows each number of each line once, at the line's tokens."""
    found, lines = events_of(run), lines_of(run)
    names = {name for line in lines for name in line} - {"tokens"}
    assert set(found.Tags()["scalars"]) == names | {log.NEVER_ACTIVE}
    for name in names:
        shown = [(event.step, event.value) for event in found.Scalars(name)]
        logged = [(line["tokens"], np.float32(line[name])) for line in lines if line.get(name) is not None]
        assert shown == logged, name


def killed(config: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train until an error that saves nothing, after `step` steps."""
    one_step = Trainer.step

    def step_or_die(self: Trainer, batch: Any) -> Any:
        if self.steps == step:
            raise RuntimeError("killed")
        return one_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_or_die)
        with pytest.raises(RuntimeError, match="killed"):
            saelab.train(config)
    return Path(config["out"])


def test_tensorboard_shows_the_lines_of_the_log(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the histogram is of the densities when its line was logged."""
    seen = {}
    observe = Trainer.step

    def step(self: Trainer, batch: Any) -> Any:
        line = observe(self, batch)
        seen[self.tokens] = self.usage.densities.numpy().copy()
        return line

    monkeypatch.setattr(Trainer, "step", step)
    run = saelab.train(config, ["training.log=tensorboard"])
    check_events(run)
    found = events_of(run)
    histograms, never = found.Histograms(log.HISTOGRAM), found.Scalars(log.NEVER_ACTIVE)
    assert [event.step for event in histograms] == [200, 2200, 4200, 6000] == [event.step for event in never]
    for event, count in zip(histograms, never, strict=True):
        densities, value = seen[event.step], event.histogram_value
        assert count.value == (densities == 0).sum()
        uppers = np.asarray(value.bucket_limit)
        logs = np.log10(densities[densities > 0])
        # TensorBoard puts a first, empty bucket in front
        bins = np.histogram(logs, len(uppers[uppers > value.min + 1e-9]), (value.min, value.max))[0]
        assert np.asarray(value.bucket)[-len(bins) :].tolist() == bins.tolist() and value.num == len(logs)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_log_elsewhere_changes_nothing_else(config: dict[str, Any], name: str, offline: None) -> None:
    runs = []
    for log_to in ("null", name):
        out = f"{config['out']}-{log_to}"
        runs.append(saelab.train(config, [f"out={out}", f"training.log={log_to}"]))
    for file in ("sae/sae_weights.safetensors", "sae/cfg.json"):
        assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes()
    assert [line["fvu"] for line in lines_of(runs[0])] == [line["fvu"] for line in lines_of(runs[1])]
    jobs = [Job(saelab.settings_of(run / "config.yaml")) for run in runs]
    assert jobs[0].training_inputs() == jobs[1].training_inputs()


def test_after_a_kill_no_step_is_in_tensorboard_twice(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill comes in the middle of an event, three steps after a state."""
    config["training"]["log"] = "tensorboard"
    run = killed(config, 13, monkeypatch)
    (events,) = (run / "tensorboard").iterdir()
    check_events(run)
    with events.open("ab") as file:
        file.write(struct.pack("<Q", 100) + b"cut off")
    assert saelab.resume(run) == run
    check_events(run)
    assert len(lines_of(run)) == 30
    assert [event.step for event in events_of(run).Histograms(log.HISTOGRAM)] == [200, 2200, 4200, 6000]


def records_of(folder: Path) -> list[Record]:
    """The records in a wandb file: in blocks of 32 kB, each part with a checksum, its length and its kind."""
    wandb.teardown()  # its process may still be writing
    (file,) = folder.glob("*.wandb")
    content, found, at, record = file.read_bytes(), [], 7, b""
    while at < len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(record))
            record = b""
    return found


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The numbers of each line that wandb has recorded, by name; those of a histogram are HISTOGRAM/values."""
    found = []
    for record in records_of(folder):
        if record.HasField("history"):
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def test_wandb_gets_the_lines_and_a_resumed_run_is_the_same_run(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    offline: None,
) -> None:
    config["training"]["log"] = "wandb"
    run = killed(config, 13, monkeypatch)
    first, said = lines_of(run), []
    saelab.resume(run, say=said.append)
    folders = sorted((run / "wandb").glob("offline-run-*"))
    known = json.loads((run / "wandb.json").read_text())
    assert len(folders) == 2 and (known["project"], known["name"]) == ("project", "run")
    for folder in folders:
        (began,) = (record.run for record in records_of(folder) if record.HasField("run"))
        assert (began.run_id, began.project, began.display_name) == (known["id"], "project", "run")
        sent = {item.key: json.loads(item.value_json) for item in began.config.update}
        assert sent["sae"]["n_features"] == 64 and sent["training"]["log"] == "wandb"
    for folder, lines in zip(folders, (first, lines_of(run)[10:]), strict=True):
        history = history_of(folder)
        assert [line["_step"] for line in history] == [line["tokens"] for line in lines]
        for shown, logged in zip(history, lines, strict=True):
            assert {name: shown[name] for name in logged if name != "tokens"} == {
                name: value for name, value in logged.items() if name != "tokens"
            }
        for line in history:
            counts = line.get(f"{log.HISTOGRAM}/values")
            assert (counts is not None) == (line["step"] % 10 == 0 or line["step"] == 29)
            assert counts is None or sum(counts) + line[log.NEVER_ACTIVE] == 64
    output = capfd.readouterr()
    assert f"wandb: offline; `wandb sync {folders[-1]}` uploads the log" in said and output.out == output.err == ""
    for path in filter(Path.is_file, run.rglob("*")):
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(said)


def test_each_run_of_a_sweep_has_a_log_of_its_own(config: dict[str, Any], offline: None) -> None:
    overrides = ["training.log=wandb", "training.log_every=5"]
    out = sweep(config | {"sweep": {"sae.k": [2, 4]}}, overrides)
    ids = []
    for run in (out / "k2", out / "k4"):
        (folder,) = (run / "wandb").glob("offline-run-*")
        assert [line["fvu"] for line in history_of(folder)] == [line["fvu"] for line in lines_of(run)]
        known = json.loads((run / "wandb.json").read_text())
        assert (known["project"], known["name"]) == (out.name, run.name)
        ids.append(known["id"])
    assert ids[0] != ids[1]


CHILD = """
import json, sys, saelab
for name in ("null", "tensorboard"):
    saelab.train(json.loads(sys.argv[1]), [f"out={sys.argv[2]}-{name}", f"training.log={name}"])
    print(*({module.split(".")[0] for module in sys.modules} & {"wandb", "tensorboard", "tensorflow"}), "|")
"""


def test_nothing_is_imported_that_is_not_asked_for(config: dict[str, Any], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(config), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert [line.strip() for line in done.stdout.split("|")[:2]] == ["", "tensorboard"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_named_before_training(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    for train in (saelab.train, lambda config, overrides: sweep(config | {"sweep": {"sae.k": [2, 4]}}, overrides)):
        with pytest.raises(SaelabError, match=rf"^training\.log: {name} .*; `pip install {name}` installs it"):
            train(config, [f"training.log={name}"])
    assert not Path(config["out"]).exists()


def test_wandb_without_a_login_is_refused_before_training(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY")
    for mode, message in (("online", "No API key.*`wandb login`.*WANDB_MODE=offline"), ("nonsense", "mode")):
        monkeypatch.setenv("WANDB_MODE", mode)
        wandb.teardown()
        with pytest.raises(SaelabError, match=f"(?s)training.log: wandb cannot be used .*{message}"):
            saelab.train(config, ["training.log=wandb"])
    assert not Path(config["out"]).exists()


def test_a_log_that_cannot_be_written_ends_the_training_with_advice(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    write = os.write

    def full(handle: int, content: bytes) -> int:
        if b"gradient_norm" in bytes(content) and not bytes(content).startswith(b"{"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(WriteError, match=r"tensorboard: the disk is full.*`saelab train --resume .*` goes on"):
            saelab.train(config, ["training.log=tensorboard"])

    def lost(*arguments: object, **named: object) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb.Run, "log", lost)
    with pytest.raises(WriteError, match=r"wandb does not take the log \(Connection lost\).*training\.log=null"):
        saelab.train(config, [f"out={config['out']}2", "training.log=wandb"])


def test_another_log_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SaelabError, match=r"training\.log: 'mlflow' is none of tensorboard, wandb and null"):
        saelab.train(config, ["training.log=mlflow"])


def test_the_progress_has_the_last_logged_figures(config: dict[str, Any]) -> None:
    notes: list[str] = []

    def track(items: Iterator[Any], label: str, total: int, size: Any, note: Any = None) -> Iterator[Any]:
        for item in items:
            yield item
            if label == "training":
                notes.append(note())

    run = saelab.train(config, ["training.log_every=10"], track=track)
    first, *_, last = lines_of(run)
    for note, line in ((notes[0], first), (notes[-1], last)):
        assert note == f"FVU {line['fvu']:.3f}, L0 {line['l0']:.1f}, {line['dead']} dead"
    out = sweep(config | {"sweep": {"sae.k": [2, 4]}}, [f"out={run}-k"], track=track)
    low, high = sorted(lines_of(out / name)[-1]["fvu"] for name in ("k2", "k4"))
    assert notes[-1] == f"2 runs, FVU {low:.3f} to {high:.3f}"
