"""dictionary_learning: ``ae.pt``, a state_dict, and ``config.json`` with the settings of its trainer."""

import re
from typing import Any, NamedTuple

import torch

from saelab.errors import SaelabError, did_you_mean
from saelab.sae.fold import fold
from saelab.sae.interop.stored import Config, Stored, inner
from saelab.sae.interop.weights import From, built, fold_gate, vector
from saelab.sae.model import SparseAutoencoder

NAME = "dictionary_learning"
MARKS = ({"encoder.weight"}, {"W_enc", "W_dec"})
SUFFIX = ".pt"


class _Class(NamedTuple):
    """How a class of dictionary_learning computes."""

    names: dict[str, From]
    """Where the parameters are."""
    rule: str
    """What is active in inference: relu, topk, threshold or gated."""
    centred: bool = True
    """Whether b_dec is subtracted from x."""


_MATRICES = {"W_enc": From("encoder.weight"), "W_dec": From("decoder.weight", turned=True)}
_LINEAR = _MATRICES | {"b_enc": From("encoder.bias")}
_ROWS = {name: From(name, turned=name == "W_enc") for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_CLASSES = {
    "AutoEncoder": _Class(_LINEAR | {"b_dec": From("bias")}, "relu"),
    "AutoEncoderNew": _Class(_LINEAR | {"b_dec": From("decoder.bias")}, "relu", centred=False),
    "AutoEncoderTopK": _Class(_LINEAR | {"b_dec": From("b_dec")}, "topk"),
    "BatchTopKSAE": _Class(_LINEAR | {"b_dec": From("b_dec")}, "threshold"),
    "MatryoshkaBatchTopKSAE": _Class(_ROWS, "threshold"),
    "JumpReluAutoEncoder": _Class(_ROWS, "threshold", centred=False),
    "GatedAutoEncoder": _Class(_MATRICES | {"b_dec": From("decoder_bias")}, "gated"),
}
_TELLING = {
    "bias": "AutoEncoder",
    "decoder.bias": "AutoEncoderNew",
    "group_sizes": "MatryoshkaBatchTopKSAE",
    "decoder_bias": "GatedAutoEncoder",
}
"""Tensors that only one class has."""
_GATE = ("gate_bias", "mag_bias", "r_mag")


def read(stored: Stored) -> SparseAutoencoder:
    """The autoencoder in `stored`, with the configuration beside it if there is one.

    Raises SaelabError if saelab cannot compute it, or if its files are damaged or contradict each other.
    """
    path = stored.path.with_name("config.json")
    whole = Config.read(path) if path.is_file() else Config(path, {})
    trainer = whole.section("trainer")
    scale = None
    if "ae" in stored.other:  # a backup during a training, before the scale of the activations is folded
        if "norm_factor" in stored.kinds:
            raise SaelabError(f"{stored.path}: norm_factor is a tensor and not a number; load the finished ae.pt")
        scale, stored = stored.other.get("norm_factor"), inner(stored, "ae")
    name = trainer.text("dict_class") or _class_of(stored)
    if not name:
        raise SaelabError(
            f"{stored.path}: could be of several classes ({stored.found()}); {path.name} beside it must name the "
            "trainer's dict_class"
        )
    if name not in _CLASSES:
        raise SaelabError(
            f"{path}: dict_class is {name!r}; known are {', '.join(_CLASSES)}.{did_you_mean(name, _CLASSES)}"
        )
    names, rule, centred = _CLASSES[name]
    also = _GATE if rule == "gated" else tuple({"k", "threshold", "group_sizes"} & stored.kinds.keys())
    sizes = {"d_in": trainer.size("activation_dim"), "n_features": trainer.size("dict_size")}
    sae = built(stored, names, trainer, sizes, also=also)
    sae.centred = centred
    if rule == "gated":
        fold_gate(sae, *(vector(stored, each, sae.n_features) for each in _GATE))
    elif rule == "threshold":
        sae.threshold = vector(stored, "threshold", sae.n_features)
    elif rule == "relu":
        sae.threshold = torch.zeros(1)
    _set_k(sae, stored, trainer, needed=rule == "topk")
    sae.metadata = _metadata(trainer, whole.section("buffer"))
    if scale is None:
        return sae
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise SaelabError(f"{stored.path}: norm_factor is {scale!r}, not a positive number")
    return fold(sae, 1 / scale)


def _class_of(stored: Stored) -> str:
    """The class that a state_dict is of, by its names; "" if several have the same (TopK and BatchTopK)."""
    for name, found in _TELLING.items():
        if name in stored.kinds:
            return found
    return "JumpReluAutoEncoder" if "W_enc" in stored.kinds and "k" not in stored.kinds else ""


def _set_k(sae: SparseAutoencoder, stored: Stored, trainer: Config, *, needed: bool) -> None:
    """Set k from the file and the configuration. Raises SaelabError if they contradict or lack one that is needed."""
    said, found = trainer.size("k"), None
    if "k" in stored.kinds:
        kind = stored.kinds["k"]
        if kind.shape not in ((), (1,)) or kind.dtype not in (torch.int32, torch.int64):
            raise SaelabError(f"{stored.path}: k is {kind}, not one whole number")
        found = int(stored.read("k"))
        if said is not None and said != found:
            raise SaelabError(f"{trainer.path}: says k = {said}, but {stored.path.name} has k = {found}")
    k = said if found is None else found
    if k is not None and 1 <= k <= sae.n_features:
        sae.k = k
    elif needed:
        raise SaelabError(f"{stored.path}: k is {'missing' if k is None else k}, not between 1 and {sae.n_features}")


def _metadata(trainer: Config, buffer: Config) -> dict[str, Any]:
    """Model, site and context, as far as the settings of the trainer and of its buffer of activations say them."""
    found: dict[str, Any] = {"model_name": trainer.text("lm_name")} if trainer.values.get("lm_name") else {}
    if (context := buffer.size("ctx_len")) is not None:
        found["context_size"] = context
    module, layer = trainer.text("submodule_name"), trainer.values.get("layer")
    named = re.fullmatch(r"(resid_post|mlp_out|attn_out|resid_pre)(?:_layer_(\d+))?", module)
    if named is not None and (named[2] is not None or isinstance(layer, int)):
        found["hook_name"] = f"blocks.{layer if named[2] is None else named[2]}.hook_{named[1]}"
    return found
