"""Which back-end computes, and the message if it cannot."""

import os
import subprocess
import sys

import pytest
import torch

from saelab.errors import SaelabError
from saelab.kernels import products, topk

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails, as if it were not installed
import saelab, torch
import saelab.kernels
values, features = saelab.kernels.topk(torch.rand(3, 5), 2)
codes = saelab.Codes.from_topk(values, features, 5)
assert saelab.kernels.spmm(codes, torch.rand(5, 4)).shape == (3, 4)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "SAELAB_KERNELS"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=variables)


@pytest.mark.parametrize("device, name", [("cpu", "cpu"), ("meta", "reference")])
def test_the_device_chooses(monkeypatch: pytest.MonkeyPatch, device: str, name: str) -> None:
    monkeypatch.delenv("SAELAB_KERNELS", raising=False)
    assert products._backend(torch.empty(0, device=device)).__name__ == f"saelab.kernels.{name}"


def test_the_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "reference")
    assert products._backend(torch.empty(0)).__name__ == "saelab.kernels.reference"


def test_a_wrong_name_is_refused_with_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "gpu")
    with pytest.raises(SaelabError, match="'gpu' is not one of reference, cpu, dense, triton"):
        topk(torch.zeros(1, 2), 1)


def test_without_triton_everything_but_gpus_works_and_the_error_says_what_to_install() -> None:
    done = python(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    done = python(WITHOUT_TRITON, SAELAB_KERNELS="triton")
    assert "SaelabError" in done.stderr and "pip install triton" in done.stderr


def test_triton_is_imported_for_gpus_only() -> None:
    done = python(
        WITHOUT_TRITON.replace('sys.modules["triton"] = None', "pass") + '\nassert "triton" not in sys.modules'
    )
    assert done.returncode == 0, done.stderr


def test_triton_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("SAELAB_KERNELS", "triton")
    with pytest.raises(SaelabError, match="on the CPU"):
        topk(torch.zeros(1, 2), 1)
