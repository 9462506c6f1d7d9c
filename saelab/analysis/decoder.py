"""Measures of the rows of a decoder or encoder, which need no text."""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1024
"""Decoder rows that are compared with all others at a time."""


@torch.no_grad()
def mean_absolute_cosine(W_dec: Tensor) -> float:
    """c_dec: mean over all pairs of different features of the absolute cosine between their decoder rows.

    `W_dec` is ``[n_features, d_in]``. NaN if there is a single feature; a row of zeros has cosine 0 with every other.
    From arXiv 2508.16560: over autoencoders of the same model and site, c_dec as a function of L0 has its elbow at the
    right L0. Takes n_features^2 d_in / 2 multiply-adds, and memory for 1024 x n_features numbers.
    """
    unit = F.normalize(W_dec.float(), dim=1)
    total = torch.zeros((), dtype=torch.float64, device=unit.device)
    for start in range(0, len(unit), TILE):
        cosines = unit[start : start + TILE] @ unit[start:].T
        total += cosines.abs_().triu_(1).sum(dtype=torch.float64)
    pairs = len(unit) * (len(unit) - 1) // 2
    return total.item() / pairs if pairs else float("nan")


@torch.no_grad()
def mean_largest_cosine(rows: Tensor) -> float:
    """Mean over the `rows` ``[n_features, d]`` of the largest cosine with another row. NaN if there is a single one.

    A row of zeros has cosine 0 with every other. Takes n_features^2 d multiply-adds, and memory for 1024 x n_features
    numbers.
    """
    unit = F.normalize(rows.float(), dim=1)
    if len(unit) == 1:
        return float("nan")
    largest = []
    for start in range(0, len(unit), TILE):
        cosines = unit[start : start + TILE] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        largest.append(cosines.amax(1))
    return torch.cat(largest).double().mean().item()
