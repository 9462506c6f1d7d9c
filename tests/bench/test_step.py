"""The benchmark runs, and its record has the promised form. No test here looks at how fast anything was."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ours_memory
import ours_step
import peer_step
import pytest
import step
import torch
from ours_step import ALLOCATIONS, PRECISIONS, STAGES, Shape
from processes import Function, MeasurementError, Processes

from saelab.errors import SaelabError

TINY = Shape(64, 16, 128, 4)
PRECISION_KEYS = {"tokens_per_s", "ms_per_step", "ms", "peak_bytes", "peak_bytes_within_step", "peak_bytes_resident"}
SCRIPT = Path(step.__file__)


def test_the_loop_has_the_stages_that_are_reported() -> None:
    ms = ours_step.stages("bf16_selection", TINY, warmup=1, steps=2)
    assert set(ms) == {*STAGES, "rest"}
    assert all(ms[stage] > 0 for stage in STAGES)


def test_peak_memory_counts_the_pre_activations_and_not_the_parameters() -> None:
    small, large = (ours_memory.memory("fp32", Shape(batch, 16, 2048, 4)) for batch in (64, 256))
    assert large["peak_bytes"] > small["peak_bytes"] > 0
    assert large["peak_bytes"] < 10 * 4 * 256 * 2048
    # None of the eight tables of parameters, gradients and moments is counted; a temporary as large as one may be.
    wide = ours_memory.memory("fp32", Shape(64, 256, 2048, 4))
    assert wide["peak_bytes"] - small["peak_bytes"] < 2 * 4 * 2048 * (256 - 16)


def test_a_source_ends_after_its_steps_or_its_seconds() -> None:
    def steps(source: peer_step.Source) -> int:
        try:
            while True:
                next(source)
        except peer_step.Enough:
            return len(source.step_ms())

    x = torch.zeros(2, 2)
    assert steps(peer_step.Source(x, warmup=2, steps=7, seconds=60)) == 7
    assert steps(peer_step.Source(x, warmup=2, steps=7, seconds=0)) == 3


def canned(self: Processes, function: Function, arguments: dict[str, Any], isolated: bool) -> tuple[Any, float]:
    """Made-up results for each kind of measurement."""
    if function.__name__ == "versions":
        return {"torch": "2.0", "eai-sparsify": "1.0", "sae-lens": "6.0"}, 0.0
    if isolated:
        return {"step_ms": {"as_shipped": 30.0, "fp32_fused": 20.0, "bf16_fused": 10.0}[arguments["variant"]]}, 0.25
    found = {
        "step": {"step_ms": {"fp32": 10.0, "mutual_choice": 8.0}.get(arguments.get("case", ""), 5.0)},
        "matmul": {"ratio": 0.5, "step_ms": 5.0, "matmul_ms": 10.0},
        "stages": dict.fromkeys((*STAGES, "rest"), 1.0),
        "memory": {"peak_bytes": 1, "peak_bytes_within_step": 1, "peak_bytes_resident": 0},
        "growth": {str(k): 1.0 for k in step.GROWTH_K},
        "decoder": {"float32": {"ms": 1.0, "gb_per_s": 2.0, "copy_gb_per_s": 4.0, "share": 0.5}},
    }
    return found[function.__name__], 0.25


def test_the_record_and_its_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "_measured", canned)
    record = step.measure(TINY, rounds=2, peers=Path(sys.executable), growth=True)
    assert json.loads(json.dumps(record)) == record
    assert record["shape"] == {"batch": 64, "d_in": 16, "n_features": 128, "k": 4}
    assert {"machine", "versions", "peers_torch", "threads", "rounds", "steps", "peer_notes"} <= set(record)
    assert record["versions"]["sae-lens"] == "6.0" and record["peers_torch"] == "2.0"
    assert set(record["ours"]) == set(PRECISIONS)
    for figures in record["ours"].values():
        assert set(figures) == PRECISION_KEYS
    assert record["ours"]["fp32"]["tokens_per_s"] == 6400
    assert set(record["peers"]) == {"sparsify", "sparsify_signum", "sae_lens"}
    sparsify = record["peers"]["sparsify"]
    assert {name: row["ratio"] for name, row in sparsify.items()} == {
        "as_shipped": 6.0,
        "fp32_fused": 2.0,
        "bf16_fused": 2.0,
    }
    assert record["encoder_matmul_ratio"] == {"fp32": 0.5, "bf16_selection": 0.5}
    assert record["allocations"]["token_choice"] == 1 and record["allocations"]["mutual_choice"] == 0.625
    assert len(record["growth"]) == len(step.GROWTH_FEATURES) * len(step.GROWTH_K)
    assert record["used_by_others"] == {"median": 0.25, "max": 0.25}
    shown = step.report(record)
    assert "6.00x" in shown


def test_a_peers_variant_that_fails_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def one_peer_fails(
        self: Processes, function: Function, arguments: dict[str, Any], isolated: bool
    ) -> tuple[Any, float]:
        if function is peer_step.step:
            asked.append(row := f"{arguments['peer']}, {arguments['variant']}")
            if row == "sparsify_signum, as_shipped" or asked.count("sparsify, bf16_fused") == 2:
                raise MeasurementError("RuntimeError: 0 active drivers", ["python"], peers=True)
        return canned(self, function, arguments, isolated)

    monkeypatch.setattr(Processes, "_measured", one_peer_fails)
    record = step.measure(TINY, rounds=2, peers=Path(sys.executable))
    reason = "RuntimeError: 0 active drivers"
    assert record["failures"]["sparsify_signum, as_shipped"] == record["failures"]["sparsify, bf16_fused"] == reason
    assert asked.count("sparsify_signum, as_shipped") == 1, "what failed is not measured again"
    assert record["peers"]["sparsify_signum"] == {}
    assert set(record["peers"]["sparsify"]) == {"as_shipped", "fp32_fused"}
    assert record["peers"]["sparsify"]["as_shipped"]["ratios"] == [6.0, 6.0]
    assert json.loads(json.dumps(record)) == record
    lines = step.report(record).splitlines()
    assert f"- sparsify, bf16_fused failed: {reason}" in lines
    assert sum(line.startswith("| sparsify, bf16_fused ") and "failed |" in line for line in lines) == 1


def test_a_missing_interpreter_or_one_without_peers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match="no such interpreter; `make bench-peers`"):
        step.measure(TINY, peers=tmp_path / "python")
    not_executable = tmp_path / "file"
    not_executable.write_text("no program")
    with pytest.raises(SaelabError, match="cannot be run"):
        step.measure(TINY, peers=not_executable)
    with pytest.raises(SaelabError, match="it has none of eai-sparsify"):
        step.measure(TINY, peers=Path(sys.executable))


@pytest.mark.parametrize("shape", ["1,2,3", "1,2,3,x", "0,2,3,4", ""])
def test_a_shape_is_four_positive_integers(shape: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not four positive integers, batch,d_in,n_features,k"):
        Shape.parse(shape)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_a_measurement_that_fails_names_its_command() -> None:
    processes = Processes(1, None, ())
    with pytest.raises(SaelabError, match=r"failed \(KeyError: 'no such peer'\): .*child.py"):
        processes.ours(peer_step.step, peer="no such peer", variant="as_shipped", shape=TINY, steps=3)


def test_the_peers_files_need_nothing_of_saelab(tmp_path: Path) -> None:
    """The call is that of --peers: isolated, from another folder, up to the import of the peer."""
    peers = {"sparsify": "sparsify", "sae_lens": "sae_lens", "dictionary_learning": "dictionary_learning"}
    for peer, package in peers.items():
        arguments = {"peer": peer, "variant": "as_shipped", "shape": TINY, "steps": 3}
        done = run("-I", str(SCRIPT.with_name("child.py")), peer_step.__file__, "step", json.dumps(arguments))
        assert done.returncode == 1 and f"No module named '{package}'" in done.stderr


def test_missing_packages_are_reported_in_one_line(tmp_path: Path) -> None:
    done = run("-E", "-S", str(SCRIPT))  # neither PYTHONPATH nor site-packages
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "has no saelab, torch, numpy; run `make install`" in done.stderr
    for option, message in (
        ("--steps=2", "not a whole number of at least 3"),
        (f"--json={tmp_path / 'missing' / 'file'}", "no such folder"),
        ("--shape=1,2", "is not four positive integers"),
    ):
        done = run(str(SCRIPT), option)
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.slow
def test_the_command_measures_and_writes_the_record(tmp_path: Path) -> None:
    shape, file = ",".join(map(str, TINY)), tmp_path / "bench.json"
    done = run(str(SCRIPT), "--shape", shape, "--rounds=1", "--steps=3", "--threads=1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert record["peers"] == {} and set(record["allocations"]) == set(ALLOCATIONS)
    for case in PRECISIONS:
        assert set(record["ours"][case]) == PRECISION_KEYS
        assert record["ours"][case]["peak_bytes"] > 0 and record["encoder_matmul_ratio"][case] > 0
    assert all(row["share"] > 0 for row in record["decoder"].values())
    assert "one training step" in done.stdout
