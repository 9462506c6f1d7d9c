"""Tiny models in both precisions, and autoencoders with random weights for their sites."""

import copy
import functools

import torch

from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder
from tests.tiny import language_model, random_rows

Z, RESID = "blocks.2.attn.hook_z", "blocks.2.hook_resid_pre"
CONTEXT = 14


@functools.cache
def double_model(kind: str) -> LanguageModel:
    """The tiny model of a kind in float64; Llama has 4 heads and 2 value heads.

    Its attention is eager, which in NeoX and Llama takes the softmax in float32 whatever the model's precision.
    """
    lm = language_model(kind)
    model = copy.deepcopy(lm.model).double()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    return LanguageModel(kind, model, lm.tokenizer, lm.sites, "")


@functools.cache
def lm_of(kind: str) -> LanguageModel:
    return language_model(kind)


def ids_of(lm: LanguageModel, context: int = CONTEXT, seed: int = 0) -> torch.Tensor:
    """Ordinary tokens after BOS."""
    return random_rows(lm, 2, context, seed)[1]


def autoencoder(lm: LanguageModel, site: str = Z, n_features: int = 48, k: int = 6, seed: int = 0) -> SparseAutoencoder:
    """Random rows, scaled so that activations matter beside biases; its error is far from 0."""
    torch.manual_seed(seed)
    sae = SparseAutoencoder(lm.width(site), n_features, k, {"hook_name": site})
    for parameter in (sae.W_enc, sae.W_dec):
        torch.nn.init.normal_(parameter)
    for parameter in (sae.b_enc, sae.b_dec):
        torch.nn.init.normal_(parameter, std=0.1)
    return sae.requires_grad_(False)


def active_feature(sae: SparseAutoencoder, lm: LanguageModel, ids: torch.Tensor, position: int, site: str = Z) -> int:
    """The feature that is most active at a position."""
    codes = sae.encode(lm.activations(ids[None], [site])[site][0, position][None].float())
    return int(codes.features[codes.values.argmax()])
