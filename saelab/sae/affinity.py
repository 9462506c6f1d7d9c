"""Affinity: the score of a (token, feature) match. Allocations maximise the sum of scores.

activation    z, the pre-activation (no allocation picks an entry at or below zero)
gradient      z (1 + beta |d . g|), d the feature's decoder direction and g the gradient of the language model's loss at
              the token (gradient-aware TopK: Olmo et al. 2024, arXiv 2411.10397)

z |d . g| is the first-order change of the loss if the feature were removed from the token. The paper's abstract gives
the score; that plain z is added, that g comes from the clean run's cross-entropy summed over the row, and that g is
divided by its root mean square over the batch, are our reconstruction. So g decides more on tokens where it is longer;
dividing each token's g by its own root mean square instead is no better on planted features (docs/results.md). The
score only decides which entries are selected: neither d nor g receives a gradient through it. g depends on the next
token, so evaluation selects by activation.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """The gradient part of the affinity."""

    gradients: Tensor
    """g of each token with root mean square 1 over the batch, ``[tokens, d_in]``."""
    beta: float


def alignment(gradients: Tensor | None, beta: float) -> Alignment | None:
    """`gradients` ``[tokens, d_in]`` normalised over the batch; None (plain activation) without gradients or beta."""
    if beta == 0 or gradients is None:
        return None
    g = gradients.detach().to(torch.promote_types(gradients.dtype, torch.float32))
    return Alignment(g / g.square().mean().sqrt().clamp_min(torch.finfo(g.dtype).tiny), beta)


def score(pre: Tensor, aligned: Tensor, beta: float, *, out: Tensor | None = None) -> Tensor:
    """``pre * (1 + beta * |aligned|)``; pre and aligned = d . g of one shape, `out` may be `aligned` itself.

    The factor is positive, so the score of a pre-activation at or below zero stays there.
    """
    magnitude = torch.abs(aligned, out=out)
    return torch.addcmul(pre, pre, magnitude, value=beta, out=out)
