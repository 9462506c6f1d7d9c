"""An autoencoder in the files of a peer, which computes the same from them: `WRITERS`.

What a peer has no class for is refused, with the reason. Where a peer subtracts b_dec from x and we do not, or the
other way round, b_enc takes the difference, W_enc b_dec.
"""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from saelab.errors import SaelabError
from saelab.files import make_folder, translate_errors, write_whole
from saelab.sae.checkpoint import save_sae
from saelab.sae.interop.saelens import GROUP_MAX, OURS, architecture_of, rule_of
from saelab.sae.model import SparseAutoencoder
from saelab.tensors import write_tensors


def write_saelens(sae: SparseAutoencoder, folder: Path) -> None:
    """Write `sae` to `folder` as SAELens does. Raises SaelabError if SAELens has no such architecture."""
    name = _architecture(sae)
    if name.startswith(OURS):
        raise SaelabError(f"SAELens has no {_described(sae)}; it has {_HAS['saelens']}")
    save_sae(sae, folder)


def write_sparsify(sae: SparseAutoencoder, folder: Path) -> None:
    """Write `sae` to `folder`, a hookpoint, as sparsify does. Raises SaelabError if sparsify cannot compute it."""
    if rule_of(sae) not in ("topk", GROUP_MAX) or len(sae.site_widths) > 1:
        raise SaelabError(f"sparsify has no {_described(sae)}; it has {_HAS['sparsify']}")
    if sae.normalisation is not None:
        raise SaelabError(f"sparsify does not normalise its input, and this autoencoder does ({sae.normalisation})")
    if sae.d_in != sae.d_out:
        raise SaelabError(f"sparsify's transcoders have one width; this one has d_in {sae.d_in} and d_out {sae.d_out}")
    tensors = {
        "encoder.weight": sae.W_enc.detach(),
        "encoder.bias": b_enc(sae, centred=not sae.transcodes),
        "W_dec": sae.W_dec.detach(),
        "b_dec": sae.b_dec.detach(),
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.detach()
    lengths = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1)
    config = {
        "activation": rule_of(sae),
        "expansion_factor": max(1, sae.n_features // sae.d_in),
        "normalize_decoder": bool(torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4)),
        "num_latents": sae.n_features,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.transcodes,
        "d_in": sae.d_in,
    }
    with translate_errors(folder):
        make_folder(folder)
        write_tensors(folder / "sae.safetensors", tensors)
        write_whole(folder / "cfg.json", json.dumps(config))


def write_dictionary_learning(sae: SparseAutoencoder, folder: Path) -> None:
    """Write `sae` to `folder` as dictionary_learning does. Raises SaelabError if it has no class for it."""
    if sae.transcodes or sae.W_skip is not None or rule_of(sae) == GROUP_MAX or len(sae.site_widths) > 1:
        raise SaelabError(f"dictionary_learning has no {_described(sae)}; it has {_HAS['dictionary_learning']}")
    if sae.normalisation is not None:
        raise SaelabError(
            f"dictionary_learning does not normalise its input, and this autoencoder does ({sae.normalisation})"
        )
    name, state = _state_dict(sae)
    content = io.BytesIO()
    torch.save({key: value.detach().cpu().contiguous() for key, value in state.items()}, content)
    site = str(sae.metadata.get("hook_name") or "")
    layer = re.search(r"blocks\.(\d+)\.", site)
    module = re.search(r"hook_(resid_post|resid_pre|mlp_out|attn_out)$", site)
    trainer = {
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.n_features,
        "k": sae.k,
        "lm_name": sae.metadata.get("model_name"),
        "layer": None if layer is None else int(layer[1]),
        "submodule_name": f"{module[1]}_layer_{layer[1]}" if module is not None and layer is not None else None,
    }
    config = {"trainer": trainer, "buffer": {"ctx_len": sae.metadata.get("context_size")}}
    with translate_errors(folder):
        make_folder(folder)
        write_whole(folder / "ae.pt", content.getvalue())
        write_whole(folder / "config.json", json.dumps(config, indent=4))


def _state_dict(sae: SparseAutoencoder) -> tuple[str, dict[str, Tensor]]:
    """The class of dictionary_learning that computes the same, and its tensors in its order."""
    rule = rule_of(sae)
    threshold = sae.threshold
    if rule == "threshold" and threshold is not None and not bool((threshold == threshold[0]).all()):
        rows = {"W_enc": sae.W_enc.T, "b_enc": b_enc(sae, centred=False), "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        return "JumpReluAutoEncoder", {**rows, "threshold": threshold.clamp_min(0)}
    linear: dict[str, Tensor] = {
        "decoder.weight": sae.W_dec.T,
        "encoder.weight": sae.W_enc,
        "encoder.bias": b_enc(sae, centred=True),
    }
    if rule == "relu":
        return "AutoEncoder", {"bias": sae.b_dec, **linear}
    cut = torch.tensor(-1.0) if threshold is None else threshold[0].float()
    sizes = {"b_dec": sae.b_dec, "k": torch.tensor(sae.k, dtype=torch.int32), "threshold": cut}
    return "AutoEncoderTopK" if rule == "topk" else "BatchTopKSAE", {**sizes, **linear}


@torch.no_grad()
def b_enc(sae: SparseAutoencoder, *, centred: bool) -> Tensor:
    """The b_enc with which `sae` computes the same if b_dec is subtracted from x, or if it is not, ``[n_features]``."""
    if sae.centred == centred:
        return sae.b_enc.detach()
    shift = sae.W_enc.double() @ sae.b_dec.double()
    return (sae.b_enc.double() + (shift if centred else -shift)).to(sae.b_enc.dtype)


def _architecture(sae: SparseAutoencoder) -> str:
    crosses = len(sae.site_widths) > 1
    return architecture_of(rule_of(sae), transcodes=sae.transcodes, skip=sae.W_skip is not None, crosses=crosses)


def _described(sae: SparseAutoencoder) -> str:
    """The kind of `sae` in words, such as "TopK transcoder"."""
    kind = "crosscoder" if len(sae.site_widths) > 1 else "transcoder" if sae.transcodes else "autoencoder"
    return f"{_RULES[rule_of(sae)]} {kind}{' with a skip connection' if sae.W_skip is not None else ''}"


_RULES = {"relu": "ReLU", "topk": "TopK", "threshold": "JumpReLU", GROUP_MAX: "GroupMax"}
_HAS = {
    "saelens": "ReLU and JumpReLU autoencoders and transcoders, and TopK autoencoders",
    "sparsify": "TopK and GroupMax autoencoders and transcoders, with or without a skip connection",
    "dictionary_learning": "TopK, BatchTopK, JumpReLU and ReLU autoencoders",
}
WRITERS: dict[str, Callable[[SparseAutoencoder, Path], None]] = {
    "saelens": write_saelens,
    "sparsify": write_sparsify,
    "dictionary_learning": write_dictionary_learning,
}
"""By the name of a peer, the function that writes an autoencoder with fixed thresholds as its files."""
