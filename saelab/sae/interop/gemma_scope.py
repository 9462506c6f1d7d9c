"""Gemma Scope and Gemma Scope 2: JumpReLU autoencoders and transcoders, a folder each.

Gemma Scope has ``params.npz``, and only the names of the folders above say of which model and site it is, such as
``gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71``. Gemma Scope 2 has ``params.safetensors`` and a
``config.json``. b_dec is not subtracted from x. Autoencoders of the embedding are read as they are stored, for the
embedding before the model multiplies it by sqrt(d_in).
"""

import re
from typing import Any

from saelab.sae.interop.stored import Config, Stored
from saelab.sae.interop.weights import From, built, vector
from saelab.sae.model import SparseAutoencoder

NAME = "Gemma Scope"
MARKS = ({"W_enc", "W_dec"}, {"w_enc", "w_dec"})
MARKS_2 = ({"w_enc", "w_dec"},)
"""Those of Gemma Scope 2, in a safetensors file."""

_SITES = {
    "res": "hook_resid_post",
    "resid_post": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "mlp_out": "hook_mlp_out",
    "att": "attn.hook_z",
    "attn_out": "attn.hook_z",  # the heads' outputs, before they are multiplied by W_O
}


def read(stored: Stored) -> SparseAutoencoder:
    """The autoencoder or transcoder in `stored`.

    Raises SaelabError if the file is damaged, or is a cross-layer transcoder, whose decoder is no matrix.
    """
    path = stored.path.with_name("config.json")
    config = Config.read(path) if path.is_file() else Config(path, {})
    place = stored.path.absolute().parent.parts  # the names of links, as in the Hub's cache, not of their targets
    kinds = [part for part in place if re.search(r"transcoder|(?:^|-)(?:res|mlp|att)$", part) or _kind(part) in _SITES]
    nearest = kinds[-1] if kinds else ""
    transcodes = bool(config.text("hf_hook_point_out")) or "transcoder" in nearest
    small = "w_enc" in stored.kinds
    names = {
        "W_enc": From("w_enc" if small else "W_enc", turned=True),
        "W_dec": From("w_dec" if small else "W_dec"),
        "b_enc": From("b_enc"),
        "b_dec": From("b_dec"),
    }
    if "affine_skip_connection" in stored.kinds:
        names["W_skip"] = From("affine_skip_connection", turned=True)
    sae = built(stored, names, config, {}, transcodes=transcodes, also=("threshold",))
    sae.threshold = vector(stored, "threshold", sae.n_features)
    sae.centred = False
    sae.metadata = _metadata(place, config, transcodes)
    return sae


def _kind(part: str) -> str:
    """The kind of site that the name of a folder of Gemma Scope 2 says, if it says one."""
    return part.removesuffix("_all")


def _metadata(place: tuple[str, ...], config: Config, transcodes: bool) -> dict[str, Any]:
    """Model and sites, as far as the names of the folders and `config` say them."""
    found: dict[str, Any] = {}
    layer = [match[1] for part in place if (match := re.match(r"layer_(\d+)(?=_|$)", part))]
    first = [match for part in place if (match := re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(\w+)", part))]
    second = [match for part in place if (match := re.search(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)", part))]
    kind = ""
    if first:
        size, tuned, kind = first[-1].groups()
        found["model_name"] = f"google/gemma-2-{size}{'-it' * (tuned == 'it')}"
    elif second:
        size, tuned = second[-1].groups()
        kind = next((_kind(part) for part in place if _kind(part) in _SITES), "")
        found["model_name"] = f"google/gemma-3-{size}{'' if (size, tuned) == ('270m', 'pt') else f'-{tuned}'}"
    elif name := config.text("model_name"):
        found["model_name"] = name
    if layer and transcodes:
        before = f"blocks.{layer[-1]}.{'hook_mlp_in' if second else 'ln2.hook_normalized'}"
        found |= {"hook_name": before, "hook_name_out": f"blocks.{layer[-1]}.hook_mlp_out"}
    elif layer and kind in _SITES:
        found["hook_name"] = f"blocks.{layer[-1]}.{_SITES[kind]}"
    return found
