"""An exponential moving average of the weights, in their dtype (float32).

After step t, from 1, the average is the mean of the weights after each step i so far, weighted by decay^(t - i). That
is the average from zero with bias correction: the initial weights, which are random, have no part in it (openai's
sparse_autoencoder does the same).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saelab.sae.model import SparseAutoencoder


class Average:
    """The average of `trained`, parameters of `sae`. With `unit_norm`, `apply` scales decoder rows to length 1."""

    def __init__(self, sae: SparseAutoencoder, trained: Sequence[nn.Parameter], decay: float, unit_norm: bool) -> None:
        self._sae, self._decay, self._unit_norm = sae, decay, unit_norm
        names = {id(parameter): name for name, parameter in sae.named_parameters()}
        self.weights: dict[str, Tensor] = {names[id(each)]: each.detach().clone() for each in trained}
        """The average by the name of the parameter; before the first step, the weights."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step `step`, from 0."""
        share = (1 - self._decay) / -math.expm1((step + 1) * math.log(self._decay))  # 1 in the first step
        parameters = dict(self._sae.named_parameters())
        for name, average in self.weights.items():
            average.lerp_(parameters[name], share)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the autoencoder the averaged weights, and free the average. A second call does nothing."""
        parameters = dict(self._sae.named_parameters())
        for name, average in self.weights.items():
            parameters[name].copy_(average)
        if self.weights and self._unit_norm:
            self._sae.renormalise_decoder()  # a mean of directions is shorter than they are
        if self.weights and self._sae.aligned:
            self._sae.align_encoder()
        self.weights = {}

    def state_dict(self) -> dict[str, Any]:
        """The average of each trained parameter, by name; not copies."""
        return dict(self.weights)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights = dict(state)
