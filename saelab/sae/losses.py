"""Losses on a batch: reconstruction and the auxiliary one. Both are ratios, so the scale of the data does not matter.

The auxiliary loss asks features that are not used enough to explain the error that the others leave. Which features
those are is all that sets its two forms apart:

aux_k      dead ones: not active for a number of tokens (Gao et al. 2024, arXiv 2406.04093, app. A.2)
aux_zipf   under-used ones: `under_used` below (Ayonrinde 2024, arXiv 2411.02124, says that it generalises aux_k to
           under-used features; the formula here is our reconstruction)
"""

import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.kernels import sddmm, spmm


def batch_fvu(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error over squared deviation from the batch mean: x, reconstruction ``[tokens, d]`` -> scalar."""
    deviation = _deviation(x)  # first, so that its temporary is gone when the error's is there
    return torch.linalg.vector_norm(x - reconstruction).square() / deviation


def _deviation(x: Tensor) -> Tensor:
    """Squared deviation from the mean over tokens, summed."""
    return torch.linalg.vector_norm(x - x.mean(0)).square()


def auxiliary(
    error: Tensor, strongest: Codes, exact: bool, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
) -> tuple[Tensor, Codes]:
    """How badly chosen features explain the error: ``||e - ehat||^2 / ||e - mean e||^2``; and the codes of ehat.

    e ``[tokens, d_in]`` is detached. `strongest` holds the chosen features' largest pre-activations of each token,
    -inf in empty slots; they are the values themselves where `exact`, else the values are computed again. ehat decodes
    those above zero, without bias. The gradient reaches the encoder and decoder rows of exactly these features. b_dec
    receives none: neither side of the ratio holds it, and `centred` = x - b_dec is detached here. The ratio
    is 0 where nothing was chosen, and where it is not finite (no error left).
    """
    error = error.detach()
    filled = strongest.values > -torch.inf
    known = torch.where(filled, strongest.values, 0.0) if exact else None
    values = sddmm(strongest, centred.detach(), W_enc, b_enc, known=known).relu() * filled
    codes = strongest.with_values(values)
    explained = spmm(codes, W_dec)
    ratio = torch.linalg.vector_norm(error - explained).square() / _deviation(error)
    return torch.where(torch.isfinite(ratio) & filled.any(), ratio, 0.0), codes


def under_used(densities: Tensor, expected: Tensor, share: float, uniform: float) -> Tensor:
    """Features active on less than `share` of the tokens expected of their rank: bool ``[n_features]``.

    densities ``[n_features]``, and expected, what the capped Zipf curve gives each feature's rank. Only features below
    the `uniform` density k / n_features count: the densest ones may lie under a curve of another shape than theirs
    without being in any danger.
    """
    return (densities < share * expected) & (densities < uniform)
