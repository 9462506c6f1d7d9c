"""Compile every Triton kernel with the options that it is launched with, for GPUs that need not be present.

    python tests/kernels/compile_kernels.py [TARGET ...]        sm_80 sm_90 gfx942 are the targets

Prints one JSON object per kernel and target: its name, case, target, registers and bytes or registers spilled. Kernels
cannot be compiled in a process that has TRITON_INTERPRET set.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saelab.kernels import gpu, gpu_topk

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
INDEX = torch.int64
Arguments = list[torch.dtype | int]


def cases() -> Iterator[tuple[str, Any, Arguments, dict[str, Any]]]:
    """A name, the kernel, its run-time arguments (tensors by dtype) and its compile-time options, as `gpu` launches it.

    d has 512-wide blocks, has 256-wide blocks, is odd, or is 1 (sums per feature); float64 needs most registers.
    """
    float32, bfloat16, float64 = torch.float32, torch.bfloat16, torch.float64
    for d, table in ((2048, bfloat16), (768, float32), (701, float32), (1, float32), (2048, float64)):
        exact = tl.float64 if table == float64 else tl.float32
        wide = torch.promote_types(table, float32)
        name = f"d {d}, {str(table).removeprefix('torch.')}"
        _, options = gpu.spmm_launch((2048, d), exact)
        matrix: Arguments = [wide, INDEX, INDEX, table]
        yield f"spmm, {name}", gpu._sum_rows, [wide, *matrix, wide, INDEX, d], {"SPLIT": 0, "ADD": False, **options}
        split = {"SPLIT": gpu.SPLIT, **options}
        for add in (False, True):
            arguments = [wide, *matrix, wide, INDEX, d]
            yield f"spmm_transposed, {name}, add {add}", gpu._sum_rows, arguments, {"ADD": add, **split}
        yield f"spmm_transposed, {name}", gpu._sum_pieces, [wide, *matrix, INDEX, INDEX, d, 24576], split
        _, options = gpu.sddmm_launch(65536, d, exact)
        yield f"sddmm, {name}", gpu._dot_products, [wide, INDEX, INDEX, wide, table, 65536, d], options
    for n, k, scores in (
        (24576, 32, float32),
        (65536, 64, bfloat16),
        (2**18, 512, torch.float16),
        (65537, 2048, float32),
    ):
        name = f"{k} of {n}, {str(scores).removeprefix('torch.')}"
        group = gpu_topk.group_size(n, k)
        groups = -(-n // group)
        _, options = gpu_topk.maxima_launch(2048, groups, group)
        yield f"topk, {name}", gpu_topk._maxima, [scores, scores, n, groups], options
        for candidates, among, width in ((groups, 0, groups), (k * group, group, n)):
            options = gpu_topk.choose_options(candidates, among, scores)
            arguments = [torch.int32, scores, torch.int32, width, k]
            yield f"topk, {name}, among {candidates}", gpu_topk._choose, arguments, options
        yield f"topk, {name}", gpu_topk._order, [scores, INDEX, torch.int32, scores, n, k], gpu_topk.order_options(k)


def compile_kernel(kernel: Any, arguments: Arguments, options: dict[str, Any], target: GPUTarget) -> Any:
    """The compiled kernel, specialised as a launch would be: for addresses and numbers that are multiples of 16, for 1,
    and on AMD for tensors below 2 GB."""
    options = dict(options)
    run_time = {"num_warps": options.pop("num_warps")}
    names = kernel.arg_names[: len(arguments)]
    assert set(kernel.arg_names[len(arguments) :]) == set(options), f"{kernel.__name__}: options do not fit"
    signature, known = {}, {}
    for i, (name, argument) in enumerate(zip(names, arguments, strict=True)):
        if argument == 1:
            options[name] = 1
            continue
        signature[name] = "i32" if isinstance(argument, int) else POINTERS[argument]
        if not isinstance(argument, int) or argument % 16 == 0:
            known[i,] = [["tt.divisibility", 16]]
        if not isinstance(argument, int) and target.backend == "hip":
            known[i,] += [["tt.pointer_range", 32]]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, options, known), target=target, options=run_time)


def resources(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Registers per thread, and the amount spilled to memory: bytes (CUDA), or bytes and registers (AMD).

    Scalar registers that AMD's compiler moves into lanes of vector registers, mostly masks, do not count as spilled.
    """
    if target.backend == "cuda":
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            found = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        numbers = {key: int(re.findall(rf"\b{key}:(\d+)", found)[-1]) for key in ("REG", "STACK", "LOCAL")}
        return {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"]}
    found = compiled.asm["amdgcn"]
    numbers = {
        key: int(re.findall(rf"\.{key}:\s+(\d+)", found)[-1])
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    spilled = numbers["vgpr_spill_count"] + numbers["private_segment_fixed_size"]
    return {"registers": numbers["vgpr_count"], "spilled": spilled}


def main(names: list[str]) -> None:
    for case, kernel, arguments, options in cases():
        for name in names or TARGETS:
            found = resources(compile_kernel(kernel, arguments, options, TARGETS[name]), TARGETS[name])
            print(json.dumps({"kernel": kernel.__name__, "case": case, "target": name, **found}), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:  # compiled anew, not taken from an earlier run
        os.environ["TRITON_CACHE_DIR"] = folder
        main(sys.argv[1:])
