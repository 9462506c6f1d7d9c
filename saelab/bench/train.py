"""`saelab bench train`: our training step against other libraries', in tokens per second, on the CPU.

Every figure comes from a process of its own (ours.py, peer_step.py), so that no library's threads, caches or settings
reach another's, and processes alternate, so that a machine that drifts drifts for all: each round measures, for each
peer, ours in both precisions and then the peer's variants. A ratio is taken between neighbours, and the median of the
rounds is reported.
"""

import os
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saelab.bench import ours, peer_step
from saelab.bench.ours import ALLOCATIONS, PRECISIONS, Shape
from saelab.bench.processes import Say, machine, run_measurement
from saelab.errors import SaelabError

GROWTH_FEATURES = tuple(2**n for n in range(12, 18))
GROWTH_K = (8, 16, 32, 64, 128, 256)
GROWTH_BATCH = 256
AGAINST = {"as_shipped": "bf16_selection", "fp32_fused": "fp32", "bf16_fused": "bf16_selection"}
"""Which of ours each variant of a peer is compared with."""
SECONDS = 8.0
"""Timed steps of one process stop after this long (three are always taken)."""


def bench(
    shape: Shape,
    *,
    rounds: int = 2,
    steps: int = 8,
    threads: int | None = None,
    peers: Path | None = None,
    growth: bool = False,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """Everything `saelab bench train` measures, as the record that its ``--json`` writes.

    `peers` is the interpreter of the environment with the other libraries. Raises SaelabError where it is none, has no
    peer, or where a measurement fails.
    """
    processes = Processes(shape, steps, threads or os.cpu_count() or 1, say)
    versions = {name: version(name) for name in ("saelab", "torch", "numpy")} | {"python": platform.python_version()}
    found = processes.peer_versions(peers) if peers else {}
    names = [name for name, distribution in peer_step.DISTRIBUTIONS.items() if distribution in found]
    if peers and not names:
        wanted = ", ".join(dict.fromkeys(peer_step.DISTRIBUTIONS.values()))
        raise SaelabError(f"{peers}: it has none of {wanted}; `make bench-peers` makes an environment that has")
    record: dict[str, Any] = {
        "machine": machine(),
        "versions": versions | {name: v for name, v in found.items() if name != "torch"},
        "peers_torch": found.get("torch"),
        "shape": shape._asdict(),
        "threads": processes.threads,
        "rounds": rounds,
        "steps": steps,
    }

    step: dict[str, list[float]] = {case: [] for case in PRECISIONS}
    peer_ms: dict[tuple[str, str], list[float]] = {}
    ratios: dict[tuple[str, str], list[float]] = {}
    relative: dict[str, list[float]] = {case: [] for case in ALLOCATIONS}
    matmul: dict[str, list[dict[str, float]]] = {case: [] for case in PRECISIONS}
    for turn in range(1, rounds + 1):
        processes.label = f"round {turn} of {rounds}"
        for name in names or [""]:
            block = {case: processes.ours(case, "step")["step_ms"] for case in PRECISIONS}
            for case, ms in block.items():
                step[case].append(ms)
            for variant in peer_step.VARIANTS_OF.get(name, ()):
                ms = processes.peer(peers, name, variant)["step_ms"]
                peer_ms.setdefault((name, variant), []).append(ms)
                ratios.setdefault((name, variant), []).append(ms / block[AGAINST[variant]])
        for case in PRECISIONS:
            matmul[case].append(processes.ours(case, "matmul"))
        block = {case: processes.ours(case, "step")["step_ms"] for case in ALLOCATIONS}
        for case, ms in block.items():
            relative[case].append(block["token_choice"] / ms)

    processes.label = "once"
    record["ours"] = {
        case: {
            "tokens_per_s": 1000 * shape.batch / statistics.median(step[case]),
            "ms_per_step": statistics.median(step[case]),
            "ms": processes.ours(case, "stages"),
            **processes.ours(case, "memory"),
        }
        for case in PRECISIONS
    }
    record["peers"] = {}
    for (name, variant), ms in peer_ms.items():
        record["peers"].setdefault(name, {})[variant] = {
            "tokens_per_s": 1000 * shape.batch / statistics.median(ms),
            "ratio": statistics.median(ratios[name, variant]),
            "ratios": ratios[name, variant],
        }
    record["peer_notes"] = {name: peer_step.LEAVES_OUT[name] for name in names}
    record["encoder_matmul_ratio"] = {
        case: statistics.median(result["ratio"] for result in results) for case, results in matmul.items()
    }
    record["encoder_matmul_ms"] = statistics.median(r["matmul_ms"] for results in matmul.values() for r in results)
    record["allocations"] = {case: statistics.median(values) for case, values in relative.items()}
    if growth:
        record["growth"] = processes.growth()
    record["used_by_others"] = {
        "median": statistics.median(processes.used_by_others),
        "max": max(processes.used_by_others),
    }
    return record


class Processes:
    """Runs measurements, each in a process of its own, one at a time."""

    def __init__(self, shape: Shape, steps: int, threads: int, say: Say) -> None:
        self.shape, self.steps, self.threads, self.say = shape, steps, threads, say
        self.label = ""
        self.used_by_others: list[float] = []
        """Share of the machine's processors that others took while each measurement ran."""

    def ours(self, case: str, measure: str) -> dict[str, Any]:
        result = self._run([sys.executable, "-m", ours.__name__, "--case", case, "--measure", measure], self.shape)
        self._tell(f"ours, {case}, {measure}", result)
        return result

    def peer(self, python: Path | None, peer: str, variant: str) -> dict[str, Any]:
        # -I: neither this environment's PYTHONPATH nor the folder of the script is on its path
        command = [str(python), "-I", peer_step.__file__, "--peer", peer, "--variant", variant]
        result = self._run(command, self.shape)
        self._tell(f"{peer}, {variant}", result)
        return result

    def peer_versions(self, python: Path) -> dict[str, str]:
        if not python.is_file():
            raise SaelabError(
                f"{python}: no such interpreter; `make bench-peers` makes an environment and says where its own is"
            )
        return self._run([str(python), "-I", peer_step.__file__, "--versions"], self.shape)

    def growth(self) -> list[dict[str, float]]:
        """Milliseconds of a step of few tokens over n_features and k: ``{"n_features", "k", "batch", "ms"}``."""
        rows = []
        for n_features in GROWTH_FEATURES:
            shape = self.shape._replace(batch=min(self.shape.batch, GROWTH_BATCH), n_features=n_features)
            command = [sys.executable, "-m", ours.__name__, "--case", "bf16_selection", "--measure", "growth"]
            for k in GROWTH_K:
                command += ["--k", str(k)]
            result = self._run(command, shape, steps=min(self.steps, 3))
            self.say(f"growth, {n_features} features: " + ", ".join(f"k {k} {ms:.0f} ms" for k, ms in result.items()))
            for k, ms in result.items():
                rows.append({"n_features": n_features, "k": int(k), "batch": shape.batch, "ms": ms})
        return rows

    def _run(self, command: list[str], shape: Shape, steps: int | None = None) -> dict[str, Any]:
        arguments = [
            "--shape",
            str(shape),
            "--steps",
            str(steps or self.steps),
            "--threads",
            str(self.threads),
            "--seconds",
            str(SECONDS),
        ]
        result, others = run_measurement(command + arguments, self.threads, self.say)
        self.used_by_others.append(others)
        return result

    def _tell(self, what: str, result: dict[str, Any]) -> None:
        figure = f": {result['step_ms']:.1f} ms" if "step_ms" in result else ""
        self.say(f"{self.label}: {what}{figure}")
