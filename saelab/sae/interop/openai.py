"""OpenAI's sparse_autoencoder: a file of torch.save with a state_dict and the name of the activation function.

TopK means that each token is normalised (layer_norm); the other activation, ReLU, that it is not.
"""

from typing import Any

import torch

from saelab.errors import SaelabError
from saelab.sae.interop.stored import Config, Stored
from saelab.sae.interop.weights import From, built
from saelab.sae.model import SparseAutoencoder

NAME = "OpenAI"
MARKS = ({"pre_bias", "latent_bias", "encoder.weight"},)
SUFFIX = ".pt"

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def read(stored: Stored) -> SparseAutoencoder:
    """The autoencoder in `stored`.

    Raises SaelabError if saelab cannot compute it, or if the file is damaged.
    """
    activation = stored.other.get("activation", "ReLU")
    state = stored.other.get("activation_state_dict", {})
    settings: dict[str, Any] = dict(state) if isinstance(state, dict) else {}
    after = settings.get("postact_fn", "ReLU")
    if activation not in ("ReLU", "TopK") or after != "ReLU":
        raise SaelabError(
            f"{stored.path}: activation is {activation!r} with {after!r}; saelab computes ReLU and TopK with ReLU, "
            "because its features are positive"
        )
    decoder = From("decoder.weight", turned=True)
    if "decoder.weight" not in stored.kinds:  # tied: the decoder is the encoder's transpose, stored or not
        decoder = From("decoder.linear.weight" if "decoder.linear.weight" in stored.kinds else "encoder.weight")
    names = {
        "W_enc": From("encoder.weight"),
        "W_dec": decoder,
        "b_enc": From("latent_bias"),
        "b_dec": From("pre_bias"),
    }
    also = tuple(name for name in _STATISTICS if name in stored.kinds)
    sae = built(stored, names, Config(stored.path, {}), {}, also=also)
    if activation == "ReLU":
        sae.threshold = torch.zeros(1)
        return sae
    k = Config(stored.path, settings).size("k")
    if k is None or k > sae.n_features:
        raise SaelabError(f"{stored.path}: k of TopK is {settings.get('k')!r}, not between 1 and {sae.n_features}")
    sae.k, sae.normalisation = k, "layer_norm"
    return sae
