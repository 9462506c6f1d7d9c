"""The Triton kernels without a GPU: their numerics in Triton's interpreter, and compilation for several GPUs.

Both need a process of their own, because triton decides at import whether kernels are interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")


def run(*command: str | Path, **environment: str) -> str:
    """The output of a Python process. If the process fails, the test fails and shows all its output."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "SAELAB_"))} | environment
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=variables, cwd=HERE.parent.parent
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_numerics_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    tests = [HERE / "test_products.py", HERE / "test_topk.py"]
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests, TRITON_INTERPRET="1")


def test_every_kernel_compiles_for_every_target_without_spills() -> None:
    triton = pytest.importorskip("triton")
    from saelab.kernels import gpu, gpu_topk

    rows = [json.loads(line) for line in run(HERE / "compile_kernels.py", PYTHONPATH=os.getcwd()).splitlines()]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    assert [row for row in rows if row["spilled"]] == []
    kernels = {
        name
        for module in (gpu, gpu_topk)
        for name, found in vars(module).items()
        if isinstance(found, triton.JITFunction)
    }
    called_by_others = {"_weighted_sum", "_as_integers", "_candidates"}
    assert {row["kernel"] for row in rows} == kernels - called_by_others
