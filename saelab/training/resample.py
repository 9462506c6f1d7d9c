"""Resampling of dead features (Bricken et al. 2023, Towards Monosemanticity): each begins anew at a token that the
autoencoder reconstructs badly.

A dead feature gets a token of the batch, drawn with a probability in proportion to the square of the token's loss. Its
decoder row becomes the token's direction (target - b_dec - W_skip x), of length 1; its encoder row the direction of the
encoder's input, with a share of the mean length of the living features' encoder rows; its biases 0; a trained threshold
the median of theirs, a gated magnitude that of the gate. Adam's moments of these rows become 0.

The share is 0.2 in the paper, whose ReLU features are active above 0. With a budget such a row wins no place (planted
data, tests/training/test_resample.py: none of 20 comes back with 0.2, all with 1), so there it is 1. No row is longer
than 1, with which a feature reconstructs all of its token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.sae.losses import row_lengths
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.training.optim import Optimiser

SHARE = 0.2
"""The new rows' length without a budget, as a share of the living encoder rows' mean length; with a budget it is 1."""


@torch.no_grad()
def resample(
    sae: SparseAutoencoder, optimiser: Optimiser, batch: Batch, losses: Tensor, dead: Tensor, share: float, seed: int
) -> None:
    """Resample the features `dead` ``[n_features]`` bool, in place.

    `losses` are those of the tokens of the batch, ``[tokens]``. Nothing happens if no feature lives, or if there is no
    loss. Tokens are drawn on the CPU, so that devices and processes agree.
    """
    ranks, part = sae.ranks, sae.part
    chance = losses.double().square().cpu()
    rows = dead.nonzero().squeeze(1)
    if not len(rows) or len(rows) == len(dead) or not 0 < chance.sum() < torch.inf:
        return
    drawn = torch.multinomial(chance, len(rows), True, generator=torch.Generator().manual_seed(seed)).to(dead.device)
    lengths = torch.cat(ranks.features.gather(torch.linalg.vector_norm(sae.W_enc, dim=1)))
    length = (share * lengths[~dead].mean()).clamp_max(1.0)
    here = (rows >= part.start) & (rows < part.stop)
    rows, drawn, target = rows[here] - part.start, drawn[here], batch.x if batch.target is None else batch.target
    skipped = 0 if sae.W_skip is None else batch.x[drawn] @ sae.W_skip.T
    written = F.normalize(target[drawn] - sae.b_dec - skipped, dim=1)
    sae.W_dec[rows] = written if len(sae.site_widths) < 2 else written / row_lengths(written, sae.site_widths)[:, None]
    if not sae.tied:
        sae.W_enc[rows] = F.normalize(batch.x[drawn] - (sae.b_dec if sae.centred else batch.x.mean(0)), dim=1) * length
    for vector in (sae.b_enc, sae.r_mag, sae.b_mag):
        if vector is not None:
            vector[rows] = 0.0
    if sae.log_threshold is not None:
        sae.log_threshold[rows] = torch.cat(ranks.features.gather(sae.log_threshold))[~dead].median()
    optimiser.forget(rows)
