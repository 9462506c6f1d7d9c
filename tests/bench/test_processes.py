"""A peer that fails is a failed row with its reason, and everything else is measured."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cache
import command
import peer_step
import processes
import pytest
import step
import torch
from processes import MeasurementError, Processes

from saelab.errors import SaelabError

PEER = """
import atexit, os, signal, sys, time

def works():
    atexit.register(os.write, 1, b"printed at exit")
    print('{"step_ms": 7}')
    os.system("echo '{\\"step_ms\\": 8}'")
    return {"step_ms": 1.5}

def raises():
    sys.stderr.write("Training:  0%")
    raise RuntimeError("0 active drivers.\\nThere should be one.")

def leaves():
    sys.exit("no GPU here")

def leaves_in_silence():
    sys.exit(0)

def stops():
    os._exit(3)

def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)

def asks():
    return input("API key? ")

def hangs():
    time.sleep(60)

def returns_no_json():
    return object()
"""


@pytest.fixture
def peer(tmp_path: Path) -> ModuleType:
    file = tmp_path / "peer.py"
    file.write_text(PEER, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("peer", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run() -> Processes:
    return Processes(1, Path(sys.executable), ("numpy",))


def test_what_a_peer_prints_is_not_taken_for_its_result(peer: ModuleType, run: Processes) -> None:
    assert run.peer(peer.works) == {"step_ms": 1.5}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("raises", "RuntimeError: 0 active drivers. There should be one."),
        ("leaves", "no GPU here"),
        ("leaves_in_silence", "no result: ''"),
        ("stops", "exit status 3"),
        ("is_killed", "ended by SIGKILL"),
        ("asks", "EOFError: EOF when reading a line"),
        ("hangs", "no result after 1 s"),
        ("returns_no_json", "TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_each_way_to_fail_is_a_row_with_its_reason(
    name: str, reason: str, peer: ModuleType, run: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "hangs":
        monkeypatch.setattr(processes, "LONGEST", 1)
    with run.row("the row"):
        run.peer(getattr(peer, name))
    assert run.failures == {"the row": reason}


def test_a_failure_of_ours_ends_the_benchmark(peer: ModuleType, run: Processes) -> None:
    with pytest.raises(MeasurementError, match=r"0 active drivers.*child.py"), run.row("the row"):
        run.ours(peer.raises)
    assert not run.failures


def test_an_interpreter_that_prints_something_else_is_an_error(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Welcome\n", encoding="utf-8")
    python.chmod(0o755)
    with pytest.raises(SaelabError, match=r"measurement failed \(no result: 'Welcome"):
        Processes(1, python, ("numpy",))


@pytest.mark.parametrize("failures, code", [({}, 0), ({"a row": "a reason"}, 1)])
@pytest.mark.parametrize("script", [step, cache])
def test_the_exit_code_says_whether_a_row_failed(
    script: ModuleType, failures: dict[str, str], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = {"failures": failures}
    monkeypatch.setattr(script, "measure", lambda **options: record)
    monkeypatch.setattr(script, "report", lambda record: "the report")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: argparse.Namespace(json=tmp_path / "file"))
    try:
        command.run(script.main)
        found = 0
    except SystemExit as ended:
        found = ended.code
    assert found == code and json.loads((tmp_path / "file").read_text(encoding="utf-8")) == record


def test_sparsify_runs_without_triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSIFY_DISABLE_TRITON", raising=False)
    seen = []

    class Sparsify(ModuleType):
        def __getattr__(self, name: str) -> Any:
            seen.append(os.environ.get("SPARSIFY_DISABLE_TRITON"))
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "sparsify", Sparsify("sparsify"))
    source = peer_step.Source(torch.zeros(2, 2), warmup=1, steps=1, seconds=1)
    with pytest.raises(ImportError):
        peer_step.sparsify(source, "as_shipped", n_features=4, k=1)
    assert seen and set(seen) == {"1"}
