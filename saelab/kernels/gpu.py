"""spmm, its transpose and sddmm for GPUs, in Triton; `topk` is in `gpu_topk.py`.

Memory traffic limits their speed. With T tokens, F features, nnz entries and tables of s bytes per number, a product
gathers nnz rows of d numbers, nnz * d * s bytes, for 2 * nnz * d FLOP: at most one FLOP per byte, while a GPU can do
tens. So the kernels read every row once, in pieces of at least a cache line, with several rows in flight, and keep sums
in registers. Neighbouring programs compute the same columns of different rows, so that only those columns of the table,
at most 512 of d, compete for the L2 cache. The kernels write:

    spmm             T * d numbers
    spmm_transposed  F * d numbers, empty features included, and at most 2 * nnz / 256 partial sums of d numbers
    sddmm            nnz numbers

Nothing is added atomically, so results are the same bits every time. No launch depends on numbers on the GPU, so the
host never waits. Sums are kept in float32, or in float64 if an input is float64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab.codes import Codes
from saelab.kernels.gpu_topk import topk
from saelab.kernels.launch import launch

__all__ = ["INTERPRETED", "sddmm", "spmm", "spmm_transposed", "topk"]

SPLIT = 256
"""Most entries of one feature that one program adds up; longer segments are cut into pieces of this size."""


def spmm(codes: Codes, table: Tensor) -> Tensor:
    """``codes.to_dense() @ table``: table ``[n_features, d]`` -> ``[tokens, d]``."""
    d, dtype = table.shape[1], torch.promote_types(codes.values.dtype, table.dtype)
    out = torch.empty(codes.tokens, d, dtype=dtype, device=table.device)
    if out.numel():
        grid, options = spmm_launch(out.shape, _exact(dtype))
        unused = (out, codes.offsets)
        arguments = (out, codes.values, codes.features, codes.offsets, table, *unused, d)
        launch(_sum_rows, grid, *arguments, SPLIT=0, ADD=False, **options)
    return out


def spmm_transposed(codes: Codes, rows: Tensor, into: Tensor | None = None) -> Tensor:
    """``codes.to_dense().T @ rows``: rows ``[tokens, d]`` -> ``[n_features, d]``, the same bits every time.

    If `into` is given, the product is added to it, and features without entries are neither read nor written.
    """
    turned, d = codes.transpose(), rows.shape[1]
    dtype = torch.promote_types(codes.values.dtype, rows.dtype)
    out = torch.empty(codes.n_features, d, dtype=dtype, device=rows.device) if into is None else into
    if not out.numel():
        return out
    first_piece, row_of_piece = turned.once("pieces", lambda: _pieces(turned))
    partial = rows.new_empty(len(row_of_piece), d, dtype=torch.promote_types(dtype, torch.float32))
    matrix = (turned.values, turned.features, turned.offsets, rows)
    if partial.numel():
        grid, options = spmm_launch(partial.shape, _exact(dtype))
        launch(_sum_pieces, grid, partial, *matrix, row_of_piece, first_piece, d, turned.tokens, SPLIT=SPLIT, **options)
    grid, options = spmm_launch(out.shape, _exact(dtype))
    options |= {"SPLIT": SPLIT, "ADD": into is not None}
    launch(_sum_rows, grid, out, *matrix, partial, first_piece, d, **options)
    return out


def sddmm(codes: Codes, a: Tensor, b: Tensor) -> Tensor:
    """``(a @ b.T)[pattern]``: a ``[tokens, d]``, b ``[n_features, d]`` -> ``[nnz]``."""
    nnz, d = len(codes.features), a.shape[1]
    out = torch.empty(nnz, dtype=torch.promote_types(a.dtype, b.dtype), device=a.device)
    if nnz:
        grid, options = sddmm_launch(nnz, d, _exact(out.dtype))
        launch(_dot_products, grid, out, codes.row_of_entry(), codes.features, a, b, nnz, d, **options)
    return out


def _pieces(codes: Codes) -> tuple[Tensor, Tensor]:
    """The first piece of each row ``[rows + 1]``, and the row of each piece ``[pieces]``. Rows of at most SPLIT entries
    have no pieces.

    Counting the pieces would wait for the GPU. 2 nnz / SPLIT are always enough; unused ones belong to row `rows`.
    """
    lengths = codes.offsets.diff()
    counts = torch.where(lengths > SPLIT, (lengths + SPLIT - 1) // SPLIT, 0)
    first_piece = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    pieces = torch.arange(2 * len(codes.features) // SPLIT, device=counts.device)
    return first_piece, torch.searchsorted(first_piece[1:], pieces, right=True)


@triton.jit
def _weighted_sum(
    values, features, table, start, end, column, d, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, EXACT: tl.constexpr
):
    """Weighted sum of the rows of entries `start` to `end`, at the columns `column`; rows of value 0 are not read."""
    total = tl.zeros([ENTRIES, BLOCK], EXACT)
    for first in range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        value = tl.load(values + entry, mask=entry < end, other=0.0).to(EXACT)
        row = tl.load(features + entry, mask=entry < end, other=0).to(tl.int64)
        address = table + row[:, None] * d + column[None, :]
        tile = tl.load(address, mask=(value != 0)[:, None] & (column < d)[None, :], other=0.0)
        total += value[:, None] * tile.to(EXACT)
    return tl.sum(total, 0)


@triton.jit
def _sum_rows(
    out,
    values,
    features,
    offsets,
    table,
    partial,
    first_piece,
    d,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One row of `out` at one block of columns. With SPLIT > 0, a longer row is the sum of its pieces in `partial`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    address, mask = out + row * d + column, column < d
    if ADD:
        mask = mask & (end > start)
    if SPLIT > 0:
        end = tl.where(end - start > SPLIT, start, end)
    total = _weighted_sum(values, features, table, start, end, column, d, BLOCK, ENTRIES, EXACT)
    if SPLIT > 0:
        for piece in range(tl.load(first_piece + row), tl.load(first_piece + row + 1)):
            total += tl.load(partial + piece * d + column, mask=column < d, other=0.0)
    if ADD:
        total += tl.load(address, mask=mask, other=0.0).to(EXACT)
    tl.store(address, total, mask=mask)


@triton.jit
def _sum_pieces(
    partial,
    values,
    features,
    offsets,
    table,
    row_of_piece,
    first_piece,
    d,
    rows,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One piece of at most SPLIT entries of a long row, at one block of columns."""
    piece = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of_piece + piece)
    if row < rows:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        start = tl.load(offsets + row) + (piece - tl.load(first_piece + row)) * SPLIT
        end = tl.minimum(start + SPLIT, tl.load(offsets + row + 1))
        total = _weighted_sum(values, features, table, start, end, column, d, BLOCK, ENTRIES, EXACT)
        tl.store(partial + piece * d + column, total, mask=column < d)


@triton.jit
def _dot_products(out, tokens, features, a, b, nnz, d, BLOCK: tl.constexpr, ENTRIES: tl.constexpr, EXACT: tl.constexpr):
    """Dot products of a block of entries. Neighbours mostly share a token, whose row of `a` is then in the L1 cache."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < nnz
    left = a + tl.load(tokens + entry, mask=there, other=0).to(tl.int64)[:, None] * d
    right = b + tl.load(features + entry, mask=there, other=0).to(tl.int64)[:, None] * d
    total = tl.zeros([ENTRIES, BLOCK], EXACT)
    for first in range(0, d, BLOCK):
        column = (first + tl.arange(0, BLOCK))[None, :]
        mask = there[:, None] & (column < d)
        total += tl.load(left + column, mask=mask, other=0.0).to(EXACT) * tl.load(
            right + column, mask=mask, other=0.0
        ).to(EXACT)
    tl.store(out + entry, tl.sum(total, 1), mask=there)


def spmm_launch(shape: tuple[int, ...], exact: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and compile-time options for an output of `shape`."""
    rows, d = shape
    options = _tile(d, exact)
    return (rows, -(-d // options["BLOCK"])), options


def sddmm_launch(nnz: int, d: int, exact: Any) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and compile-time options for `nnz` dot products of length `d`."""
    options = _tile(d, exact)
    return (-(-nnz // options["ENTRIES"]),), options


def _tile(d: int, exact: Any) -> dict[str, Any]:
    """Columns and entries of a program: 4096 sums on 128 threads, 32 registers each; half as many in float64.

    The block of columns is 512, 256 or 128, whichever wastes least: d = 768, for example, is not a power of two.
    """
    widest = min(512, max(16, triton.next_power_of_2(d)))
    block = min(
        (size for size in (512, 256, 128) if size <= widest), key=lambda n: (-(-d // n) * n, -n), default=widest
    )
    entries = (8 if block == 512 else 16) // (2 if exact == tl.float64 else 1)
    return {"BLOCK": block, "ENTRIES": entries, "EXACT": exact, "num_warps": max(1, min(4, block * entries // 1024))}


def _exact(dtype: torch.dtype) -> Any:
    """Triton's dtype for sums of numbers of `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


INTERPRETED = not isinstance(_sum_rows, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set at import; if so, the kernels run in Python, on CPU tensors."""
