"""The sparse products with their gradients: one autograd function each, above whichever back-end computes them.

Gradients stay sparse: no tensor of tokens x features and none of nnz x d is ever made.
"""

from typing import Any

import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.kernels import cpu


def spmm(codes: Codes, table: Tensor) -> Tensor:
    """Sum of rows of `table` weighted by `codes`; ``codes.to_dense() @ table``.

    table ``[n_features, d]`` -> ``[tokens, d]``. Gradients reach ``codes.values`` and `table`.
    """
    return _Spmm.apply(codes.values, codes.features, codes.offsets, table)


def sddmm(pattern: Codes, a: Tensor, b: Tensor, bias: Tensor | None = None, *, known: Tensor | None = None) -> Tensor:
    """Dot products of rows of `a` and `b` where `pattern` is set; ``(a @ b.T + bias)[pattern]``.

    a ``[tokens, d]``, b ``[n_features, d]``, bias ``[n_features]`` -> ``[nnz]``. Gradients reach `a`, `b` and `bias`;
    the values of `pattern` are not read. `known` is the result where the caller has it already (from the dense
    product it selected on): it is returned as it is, and only the gradients are computed here.
    """
    return _Sddmm.apply(pattern.features, pattern.offsets, a, b, bias, known)


class _Spmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, features: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(values, features, offsets, table)
        return cpu.spmm(Codes(values, features, offsets, len(table)), table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, features, offsets, table = ctx.saved_tensors
        codes = Codes(values, features, offsets, len(table))
        grad = grad.contiguous()
        d_values = cpu.sddmm(codes, grad, table) if ctx.needs_input_grad[0] else None
        d_table = cpu.spmm_transposed(codes, grad) if ctx.needs_input_grad[3] else None
        return d_values, None, None, d_table


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, offsets: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, known: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(features, offsets, a, b)
        if known is not None:
            return known.clone()
        products = cpu.sddmm(Codes(a.new_empty(len(features)), features, offsets, len(b)), a, b)
        return products if bias is None else products + bias[features]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        features, offsets, a, b = ctx.saved_tensors
        codes = Codes(grad.contiguous(), features, offsets, len(b))
        d_a = cpu.spmm(codes, b) if ctx.needs_input_grad[2] else None
        d_b = cpu.spmm_transposed(codes, a.contiguous()) if ctx.needs_input_grad[3] else None
        d_bias = grad.new_zeros(len(b)).index_add_(0, features, grad) if ctx.needs_input_grad[4] else None
        return None, None, d_a, d_b, d_bias, None
