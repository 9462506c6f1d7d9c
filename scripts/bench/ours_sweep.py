"""A sweep of eight autoencoders of the quickstart's size, and the eight one by one, measured in this process.

child.py calls these functions, sweep.py reports them. `tokens` are trained on and `held_out` evaluated on.
"""

import tempfile
import time
from pathlib import Path

from saelab.analysis.settings import EvalSettings
from saelab.runs.grid import grid
from saelab.runs.plan import plan_evaluation, plan_training
from saelab.runs.stages import evaluate
from saelab.runs.sweep import sweep
from saelab.runs.train import train

VARIED = ("sweep.sae.k=[8,16,32,64]", "sweep.training.lr=[1e-3,2e-3]")


def together(tokens: int, held_out: int) -> dict[str, float]:
    """`saelab sweep`: the `processor` seconds of this process, and those until the last autoencoder was `trained`."""
    with tempfile.TemporaryDirectory() as out:
        trained = [0.0]

        def say(message: str) -> None:
            if "trained on" in message:
                trained.append(time.process_time())

        sweep("quickstart", [*_overrides(tokens, held_out, out), *VARIED], say=say)
    return {"processor": time.process_time(), "trained": trained[-1]}


def train_one(tokens: int, held_out: int, number: int, out: str) -> dict[str, float]:
    """`saelab train` of run `number` of the sweep into a folder of `out`: the `processor` seconds of this process."""
    train(grid("quickstart", [*_overrides(tokens, held_out, out), *VARIED])[number].settings)
    return {"processor": time.process_time()}


def evaluate_one(tokens: int, held_out: int, number: int, out: str) -> dict[str, float]:
    """`saelab eval` of what `train_one` trained: the `processor` seconds of this process."""
    evaluate(grid("quickstart", [*_overrides(tokens, held_out, out), *VARIED])[number].settings.out)
    return {"processor": time.process_time()}


def memory(tokens: int, held_out: int) -> dict[str, int]:
    """What the sweep adds at most (VmHWM) to a process that has planned it, and what the plan says.

    A plan loads most libraries, and is compared with what is free after that.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    with tempfile.TemporaryDirectory() as out:
        overrides = [*_overrides(tokens, held_out, out), *VARIED]
        runs = [run.settings for run in grid("quickstart", overrides)]
        planned = max(plan(*runs).total("memory") for plan in (plan_training, plan_evaluation))
        clear.write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        sweep("quickstart", overrides)
        return {"growth": resident("VmHWM") - before, "planned": planned}


def _overrides(tokens: int, held_out: int, out: str) -> list[str]:
    losses = held_out * EvalSettings.ce_tokens // EvalSettings.tokens  # in the proportion of the defaults
    evaluation = [f"eval.tokens={held_out}", f"eval.ce_tokens={losses}"]
    return [f"out={out}/sweep", "device=cpu", f"training.tokens={tokens}", *evaluation]
