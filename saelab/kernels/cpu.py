"""The sparse products on a CPU, built on ``embedding_bag``, which sums weighted rows without an ``[nnz, d]`` temporary.

Reading nnz rows of d numbers from memory limits their speed. With entries sorted by feature, each row of the table is
read from memory once and then from the processor's cache (three times faster at 65 k entries of d 768), so sddmm uses
that order too. Results of tens of MB are computed in blocks, whose memory the allocator reuses; one large temporary
costs a page fault per 4 KB (22 ms against 3 for 24576 x 768 floats).

``embedding_bag`` needs one dtype for table and weights. Rows of bfloat16 and float16 are gathered and cast in blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.codes import Codes

_BLOCK_ROWS = 2048
"""Rows of a transposed product at a time: 6 MB at d 768."""
CAST_ENTRIES = 4096
"""Rows gathered at a time to be cast: 12 MB at d 768."""


def spmm(codes: Codes, table: Tensor) -> Tensor:
    """``codes.to_dense() @ table``: table ``[n_features, d]`` -> ``[tokens, d]``, in their promoted dtype."""
    values, dtype = codes.values, torch.promote_types(codes.values.dtype, table.dtype)
    exact = _accumulator(dtype)
    if table.dtype == exact:
        return F.embedding_bag(
            codes.features,
            table,
            codes.offsets.to(codes.features.dtype),
            mode="sum",
            per_sample_weights=values.to(exact),
            include_last_offset=True,
        ).to(dtype)
    out = table.new_zeros(codes.tokens, table.shape[1], dtype=exact)
    rows = codes.row_of_entry()
    for start in range(0, codes.nnz, CAST_ENTRIES):
        block = slice(start, start + CAST_ENTRIES)
        weighted = table[codes.features[block]].to(exact) * values[block, None].to(exact)
        out.index_add_(0, rows[block], weighted)
    return out.to(dtype)


def spmm_transposed(codes: Codes, rows: Tensor, into: Tensor | None = None) -> Tensor:
    """``codes.to_dense().T @ rows``: rows ``[tokens, d]`` -> ``[n_features, d]``, summed in the same order every time.

    If `into` is given, the product is added to it.
    """
    by_feature = codes.transpose()
    dtype = torch.promote_types(codes.values.dtype, rows.dtype)
    out = rows.new_empty(codes.n_features, rows.shape[1], dtype=dtype) if into is None else into
    for start in range(0, codes.n_features, _BLOCK_ROWS):
        block = spmm(by_feature[start : start + _BLOCK_ROWS], rows)
        if into is None:
            out[start : start + len(block)] = block
        else:
            out[start : start + len(block)] += block
    return out


def sddmm(codes: Codes, a: Tensor, b: Tensor) -> Tensor:
    """``(a @ b.T)`` at the pattern of `codes`: a ``[tokens, d]``, b ``[n_features, d]`` -> ``[nnz]``."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    exact = _accumulator(dtype)
    by_feature = codes.with_values(torch.arange(codes.nnz)).transpose()
    order, tokens = by_feature.values, by_feature.features
    features = by_feature.row_of_entry()
    if a.dtype == b.dtype == exact:
        # embedding_bag's gradient for its weights: dot products of rows, fused and in parallel
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            a, b, features, codes.offsets[:-1].long(), tokens, 0
        )
    else:
        products = torch.empty(codes.nnz, dtype=exact)
        for start in range(0, codes.nnz, CAST_ENTRIES):
            block = slice(start, start + CAST_ENTRIES)
            products[block] = torch.linalg.vecdot(a[tokens[block]].to(exact), b[features[block]].to(exact))
    return torch.empty_like(products).index_copy_(0, order, products).to(dtype)


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of a stable descending sort of each row of scores ``[tokens, n_features]``: two ``[tokens, k]``."""
    if k >= scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True)
    values, features = scores.topk(k + 1, dim=1)
    last = values[:, k] if k else values[:, 0]
    tied = (values[:, k - 1] == last) | last.isnan() if k else torch.zeros(len(scores), dtype=torch.bool)
    features = features[:, :k].sort(dim=1).values  # so that the stable sort below orders equal values by feature
    values, order = scores.gather(1, features).sort(dim=1, descending=True, stable=True)
    features = features.gather(1, order)
    if tied.any():  # torch.topk may have taken any of the features that tie at the cut
        exact = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], features[tied] = exact.values[:, :k], exact.indices[:, :k]
    return values, features


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
