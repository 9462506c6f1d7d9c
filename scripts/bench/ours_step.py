"""Our training step, measured in this process (child.py calls these functions; step.py reports them).

It is `saelab.training.trainer.train` on a random batch, the peers' batch, timed by the peers' clock: a step lasts from
one request for a batch to the next. Only `settings_of`, `made` and `run` depend on how saelab trains.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from peer_step import Enough, Source
from torch.profiler import record_function

from saelab.codes import Codes
from saelab.kernels import spmm
from saelab.sae.initial import initialise
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.settings import AffinitySettings, AllocationSettings, AuxSettings, SaeSettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import train

STAGES = ("encoder matmul", "selection", "decode", "backward", "optimiser")
"""The `record_function` scopes of the loop."""
PRECISIONS = {"fp32": "float32", "bf16_selection": "bfloat16"}
ALLOCATIONS = ("token_choice", "mutual_choice", "feature_choice", "gradient")
STEPS_OF_A_RUN = 100_000
"""Steps of the run whose first steps are timed; this decides when features count as dead."""


class Shape(NamedTuple):
    batch: int
    d_in: int
    n_features: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """The shape in ``batch,d_in,n_features,k``; argparse.ArgumentTypeError unless these are positive integers."""
        numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
        if len(numbers) != 4 or min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not four positive integers, batch,d_in,n_features,k")
        return cls(*numbers)


def settings_of(case: str, shape: Shape) -> SaeSettings:
    """The settings of a case: a precision of token choice, or one of ALLOCATIONS (all with bf16 selection).

    Feature choice has a given curve from the first step on, which is its steady state; the mutual choice of its first
    steps is a separate case. The curve's densest feature is active on about a tenth of the tokens.
    """
    name = case if case.endswith("_choice") else "token_choice"
    return SaeSettings(
        n_features=shape.n_features,
        k=shape.k,
        affinity=AffinitySettings("gradient" if case == "gradient" else "activation"),
        allocation=AllocationSettings(name, exponent=1.0, shift=50.0, after=0.0),
        aux=AuxSettings("none"),
        selection=PRECISIONS.get(case.removesuffix("_tf32"), "bfloat16"),
    )


def made(case: str, shape: Shape, device: str) -> tuple[SparseAutoencoder, Batch]:
    """An autoencoder, and the batch of every step."""
    torch.set_float32_matmul_precision("high" if case.endswith("_tf32") else "highest")
    x, gradients = (torch.randn(shape[:2], generator=torch.Generator().manual_seed(i)).to(device) for i in range(2))
    torch.manual_seed(0)
    sae = SparseAutoencoder(shape.d_in, shape.n_features, shape.k).to(device)
    initialise(sae, x[:256])
    return sae, Batch(x, gradients=gradients if case == "gradient" else None)


def run(sae: SparseAutoencoder, case: str, shape: Shape, batches: Iterable[Batch]) -> None:
    """Train on `batches`, as at the beginning of a long run, until they end."""
    settings = TrainingSettings(tokens=STEPS_OF_A_RUN * shape.batch, batch=shape.batch, log_every=10**9)
    with contextlib.suppress(Enough):
        train(sae, batches, settings, settings_of(case, shape))


def step(
    case: str, shape: Iterable[int], steps: int, warmup: int = 2, seconds: float = 8.0, device: str = "cpu"
) -> dict[str, Any]:
    """``step_ms``, the median, and ``all_ms`` of the timed steps, at least three, no new one after `seconds`."""
    shape = Shape(*shape)
    sae, batch = made(case, shape, device)
    source = Source(batch.x, warmup, steps, seconds)
    run(sae, case, shape, (batch for _ in source))
    return {"step_ms": statistics.median(source.step_ms()), "all_ms": source.step_ms()}


def growth(shape: Iterable[int], ks: Iterable[int], steps: int, device: str = "cpu") -> dict[str, float]:
    """Milliseconds of a step with bf16 selection for each k."""
    batch, d_in, n_features, _ = shape
    return {str(k): step("bf16_selection", (batch, d_in, n_features, k), steps, device=device)["step_ms"] for k in ks}


def matmul(
    case: str, shape: Iterable[int], steps: int, warmup: int = 2, device: str = "cpu", dtype: str = "float32"
) -> dict[str, float]:
    """Medians of ``step_ms``, of ``matmul_ms``, one encoder matmul right before each step, and of their ``ratio``.

    The matmul, ``[batch, d_in] @ [d_in, n_features]`` in `dtype`, writes into allocated memory.
    """
    shape = Shape(*shape)
    sae, batch = made(case, shape, device)
    options: Any = {"device": device, "dtype": getattr(torch, dtype)}
    x, weight = torch.randn(shape.batch, shape.d_in, **options), torch.randn(shape.n_features, shape.d_in, **options)
    out = torch.empty(shape.batch, shape.n_features, **options)
    times: list[float] = []

    def batches() -> Iterator[Batch]:
        for _ in range(warmup + steps):
            times.append(_now(device))
            torch.mm(x, weight.T, out=out)
            times.append(_now(device))
            yield batch
            times.append(_now(device))

    run(sae, case, shape, batches())
    begin, middle, end = (times[3 * warmup + part :: 3] for part in range(3))
    pairs = [(1000 * (c - b), 1000 * (b - a)) for a, b, c in zip(begin, middle, end, strict=True)]
    return {
        "ratio": statistics.median(step / product for step, product in pairs),
        "step_ms": statistics.median(step for step, _ in pairs),
        "matmul_ms": statistics.median(product for _, product in pairs),
    }


def stages(case: str, shape: Iterable[int], steps: int, warmup: int = 2, device: str = "cpu") -> dict[str, float]:
    """Median milliseconds per step in each scope of the loop; "rest" is the time outside all scopes."""
    shape = Shape(*shape)
    sae, batch = made(case, shape, device)
    rows: list[dict[str, float]] = []

    def batches() -> Iterator[Batch]:
        for _ in range(warmup + steps):
            scopes.clear()
            began = _now(device)
            yield batch
            whole = 1000 * (_now(device) - began)
            row = dict.fromkeys(STAGES, 0.0)
            for scope in scopes:
                if scope[0] in row:
                    row[scope[0]] += _milliseconds(scope, device)
            rows.append(row | {"rest": whole - sum(row.values())})

    with _timed_scopes(device) as scopes:
        run(sae, case, shape, batches())
    return {name: statistics.median(row[name] for row in rows[warmup:]) for name in (*STAGES, "rest")}


@contextlib.contextmanager
def _timed_scopes(device: str) -> Iterator[list[tuple[str, Any, Any]]]:
    """Yields a list of (name, begin, end) of `record_function` scopes: seconds, or events on a GPU."""
    found: list[tuple[str, Any, Any]] = []

    def now() -> Any:
        if device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enter(scope: Any) -> Any:
        scope.began = now()
        return scope

    def leave(scope: Any, *exception: object) -> None:
        found.append((scope.name, scope.began, now()))

    with mock.patch.multiple(record_function, __enter__=enter, __exit__=leave):  # a patch of the class
        yield found


def waits(case: str, shape: Iterable[int], device: str) -> str | None:
    """None if steps four to six of a run never wait for the GPU; else torch's message about the wait."""
    shape = Shape(*shape)
    sae, batch = made(case, shape, device)

    def batches() -> Iterator[Batch]:
        for i in range(6):
            if i == 3:  # the first step logs, and compiles
                torch.cuda.set_sync_debug_mode("error")
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    try:
        run(sae, case, shape, batches())
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def decoder(shape: Iterable[int], device: str = "cpu") -> dict[str, dict[str, float]]:
    """Median milliseconds of the decoder's product in each dtype, its bytes per second, and those of a copy.

    It must move each entry's row of the table, its value and feature, and the output. Rows that are still in the cache
    make it faster than memory; at the shapes of a large run the table fits no cache.
    """
    shape, found = Shape(*shape), {}
    source = torch.empty(2**22 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _median_ms(lambda: target.copy_(source), device) * 1000  # read and written, per second
    for dtype in (torch.float32, torch.bfloat16):
        features = torch.randint(shape.n_features, (shape.batch, shape.k), device=device)
        values = torch.rand(shape.batch, shape.k, device=device, dtype=dtype) + 0.1
        codes = Codes.from_topk(values, features, shape.n_features)
        table = torch.randn(shape.n_features, shape.d_in, device=device, dtype=dtype)
        moved = codes.nnz * (table[0].nbytes + values.itemsize + 8) + shape.batch * table[0].nbytes
        with torch.no_grad():
            ms = _median_ms(lambda codes=codes, table=table: spmm(codes, table), device)
        speed = moved / ms * 1000
        row = {"ms": ms, "gb_per_s": speed / 1e9, "copy_gb_per_s": copy / 1e9, "share": speed / copy}
        found[str(dtype).removeprefix("torch.")] = row
    return found


def _median_ms(f: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Median milliseconds of f() after three calls that warm up."""
    ms = []
    for _ in range(3 + repeats):
        with _timed_scopes(device) as scopes, record_function("f"):
            f()
        ms.append(_milliseconds(scopes[-1], device))
    return statistics.median(ms[3:])


def _milliseconds(scope: tuple[str, Any, Any], device: str) -> float:
    _, begin, end = scope
    if device == "cpu":
        return 1000 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)


def _now(device: str) -> float:
    """Time in seconds, after the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()
