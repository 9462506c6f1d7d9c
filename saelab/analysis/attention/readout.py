"""How a feature of attention output reads the residual stream at the source positions, patterns and scales frozen.

pre[t] = sum over h, s of A[h, t, s] ((linear(x[s]) / scale[s] + beta) W_V[h] + b_V[h]) . w[h]  +  bias
       = sum over h, s of weight[h, s] (x[s] . direction[h])  +  constant[h, s]  +  remainder[h, s]  +  bias

direction[h]  the feature's encoder slice of head h, through W_V and the norm's gain, in the residual stream
weight        A[h, t, s] / scale[s], the pattern over the scale that the norm divides by
constant      A[h, t, s] (beta W_V[h] + b_V[h]) . w[h], from the biases of the norm and the values
remainder     what these formulas leave of v as the model computed it: its rounding
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from saelab.analysis.attention.direct import DirectAttribution, direct
from saelab.analysis.attention.prompt import Prompt
from saelab.lm.attention import LayerMaps
from saelab.sae.model import SparseAutoencoder


class Readout(NamedTuple):
    """A feature at one position as a sum over heads and sources of a linear function of the residual stream."""

    direct: DirectAttribution
    directions: Tensor
    """``[heads, d_model]`` float64"""
    weight: Tensor
    """``[heads, sources]``"""
    constant: Tensor
    """``[heads, sources]``"""
    remainder: Tensor
    """``[heads, sources]``"""

    def of(self, y: Tensor, source: int) -> Tensor:
        """What parts y ``[n, d_model]`` of the residual stream at a source add through each head, ``[n, heads]``."""
        return (y @ self.directions.T) * self.weight[:, source]


def stream_sites(layer: int) -> list[str]:
    """The sites that a `Prompt` must have for a readout of the layer's features."""
    return [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.hook_in"]


@torch.no_grad()
def readout(
    sae: SparseAutoencoder, prompt: Prompt, layer: int, maps: LayerMaps, feature: int, position: int
) -> Readout:
    """The `Readout` of a feature of the heads' outputs of `layer`; `prompt` has the `stream_sites`."""
    found = direct(sae, prompt, layer, feature, position)
    heads, sources = prompt.heads[layer], slice(position + 1)
    x, normed = (prompt.values[site][sources] for site in stream_sites(layer))
    linear, beta = maps.norm.linear(x), maps.norm.bias.double()
    # the projection, not the root mean square: it includes the constant that a norm adds under the root
    weight = ((normed - beta) * linear).sum(1) / linear.square().sum(1).clamp_min(1e-300)
    pattern = heads.pattern[0, :, position, sources]
    row = rearrange(sae.W_enc[feature].double(), "(h d) -> h d", h=heads.n_heads)
    W_V = rearrange(maps.values.weight, "m (v d) -> v m d", d=heads.d_head)[heads.value_head]
    read = torch.einsum("hmd,hd->hm", W_V, row)
    b_V = rearrange(maps.values.bias, "(v d) -> v d", d=heads.d_head)[heads.value_head]
    constant = pattern * (read @ beta + (b_V * row).sum(1))[:, None]
    scaled = read * maps.norm.gain.double()
    directions = scaled - scaled.mean(1, keepdim=True) if maps.norm.centred else scaled
    weights = pattern * weight
    remainder = found.contributions.to(x.device) - constant - (directions @ x.T) * weights
    return Readout(found, directions, weights, constant, remainder)
