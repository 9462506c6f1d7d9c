"""Measurements in processes of their own, and what is known of the machine that they run on."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saelab.errors import SaelabError, brief

BUSY = 0.1
"""A machine of which others take a larger share than this, while something is measured, is called busy."""

Say = Callable[[str], None]


def run_measurement(command: list[str], threads: int, say: Say) -> tuple[dict[str, Any], float]:
    """Run `command`: the JSON object of its last line, and the share of the processors that others took meanwhile.

    Tells `say` where that share is large: a step of many short parallel regions suffers most from it, for every region
    waits for the thread that was put off. Raises SaelabError where the command cannot be run or fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    began, busy, own = time.monotonic(), _busy_seconds(), _child_seconds()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SaelabError(f"{command[0]}: cannot be run ({brief(error)})") from error
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise SaelabError(f"bench: `{' '.join(command)}` failed: {last[:300]}")
    processors = (os.cpu_count() or 1) * (time.monotonic() - began)
    others = max(0.0, (_busy_seconds() - busy) - (_child_seconds() - own)) / processors
    if others > BUSY:
        say(f"others took {others:.0%} of this machine's processors: the next figure is not to be trusted")
    return json.loads(lines[-1]), others


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and memory in GB where the system says."""
    processor = platform.processor() or platform.machine()
    info, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gigabytes = int(memory.read_text().split()[1]) / 1e6 if memory.exists() else None
    return {"system": platform.system(), "processor": processor, "cores": cores, "memory_gb": gigabytes}


def _busy_seconds() -> float:
    """Processor seconds that this machine spent on anything since it started; 0 where the system does not say."""
    statistics_of_system = Path("/proc/stat")
    if not statistics_of_system.exists():
        return 0.0
    user, nice, system, _idle, _waiting, *rest = map(int, statistics_of_system.read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _child_seconds() -> float:
    """Processor seconds of the child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system
