"""A run that is stopped and resumed equals, to the bit, the run that never stopped; other settings are refused."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab.errors import SaelabError
from saelab.runs import resume as resuming
from saelab.runs.config import leaves, settings_from
from saelab.runs.resume import FREE, RAISED, SAME, resumed_settings, states
from saelab.runs.save import write_settings
from saelab.training.state import load_state, save_state
from tests.faults.tools import command
from tests.runs.test_stages import small

ROOT = Path(__file__).parents[2]
Ask = Callable[..., dict[str, Any]]

METHODS = {
    "token": [],
    "mutual": ["sae.allocation=mutual_choice", "sae.aux=aux_zipf", "sae.selection=bfloat16"],
    "feature": ["sae.allocation={name: feature_choice, refresh: 7}", "sae.multi_topk=true"],
    "gradient": ["sae.affinity=gradient", "sae.aux={name: aux_k, lift: true}"],
    "jumprelu": ["sae.allocation=threshold", "sae.encoder=jumprelu", "sae.sparsity={name: l0, target_l0: 4}"],
    "relu": ["sae.allocation=threshold", "sae.sparsity={name: l1, coefficient: 0.1}", "sae.freeze=decoder"],
}


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Trains in another process, which a signal may end."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "runs" / "resume_child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None

    def send(
        call: str,
        run: Path,
        config: Any = None,
        overrides: Any = (),
        step: int | None = None,
        number: int = 9,
        renames: int | None = None,
    ) -> dict[str, Any]:
        line = {"call": call, "run": str(run), "config": config, "overrides": list(overrides)}
        child.stdin.write(json.dumps(line | {"step": step, "signal": number, "renames": renames}) + "\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())

    yield send
    child.stdin.close()
    child.wait(120)


def config_of(tmp_path: Path, cached: bool = False) -> dict:
    """30 steps over several epochs of the text, groups of the shuffle, and shards; all lines logged."""
    config = small(tmp_path)
    config["activations"] = {"stream": {"buffer_tokens": 800, "rows_per_forward": 8}}
    config["training"] = {"tokens": 6000, "batch": 200, "lr": 3e-3, "log_every": 1, "checkpoint": {"tokens": 1000}}
    if cached:
        cache = tmp_path / "cache"
        if not cache.exists():
            write = {"gradients": True, "rows_per_forward": 8, "shard_tokens": 8 * 64}
            saelab.cache(config | {"cache": write}, cache, tokens=2500)
        config["activations"] = {"cache": {"path": str(cache), "buffer_tokens": 800}}
    return config


def contents(run: Path) -> dict[str, Any]:
    """The parts of a run that must be equal: weights, facts, log without the speed, last state, evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second")
    state = load_state(states(run)[-1])
    state.pop("seconds")
    config = json.loads((run / "sae" / "cfg.json").read_text())
    evaluation = saelab.evaluate(run).to_dict()
    weights = (run / "sae" / "sae_weights.safetensors").read_bytes()
    return {"weights": weights, "config": config, "log": lines, "state": state, "evaluation": evaluation}


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["stream", "cache"])
@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_in_other_processes_equals_never_stopped(
    method: str, cached: bool, tmp_path: Path, ask: Ask
) -> None:
    """Stopped after 7 steps (warm-up, within a group), 15 (decay, feature choice begins) and 23 (another epoch)."""
    config = config_of(tmp_path, cached)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ask("train", whole, config, [*METHODS[method], f"out={whole}"])["code"] == 0
    stop = {"number": signal.SIGTERM}
    reply = ask("train", parts, config, [*METHODS[method], f"out={parts}"], step=7, **stop)
    assert any(f"`saelab train --resume {parts}` goes on" in line for line in reply["messages"])
    assert reply["stopped"] == 143
    assert not json.loads((parts / "train.json").read_text())["complete"]
    for step in (15, 23, None):
        assert ask("resume", parts, step=step, **stop)["stopped"] == (143 if step else None)
    assert json.loads((parts / "train.json").read_text())["complete"]
    assert_same(contents(parts), contents(whole))


@pytest.mark.slow
def test_killed_at_ten_random_steps_and_resumed_equals_never_killed(tmp_path: Path, ask: Ask) -> None:
    """With states every 5 steps; the first kills come before there is one."""
    config = config_of(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ask("train", whole, config, [*METHODS["mutual"], f"out={whole}"])["code"] == 0
    steps = sorted(random.Random(5).sample(range(1, 30), 10))
    assert ask("train", killed, config, [*METHODS["mutual"], f"out={killed}"], step=steps[0])["code"] == -signal.SIGKILL
    for step in steps[1:]:
        assert ask("resume", killed, step=step)["code"] == -signal.SIGKILL
    assert ask("resume", killed)["code"] == 0
    assert_same(contents(killed), contents(whole))


def test_a_run_continues_to_more_tokens_and_a_complete_one_does_not_change(tmp_path: Path) -> None:
    config, said = config_of(tmp_path), []
    run = saelab.train(config, ["training.tokens=2000"])
    before = (run / "sae" / "sae_weights.safetensors").read_bytes()
    assert saelab.resume(run, say=said.append) == run
    assert any("all 2,000 tokens are trained on" in line for line in said)
    assert (run / "sae" / "sae_weights.safetensors").read_bytes() == before
    saelab.resume(run, ["training.tokens=3000"])
    record = json.loads((run / "train.json").read_text())
    assert record["complete"] and record["tokens"] == 3000
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(range(15))
    assert "tokens: 3000" in (run / "config.yaml").read_text()


def test_every_setting_is_free_raised_or_the_same(tmp_path: Path) -> None:
    """A new setting must be put into one of the three sets of runs/resume.py."""
    sources = [{"cache": {"path": "x"}}, {"array": {"path": "x"}}, {}]
    trees = [asdict(settings_from(small(tmp_path) | {"activations": source})) for source in sources]
    trees.append(asdict(settings_from(small(tmp_path) | {"second_model": "x", "more_sites": ["y@second"]})))
    names = {name for tree in trees for name in leaves(tree)}
    assert {name for name in names if not name.startswith("analysis.")} == FREE | RAISED | SAME
    assert not (FREE & RAISED or FREE & SAME or RAISED & SAME)


def test_another_setting_is_refused_with_both_values(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = settings_from(config_of(tmp_path))
    (run / "config.yaml").write_text(config.to_yaml())
    for override, message in {
        "sae.k=5": r"sae\.k: is 4 in the run, not 5",
        "training.lr=1": r"training\.lr: is 0\.003 in the run, not 1",
        "training.tokens=5000": r"training\.tokens: is 6000 in the run, not 5000 \(it can only be raised\)",
        "seed=1": r"seed: is 0 in the run, not 1",
        "eval.tokens=7": r"eval\.tokens: is 1500 in the run, not 7",
        "activations.cache=elsewhere": r"activations\.cache\.path: is None in the run, not elsewhere",
    }.items():
        with pytest.raises(SaelabError, match=message):
            resumed_settings(run, settings_from(asdict(config), [override]))
    for override in ("training.tokens=7000", "device=cuda", "training.log_every=7", "training.checkpoint.keep=9"):
        resumed_settings(run, settings_from(asdict(config), [override]))


def test_paths_are_the_same_if_they_lead_to_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run names its files by absolute paths, a config may name them from where the user stands."""
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path) | {"activations": {"cache": "cache"}}
    config["corpus"] |= {"source": "book.txt"}
    (tmp_path / "run").mkdir()
    write_settings(tmp_path / "run", saelab.settings_of(config))
    assert "source: /" in (tmp_path / "run" / "config.yaml").read_text()
    resumed_settings(tmp_path / "run", saelab.settings_of(config))
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(SaelabError, match=r"corpus.source: is .*/book.txt in the run, not book.txt"):
        resumed_settings(tmp_path / "run", saelab.settings_of(config))


def test_another_text_or_folder_is_refused(tmp_path: Path) -> None:
    run = saelab.train(config_of(tmp_path), ["training.tokens=1000"])
    (tmp_path / "book.txt").write_text((tmp_path / "book.txt").read_text() + "\n\nmore text than there was before")
    with pytest.raises(SaelabError, match=r"was trained on something else .*: its corpus"):
        saelab.resume(run, ["training.tokens=2000"])
    with pytest.raises(SaelabError, match="not a run folder"):
        saelab.resume(tmp_path)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    run = saelab.train(config_of(tmp_path), ["training.tokens=1000"])
    (state,) = states(run)
    (state / "state.safetensors").write_bytes(b"short")
    with pytest.raises(SaelabError, match=r"state/000000005: the state of the training cannot be read"):
        saelab.resume(run, ["training.tokens=2000"])


def test_the_last_states_are_kept_and_written_at_their_interval(tmp_path: Path) -> None:
    run = saelab.train(config_of(tmp_path), ["training.checkpoint.keep=3"])
    assert [path.name for path in states(run)] == ["000000020", "000000025", "000000030"]
    assert {path.name for path in (run / "state").iterdir()} == {path.name for path in states(run)}
    none = ["training.checkpoint.tokens=null", "training.checkpoint.minutes=null", f"out={tmp_path / 'none'}"]
    assert [path.name for path in states(saelab.train(config_of(tmp_path), none))] == ["000000030"]


@pytest.mark.parametrize(
    "file",
    [
        "state/000000010.tmp/state.safetensors.tmp",
        "state/000000010.tmp/state.json.tmp",
        "metrics.jsonl",
        "sae.tmp/cfg.json.tmp",
        "train.json.tmp",
    ],
)
def test_a_disk_that_fills_up_ends_a_training_that_can_be_resumed(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message, exit code 2, the last state kept; half of the write is done. Later the run equals one that was not
    disturbed."""
    config = config_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole, really_write = saelab.train(config, [f"out={tmp_path / 'whole'}"]), os.write
    full = False

    def write(handle: int, content: Any) -> int:
        nonlocal full
        path = os.readlink(f"/proc/self/fd/{handle}")
        full = full or (path.endswith(f"run/{file}") and bool(states(tmp_path / "run")))
        if full and path.endswith(file) and len(content) > 20:
            return really_write(handle, content[: len(content) // 2])
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really_write(handle, content)

    monkeypatch.setattr(os, "write", write)
    code, _, error = command(monkeypatch, capsys, "train", tmp_path / "config.json")
    monkeypatch.undo()
    run = tmp_path / "run"
    errors = [line for line in error.splitlines() if line.startswith("error")]
    assert code == 2 and full and len(errors) == 1 and "Traceback" not in error
    assert "the disk is full: " in errors[0]
    assert f"make room and run again: `saelab train --resume {run}` goes on from the last state" in errors[0]
    assert states(run) and not list(run.rglob("*.tmp")) and not json.loads((run / "train.json").read_text())["complete"]
    saelab.resume(run)
    assert_same(contents(run), contents(whole))


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the state of the first one is being written: the earlier files stay."""
    config, saved = config_of(tmp_path), resuming.save_state
    calls = []

    def interrupted(folder: Path, *rest: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        saved(folder, *rest)

    monkeypatch.setattr(resuming, "save_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saelab.train(config)
    assert [path.name for path in states(tmp_path / "run")] == ["000000005"] and len(calls) == 2


def test_the_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    state = {
        "a": {"b": torch.randn(3, 2), "c": torch.tensor(2**-60, dtype=torch.float64)},
        "n": 7,
        "x": 0.1 + 0.2,
        "none": None,
        "list": [1.5, "two"],
        "rng": torch.get_rng_state(),
    }
    save_state(tmp_path, state)
    assert_same(load_state(tmp_path), state)
    assert load_file(tmp_path / "state.safetensors").keys() == {"a/b", "a/c", "rng"}


def test_a_run_that_was_stopped_after_its_last_step_is_finished(tmp_path: Path) -> None:
    """A kill during calibration leaves such a run; `saelab run` continues it too."""
    config = config_of(tmp_path)
    run = saelab.train(config, METHODS["mutual"])
    expected = contents(run)
    record = json.loads((run / "train.json").read_text())
    for finish in (lambda: saelab.resume(run), lambda: saelab.run(config, METHODS["mutual"])):
        shutil.rmtree(run / "sae")
        (run / "train.json").write_text(json.dumps(record | {"complete": False}))
        finish()
        assert json.loads((run / "train.json").read_text())["complete"]
        assert_same(contents(run), expected)


def test_a_checkpoint_without_a_state_is_not_replaced(tmp_path: Path) -> None:
    """As runs of earlier versions are."""
    run = saelab.train(config_of(tmp_path), ["training.tokens=1000"])
    shutil.rmtree(run / "state")
    before = (run / "sae" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(
        SaelabError, match=r"has no state to go on from; `saelab train .*config.yaml --force` trains it again"
    ):
        saelab.resume(run, ["training.tokens=2000"])
    assert (run / "sae" / "sae_weights.safetensors").read_bytes() == before
