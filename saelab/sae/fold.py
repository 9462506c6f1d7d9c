"""The scale of the inputs taken into the weights, and trained thresholds and gates made plain ones."""

import copy

import torch

from saelab.sae.model import SparseAutoencoder


@torch.no_grad()
def fold(sae: SparseAutoencoder, scale: float) -> SparseAutoencoder:
    """`sae` on unscaled data, if it was trained on ``scale * x``: the same function; for inference.

    Biases and threshold are divided by the scale, the matrices stay: relu and selection commute with a scale. The
    cosine affinity is taken in. Trained thresholds become fixed ones. A gate becomes a threshold of the magnitude,
    max(0, b_mag - exp(r) b_enc), with exp(r) in the rows of W_enc: z > 0 if and only if the magnitude before relu
    exceeds b_mag - exp(r) b_enc; a threshold of the gate that was set becomes one of the magnitude likewise. A
    normalisation of each token undoes the scale before the encoder; then only what a transcoder writes is divided.
    """
    folded = copy.deepcopy(sae)
    folded.take_in_affinity()
    if folded.r_mag is not None and folded.b_mag is not None:
        growth, b_mag = folded.r_mag.exp(), folded.b_mag.detach()
        bound = 0.0 if folded.threshold is None else folded.threshold
        folded.threshold = (b_mag + growth * (bound - folded.b_enc)).clamp_min(0)
        folded.W_enc.mul_(growth[:, None])
        folded.b_enc.copy_(b_mag)
        folded.r_mag = folded.b_mag = None
    if folded.log_threshold is not None:
        folded.threshold, folded.log_threshold = folded.log_threshold.detach().exp(), None
    if folded.normalisation is None:
        folded.b_enc.div_(scale)
        folded.b_dec.div_(scale)
        if folded.threshold is not None:
            folded.threshold = folded.threshold / scale
    elif folded.transcodes:
        folded.W_dec.div_(scale)
        folded.b_dec.div_(scale)
    return folded
