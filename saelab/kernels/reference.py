"""The products by their dense formulas, on any device. Tests compare the other back-ends with them.

Computes low-precision input in float32 and rounds once, at the end.
"""

import torch
from torch import Tensor

from saelab.codes import Codes


def spmm(codes: Codes, table: Tensor) -> Tensor:
    """``codes.to_dense() @ table``: table ``[n_features, d]`` -> ``[tokens, d]``."""
    return _product(codes.to_dense(), table)


def spmm_transposed(codes: Codes, rows: Tensor, into: Tensor | None = None) -> Tensor:
    """``codes.to_dense().T @ rows``: rows ``[tokens, d]`` -> ``[n_features, d]``; added to `into` if given."""
    product = _product(codes.to_dense().T, rows)
    return product if into is None else into.add_(product)


def sddmm(codes: Codes, a: Tensor, b: Tensor) -> Tensor:
    """``(a @ b.T)[pattern]``: a ``[tokens, d]``, b ``[n_features, d]`` -> ``[nnz]``."""
    return _product(a, b.T)[codes.row_of_entry(), codes.features]


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of every sorted row: scores ``[tokens, n_features]`` -> values and features ``[tokens, k]``."""
    # a GPU sorts a NaN whose sign bit is set as the smallest
    scores = scores.masked_fill(scores.isnan(), torch.nan)
    values, features = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], features[:, :k]


def _product(left: Tensor, right: Tensor) -> Tensor:
    result = torch.promote_types(left.dtype, right.dtype)
    exact = torch.promote_types(result, torch.float32)
    return (left.to(exact) @ right.to(exact)).to(result)
