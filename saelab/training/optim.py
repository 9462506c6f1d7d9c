"""One optimiser step: the decoder-parallel gradient out, clip, Adam, unit decoder rows. The host is not waited for.

What bounds it is memory: parameters, gradients and two moments are read, all but the gradients written. So gradients
are clipped inside Adam's own pass, and gradient memory is kept from step to step.
"""

import torch
from torch import Tensor

from saelab.kernels.products import accumulate_in_place, return_gradients
from saelab.sae.model import SparseAutoencoder

_BLOCK_ROWS = 2048
"""Decoder rows at a time, whose products then stay in the cache: 6 MB at d_in 768."""


def adam(sae: SparseAutoencoder, lr: float) -> torch.optim.Adam:
    """Adam for `sae`, whose large gradients are from now on kept and added to in place."""
    for table in (sae.W_enc, sae.W_dec):
        accumulate_in_place(table)
    return torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def release(sae: SparseAutoencoder) -> None:
    """Undo what `adam` did to `sae`: gradients are none, and will be returned again."""
    for parameter in sae.parameters():
        return_gradients(parameter)


@torch.no_grad()
def step(sae: SparseAutoencoder, optimiser: torch.optim.Adam, clip: float) -> Tensor:
    """Update `sae` from its gradients, which are zero afterwards; returns their norm before clipping, a scalar.

    Where the norm is not finite nothing is updated.
    """
    remove_parallel_gradient(sae)
    norm = torch.nn.utils.get_total_norm([p.grad for p in sae.parameters() if p.grad is not None])
    # Adam's fused pass divides gradients by `grad_scale` and skips everything where `found_inf` is 1
    scale = (norm / clip).clamp_min(1.0)
    nothing_to_clip = scale.device.type == "cpu" and scale == 1  # dividing means writing, too; a GPU is not asked
    optimiser.grad_scale = None if nothing_to_clip else scale  # type: ignore[attr-defined]
    optimiser.found_inf = torch.isfinite(norm).logical_not().float()  # type: ignore[attr-defined]
    optimiser.step()
    optimiser.zero_grad(set_to_none=False)
    sae.renormalise_decoder()
    return norm


@torch.no_grad()
def remove_parallel_gradient(sae: SparseAutoencoder) -> None:
    """Take out the part of the decoder's gradient that would change the length of its (unit) rows."""
    assert sae.W_dec.grad is not None
    for gradient, rows in zip(sae.W_dec.grad.split(_BLOCK_ROWS), sae.W_dec.split(_BLOCK_ROWS), strict=True):
        gradient.addcmul_((gradient * rows).sum(1, keepdim=True), rows, value=-1)
