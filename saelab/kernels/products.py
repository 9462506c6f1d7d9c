"""The sparse products with their gradients, and the exact top-k. Each is one function, which calls a back-end.

A back-end is a module of four functions, `spmm`, `spmm_transposed`, `sddmm` and `topk`. The device of the tensors
chooses it (CPU: `cpu`, or `dense` for codes denser than `CROSSOVER`; CUDA and ROCm: `gpu`, written in Triton; any
other: `reference`, dense); the environment variable SAELAB_KERNELS (cpu, dense, triton or reference) forces one. All
back-ends share the autograd functions here.

Gradients stay sparse: outside `reference` no tensor of tokens x features or nnz x d is ever made (`dense` makes one
tile of tokens x features at a time). Sums are accumulated in float32, or in float64 if an input is float64. There are
no second derivatives.
"""

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab.codes import Codes
from saelab.errors import SaelabError

CROSSOVER = 0.11
"""Share of all entries above which codes on a CPU are dense: their products take the dense way.

Measured by ``python scripts/bench/crossover.py --threads 2``, which times a training step's products both ways: they
are equally fast at 0.12 (batch 2048, d 256, 4096 features) and 0.10 (1024, 768, 24576); at one half the dense way is
four to five times faster. Not measured on a GPU, where codes of any density take the sparse kernels.
"""

CAST_ELEMENTS = 2**24
"""Numbers of a table that are cast at a time, 64 MB in float32."""

_MODULES = {"reference": "reference", "cpu": "cpu", "dense": "dense", "triton": "gpu"}


def spmm(codes: Codes, table: Tensor, *, read: Tensor | None = None) -> Tensor:
    """Sum of rows of `table` weighted by `codes`; ``codes.to_dense() @ table``.

    table ``[n_features, d]`` -> ``[tokens, d]``, in the promoted dtype of values and table (float32, bfloat16, float16
    or float64 each). Gradients reach ``codes.values`` and `table`. Non-contiguous input is copied. Entries of value 0
    have no effect. `read`: a copy of `table` in a lower precision that is read instead of it; the gradients are those
    of the product with `read`, and reach `table` in its own precision. Raises ValueError if shapes do not fit; does not
    check that features are in range.
    """
    _check_shapes(codes, codes.tokens, table)
    return _Spmm.apply(codes.values, codes, table, read)


def sddmm(
    pattern: Codes,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    centre: Tensor | None = None,
    known: Tensor | None = None,
    read: Tensor | None = None,
) -> Tensor:
    """Dot products of rows of `a` and `b` at the entries of `pattern`; ``((a - centre) @ b.T + bias)[pattern]``.

    a ``[tokens, d]``, b ``[n_features, d]``, bias ``[n_features]``, centre ``[d]`` -> ``[nnz]``, in the promoted dtype
    of the arguments. Gradients reach `a`, `b`, `bias` and `centre`; the values of `pattern` are not read.
    Non-contiguous input is copied. If the caller already has the result (from the dense product it selected on), it is
    passed as `known` and returned unchanged, and only gradients are computed here. `read` is a copy of `b`, as in
    `spmm`. Raises ValueError if shapes do not fit; does not check that features are in range.
    """
    _check_shapes(pattern, len(a), b, a)
    return _Sddmm.apply(pattern, a, b, bias, centre, known, read)


def per_entry(pattern: Codes, vector: Tensor) -> Tensor:
    """The number of each entry's feature: ``vector[pattern.features]``, vector ``[n_features]`` -> ``[nnz]``.

    Its gradient is summed in the same order every time, which that of an index is not, on a GPU or in several threads.
    """
    return _PerEntry.apply(vector, pattern)


@torch.no_grad()
def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each token and their features: scores ``[tokens, n_features]`` -> two ``[tokens, k]``.

    Exact: equals the first k of a stable descending sort of each row, with ties to the lower feature. -0 and 0 tie, NaN
    counts as largest, and numbers below the smallest normal one may count as 0. Values have the dtype of `scores`,
    features are int64. Has no gradient. Raises ValueError if k is out of range.
    """
    if scores.ndim != 2 or not 0 <= k <= scores.shape[1]:
        raise ValueError(f"topk: {k} of scores {list(scores.shape)}")
    return _backend(scores).topk(scores, k)


class _PerEntry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, pattern: Codes) -> Tensor:
        ctx.pattern = pattern
        return vector[pattern.features]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _summed_by_feature(ctx.pattern.with_values(grad.contiguous()), grad), None


def _summed_by_feature(codes: Codes, like: Tensor) -> Tensor:
    """The sum of each feature's values, ``[n_features]``, in the promoted dtype with `like`.

    Not index_add, which adds in any order on a GPU and in several threads.
    """
    ones = like.new_ones(codes.tokens, 1)
    return _backend(ones, codes).spmm_transposed(codes, ones).squeeze(1)


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, codes: Codes, table: Tensor, read: Tensor | None) -> Tensor:
        values, table = values.contiguous(), table.contiguous()
        read = table if read is None else read.contiguous()
        ctx.save_for_backward(values, table, read)
        ctx.pattern = codes
        return _backend(read, codes).spmm(codes.with_values(values), read)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, table, read = ctx.saved_tensors
        codes, grad, backend = ctx.pattern.with_values(values), grad.contiguous(), _backend(table, ctx.pattern)
        d_values = backend.sddmm(codes, grad, read).to(values.dtype) if ctx.needs_input_grad[0] else None
        d_table = _table_gradient(backend, codes, grad, table) if ctx.needs_input_grad[2] else None
        return d_values, None, d_table, None


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pattern: Codes,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        centre: Tensor | None,
        known: Tensor | None,
        read: Tensor | None,
    ) -> Tensor:
        a, b = (a if centre is None else a - centre).contiguous(), b.contiguous()
        read = b if read is None else read.contiguous()
        ctx.save_for_backward(a, b, read)
        ctx.pattern = pattern
        if known is not None:
            return known.clone()
        products = _backend(a, pattern).sddmm(pattern, a, read)
        return products if bias is None else products + bias[pattern.features]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b, read = ctx.saved_tensors
        codes, backend = ctx.pattern.with_values(grad.contiguous()), _backend(a, ctx.pattern)
        _, wants_a, wants_b, wants_bias, wants_centre, *_ = ctx.needs_input_grad
        d_a = backend.spmm(codes, read) if wants_a else None
        d_b = _table_gradient(backend, codes, a, b) if wants_b else None
        d_bias = d_centre = None
        if wants_bias or wants_centre:
            per_feature = _summed_by_feature(codes, a)  # d_centre does not need the gradient [tokens, d] of `a`
            d_bias = per_feature if wants_bias else None
            d_centre = -_weighted_sum(per_feature.to(b.dtype), read) if wants_centre else None
        return None, d_a, d_b, d_bias, d_centre, None, None


def _weighted_sum(weights: Tensor, table: Tensor) -> Tensor:
    """``weights @ table`` in the dtype of weights ``[n]``; table ``[n, d]`` may be of a lower precision."""
    if table.dtype == weights.dtype:
        return weights @ table
    rows = max(1, CAST_ELEMENTS // table.shape[1])
    parts = zip(weights.split(rows), table.split(rows), strict=True)
    return sum((part @ block.to(part.dtype) for part, block in parts), weights.new_zeros(table.shape[1]))


def accumulate_in_place(table: Tensor) -> None:
    """Set ``table.grad`` to zero and add later gradients of parameter `table` to it directly, without returning them.

    This saves allocating and adding a gradient as large as the table in every step. Gradients that do not come from
    these products reach ``table.grad`` as usual; `torch.autograd.grad` no longer returns those that do.
    """
    table.grad = torch.zeros_like(table)
    table.accumulates_in_place = True  # type: ignore[attr-defined]


def return_gradients(table: Tensor) -> None:
    """Undo `accumulate_in_place`."""
    table.grad = None
    table.accumulates_in_place = False  # type: ignore[attr-defined]


def _table_gradient(backend: ModuleType, codes: Codes, rows: Tensor, table: Tensor) -> Tensor | None:
    if getattr(table, "accumulates_in_place", False) and table.grad is not None:
        if codes.nnz:  # an auxiliary loss may have no entries, and to add zeros is a pass over the table
            backend.spmm_transposed(codes, rows, table.grad)
        return None
    return backend.spmm_transposed(codes, rows).to(table.dtype)


def _backend(tensor: Tensor, codes: Codes | None = None) -> ModuleType:
    """The back-end for `codes` on the device of `tensor`, or the one that SAELAB_KERNELS names."""
    forced = os.environ.get("SAELAB_KERNELS", "")
    if forced and forced not in _MODULES:
        raise SaelabError(f"SAELAB_KERNELS: {forced!r} is not one of {', '.join(_MODULES)}; set one or unset it")
    name = forced or {"cpu": "cpu", "cuda": "triton"}.get(tensor.device.type, "reference")
    if codes is not None and name == "cpu" and not forced and codes.nnz > CROSSOVER * codes.tokens * codes.n_features:
        name = "dense"
    try:
        module = importlib.import_module(f"saelab.kernels.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise SaelabError(
            "The kernels for GPUs need triton, which is not installed: pip install triton. "
            "SAELAB_KERNELS=reference works without it, but slowly and with dense tensors."
        ) from error
    if name == "triton" and tensor.device.type == "cpu" and not module.INTERPRETED:
        raise SaelabError(
            "SAELAB_KERNELS=triton: Triton computes on a GPU, but the tensors are on the CPU; unset SAELAB_KERNELS"
        )
    return module


def _check_shapes(codes: Codes, tokens: int, table: Tensor, rows: Tensor | None = None) -> None:
    matrices = [table] if rows is None else [rows, table]
    if any(m.ndim != 2 or m.shape[1] != table.shape[-1] for m in matrices) or (tokens, len(table)) != (
        codes.tokens,
        codes.n_features,
    ):
        shapes = " and ".join(str(list(m.shape)) for m in matrices)
        raise ValueError(f"{shapes} do not fit codes of [{codes.tokens}, {codes.n_features}]")
