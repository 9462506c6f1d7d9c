"""Runs each measurement in its own process, and describes the machine.

So no library's threads, caches or settings affect another. The share of the processors that other programs used
meanwhile is measured with every figure.
"""

import inspect
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import child
import command

import saelab
from saelab.errors import SaelabError, brief

BUSY = 0.1
"""Share of the processors above which other programs are reported. A step of many short parallel regions suffers most,
because each region waits for its slowest thread."""
LONGEST = 3600
"""Seconds that one measurement may take."""
Function = Callable[..., Any]
OFFLINE = {
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def add_options(parser: Any) -> None:
    """The options of every command that measures beside the peers."""
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="interpreter that `make bench-peers` made")
    parser.add_argument("--threads", type=command.whole(1), help="of every process (default: all processors)")


class MeasurementError(SaelabError):
    """A measurement that gave no result."""

    def __init__(self, reason: str, command: Sequence[str], *, peers: bool) -> None:
        self.reason, self.peers = reason, peers
        super().__init__(f"this measurement failed ({reason}): {shlex.join(command)}")


class Processes:
    """Runs measurements one at a time.

    `peers` is the interpreter of an environment with any of `distributions`. Raises SaelabError if it is not an
    interpreter or has none of them.
    """

    def __init__(self, threads: int | None, peers: Path | None, distributions: Sequence[str]) -> None:
        self.threads, self.peers = threads or os.cpu_count() or 1, peers
        self.label = "once"
        self.others: list[float] = []
        """Share of the machine's processors that other programs used, for each measurement."""
        self.failures: dict[str, str] = {}
        """Reasons by row of the report, for the rows that a peer gave no result for."""
        self.peer_versions: dict[str, str] = {}
        if peers:
            if not peers.is_file():
                raise SaelabError(
                    f"{peers}: no such interpreter; `make bench-peers` makes an environment and prints its interpreter"
                )
            names = ("torch", *distributions)
            self.peer_versions, _ = self._measured(child.versions, {"distributions": names}, isolated=True)
            if not set(self.peer_versions) & set(distributions):
                raise SaelabError(
                    f"{peers}: it has none of {', '.join(distributions)}; `make bench-peers` makes an environment that "
                    "has them"
                )

    def ours(self, function: Function, **arguments: Any) -> Any:
        """The result of ``function(**arguments)`` in a process of our interpreter, through JSON."""
        return self._reported(function, arguments, isolated=False)

    def peer(self, function: Function, **arguments: Any) -> Any:
        """The same from the peers' interpreter; the function's file may import nothing from this folder.

        Raises MeasurementError if the peer fails; call it in a `row`.
        """
        return self._reported(function, arguments, isolated=True)

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        """The measurements of a row of the report. If a peer fails, the block ends and `failures` has the reason."""
        try:
            yield
        except MeasurementError as error:
            if not error.peers:
                raise
            self.failures[name] = error.reason
            _say(f"{self.label}: {name}: {error}")

    def facts(self, *distributions: str) -> dict[str, Any]:
        """Facts for a record: the machine, the versions of these distributions, and those of the peers."""
        own = {"saelab": saelab.__version__, "python": platform.python_version()}
        own |= {name: version(name) for name in distributions}
        peers = {name: found for name, found in self.peer_versions.items() if name != "torch"}
        return {
            "machine": machine(),
            "versions": own | peers,
            "peers_torch": self.peer_versions.get("torch"),
            "threads": self.threads,
        }

    def outcome(self) -> dict[str, Any]:
        """The last facts for a record: how busy the machine was, and which rows failed."""
        others = {"median": statistics.median(self.others), "max": max(self.others)}
        return {"used_by_others": others, "failures": self.failures}

    def _reported(self, function: Function, arguments: dict[str, Any], isolated: bool) -> Any:
        result, others = self._measured(function, arguments, isolated)
        self.others.append(others)
        if others > BUSY:
            _say(f"other programs used {others:.0%} of this machine's processors: do not trust the next figure")
        given = " ".join(str(value) for value in arguments.values() if isinstance(value, str))
        figures = result if isinstance(result, dict) else {}
        took = [f"{figures[key]:.4g} {unit}" for key, unit in (("step_ms", "ms"), ("seconds", "s")) if key in figures]
        _say(" ".join([f"{self.label}: {Path(inspect.getfile(function)).stem} {function.__name__} {given}", *took]))
        return result

    def _measured(self, function: Function, arguments: dict[str, Any], isolated: bool) -> tuple[Any, float]:
        """The function's result and the share of the processors that other programs used."""
        # -I: neither this environment's PYTHONPATH nor this folder is on the path of the peers' interpreter
        python = [str(self.peers), "-I"] if isolated else [sys.executable]
        call = [inspect.getfile(function), function.__name__, json.dumps(arguments, default=str)]
        line = [*python, child.__file__, *call]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        began, busy, own = time.monotonic(), busy_seconds(), _child_seconds()
        try:
            done = subprocess.run(
                line,
                env=OFFLINE | os.environ | threads,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=LONGEST,
                check=False,
            )
        except OSError as error:
            raise SaelabError(f"{line[0]}: cannot be run ({brief(error)})") from error
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"no result after {LONGEST:,} s", line, peers=isolated) from error
        result, problem = _result(done)
        if problem:
            raise MeasurementError(problem, line, peers=isolated)
        processors = (os.cpu_count() or 1) * (time.monotonic() - began)
        others = max(0.0, (busy_seconds() - busy) - (_child_seconds() - own)) / processors
        return result, others


def _result(done: subprocess.CompletedProcess[str]) -> tuple[Any, str]:
    """What a measurement returned, and "" or the reason why it returned nothing."""
    if done.returncode < 0:
        return None, f"ended by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        said = done.stdout.splitlines() or done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return None, said[-1][:300]
    try:
        return json.loads(done.stdout), ""
    except ValueError:
        return None, f"no result: {done.stdout[:100]!r}"


def heading(record: dict[str, Any], *more: str) -> str:
    """The first lines of a report: the machine, `more`, and how busy the machine was."""
    known, others = record["machine"], record["used_by_others"]
    machine = ", ".join([known.get("gpu") or known["processor"], f"{record['threads']} threads", *more])
    busy = f"Other programs used {others['median']:.0%} of the processors meanwhile, {others['max']:.0%} at most."
    return f"{machine}, torch {record['versions']['torch']}.\n{busy}"


def failures(record: dict[str, Any]) -> str:
    """The rows of a report that failed, each with the reason; "" if none did."""
    return "\n".join(f"- {name} failed: {reason}" for name, reason in record["failures"].items())


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and memory in GB (None if unknown)."""
    processor = platform.processor() or platform.machine()
    info, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gigabytes = int(memory.read_text().split()[1]) / 1e6 if memory.exists() else None
    return {"system": platform.system(), "processor": processor, "cores": cores, "memory_gb": gigabytes}


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def busy_seconds() -> float:
    """Processor seconds that this machine has used since it started; 0 if the system does not report them."""
    system_statistics = Path("/proc/stat")
    if not system_statistics.exists():
        return 0.0
    user, nice, system, _idle, _waiting, *rest = map(int, system_statistics.read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def _child_seconds() -> float:
    """Processor seconds of the child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system
