"""The benchmark runs, and its record has the promised form. No test here looks at how fast anything was."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saelab.bench import ours, peer_step, tables, train
from saelab.bench.ours import ALLOCATIONS, PRECISIONS, STAGES, Shape
from saelab.errors import SaelabError

TINY = Shape(64, 16, 128, 4)
PRECISION_KEYS = {"tokens_per_s", "ms", "peak_bytes"}


@pytest.mark.parametrize("case", [*PRECISIONS, *ALLOCATIONS])
def test_every_case_is_timed(case: str) -> None:
    ms = ours.step_ms(case, TINY, seed=0, warmup=1, steps=3, seconds=60)
    assert len(ms) == 3 and min(ms) > 0


def test_a_step_ends_where_the_next_batch_is_asked_for() -> None:
    step, matmul = ours.with_matmul("fp32", TINY, seed=0, warmup=1, steps=3)
    assert len(step) == len(matmul) == 3 and min(step + matmul) > 0


def test_the_loop_has_the_stages_that_are_reported() -> None:
    ms = ours.stage_ms("bf16_selection", TINY, seed=0, warmup=1, steps=2)
    assert set(ms) == {*STAGES, "rest"}
    assert all(ms[stage] > 0 for stage in STAGES)


def test_peak_memory_counts_the_pre_activations_and_not_the_parameters() -> None:
    small, large = (ours.peak_memory("fp32", Shape(batch, 16, 2048, 4), seed=0) for batch in (64, 256))
    assert large["peak_bytes"] > small["peak_bytes"] > 0
    assert large["peak_bytes"] < 10 * 4 * 256 * 2048
    # Of the eight tables of parameters, gradients and moments none is counted; a temporary as large as one may be.
    wide = ours.peak_memory("fp32", Shape(64, 256, 2048, 4), seed=0)
    assert wide["peak_bytes"] - small["peak_bytes"] < 2 * 4 * 2048 * (256 - 16)


def test_a_source_ends_after_its_steps_or_its_seconds() -> None:
    import torch

    def steps(source: peer_step.Source) -> int:
        try:
            while True:
                next(source)
        except peer_step.Enough:
            return len(source.step_ms())

    x = torch.zeros(2, 2)
    assert steps(peer_step.Source(x, warmup=2, steps=7, seconds=60)) == 7
    assert steps(peer_step.Source(x, warmup=2, steps=7, seconds=0)) == 3


def canned(self: train.Processes, command: list[str], shape: Shape, steps: int | None = None) -> dict[str, Any]:
    """What a measurement of each kind returns, made up."""
    self.used_by_others.append(0.25)
    if "--versions" in command:
        return {"torch": "2.0", "eai-sparsify": "1.0", "sae-lens": "6.0"}
    if "--peer" in command:
        return {"step_ms": {"as_shipped": 30.0, "fp32_fused": 20.0, "bf16_fused": 10.0}[command[-1]]}
    case, measure = command[command.index("--case") + 1], command[command.index("--measure") + 1]
    if measure == "step":
        return {"step_ms": {"fp32": 10.0, "mutual_choice": 8.0}.get(case, 5.0)}
    return {
        "matmul": {"ratio": 0.5, "step_ms": 5.0, "matmul_ms": 10.0},
        "stages": dict.fromkeys((*STAGES, "rest"), 1.0),
        "memory": {"peak_bytes": 1, "peak_bytes_within_step": 1, "peak_bytes_resident": 0},
        "growth": {str(k): 1.0 for k in train.GROWTH_K},
    }[measure]


def test_the_record_and_its_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train.Processes, "_run", canned)
    record = train.bench(TINY, rounds=2, peers=Path(sys.executable), growth=True)
    assert json.loads(json.dumps(record)) == record
    assert record["shape"] == {"batch": 64, "d_in": 16, "n_features": 128, "k": 4}
    assert {"machine", "versions", "threads"} <= set(record)
    assert set(record["ours"]) == set(PRECISIONS)
    for figures in record["ours"].values():
        assert set(figures) >= PRECISION_KEYS
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
    assert len(record["growth"]) == len(train.GROWTH_FEATURES) * len(train.GROWTH_K)
    tables.show_train(record)
    assert "6.00x" in capsys.readouterr().out


def test_an_interpreter_that_is_none_or_has_no_peer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match="no such interpreter; `make bench-peers`"):
        train.bench(TINY, peers=tmp_path / "python")
    not_executable = tmp_path / "file"
    not_executable.write_text("no program")
    with pytest.raises(SaelabError, match="cannot be run"):
        train.bench(TINY, peers=not_executable)
    with pytest.raises(SaelabError, match="it has none of eai-sparsify"):
        train.bench(TINY, peers=Path(sys.executable))


@pytest.mark.parametrize("shape", ["1,2,3", "1,2,3,x", "0,2,3,4", ""])
def test_a_shape_is_four_positive_integers(shape: str) -> None:
    with pytest.raises(ValueError):
        Shape.parse(shape)


@pytest.mark.slow
def test_the_command_measures_and_writes_the_record(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "saelab.cli",
        "bench",
        "train",
        "--shape",
        str(TINY),
        "--rounds",
        "1",
        "--steps",
        "3",
        "--threads",
        "1",
        "--json",
        "bench.json",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["peers"] == {} and set(record["allocations"]) == set(ALLOCATIONS)
    for case in PRECISIONS:
        assert set(record["ours"][case]) >= PRECISION_KEYS
        assert record["ours"][case]["peak_bytes"] > 0 and record["encoder_matmul_ratio"][case] > 0
    assert "One training step" in done.stdout
