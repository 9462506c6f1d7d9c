"""`scripts/bench_gpu.py` goes through its whole code on a CPU; what it measures is another matter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gpu.py"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_small_numbers(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--steps", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert max(record["errors"].values()) < 1e-5
    assert set(record["waits"].values()) == {None}
    for result in record["shapes"]:
        assert set(result["ours"]) == {"fp32", "bf16_selection", "fp32_tf32"}
        assert result["decoder"]["float32"]["share"] > 0
    assert "| spmm |" in (tmp_path / "bench_gpu.md").read_text()
