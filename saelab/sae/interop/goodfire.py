"""Goodfire: ReLU autoencoders of Llama models, each a file of torch.save. b_dec is not subtracted from x."""

import re

import torch

from saelab.sae.interop.stored import Config, Stored
from saelab.sae.interop.weights import From, built
from saelab.sae.model import SparseAutoencoder

NAME = "Goodfire"
MARKS = ({"encoder_linear.weight", "decoder_linear.weight"},)
SUFFIX = ".pt"


def read(stored: Stored) -> SparseAutoencoder:
    """The autoencoder in `stored`, whose name says model and layer. Raises SaelabError if the file is damaged."""
    names = {
        "W_enc": From("encoder_linear.weight"),
        "W_dec": From("decoder_linear.weight", turned=True),
        "b_enc": From("encoder_linear.bias"),
        "b_dec": From("decoder_linear.bias"),
    }
    sae = built(stored, names, Config(stored.path, {}), {})
    sae.threshold, sae.centred = torch.zeros(1), False
    if named := re.match(r"(Llama-.+)-SAE-l(\d+)$", stored.path.stem):
        sae.metadata = {"model_name": f"meta-llama/{named[1]}", "hook_name": f"blocks.{named[2]}.hook_resid_post"}
    return sae
