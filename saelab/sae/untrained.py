"""Autoencoders that nothing trained: controls that a trained one must beat.

neurons       each dimension of x is a feature, and the k largest ones of a token are active
directions    random unit rows, the same ones as encoder and decoder; thresholds are set later
"""

import torch
from torch import Tensor

from saelab.sae.model import SparseAutoencoder


@torch.no_grad()
def neurons(d: int, k: int) -> SparseAutoencoder:
    """The autoencoder whose codes are the `k` largest positive dimensions of each token, x ``[tokens, d]``.

    Encoder and decoder are identity matrices, of 8 d^2 bytes together.
    """
    sae = SparseAutoencoder(d, d, k)
    sae.W_enc.copy_(torch.eye(d))
    sae.W_dec.copy_(sae.W_enc)
    return sae


@torch.no_grad()
def directions(n_features: int, centre: Tensor, seed: int) -> SparseAutoencoder:
    """Random directions: ``z = (x - centre) . u`` with u uniform on the unit sphere, of which the decoder row is u too.

    centre ``[d]`` is b_dec. Every positive z is active until there is a `threshold`.
    """
    sae = SparseAutoencoder(len(centre), n_features, n_features)
    torch.nn.init.normal_(sae.W_dec, generator=torch.Generator().manual_seed(seed))
    sae.renormalise_decoder()
    sae.W_enc.copy_(sae.W_dec)
    sae.b_dec.copy_(centre)
    sae.threshold = torch.zeros(n_features)
    return sae
