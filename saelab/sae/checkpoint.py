"""A checkpoint is a SAELens folder: ``cfg.json`` and ``sae_weights.safetensors``, loadable by SAELens as it is.

Weights are folded (they apply to unscaled activations); our own facts are under ``metadata.saelab``. The rule of
inference decides the architecture: token choice becomes SAELens' ``topk``; thresholds become its ``jumprelu``, with one
for each feature, above which an entry is active; thresholds that are all 0 become its ``standard`` (ReLU). What SAELens
has no architecture for gets a name that begins with ``saelab_``, in the same layout (interop/saelens.py).
"""

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saelab.errors import SaelabError
from saelab.files import current_folder, expanded, make_folder, read_json, translate_errors, write_json
from saelab.sae.fold import fold
from saelab.sae.interop.recognise import Peer, find
from saelab.sae.interop.saelens import architecture_of, rule_of
from saelab.sae.interop.stored import Stored
from saelab.sae.layout import CONFIG, EVALUATION, FOLDER, WEIGHTS
from saelab.sae.model import SparseAutoencoder
from saelab.tensors import write_tensors

FORMAT = 1


def save_sae(sae: SparseAutoencoder, folder: Path) -> None:
    """Write `sae` to `folder`, each file whole or not at all; `replace_folder` of saelab.files replaces both at once.

    Trained thresholds and gates are written as fixed thresholds, and the cosine affinity is taken into the weights.
    Raises SaelabError if the files cannot be written.
    """
    if sae.log_threshold is not None or sae.r_mag is not None or sae.power:
        sae = fold(sae, 1.0)
    tensors = {  # SAELens keeps the encoder as columns, [d_in, n_features]
        "W_enc": sae.W_enc.detach().T,
        "b_enc": sae.b_enc.detach(),
        "W_dec": sae.W_dec.detach(),
        "b_dec": sae.b_dec.detach(),
    }
    metadata = {"sae_lens_version": "6.54.12", **sae.metadata}  # >= 6, or SAELens rebuilds and drops our metadata
    metadata["saelab"] = {"format": FORMAT, "k": sae.k, "beta": sae.beta, **metadata.get("saelab", {})}
    rule = rule_of(sae)
    if rule == "threshold" and sae.threshold is not None:
        tensors["threshold"] = sae.threshold.detach().clamp_min(0).expand(sae.n_features)
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.detach()
    crosses = len(sae.site_widths) > 1
    name = architecture_of(rule, transcodes=sae.transcodes, skip=sae.W_skip is not None, crosses=crosses)
    config = {
        "architecture": name,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        **({"d_out": sae.d_out} if sae.transcodes else {}),
        **({"site_widths": list(sae.site_widths)} if crosses else {}),
        **({"k": sae.k} if rule in ("topk", "groupmax") else {}),
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": sae.normalisation or "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": metadata,
    }
    with translate_errors(folder):
        make_folder(folder)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)


def load(path: str | Path, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """The autoencoder in `path`: a run folder, its ``sae/`` folder, or a checkpoint of another trainer.

    Others are SAELens, sparsify, dictionary_learning and OpenAI's sparse_autoencoder, recognised by the tensors in
    their files: a folder, one of a folder of hookpoints, or the file of weights itself (docs/interop.md). From a run
    folder, or one that `saelab push` made, it also takes the figures of the run's evaluation, to show in a notebook.

    Raises SaelabError if there is no checkpoint, if it is damaged or has weights that are not finite, or if saelab does
    not compute it.
    """
    path = Path(expanded(path))
    peer, stored = found_in(path)
    sae = peer.read(stored)
    check_weights(sae, str(stored.path))
    if stored.path.parent == current_folder(path / FOLDER):
        sae.figures = _figures(path / EVALUATION)
    elif "saelab" in sae.metadata:
        sae.figures = _figures(stored.path.parent / EVALUATION)
    return sae.to(device).requires_grad_(False)


def found_in(path: Path) -> tuple[Peer, Stored]:
    """The trainer and the file of the checkpoint in `path`, which is as in `load`.

    Raises SaelabError if there is none.
    """
    inner = current_folder(path / FOLDER)
    return find(inner if (inner / CONFIG).is_file() else current_folder(path))


def checksum(path: str | Path) -> str:
    """SHA-256 of the files of the checkpoint in `path`, which is as in `load`. Raises SaelabError if there is none."""
    _, stored = found_in(Path(expanded(path)))
    beside = [stored.path.with_name(name) for name in (CONFIG, "config.json", "activation_scaler.json")]
    beside.append(stored.path.parent.parent / "hyperparams.json")
    digest = hashlib.sha256()
    for file in (stored.path, *filter(Path.is_file, beside)):
        with translate_errors(file), file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def check_weights(sae: nn.Module, where: str) -> None:
    """Raises SaelabError if a parameter of `sae` is NaN or infinite, or a buffer NaN.

    With such weights features look silent and figures undefined. An infinite threshold, a buffer, is in order: its
    feature is never active. `where` begins the message.
    """
    finite = ((name, torch.isfinite(weights)) for name, weights in sae.named_parameters())
    numbers = ((name, ~torch.isnan(values)) for name, values in sae.named_buffers())
    for name, good in chain(finite, numbers):
        if not good.all():
            raise SaelabError(
                f"{where}: {int((~good).sum()):,} of {good.numel():,} values of {name} are NaN or infinite; use an "
                "earlier checkpoint, or train it again with a smaller `training.lr`"
            )


def _figures(evaluation: Path) -> dict[str, Any]:
    """The figures in a run's evaluation; empty if it is missing or damaged, so that the weights still load."""
    try:
        return read_json(evaluation, "")
    except SaelabError:
        return {}
