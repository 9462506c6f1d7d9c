"""Losses on a batch: reconstruction and AuxK. Both are ratios, so they do not depend on the scale of the data."""

import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.kernels import sddmm, spmm
from saelab.sae.allocation import token_choice


def batch_fvu(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error over squared deviation from the batch mean: x, reconstruction ``[tokens, d]`` -> scalar."""
    return (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()


def aux_k(
    x: Tensor, reconstruction: Tensor, pre: Tensor, centred: Tensor,
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, dead: Tensor, k_aux: int,
) -> Tensor:  # fmt: skip
    """How badly the dead features explain the error: ``||e - ehat||^2 / ||e - mean e||^2`` (Gao et al. 2024, app. A.2).

    e = x - reconstruction (detached); ehat decodes, without bias, the k_aux largest pre-activations among the `dead`
    features (indices ``[n_dead]``), those at or below zero with value 0. The gradient reaches the encoder and decoder
    rows of exactly the dead features selected with a positive pre-activation. b_dec receives none: neither side of
    the ratio holds it, and `centred` is detached here.

    pre ``[tokens, n_features]`` and centred = x - b_dec ``[tokens, d]`` are those of the forward pass. A ratio that is
    not finite (no error left) counts as 0.
    """
    error = (x - reconstruction).detach()
    chosen = token_choice(pre.detach()[:, dead], min(k_aux, len(dead)))
    pattern = Codes(chosen.values, dead[chosen.features], chosen.offsets, len(W_enc))
    raw = pre.detach()[pattern.row_of_entry(), pattern.features]
    values = sddmm(pattern, centred.detach(), W_enc, b_enc, known=raw).relu()
    explained = spmm(Codes(values, pattern.features, pattern.offsets, len(W_enc)), W_dec)
    ratio = (error - explained).square().sum() / (error - error.mean(0)).square().sum()
    return torch.where(torch.isfinite(ratio), ratio, torch.zeros_like(ratio))
