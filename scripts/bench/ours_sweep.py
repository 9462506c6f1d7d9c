"""A sweep of eight autoencoders of the quickstart's size, and the eight one by one, measured in this process.

child.py calls these functions, sweep.py reports them. `tokens` are trained on and `held_out` evaluated on.
"""

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saelab.analysis.settings import EvalSettings
from saelab.runs import folder
from saelab.runs.grid import GridRun, grid
from saelab.runs.plan import plan_training
from saelab.runs.stages import evaluate
from saelab.runs.sweep import sweep
from saelab.runs.train import train

VARIED = ("sweep.sae.k=[8,16,32,64]", "sweep.training.lr=[1e-3,2e-3]")


def together(tokens: int, held_out: int) -> dict[str, float]:
    """`saelab sweep`: `seconds` of all, loading of model and text included, and of its `training`."""
    with tempfile.TemporaryDirectory() as out:
        overrides = _overrides(tokens, held_out, out)
        begin = time.monotonic()
        sweep("quickstart", [*overrides, *VARIED])
        return {"seconds": time.monotonic() - begin} | _training(grid("quickstart", [*overrides, *VARIED])[:1])


def one_by_one(tokens: int, held_out: int, number: int) -> dict[str, float]:
    """`saelab train` and `saelab eval` of run `number` of the sweep: `seconds` of both, and of its `training`."""
    with tempfile.TemporaryDirectory() as out:
        run = grid("quickstart", [*_overrides(tokens, held_out, out), *VARIED])[number]
        begin = time.monotonic()
        evaluate(train(run.settings))
        return {"seconds": time.monotonic() - begin} | _training([run])


def memory(tokens: int, held_out: int) -> dict[str, int]:
    """What training the sweep adds to the process at most (VmHWM), and what its plan says."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    with tempfile.TemporaryDirectory() as out:
        overrides = [*_overrides(tokens, held_out, out), *VARIED]
        planned = plan_training(*(run.settings for run in grid("quickstart", overrides))).total("memory")
        clear.write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        sweep("quickstart", overrides)
        return {"growth": resident("VmHWM") - before, "planned": planned}


def _overrides(tokens: int, held_out: int, out: str) -> list[str]:
    losses = held_out * EvalSettings.ce_tokens // EvalSettings.tokens  # in the proportion of the defaults
    evaluation = [f"eval.tokens={held_out}", f"eval.ce_tokens={losses}"]
    return [f"out={out}/sweep", "device=cpu", f"training.tokens={tokens}", *evaluation]


def _training(runs: Iterable[GridRun]) -> dict[str, Any]:
    return {"training": sum(folder.training_record(Path(run.settings.out))["seconds"] for run in runs)}
