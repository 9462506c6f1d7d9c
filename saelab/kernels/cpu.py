"""spmm, its transpose and sddmm for torch's CPU (and, unfused, any torch device), built on ``embedding_bag``.

`embedding_bag` sums weighted rows of a table without an ``[nnz, d]`` temporary; sddmm, which has no such torch
operation, runs over blocks of tokens so that its gather stays in cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.codes import Codes

_BLOCK_ENTRIES = 4096
"""Entries per block of sddmm: at d 768, two gathered blocks of 12 MB; larger ones fall out of the caches."""


def spmm(codes: Codes, table: Tensor) -> Tensor:
    """``codes.to_dense() @ table``: table ``[n_features, d]`` -> ``[tokens, d]``."""
    return F.embedding_bag(
        codes.features, table, codes.offsets, mode="sum", per_sample_weights=codes.values, include_last_offset=True
    )


def spmm_transposed(codes: Codes, rows: Tensor) -> Tensor:
    """``codes.to_dense().T @ rows``: rows ``[tokens, d]`` -> ``[n_features, d]``, in the same order every time."""
    order = torch.argsort(codes.features, stable=True)
    counts = torch.bincount(codes.features, minlength=codes.n_features)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tokens = codes.row_of_entry()
    return F.embedding_bag(
        tokens[order], rows, offsets, mode="sum", per_sample_weights=codes.values[order], include_last_offset=True
    )


def sddmm(codes: Codes, a: Tensor, b: Tensor) -> Tensor:
    """``(a @ b.T)`` at the pattern of `codes`: a ``[tokens, d]``, b ``[n_features, d]`` -> ``[nnz]``."""
    tokens = codes.row_of_entry()
    out = torch.empty(codes.nnz, dtype=torch.promote_types(a.dtype, b.dtype), device=a.device)
    for start in range(0, codes.nnz, _BLOCK_ENTRIES):
        block = slice(start, start + _BLOCK_ENTRIES)
        torch.linalg.vecdot(a[tokens[block]], b[codes.features[block]], out=out[block])
    return out
