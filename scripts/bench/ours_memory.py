"""Memory of our training step, measured in this process (child.py calls `memory`; step.py reports it)."""

import contextlib
import ctypes
import json
import tempfile
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from ours_step import Shape, made, run
from torch.profiler import ProfilerActivity, profile, record_function

from saelab.sae.model import Batch


def memory(case: str, shape: Iterable[int], device: str = "cpu") -> dict[str, int]:
    """`peak_bytes`: peak of the allocated memory in the third step, beyond parameters, their Adam moments and the
    gradients that exist when the step begins.

    On a CPU it is counted from torch's own allocations and releases (the profiler's memory events): every tensor,
    including the batch and buffers kept from step to step, and nothing else. `peak_bytes_within_step` is the part that
    the step allocates and frees. `peak_bytes_resident` is the peak of resident memory (VmHWM) in a step above the
    resident memory at its beginning, without the profiler: it includes scratch memory of the BLAS library and pages
    that the C allocator keeps. 0 if /proc cannot be read.
    """
    shape = Shape(*shape)
    account = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with account if device == "cpu" else contextlib.nullcontext():
        sae, batch = made(case, shape, device)
        kept = 0

        def batches() -> Iterator[Batch]:
            nonlocal kept
            for _ in range(3):
                parameters = list(sae.parameters())
                gradients = [p.grad.nbytes for p in parameters if p.grad is not None]
                kept = 3 * sum(p.nbytes for p in parameters) + sum(gradients)
                if device != "cpu":
                    torch.cuda.reset_peak_memory_stats(device)
                with record_function("step"):  # entered and left by the loop's requests: it spans one step
                    yield batch

        run(sae, case, shape, batches())
    if device != "cpu":
        return {"peak_bytes": torch.cuda.max_memory_allocated(device) - kept}
    events = _trace(account)
    begin, end = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "step"][-1]
    changes = [e for e in events if e["name"] == "[memory]"]
    totals = list(accumulate(e["args"]["Bytes"] for e in changes))
    at = [e["ts"] for e in changes]
    before = [total for ts, total in zip(at, totals, strict=True) if ts < begin][-1]
    peak = max(total for ts, total in zip(at, totals, strict=True) if begin <= ts <= end)
    return {
        "peak_bytes": peak - kept,
        "peak_bytes_within_step": max(peak - before, 0),
        "peak_bytes_resident": _resident_peak(case, shape),
    }


def _trace(profiler: profile) -> list[dict[str, Any]]:
    """The profiler's events in time, from its exported trace: the only public source of single allocations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    timed = [event for event in events if "ts" in event and event.get("ph") in ("X", "i")]
    return sorted(timed, key=lambda event: event["ts"])


def _resident_peak(case: str, shape: Shape) -> int:
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and clear.exists()):
        return 0

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name + ":"))

    sae, batch = made(case, shape, "cpu")
    peaks: list[int] = []

    def batches() -> Iterator[Batch]:
        for _ in range(4):
            with contextlib.suppress(OSError, AttributeError):  # glibc only: return freed memory that is still resident
                ctypes.CDLL(None).malloc_trim(0)
            clear.write_text("5")
            before = kilobytes("VmRSS")
            yield batch
            peaks.append(1024 * (kilobytes("VmHWM") - before))

    try:
        run(sae, case, shape, batches())
    except PermissionError:
        return 0
    return peaks[-1]
