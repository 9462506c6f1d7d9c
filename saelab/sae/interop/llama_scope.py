"""Llama Scope (OpenMOSS): ``hyperparams.json`` and ``checkpoints/final.safetensors``.

The stored weights read x times c_in = sqrt(d_model) / average norm of x, and write the output times c_out, of the same
form. What its own loader computes from them, and this one too: with W_dec and b_enc in units of x,

    v = W_dec c_in / c_out,   u = W_enc x + b_enc / c_in,   reconstruction = sum of u v + b_dec / c_out,

where the decoder's rows v then get length 1 if `sparsity_include_decoder_norm`, and u the factor. A feature is active
if u, with this factor, exceeds `jump_relu_threshold`, or is among the `top_k` largest.
"""

import math

import torch

from saelab.errors import SaelabError
from saelab.sae.interop.stored import Config, Stored
from saelab.sae.interop.weights import From, built, fold_decoder_norms
from saelab.sae.model import SparseAutoencoder

NAME = "Llama Scope"
MARKS = ({"encoder.weight", "decoder.weight", "decoder.bias"},)
SUFFIX = ".safetensors"

_ACTIVATIONS = ("jumprelu", "topk", "relu")


@torch.no_grad()
def read(stored: Stored) -> SparseAutoencoder:
    """The autoencoder or transcoder in `stored`, with ``hyperparams.json`` beside it or in the folder above.

    Raises SaelabError if saelab cannot compute it, or if its files are damaged or contradict each other.
    """
    folder = stored.path.parent
    above = folder.name == "checkpoints" and not (folder / "hyperparams.json").exists()
    config = Config.read((folder.parent if above else folder) / "hyperparams.json")
    before, after = config.text("hook_point_in"), config.text("hook_point_out") or config.text("hook_point_in")
    transcodes, centred = before != after, config.flag("apply_decoder_bias_to_pre_encoder", False)
    if config.flag("use_glu_encoder", False):
        raise SaelabError(f"{config.path}: use_glu_encoder is true; saelab computes linear encoders")
    if centred and transcodes:
        raise SaelabError(f"{config.path}: is a transcoder with apply_decoder_bias_to_pre_encoder")
    names = {
        "W_enc": From("encoder.weight"),
        "W_dec": From("decoder.weight", turned=True),
        "b_enc": From("encoder.bias"),
        "b_dec": From("decoder.bias"),
    }
    sizes = {"d_in": config.size("d_model"), "n_features": config.size("d_sae")}
    c_in, c_out = _scales(config)
    activation = config.text("act_fn", "jumprelu")
    if activation not in _ACTIVATIONS:
        raise config.wrong("act_fn", " or ".join(_ACTIVATIONS))
    sae = built(stored, names, config, sizes, transcodes=transcodes)
    sae.centred = centred
    sae.b_enc.div_(c_in)
    sae.b_dec.div_(c_out)
    sae.W_dec.mul_(c_in / c_out)
    if config.flag("sparsity_include_decoder_norm", True):
        fold_decoder_norms(sae)
    if activation == "topk":
        k = config.size("top_k")
        if k is None or k > sae.n_features:
            raise SaelabError(f"{config.path}: top_k is {k!r}, not between 1 and {sae.n_features}")
        sae.k = k
    else:
        bound = _number(config, config.values.get("jump_relu_threshold"), "jump_relu_threshold", least=0.0)
        sae.threshold = torch.full((1,), bound if activation == "jumprelu" else 0.0)
    sae.metadata = {"model_name": "meta-llama/Llama-3.1-8B"} if "Llama3_1-8B" in str(stored.path) else {}
    sae.metadata |= {"hook_name": before} if before else {}
    sae.metadata |= {"hook_name_out": after} if transcodes else {}
    return sae


def _scales(config: Config) -> tuple[float, float]:
    """c_in and c_out."""
    name = config.text("norm_activation", "dataset-wise")
    if name in ("none", "inference"):
        return 1.0, 1.0
    if name != "dataset-wise":
        raise config.wrong("norm_activation", "dataset-wise, none or inference")
    width, norms = config.size("d_model"), config.section("dataset_average_activation_norm")
    if width is None:
        raise config.wrong("d_model", "the width of x")
    least = 1e-30
    before = _number(norms, norms.values.get("in"), "in", least)
    after = _number(norms, norms.values.get("out", before), "out", least)
    return math.sqrt(width) / before, math.sqrt(width) / after


def _number(config: Config, value: object, name: str, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise config.wrong(name, f"a number, {'at least 0' if least == 0 else 'above 0'}")
    return float(value)
