"""Time the training step: tokens per second, and milliseconds per stage of the very loop that training runs.

The data are random; dead features do not occur in so few steps, so no auxiliary loss is in the figures. Tokens per
second are taken over whole steps without the profiler, the stages with it in a run of their own, medians both. Stages
are timed on CPUs only: a GPU runs them behind the interpreter's back.

    python scripts/bench_train.py                       # the quickstart's shape, and a GPT-2-sized one
    python scripts/bench_train.py --shape 4096,1024,32768,64 --json bench.json
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from saelab.lm import resolve_device
from saelab.sae.model import SaeSettings, SparseAutoencoder
from saelab.training.trainer import TrainingSettings, train

STAGES = ("encoder matmul", "selection", "decode", "backward", "optimiser")
SHAPES = ("1024,256,4096,32", "2048,768,24576,32")


def timed_batches(n: int, batch: int, d_in: int, device: torch.device, begins: list[float]) -> Iterator[torch.Tensor]:
    """`n` batches of one random tensor; notes when each is asked for, which is when the step before it has ended."""
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(n):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begins.append(time.perf_counter())
        yield x
    begins.append(time.perf_counter())


def bench(batch: int, d_in: int, n_features: int, k: int, steps: int, device: torch.device) -> dict:
    """Medians over `steps` steps after two that warm up."""
    sae = SparseAutoencoder(d_in, n_features, k).to(device)
    sae.initialise(torch.randn(4096, d_in, device=device))
    settings = TrainingSettings(tokens=(steps + 3) * batch, batch=batch, log_every=10**9)
    sae_settings = SaeSettings(n_features, k, aux="none")
    begins: list[float] = []
    train(sae, timed_batches(steps + 3, batch, d_in, device, begins), settings, sae_settings)
    step = statistics.median(b - a for a, b in pairwise(begins[2:]))

    ms: dict[str, float] = {}
    if device.type == "cpu":
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train(sae, timed_batches(steps + 2, batch, d_in, device, []), settings, sae_settings)
        for stage in STAGES:
            spans = [event.cpu_time_total for event in profiler.events() if event.name == stage]
            ms[stage] = statistics.median(spans[2:]) / 1000
    return {
        "batch": batch, "d_in": d_in, "n_features": n_features, "k": k,
        "tokens_per_s": batch / step, "ms_per_step": 1000 * step, "ms": ms,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="batch,d_in,n_features,k; may be given more than once")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = resolve_device(args.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'batch,d_in,n_features,k':>26} {'tokens/s':>10} {'ms/step':>8}   " + "  ".join(f"{s:>14}" for s in STAGES))
    results = []
    for shape in args.shape or SHAPES:
        result = bench(*map(int, shape.split(",")), steps=args.steps, device=device)
        results.append(result)
        stages = "  ".join(f"{result['ms'].get(s, math.nan):>14.1f}" for s in STAGES)
        print(f"{shape:>26} {result['tokens_per_s']:>10,.0f} {result['ms_per_step']:>8.1f}   {stages}", flush=True)
    if args.json:
        record = {
            "machine": machine,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
