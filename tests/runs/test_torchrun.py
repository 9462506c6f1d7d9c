"""Trainings under torchrun, with real processes: the weights, what a state is good for, and what is said when they end.

Starting a process takes seconds, so that each test has one job of torchrun go through several commands
(torchrun_child.py), or several jobs take turns at one run.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab.runs.resume import states
from saelab.training.state import load_state
from tests.faults.test_disk_full import small_disk  # noqa: F401 (a fixture)
from tests.runs.test_stages import small

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BATCH = 200


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """30 steps, a state every 5."""
    config = small(tmp_path_factory.mktemp("config"))
    config["activations"] = {"stream": {"buffer_tokens": 800, "rows_per_forward": 8}}
    config["sae"] = {"n_features": 65, "k": 4, "allocation": "mutual_choice"}  # parts of 33 and 32 features
    return config | {
        "device": "cpu",
        "training": {"tokens": 30 * BATCH, "batch": BATCH, "lr": 3e-3, "log_every": 1, "checkpoint": {"tokens": 1000}},
    }


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun
    try:
        return saelab.train(config | {"out": str(tmp_path_factory.mktemp("whole") / "run")})
    finally:
        torch.set_num_threads(threads)


def run(folder: Path, processes: int, *commands: dict[str, Any], restarts: int = 0) -> tuple[str, int]:
    """What torchrun's processes print in the working folder `folder`, without its own lines, and its exit code."""
    options = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    child = [str(ROOT / "tests" / "runs" / "torchrun_child.py"), json.dumps(commands)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, *child],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    ours = re.split(r"^Traceback .*\n  File \"<frozen runpy>", done.stderr, flags=re.MULTILINE)[0]  # torchrun's report
    return "".join(line for line in ours.splitlines(True) if not re.match(r"[WE]\d{4} ", line)), done.returncode


def command(*arguments: object, **fault: Any) -> dict[str, Any]:
    return {"arguments": [str(each) for each in arguments]} | ({"fault": fault} if fault else {})


def written(config: dict[str, Any], folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config | {"out": str(folder / "run")} | changes))
    return path


def codes(printed: str, number: int) -> set[str]:
    """Exit codes of all processes for a command."""
    return set(re.findall(rf"^ended: {number} \d (.*)$", printed, re.MULTILINE))


def assert_equal(run: Path, whole: Path) -> None:
    """The same files, and weights equal to float32 rounding.

    Sums over the tokens of a batch, and over features, are added in another order: a relative error of 1e-7 each, which
    30 steps of Adam add up. Adam divides by the root of the second moment, so a weight whose gradient is small gets an
    error of the size of the largest, which `atol` allows.
    """
    assert {p.relative_to(run) for p in run.rglob("*")} == {p.relative_to(whole) for p in whole.rglob("*")}
    found, expected = (load_file(path / "sae" / "sae_weights.safetensors") for path in (run, whole))
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-4, atol=1e-5 * weights.abs().max().item(), msg=name)
    records = [json.loads((path / "sae" / "cfg.json").read_text()) for path in (run, whole)]
    assert records[0].keys() == records[1].keys()
    lines = [
        [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run, whole)
    ]
    assert lines[0] == lines[1] == list(range(30))


def test_two_processes_divide_tokens_then_features_and_each_message_is_printed_once(
    config: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    small_disk,  # noqa: F811
) -> None:
    """A signal to one process stops both after the same step, and the run goes on in another layout."""
    file, out, full = written(config, tmp_path), tmp_path / "run", small_disk("2m")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    printed, code = run(
        tmp_path,
        2,
        command("train", file, "sae.k=0"),
        command("eval", whole),
        command("train", file, "parallel.features=3"),
        command("train", file, "sae.n_features=1", "sae.k=1", "parallel.features=2"),
        command("train", file, rank=1, step=7, signal=signal.SIGTERM),
        command("train", "--resume", out, "parallel.features=2"),
        command("train", file, "out=here", rank=1, folder=str(elsewhere)),
        command(
            "train", file, f"out={full / 'run'}", "parallel.features=2", rank=1, step=7, ballast=str(full / "ballast")
        ),
    )
    assert code == 1 and [codes(printed, i) for i in range(8)] == [{"2"}] * 4 + [{"143"}, {"0"}, {"2"}, {"2"}], printed
    for message in (
        "error: .*sae.k: 0",
        "error: saelab eval: runs in one process, and torchrun started 2",
        "error: parallel: data 1 times features 3 is 3 processes, and torchrun started 2",
        "error: sae.n_features: 1 are fewer than the 2 processes",
        rf"stopped after 1,400 tokens; `torchrun \.\.\. -m saelab train --resume {out}` goes on",
        f"{out}: training continues after 1,400 tokens",
        "error: process 1: here: is not there on .*common file system",
        "error: .*the disk is full",
    ):
        assert len(re.findall(message, printed)) == 1, (message, printed)
    assert printed.count("error: ") == 6 and "Traceback" not in printed
    assert_equal(out, whole)
    assert [path.name for path in states(full / "run")] == ["000000005"]
    assert f"`torchrun ... -m saelab train --resume {full / 'run'}` goes on from the last state" in printed


def test_four_processes_are_stopped_two_go_on_and_one_is_killed_and_one_ends_it(
    config: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    file = written(config, tmp_path, parallel={"features": 2})
    printed, code = run(tmp_path, 4, command("train", file, rank=0, step=7, signal=signal.SIGTERM, torchrun=True))
    assert code != 0 and "error: " not in printed
    assert printed.count("stopped after ") == 1 and "Traceback" not in printed
    stopped = int(states(out)[-1].name)
    assert 7 <= stopped < 30

    printed, code = run(tmp_path, 2, command("train", "--resume", out, rank=1, rows=True))
    (error,) = re.findall("^error: .*$", printed, re.MULTILINE)
    assert code == 1 and "Traceback" not in printed
    assert "error: another process of the job was killed" in error
    assert f"`torchrun ... -m saelab train --resume {out}` goes on from the last state" in error
    assert not list(out.rglob("*.tmp")) and int(states(out)[-1].name) == stopped

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    saelab.resume(out, ["parallel.features=1"])
    torch.set_num_threads(threads)
    assert_equal(out, whole)


def test_torchrun_starts_a_killed_process_again_and_the_command_goes_on(
    config: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    file = written(config, tmp_path)
    printed, code = run(tmp_path, 2, command("train", file, rank=1, step=12, signal=signal.SIGKILL), restarts=1)
    assert code == 0, printed
    assert "training continues after 2,000 tokens" in printed
    assert printed.count("error: ") == 1
    assert_equal(tmp_path / "run", whole)
    state = load_state(states(tmp_path / "run")[-1])["trainer"]
    assert state["steps"] == 30 and state["sae"]["W_enc"].shape[0] == 65
