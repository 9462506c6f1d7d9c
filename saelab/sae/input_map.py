"""What is done to activations before training, and how the trained weights take it in, so that they apply to x itself.

    x' = scale (x - mean) whitening, or each token normalised

scale        the scale makes E||x'||^2 = d_in; there is no mean and no whitening
centre       the mean of the first activations is subtracted first
whiten       the covariance of x' is the identity, as far as the first activations show it (ZCA: whitening is symmetric,
             so x' is the whitened point nearest to x). Training then counts an error in a direction in units of the
             standard deviation of that direction
layer_norm, constant_norm_rescale
             each token by itself (normalisation.py): x' = (x - shift) / gain. Training then counts the error of every
             token by its own length, so that long ones do not decide; an ordinary FVU is in the units of x. The loss is
             that of x', as in OpenAI's trainer; SAELens takes that of x

The target of a transcoder has a scale of its own, which makes E||y'||^2 = d_out, and no mean or whitening: its mean is
what b_dec is for, and whitening would train another loss than the one it is judged by.

All are exact in the checkpoint that is saved (`InputMap.folded`): the weights take in the first three, and it records a
normalisation, which every reader undoes after the decoder. Standard deviations below `FLOOR` times their
root mean square count as this much: the sample says little about them, and they would become as large as all others.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from saelab.sae.fold import fold
from saelab.sae.model import SparseAutoencoder
from saelab.sae.normalisation import NORMALISATIONS, normalised

FLOOR = 0.03
_PART = 1024
"""Tokens of the sample that there is a copy of at a time."""


@dataclass(frozen=True)
class InputMap:
    """``x -> scale (x - mean) whitening``, or a normalisation of each token."""

    scale: float
    mean: Tensor | None = None
    """``[d_in]``, or None: nothing is subtracted."""
    whitening: Tensor | None = None
    """Symmetric, ``[d_in, d_in]``, or None; it goes with a mean."""
    normalisation: str | None = None
    """A key of `NORMALISATIONS`, with scale 1 and nothing else; or None."""

    def __call__(self, x: Tensor) -> Tensor:
        """The inputs of training: x ``[tokens, d_in]`` -> ``[tokens, d_in]``."""
        if self.normalisation is not None:
            return normalised(x, self.normalisation).x
        if self.mean is None:
            return x * self.scale
        x = x - self.mean.to(x)
        if self.whitening is not None:
            x = x @ self.whitening.to(x)
        return x.mul_(self.scale)

    def gradients(self, g: Tensor | None, x: Tensor) -> Tensor | None:
        """The direction of the gradient with respect to x', given g with respect to x, ``[tokens, d_in]``, or None.

        That of a normalised token is with respect to what a decoder row writes: gain times g.
        """
        if g is None:
            return None
        if self.normalisation is not None:
            return g * normalised(x, self.normalisation).gain.to(g)
        return g if self.inverse is None else g @ self.inverse.to(g)

    @torch.no_grad()
    def folded(self, sae: SparseAutoencoder, target_scale: float = 1.0) -> SparseAutoencoder:
        """The autoencoder of x that computes what `sae`, trained on x', computes on x'; for inference.

        Its activations are those of `sae` over the scale. It normalises each token if the inputs were. Whitening leaves
        decoder rows of other lengths than 1. A transcoder was trained on `target_scale` times its targets; its
        activations are those of `sae` over that.
        """
        if sae.transcodes:
            return self._folded_transcoder(sae, target_scale)
        folded = fold(sae, self.scale)
        if self.normalisation is not None:
            folded.normalisation = self.normalisation
        if self.whitening is not None and self.inverse is not None:
            whitening, inverse = self.whitening.to(folded.W_dec), self.inverse.to(folded.W_dec)
            encoder, decoder = folded.W_enc @ whitening, folded.W_dec @ inverse
            folded.W_enc, folded.W_dec = nn.Parameter(encoder), nn.Parameter(decoder)
            folded.b_dec.copy_(folded.b_dec @ inverse)
        if self.mean is not None:
            folded.b_dec.add_(self.mean.to(folded.b_dec))
        return folded

    def _folded_transcoder(self, sae: SparseAutoencoder, target_scale: float) -> SparseAutoencoder:
        folded = fold(sae, target_scale)
        ratio = self.scale / target_scale
        encoder, skip = folded.W_enc * ratio, None if folded.W_skip is None else folded.W_skip * ratio
        if self.whitening is not None:
            whitening = self.whitening.to(encoder)
            encoder, skip = encoder @ whitening, None if skip is None else skip @ whitening
        folded.W_enc, folded.W_skip = nn.Parameter(encoder), None if skip is None else nn.Parameter(skip)
        if self.mean is not None:  # b_dec is in the space of the target
            mean = self.mean.to(encoder)
            folded.b_enc.sub_(encoder @ mean)
            if skip is not None:
                folded.b_dec.sub_(skip @ mean)
        return folded

    @cached_property
    def inverse(self) -> Tensor | None:
        """The inverse of the whitening, float64."""
        return None if self.whitening is None else torch.linalg.inv(self.whitening.double())


UNCHANGED = InputMap(1.0)


@torch.no_grad()
def input_map(name: str, sample: Tensor) -> InputMap:
    """The map called `name`, one of those above, fitted to the first activations, `sample` ``[tokens, d_in]``.

    Raises ValueError if all activations are 0, or equal if the mean is subtracted, or if their squares are infinite.
    """
    if name in NORMALISATIONS:
        _scale(InputMap(1.0), sample)
        return InputMap(1.0, normalisation=name)
    if name == "scale":
        return InputMap(_scale(InputMap(1.0), sample))
    centred = InputMap(1.0, sample.mean(0, dtype=torch.float64).to(sample.dtype))
    scale = _scale(centred, sample)
    if name == "centre":
        return replace(centred, scale=scale)
    whitened = replace(centred, whitening=_whitening(sample))
    return replace(whitened, scale=_scale(whitened, sample))


def _scale(inputs: InputMap, sample: Tensor) -> float:
    """The scale that makes E||x'||^2 = d_in over the sample. Raises ValueError if none does."""
    square = _mean_square(inputs, sample)
    if not 0 < square < math.inf:
        wrong = "are all 0" if inputs.mean is None else "are all equal"
        raise ValueError("are so large that their squares are infinite" if square else wrong)
    return math.sqrt(sample.shape[1] / square)


def _mean_square(inputs: InputMap, sample: Tensor) -> float:
    """Mean of ||x'||^2 over the sample."""
    if inputs.mean is None:
        return sample.square().sum(1).double().mean().item()
    return sum(inputs(part).double().square().sum().item() for part in sample.split(_PART)) / len(sample)


def _whitening(sample: Tensor) -> Tensor:
    """The inverse square root of the covariance, symmetric, ``[d_in, d_in]`` in the dtype of `sample`."""
    covariance = torch.zeros(sample.shape[1], sample.shape[1], dtype=torch.float64, device=sample.device)
    mean = sample.mean(0, dtype=torch.float64)
    for part in sample.split(_PART):
        apart = part.double() - mean
        covariance.addmm_(apart.T, apart, alpha=1 / len(sample))
    variances, directions = torch.linalg.eigh(covariance)
    variances = variances.clamp_min(FLOOR**2 * variances.mean().item())
    return (directions * variances.rsqrt() @ directions.T).to(sample.dtype)
