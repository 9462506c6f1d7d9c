"""One optimiser step: remove the decoder-parallel gradient, clip, Adam, normalise decoder rows, align
encoder rows. The host never waits.

Memory bandwidth bounds it: a step reads parameters, gradients and two moments, and writes all but the gradients. So
gradients are clipped inside Adam's own pass, and gradient memory is kept from step to step.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saelab.kernels.products import accumulate_in_place, return_gradients
from saelab.sae.model import BY_FEATURE, SparseAutoencoder

_BLOCK_ROWS = 2048
"""Decoder rows at a time: their products stay in the cache, 6 MB at d_in 768."""
THRESHOLD_RATE = 10.0
"""Learning rate of trained thresholds, as a multiple of that of the weights. At the same rate thresholds follow the
pre-activations, which get sparser, too slowly: L0 stays a fifth below its target on the demo model (docs/training.md).
"""
_FROZEN: dict[str, tuple[str, ...]] = {
    "none": (),
    "decoder": ("W_dec",),
    "encoder": ("W_enc", "b_enc", "r_mag", "b_mag"),
}


class Optimiser:
    """Adam for `sae`. Until `release`, the large gradients stay allocated and are added to in place.

    `freeze` names weights that are not trained: none, decoder (W_dec) or encoder (W_enc and biases). Decoder rows keep
    length 1 if `unit_norm` and the decoder is trained.
    """

    def __init__(self, sae: SparseAutoencoder, lr: float, *, unit_norm: bool = True, freeze: str = "none") -> None:
        self.sae = sae
        frozen = _FROZEN[freeze]
        for name, parameter in sae.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.trained: list[nn.Parameter] = [p for p in sae.parameters() if p.requires_grad]
        self.fixed_lengths = unit_norm and sae.W_dec.requires_grad
        """Whether decoder rows keep length 1."""
        for table in (sae.W_enc, sae.W_dec):
            if table.requires_grad:
                accumulate_in_place(table)
        groups = [{"params": [p for p in self.trained if p is not sae.log_threshold], "times": 1.0}]
        if sae.log_threshold is not None:
            groups.append({"params": [sae.log_threshold], "times": THRESHOLD_RATE})
        self._adam = torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> Tensor:
        """Update the weights and zero their gradients; returns the norm before clipping, a scalar.

        Processes with other tokens of the batch first add up their gradients.

        If the norm is not finite nothing is updated.
        """
        for group in self._adam.param_groups:
            group["lr"] = group["times"] * lr
        self._add_up_gradients()
        if self.fixed_lengths:
            remove_parallel_gradient(self.sae)
        norm = self._norm()
        # Adam's fused pass divides gradients by `grad_scale` and skips everything if `found_inf` is 1
        scale = (norm / clip).clamp_min(1.0)
        nothing_to_clip = scale.device.type == "cpu" and scale == 1  # dividing writes gradients; asking a GPU waits
        self._adam.grad_scale = None if nothing_to_clip else scale  # type: ignore[attr-defined]
        self._adam.found_inf = torch.isfinite(norm).logical_not().float()  # type: ignore[attr-defined]
        self._adam.step()
        self._adam.zero_grad(set_to_none=False)
        if self.fixed_lengths:
            self.sae.renormalise_decoder()
        if self.sae.aligned:
            self.sae.align_encoder()
        return norm

    def _add_up_gradients(self) -> None:
        """Replace each gradient by the sum of those of the processes with other tokens."""
        axis, gradients = self.sae.ranks.data, [p.grad for p in self.trained if p.grad is not None]
        if axis.size == 1:
            return
        for table in (each for each in gradients if each.ndim > 1):
            axis.sum_(table)
        vectors = [each for each in gradients if each.ndim == 1]
        summed = axis.sum_(torch.cat(vectors))  # in one exchange, which takes as long as that of one vector
        for vector, part in zip(vectors, summed.split([len(each) for each in vectors]), strict=True):
            vector.copy_(part)

    def _norm(self) -> Tensor:
        """Norm of the gradients of all trained weights, those of other processes included."""
        axis = self.sae.ranks.features
        gradients = {name: p.grad for name, p in self.sae.named_parameters() if p.requires_grad and p.grad is not None}
        if axis.size == 1:
            return torch.nn.utils.get_total_norm(list(gradients.values()))
        own = [gradient for name, gradient in gradients.items() if name in BY_FEATURE]
        everywhere = [gradient for name, gradient in gradients.items() if name not in BY_FEATURE]
        norms = [torch.nn.utils.get_total_norm(part) for part in (own, everywhere)]
        return (axis.sum_(norms[0].square()) + norms[1].square()).sqrt()

    @torch.no_grad()
    def forget(self, rows: Tensor) -> None:
        """Set Adam's moments of these rows of the weights of features, ``[n]`` int64, to 0."""
        for parameter in self.trained:
            if parameter is not self.sae.b_dec and parameter is not self.sae.W_skip:
                for name in ("exp_avg", "exp_avg_sq"):
                    self._adam.state[parameter][name][rows] = 0.0

    def release(self) -> None:
        """Make the autoencoder an ordinary module again, without gradients or in-place addition. Frees the moments."""
        for parameter in self.sae.parameters():
            return_gradients(parameter)
        self._adam.state.clear()  # calibration needs this memory, and that of the gradients

    def state_dict(self) -> dict[str, Any]:
        """Adam's moments and count of steps for each trained parameter, by name; not copies."""
        names = {id(parameter): name for name, parameter in self.sae.named_parameters()}
        return {names[id(parameter)]: dict(self._adam.state[parameter]) for parameter in self.trained}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parameters = dict(self.sae.named_parameters())
        for name, moments in state.items():
            if moments:
                self._adam.state[parameters[name]] = dict(moments)


@torch.no_grad()
def remove_parallel_gradient(sae: SparseAutoencoder) -> None:
    """Remove the part of the decoder's gradient that would change the length of its (unit) rows.

    The length of a crosscoder's row, a sum over sites, changes along its parts over their lengths, site by site.
    """
    assert sae.W_dec.grad is not None
    widths = list(sae.site_widths)
    for gradient, rows in zip(sae.W_dec.grad.split(_BLOCK_ROWS), sae.W_dec.split(_BLOCK_ROWS), strict=True):
        if len(widths) > 1:
            units = torch.cat([F.normalize(part, dim=1) for part in rows.split(widths, 1)], 1)
            rows = F.normalize(units, dim=1)
        gradient.addcmul_((gradient * rows).sum(1, keepdim=True), rows, value=-1)
