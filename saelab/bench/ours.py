"""One measurement of our own training step in this process: `saelab.training.trainer.train`, on a random batch.

    python -m saelab.bench.ours --case bf16_selection --measure step --shape 2048,768,24576,32

prints one line of JSON. The batch and the clock are those of peer_step.py: a step lasts from one request for a batch to
the next. What is measured:

step       milliseconds of a step
matmul     the same, each step right after one fp32 encoder matmul ``[batch, d_in] @ [d_in, n_features]`` into memory
           that is there already; the ratio of the two, pair by pair
stages     milliseconds of each `record_function` scope of the loop, with torch's profiler on; medians over steps
memory     the most bytes that a step holds beyond parameters, gradients and optimiser state, see `peak_memory`
growth     milliseconds of a step for several k
"""

import argparse
import contextlib
import ctypes
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from saelab.bench.peer_step import Enough, Source
from saelab.sae.model import SparseAutoencoder
from saelab.sae.settings import AffinitySettings, AllocationSettings, AuxSettings, SaeSettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import train

STAGES = ("encoder matmul", "selection", "decode", "backward", "optimiser")
PRECISIONS = {"fp32": "float32", "bf16_selection": "bfloat16"}
ALLOCATIONS = ("token_choice", "mutual_choice", "feature_choice", "gradient")
STEPS_OF_A_RUN = 100_000
"""Length of the run that the timed steps are the beginning of: it decides when features count as dead."""


class Shape(NamedTuple):
    batch: int
    d_in: int
    n_features: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """``batch,d_in,n_features,k``; ValueError for anything but four positive integers."""
        numbers = [int(part) for part in text.split(",")]
        if len(numbers) != 4 or min(numbers) < 1:
            raise ValueError(text)
        return cls(*numbers)

    def __str__(self) -> str:
        return ",".join(map(str, self))


def settings_of(case: str, shape: Shape) -> SaeSettings:
    """The settings of a case: a precision of token choice, or one of ALLOCATIONS (all with bf16 selection).

    Feature choice runs from the first step on with a given curve, for its steady state; a run's first part, mutual
    choice, is a case of its own. The curve's densest feature is active on about a tenth of the tokens.
    """
    name = case if case.endswith("_choice") else "token_choice"
    return SaeSettings(
        n_features=shape.n_features,
        k=shape.k,
        affinity=AffinitySettings("gradient" if case == "gradient" else "activation"),
        allocation=AllocationSettings(name, exponent=1.0, shift=50.0, after=0.0),
        aux=AuxSettings("none"),
        selection=PRECISIONS.get(case, "bfloat16"),
    )


def made(case: str, shape: Shape, seed: int, device: str = "cpu") -> tuple[SparseAutoencoder, Tensor, Tensor | None]:
    """An autoencoder, the batch, and where the case needs them gradients of a loss in its shape."""
    x = torch.randn(shape.batch, shape.d_in, generator=torch.Generator().manual_seed(seed))
    gradients = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1)) if case == "gradient" else None
    torch.manual_seed(seed)
    sae = SparseAutoencoder(shape.d_in, shape.n_features, shape.k).to(device)
    sae.initialise(x[:256].to(device))
    return sae, x.to(device), None if gradients is None else gradients.to(device)


def run(sae: SparseAutoencoder, case: str, shape: Shape, batches: Iterable[Any]) -> None:
    """Train on `batches`, as at the beginning of a long run, until they end."""
    settings = TrainingSettings(tokens=STEPS_OF_A_RUN * shape.batch, batch=shape.batch, log_every=10**9)
    with contextlib.suppress(Enough):
        train(sae, batches, settings, settings_of(case, shape))


def step_ms(
    case: str, shape: Shape, seed: int, warmup: int, steps: int, seconds: float, device: str = "cpu"
) -> list[float]:
    """Milliseconds of each timed step."""
    sae, x, gradients = made(case, shape, seed, device)
    source = Source(x, warmup, steps, seconds)
    run(sae, case, shape, source if gradients is None else ((batch, gradients) for batch in source))
    return source.step_ms()


def with_matmul(case: str, shape: Shape, seed: int, warmup: int, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each step and of the fp32 encoder matmul that ran right before it."""
    sae, x, gradients = made(case, shape, seed)
    weight, out = torch.randn(shape.n_features, shape.d_in), torch.empty(shape.batch, shape.n_features)
    step, matmul = [], []

    def batches() -> Iterator[Any]:
        for _ in range(warmup + steps):
            begin = time.perf_counter()
            torch.mm(x, weight.T, out=out)
            middle = time.perf_counter()
            yield x if gradients is None else (x, gradients)
            step.append(1000 * (time.perf_counter() - middle))
            matmul.append(1000 * (middle - begin))

    run(sae, case, shape, batches())
    return step[warmup:], matmul[warmup:]


def stage_ms(case: str, shape: Shape, seed: int, warmup: int, steps: int) -> dict[str, float]:
    """Median milliseconds per step in each scope; "rest" is what no scope covers."""
    sae, x, gradients = made(case, shape, seed)

    def batches() -> Iterator[Any]:
        for _ in range(warmup + steps):
            with record_function("step"):  # entered and left by the loop's requests: it spans one step
                yield x if gradients is None else (x, gradients)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(sae, case, shape, batches())
    events = profiler.events() or []
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.name == "step")[warmup:]
    scopes = [(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in events if e.name in STAGES]
    rows = [
        {name: sum(us for n, start, us in scopes if n == name and begin <= start < end) / 1000 for name in STAGES}
        for begin, end in spans
    ]
    for row, (begin, end) in zip(rows, spans, strict=True):
        row["rest"] = (end - begin) / 1000 - sum(row.values())
    return {name: statistics.median(row[name] for row in rows) for name in (*STAGES, "rest")}


def peak_memory(case: str, shape: Shape, seed: int) -> dict[str, int]:
    """`peak_bytes`: the most that is allocated at one time in a step, beyond parameters, gradients, optimiser state.

    Counted from torch's own allocations and releases (the profiler's memory events), which see every tensor and
    nothing else. The account opens before the autoencoder is made, so the batch and buffers kept from step to step
    count; it is read at every instant of the third step. A gradient is taken off only while it exists: where a forward
    pass runs without any, it gets no credit for their room.

    `peak_bytes_resident` is the operating system's word on it, in a step without the profiler: the peak of resident
    memory (VmHWM, reset as the step begins) above what is resident then. What persists between steps is not in it
    (in the account: `peak_bytes_within_step`, gradients included where they come and go), scratch memory of the BLAS
    library is, and so are pages that the C allocator keeps. 0 where /proc cannot be read.
    """
    noted: list[set[int]] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sae, x, gradients = made(case, shape, seed)
        parameters = list(sae.parameters())

        def note(parameter: Tensor | None = None) -> None:
            with record_function("gradients noted"):
                noted.append({p.grad.data_ptr() for p in parameters if p.grad is not None})

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(note)

        def batches() -> Iterator[Any]:
            for _ in range(3):
                note()
                with record_function("step"):
                    yield x if gradients is None else (x, gradients)

        run(sae, case, shape, batches())
    kept = 3 * sum(p.nbytes for p in parameters)  # the parameters and Adam's two moments of each
    events = sorted(_trace(profiler), key=lambda event: event["ts"])
    begin, end = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "step"][-1]

    # Which allocations are gradients: those alive at an address that was a gradient's when it was noted.
    alive: dict[int, int] = {}
    gradient_events: set[int] = set()
    notes = iter(noted)
    for i, event in enumerate(events):
        if event["name"] == "gradients noted":
            gradient_events |= {alive[address] for address in next(notes) if address in alive}
        elif event["name"] == "[memory]":
            if event["args"]["Bytes"] > 0:
                alive[event["args"]["Addr"]] = i
            else:
                alive.pop(event["args"]["Addr"], None)

    total = gradient = peak = 0
    within: list[int] = []
    live_gradients: dict[int, int] = {}
    for i, event in enumerate(events):
        if event["name"] != "[memory]":
            continue
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        total += size
        if i in gradient_events:
            live_gradients[address] = size
            gradient += size
        elif size < 0:
            gradient -= live_gradients.pop(address, 0)
        if event["ts"] < begin:
            within = [total]
        elif event["ts"] <= end:
            within.append(total)
            peak = max(peak, total - kept - gradient)
    return {
        "peak_bytes": peak,
        "peak_bytes_within_step": max(within) - within[0],
        "peak_bytes_resident": _resident_peak(case, shape, seed),
    }


def _trace(profiler: profile) -> list[dict[str, Any]]:
    """The profiler's events with a time, from its exported trace: the one public place that has single allocations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if "ts" in event and event.get("ph") in ("X", "i")]


def _resident_peak(case: str, shape: Shape, seed: int) -> int:
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and clear.exists()):
        return 0

    def kilobytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name + ":"))

    sae, x, gradients = made(case, shape, seed)
    peaks: list[int] = []

    def batches() -> Iterator[Any]:
        for _ in range(4):
            with contextlib.suppress(OSError, AttributeError):  # glibc only: give back what is free but resident
                ctypes.CDLL(None).malloc_trim(0)
            clear.write_text("5")
            before = kilobytes("VmRSS")
            yield x if gradients is None else (x, gradients)
            peaks.append(1024 * (kilobytes("VmHWM") - before))

    try:
        run(sae, case, shape, batches())
    except PermissionError:
        return 0
    return peaks[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*PRECISIONS, *ALLOCATIONS], default="bf16_selection")
    parser.add_argument("--measure", choices=["step", "matmul", "stages", "memory", "growth"], default="step")
    parser.add_argument("--shape", type=Shape.parse, default=Shape(2048, 768, 24576, 32))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="no further step once the timed ones took this long"
    )
    parser.add_argument("--k", type=int, action="append", help="for growth: the k in place of the shape's")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape: Shape = args.shape
    if args.measure == "step":
        ms = step_ms(args.case, shape, args.seed, args.warmup, args.steps, args.seconds)
        result = {"step_ms": statistics.median(ms), "all_ms": ms}
    elif args.measure == "matmul":
        step, matmul = with_matmul(args.case, shape, args.seed, args.warmup, args.steps)
        ratios = [s / m for s, m in zip(step, matmul, strict=True)]
        result = {"ratio": statistics.median(ratios)}
        result |= {"step_ms": statistics.median(step), "matmul_ms": statistics.median(matmul)}
    elif args.measure == "stages":
        result = stage_ms(args.case, shape, args.seed, args.warmup, args.steps)
    elif args.measure == "memory":
        result = peak_memory(args.case, shape, args.seed)
    else:
        result = {}
        for k in args.k or [shape.k]:
            ms = step_ms(args.case, shape._replace(k=k), args.seed, args.warmup, args.steps, args.seconds)
            result[str(k)] = statistics.median(ms)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
