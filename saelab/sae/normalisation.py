"""Normalisation of each token before the encoder, undone after the decoder; by SAELens' names.

layer_norm             (x - m) / (s + 1e-5), m the mean of the token's numbers, s their standard deviation (n - 1)
constant_norm_rescale  x scaled to length sqrt(d_in)

The statistics are those of the one token, so a token's features do not depend on the other tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_EPSILON = 1e-5
"""Added to the standard deviation before the division, but not when that is undone: so do OpenAI and SAELens."""


class Normalised(NamedTuple):
    """A normalised x and the way back: ``gain * y + shift``."""

    x: Tensor
    """``[tokens, d_in]``"""
    gain: Tensor
    """``[tokens, 1]``"""
    shift: Tensor
    """``[tokens, 1]``"""


def layer_norm(x: Tensor) -> Normalised:
    """x ``[tokens, d_in]`` with mean 0 and standard deviation 1 in each token."""
    mean = x.mean(1, keepdim=True)
    x = x - mean
    deviation = x.std(1, keepdim=True)
    return Normalised(x / (deviation + _EPSILON), deviation, mean)


def constant_norm_rescale(x: Tensor) -> Normalised:
    """x ``[tokens, d_in]`` with each token of length sqrt(d_in)."""
    gain = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12) / x.shape[1] ** 0.5
    return Normalised(x / gain, gain, torch.zeros_like(gain))


NORMALISATIONS = {"layer_norm": layer_norm, "constant_norm_rescale": constant_norm_rescale}


def normalised(x: Tensor, name: str) -> Normalised:
    """x ``[tokens, d_in]`` normalised by the function of that name in `NORMALISATIONS`."""
    return NORMALISATIONS[name](x)
