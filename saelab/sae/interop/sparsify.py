"""sparsify: for each hookpoint a folder with ``cfg.json`` and ``sae.safetensors``; about all, ``config.json``."""

import re
from typing import Any

from saelab.errors import SaelabError
from saelab.sae.interop.stored import Config, Stored
from saelab.sae.interop.weights import From, built, set_groups
from saelab.sae.model import SparseAutoencoder

NAME = "sparsify"
MARKS = ({"encoder.weight"},)
SUFFIX = ".safetensors"

_SITES = {
    None: ("hook_resid_pre", "hook_resid_post"),
    ".mlp": ("mlp.hook_in", "hook_mlp_out"),
    ".attn": ("attn.hook_in", "hook_attn_out"),
    ".self_attn": ("attn.hook_in", "hook_attn_out"),
}
"""By the last part of a module's name, the sites in its block of what it gets and what it gives."""


def read(stored: Stored) -> SparseAutoencoder:
    """The autoencoder or transcoder in `stored`, with the configuration beside it.

    Raises SaelabError if saelab cannot compute it, or if its files are damaged or contradict each other.
    """
    config = Config.read(stored.path.with_name("cfg.json"))
    if config.section("sae").values:  # the configuration of the whole training
        config = config.section("sae")
    if config.flag("signed", False):
        raise SaelabError(f"{config.path}: signed: its activations can be negative, and saelab's features are positive")
    activation = config.text("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise SaelabError(f"{config.path}: activation is {activation!r}; saelab computes topk and groupmax")
    d_in = config.size("d_in")
    n_features = None if config.values.get("num_latents") in (0, None) else config.size("num_latents")
    if n_features is None and d_in is not None and (factor := config.size("expansion_factor")) is not None:
        n_features = d_in * factor
    names = {"W_enc": From("encoder.weight"), "b_dec": From("b_dec")}
    names["W_dec"] = From("W_dec") if "W_dec" in stored.kinds else From("decoder.weight", turned=True)
    if "encoder.bias" in stored.kinds:
        names["b_enc"] = From("encoder.bias")
    if config.flag("skip_connection", False):
        names["W_skip"] = From("W_skip")
    sizes = {"d_in": d_in, "n_features": n_features}
    sae = built(stored, names, config, sizes, transcodes=config.flag("transcode", False))
    k = config.size("k")
    if k is None or k > sae.n_features:
        raise SaelabError(f"{config.path}: k is {config.values.get('k')!r}, not between 1 and {sae.n_features}")
    if activation == "groupmax":
        set_groups(sae, k, str(config.path))
    sae.k = k
    sae.metadata = _metadata(stored, transcodes=sae.transcodes)
    return sae


def _metadata(stored: Stored, *, transcodes: bool) -> dict[str, Any]:
    """Model, text and sites, as far as the names of the folder and ``config.json`` in the one above say them.

    The name of the folder is that of a module: an autoencoder reads what it gives; a transcoder reads what it gets.
    """
    folder, above = stored.path.parent.resolve(), {}
    if (folder.parent / "config.json").is_file():
        found = Config.read(folder.parent / "config.json").values
        names = {"model_name": "model", "dataset_path": "dataset", "context_size": "ctx_len"}
        above = {ours: found[theirs] for ours, theirs in names.items() if found.get(theirs) is not None}
    module = re.fullmatch(r"(?:.*\.)?(?:layers|h)[._](\d+)(\.mlp|\.attn|\.self_attn)?", folder.name)
    if module is not None:
        read, given = _SITES[module[2]]
        above["hook_name"] = f"blocks.{module[1]}.{read if transcodes else given}"
        if transcodes:
            above["hook_name_out"] = f"blocks.{module[1]}.{given}"
    return above
