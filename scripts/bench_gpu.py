"""The training step on a GPU: against a bf16 encoder matmul, by stage, its kernels, and other libraries. One command.

NOT YET RUN ON A GPU: it was written on a machine that has none, where `--device cpu --tiny` goes through the same code.

It needs torch, triton, numpy and safetensors, and saelab from this checkout. Under nine minutes on one large GPU: what
would not fit into `--seconds` any more is left out and listed.

    python scripts/bench_gpu.py --out results                          # both shapes of docs/results.md
    python scripts/bench_gpu.py --device cpu --tiny --out /tmp/tiny    # the same code, on small numbers

Other libraries are measured where this interpreter can import them; `--peers FOLDER` is put on their path, for a
machine that cannot install them: ``pip install --no-deps --target FOLDER eai-sparsify einops natsort schedulefree
simple-parsing docstring-parser tqdm``. Of what sparsify imports for other things than its training step (transformers,
datasets, accelerate, huggingface_hub), what is missing is replaced by empty names and a schedule of the learning rate.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saelab.bench import ours, peer_step
from saelab.bench.ours import ALLOCATIONS, PRECISIONS, STAGES, Shape
from saelab.codes import Codes
from saelab.kernels import sddmm, spmm, topk

SHAPES = ("8192,2048,65536,64", "4096,4096,131072,64")
TINY_SHAPES = ("128,32,512,8", "64,48,1024,8")
REPLACEABLE = ("transformers", "datasets", "accelerate", "huggingface_hub")
BEGAN = time.monotonic()
AGAINST = {"as_shipped": "bf16_selection", "fp32_fused": "fp32_tf32", "bf16_fused": "bf16_selection"}
"""What each variant of a peer is compared with. sparsify turns TF32 on, so its fp32 meets ours with TF32 on; what it
ships on a GPU is bf16 autocast."""


class Events:
    """Stands in for torch's `record_function`: milliseconds of each scope by events in the stream."""

    taken: ClassVar[list[tuple[str, Any, Any]]] = []
    on_gpu: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.begin = self._now()

    def __exit__(self, *exception: object) -> None:
        Events.taken.append((self.name, self.begin, self._now()))

    @staticmethod
    def _now() -> Any:
        if not Events.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(f: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median milliseconds of f() after three calls that warm up."""
    ms = []
    for i in range(repeats + 3):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            f()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            f()
            took = 1000 * (time.perf_counter() - start)
        if i >= 3:
            ms.append(took)
    return statistics.median(ms)


def matmul_ms(shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """One encoder matmul, 2 * batch * d_in * n_features FLOP, into memory that is there."""
    x = torch.randn(shape.batch, shape.d_in, device=device, dtype=dtype)
    W = torch.randn(shape.n_features, shape.d_in, device=device, dtype=dtype)
    out = torch.empty(shape.batch, shape.n_features, device=device, dtype=dtype)
    return timed(lambda: torch.mm(x, W.T, out=out), device)


def steps(case: str, shape: Shape, device: torch.device, n: int) -> float:
    return statistics.median(ours.step_ms(case, shape, 0, 3, n, 30.0, str(device)))


def stages(case: str, shape: Shape, device: torch.device, n: int) -> dict[str, float]:
    """Median milliseconds per step in each scope of the loop."""
    Events.on_gpu = device.type == "cuda"
    modules = [m for name, m in sys.modules.items() if name.startswith("saelab.") and hasattr(m, "record_function")]
    originals = [m.record_function for m in modules]
    sae, x, gradients = ours.made(case, shape, 0, str(device))
    per_step: list[dict[str, float]] = []

    def batches() -> Iterator[Any]:
        for _ in range(3 + n):
            Events.taken.clear()
            yield x if gradients is None else (x, gradients)
            synchronise(device)
            row = dict.fromkeys(STAGES, 0.0)
            for name, begin, end in Events.taken:
                if name in row:
                    row[name] += begin.elapsed_time(end) if Events.on_gpu else 1000 * (end - begin)
            per_step.append(row)

    try:
        for module in modules:
            module.record_function = Events
        ours.run(sae, case, shape, batches())
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.record_function = original
    return {name: statistics.median(row[name] for row in per_step[3:]) for name in STAGES}


def peak_bytes(case: str, shape: Shape, device: torch.device) -> int | None:
    """The most a step holds beyond parameters, gradients and Adam's two moments; gradients are taken off throughout."""
    if device.type != "cuda":
        return None
    sae, x, gradients = ours.made(case, shape, 0, str(device))

    def batches() -> Iterator[Any]:
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats(device)
            yield x if gradients is None else (x, gradients)

    ours.run(sae, case, shape, batches())
    return torch.cuda.max_memory_allocated(device) - 4 * sum(p.nbytes for p in sae.parameters())


def waits_for_the_gpu(case: str, shape: Shape, device: torch.device) -> str | None:
    """None where steps four to six of a run never wait for the device; else what torch said about the one that did."""
    sae, x, gradients = ours.made(case, shape, 0, str(device))

    def mode(name: str) -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(name)

    def batches() -> Iterator[Any]:
        for i in range(6):
            if i == 3:  # the first step logs, and compiles
                mode("error")
            yield x if gradients is None else (x, gradients)
        mode("default")

    try:
        ours.run(sae, case, shape, batches())
    except RuntimeError as error:
        return f"{error}".splitlines()[0]
    finally:
        mode("default")
    return None


def random_codes(tokens: int, n_features: int, k: int, device: torch.device, dtype: torch.dtype) -> Codes:
    features = (
        torch.rand(tokens, n_features, device=device).topk(k, dim=1).indices
        if n_features <= 2**13
        else (torch.randint(n_features, (tokens, k), device=device))
    )
    return Codes.from_topk(torch.rand(tokens, k, device=device, dtype=dtype) + 0.1, features, n_features)


def errors(device: torch.device) -> dict[str, float]:
    """Largest error of each kernel, of the largest entry of the dense float64 formula; topk: share of misses."""
    torch.manual_seed(0)
    codes = random_codes(300, 700, 13, device, torch.float32)
    table, rows = torch.randn(700, 200, device=device), torch.randn(300, 200, device=device)
    table.requires_grad_()
    rows.requires_grad_()
    values = codes.values.clone().requires_grad_()
    ragged = codes.with_values(values)
    out = spmm(ragged, table)
    weights = torch.randn_like(out)
    d_values, d_table = torch.autograd.grad(out, (values, table), weights)
    products = sddmm(codes, rows, table)
    cotangent = torch.randn_like(products)
    d_rows, d_b = torch.autograd.grad(products, (rows, table), cotangent)

    with torch.no_grad():
        dense, W, x, G = codes.to_dense().double(), table.double(), rows.double(), weights.double()
        token = codes.row_of_entry()
        C = codes.with_values(cotangent).to_dense().double()
        expected = {
            "spmm": (out, dense @ W),
            "spmm d values": (d_values, (G @ W.T)[token, codes.features]),
            "spmm d table": (d_table, dense.T @ G),
            "sddmm": (products, (x @ W.T)[token, codes.features]),
            "sddmm d a": (d_rows, C @ W),
            "sddmm d b": (d_b, C.T @ x),
        }
        found = {name: ((got - want).abs().max() / want.abs().max()).item() for name, (got, want) in expected.items()}
        scores = torch.randn(64, 5000, device=device).bfloat16()
        got_values, got_features = topk(scores, 33)
        want_values, want_features = torch.sort(scores, dim=1, descending=True, stable=True)
        found["topk"] = max(
            (got_features != want_features[:, :33]).double().mean().item(),
            (got_values != want_values[:, :33]).double().mean().item(),
        )
    return found


def decoder_bandwidth(shape: Shape, device: torch.device) -> dict[str, dict[str, float]]:
    """Bytes per second of the decoder kernel, against a copy on the same device.

    What it must move: each selected row of the table once per entry, its value and feature, and the output. Rows that
    the cache still holds make it faster than memory; a table that none fits into is what the shapes have.
    """
    size = 2**28 if device.type == "cuda" else 2**22
    source, target = torch.empty(size, device=device), torch.empty(size, device=device)
    copy = 2 * source.nbytes / timed(lambda: target.copy_(source), device) * 1000  # read and written, per second
    rows = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        codes = random_codes(shape.batch, shape.n_features, shape.k, device, dtype)
        table = torch.randn(shape.n_features, shape.d_in, device=device, dtype=dtype)
        size = table.element_size()
        moved = codes.nnz * (shape.d_in * size + size + 8) + shape.batch * shape.d_in * size
        with torch.no_grad():
            ms = timed(lambda codes=codes, table=table: spmm(codes, table), device)
        achieved = moved / ms * 1000
        rows[name] = {"ms": ms, "gb_per_s": achieved / 1e9, "copy_gb_per_s": copy / 1e9, "share": achieved / copy}
    return rows


def stand_ins() -> list[str]:
    """Replace what sparsify imports, but its step does not use, where it is missing; says what that was."""

    class Missing(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (nn.Module,), {})

    def rising(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))

    missing = [name for name in REPLACEABLE if importlib.util.find_spec(name) is None]
    for name in missing:
        sys.modules[name] = module = Missing(name)
        if name == "transformers":
            module.get_linear_schedule_with_warmup = rising  # type: ignore[attr-defined]
        if name == "accelerate":
            sys.modules["accelerate.utils"] = module
            module.send_to_device = lambda batch, device: {key: value.to(device) for key, value in batch.items()}  # type: ignore[attr-defined]
    return missing


def peer_process(arguments: list[str]) -> None:
    """What a child process of this script does: one measurement of a peer, one line of JSON."""
    peer, variant, shape, device, n = arguments
    replaced = stand_ins()
    with contextlib.redirect_stdout(sys.stderr):
        result = peer_step.measure(peer, variant, Shape.parse(shape), steps=int(n), warmup=3, device=device)
    print(json.dumps(result | {"replaced": replaced}))


def peer_ms(peer: str, variant: str, shape: Shape, device: torch.device, n: int, folder: Path | None) -> dict[str, Any]:
    """Its step in a process of its own: ``{"step_ms", ...}``, or ``{"error"}``."""
    path = os.pathsep.join(filter(None, [str(folder.resolve()) if folder else "", os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, __file__, "--peer-process", peer, variant, str(shape), str(device), str(n)]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": path, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=150,
        )
    except subprocess.TimeoutExpired:
        return {"error": "took more than 150 s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def measure_shape(shape: Shape, device: torch.device, args: argparse.Namespace, note: Callable[[str], None]) -> dict:
    """All figures at one shape; those that the time does not suffice for are missing and noted."""
    record: dict[str, Any] = {"shape": shape._asdict(), "ours": {}, "peers": {}, "allocations": {}}
    absent: set[str] = set()

    def afford(what: str, seconds: float) -> bool:
        left = args.seconds - (time.monotonic() - BEGAN)
        if left < seconds:
            note(f"{shape}: {what} left out, {left:.0f} s left")
        return left >= seconds

    record["matmul_ms"] = {
        "bf16": matmul_ms(shape, device, torch.bfloat16),
        "fp32": matmul_ms(shape, device, torch.float32),
    }
    for name in (*PRECISIONS, "fp32_tf32"):
        if not afford(f"ours {name}", 20):
            continue
        case = name.removesuffix("_tf32")
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name.endswith("_tf32") else "highest")
        ms = steps(case, shape, device, args.steps)
        record["ours"][name] = {
            "ms_per_step": ms,
            "tokens_per_s": 1000 * shape.batch / ms,
            "per_bf16_matmul": ms / record["matmul_ms"]["bf16"],
            "ms": stages(case, shape, device, min(10, args.steps)),
            "peak_bytes": peak_bytes(case, shape, device),
        }
        torch.set_float32_matmul_precision(before)
        print(f"{shape} ours {name}: {ms:.2f} ms", flush=True)
    record["decoder"] = decoder_bandwidth(shape, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the peers' processes share the device
    for peer, variant in [(name, v) for name in args.peer for v in peer_step.VARIANTS_OF[name]]:
        if peer in absent or not afford(f"{peer} {variant}", 60):
            continue
        result = peer_ms(peer, variant, shape, device, args.steps, args.peers)
        if "No module named" in result.get("error", ""):
            absent.add(peer)
            note(f"{peer}: not measured, {result['error']}")
            continue
        if "error" in result:
            note(f"{shape}: {peer} {variant}: {result['error']}")
            continue
        mine = record["ours"].get(AGAINST[variant])
        record["peers"].setdefault(peer, {})[variant] = {
            "ms_per_step": result["step_ms"],
            "tokens_per_s": 1000 * shape.batch / result["step_ms"],
            "ratio": result["step_ms"] / mine["ms_per_step"] if mine else None,
            "version": result["version"],
        }
        if result["replaced"]:
            names = ", ".join(result["replaced"])
            note(f"{peer}: stand-ins for {names}; its step uses no more of them than a schedule of the rate")
        print(f"{shape} {peer} {variant}: {result['step_ms']:.2f} ms", flush=True)
    token_choice = None
    for case in ALLOCATIONS:
        if afford(f"allocation {case}", 15):
            ms = steps(case, shape, device, args.steps)
            token_choice = token_choice or ms
            record["allocations"][case] = token_choice / ms
    return record


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    lines = [f"{record['device']}, torch {record['torch']}, Triton {record['triton']}", ""]
    for result in record["shapes"]:
        shape = ", ".join(f"{name} {value}" for name, value in result["shape"].items())
        bf16, fp32 = result["matmul_ms"]["bf16"], result["matmul_ms"]["fp32"]
        lines += [f"### {shape}", "", f"One encoder matmul: {bf16:.2f} ms in bf16, {fp32:.2f} ms in fp32.", ""]
        names = [*STAGES, "step", "step / bf16 matmul", "tokens/s", "peak MB"]
        lines += ["| ms | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for name, figures in result["ours"].items():
            peak = figures["peak_bytes"]
            cells = [f"{figures['ms'][stage]:.2f}" for stage in STAGES] + [
                f"{figures['ms_per_step']:.2f}",
                f"{figures['per_bf16_matmul']:.2f}",
                f"{figures['tokens_per_s']:,.0f}",
                "-" if peak is None else f"{peak / 1e6:,.0f}",
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", "| decoder kernel | ms | GB/s | a copy's GB/s | share |", "|---|---|---|---|---|"]
        for name, row in result["decoder"].items():
            cells = [
                f"{row['ms']:.3f}",
                f"{row['gb_per_s']:,.0f}",
                f"{row['copy_gb_per_s']:,.0f}",
                f"{row['share']:.2f}",
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if result["peers"]:
            lines += ["", "| peer | variant | ms | tokens/s | ours / peer |", "|---|---|---|---|---|"]
        for peer, variants in result["peers"].items():
            for variant, row in variants.items():
                ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
                cells = [variant, f"{row['ms_per_step']:.2f}", f"{row['tokens_per_s']:,.0f}", ratio]
                lines.append(f"| {peer} {row['version']} | " + " | ".join(cells) + " |")
        relative = ", ".join(f"{name} {value:.2f}" for name, value in result["allocations"].items())
        lines += ["", f"Tokens/s relative to token choice (bf16 selection): {relative}", ""]
    lines += ["| kernel against the dense float64 formula | error |", "|---|---|"]
    lines += [f"| {name} | {error:.1e} |" for name, error in record["errors"].items()]
    lines += ["", "Waiting for the device within a step:", ""]
    lines += [f"- {case}: {what or 'never'}" for case, what in record["waits"].items()]
    lines += [f"- {note}" for note in record["notes"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--peer-process"]:
        peer_process(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: to see that it runs")
    parser.add_argument("--shape", action="append", help="batch,d_in,n_features,k; may be given more than once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=500.0, help="begin nothing that would not end within these")
    parser.add_argument("--peers", type=Path, help="a folder that other libraries may be imported from")
    parser.add_argument(
        "--peer", action="append", choices=list(peer_step.DISTRIBUTIONS), help="default: sparsify, sae_lens"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for bench_gpu.json and bench_gpu.md")
    args = parser.parse_args()
    args.peer = args.peer or ["sparsify", "sae_lens"]
    device = torch.device(args.device)
    notes: list[str] = []

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)
            print(text, flush=True)

    shapes = [Shape.parse(text) for text in args.shape or (TINY_SHAPES if args.tiny else SHAPES)]
    small = Shape(*shapes[0])._replace(batch=min(1024, shapes[0].batch), n_features=min(16384, shapes[0].n_features))
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
        "steps": args.steps,
        "errors": errors(device),
        "waits": {case: waits_for_the_gpu(case, small, device) for case in ("fp32", *ALLOCATIONS)},
        "notes": notes,
        "shapes": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        record["shapes"].append(measure_shape(shape, device, args, note))
        record["seconds"] = time.monotonic() - BEGAN
        (args.out / "bench_gpu.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (args.out / "bench_gpu.md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


if __name__ == "__main__":
    main()
