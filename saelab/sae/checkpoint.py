"""A checkpoint is a SAELens folder: ``cfg.json`` and ``sae_weights.safetensors``, loadable by SAELens as it is.

Weights are folded (they apply to unscaled activations); our own facts are under ``metadata.saelab``. The rule of
inference decides the architecture: token choice becomes SAELens' ``topk``; thresholds become its ``jumprelu``, with one
for each feature, above which an entry is active; thresholds that are all 0 become its ``standard`` (ReLU). SAELens has
no GroupMax, whose architecture is `GROUP_MAX`, in the same layout.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from saelab.errors import SaelabError, brief
from saelab.files import current_folder, expanded, make_folder, read_json, translate_errors, write_json
from saelab.sae.layout import CONFIG, EVALUATION, FOLDER, WEIGHTS
from saelab.sae.model import SparseAutoencoder
from saelab.tensors import write_tensors

FORMAT = 1
GROUP_MAX = "saelab_groupmax"
_WITH_K = ("topk", GROUP_MAX)


def save_sae(sae: SparseAutoencoder, folder: Path) -> None:
    """Write `sae` to `folder`, each file whole or not at all; `replace_folder` of saelab.files replaces both at once.

    Trained thresholds and gates are written as fixed thresholds. Raises SaelabError if the files cannot be written, or
    for a transcoder, which has no format yet.
    """
    if not sae.centred:
        raise SaelabError(f"{folder}: a transcoder (d_out {sae.d_out}) cannot be saved by this version")
    sae = sae.folded(1.0) if sae.log_threshold is not None or sae.r_mag is not None else sae
    tensors = {  # SAELens keeps the encoder as columns, [d_in, n_features]
        "W_enc": sae.W_enc.detach().T,
        "b_enc": sae.b_enc.detach(),
        "W_dec": sae.W_dec.detach(),
        "b_dec": sae.b_dec.detach(),
    }
    metadata = {"sae_lens_version": "6.54.12", **sae.metadata}  # >= 6, or SAELens rebuilds and drops our metadata
    metadata["saelab"] = {"format": FORMAT, "k": sae.k, "beta": sae.beta, **metadata.get("saelab", {})}
    architecture = _architecture(sae)
    if architecture == "jumprelu":
        assert sae.threshold is not None
        tensors["threshold"] = sae.threshold.detach().clamp_min(0).expand(sae.n_features)
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        **({"k": sae.k} if architecture in _WITH_K else {}),
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": metadata,
    }
    with translate_errors(folder):
        make_folder(folder)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)


def _architecture(sae: SparseAutoencoder) -> str:
    if sae.threshold is None:
        return GROUP_MAX if sae.groups else "topk"
    return "jumprelu" if bool((sae.threshold > 0).any()) else "standard"


def load(path: str | Path, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """The autoencoder in `path`, a checkpoint folder or a run folder with one under ``sae/``.

    From a run folder it also takes the figures of the run's evaluation, if there is one, to show them in a notebook.

    Raises SaelabError if there is no checkpoint, if it is damaged or has weights that are not finite, or if it is not a
    TopK, GroupMax, JumpReLU or ReLU autoencoder that saelab computes exactly.
    """
    path = Path(expanded(path))
    inner = current_folder(path / FOLDER)
    folder = inner if (inner / CONFIG).is_file() else current_folder(path)
    if not (folder / CONFIG).is_file():
        raise SaelabError(f"{path}: no checkpoint here ({CONFIG} is missing; give a run folder or its sae/ folder)")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        d_in, n_features = int(config["d_in"]), int(config["d_sae"])
        metadata = _object(config, "metadata")
        ours = _object(metadata, "saelab")
        architecture = _checked_architecture(config, n_features, folder)
        # without a budget of its own, as from another trainer, nothing limits the active features
        k = int(config["k"] if architecture in _WITH_K else ours.get("k", n_features))
        beta = float(ours.get("beta", 0.0))
    except (OSError, ValueError, OverflowError, SafetensorError, KeyError, TypeError) as error:
        raise SaelabError(
            f"{folder}: the checkpoint is damaged ({brief(error)}); restore it from a copy, or train the run again"
        ) from error
    if "W_enc" in tensors:
        tensors["W_enc"] = tensors["W_enc"].T
    _check_shape(folder, "W_enc", tensors.get("W_enc"), (n_features, d_in))  # before memory is allocated
    sae = SparseAutoencoder(d_in, n_features, k, metadata)
    sae.beta, sae.groups = beta, architecture == GROUP_MAX
    expected: dict[str, torch.Tensor] = dict(sae.named_parameters())
    if architecture == "jumprelu":
        sae.threshold = expected["threshold"] = torch.empty(n_features)
    elif architecture == "standard":
        sae.threshold = torch.zeros(1)
    for name, parameter in expected.items():
        parameter.data.copy_(_check_shape(folder, name, tensors.get(name), tuple(parameter.shape)))
    check_weights(sae, str(folder / WEIGHTS))
    if folder == inner:
        sae.figures = _figures(path / EVALUATION)
    return sae.to(device).requires_grad_(False)


def _check_shape(folder: Path, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor`. Raises SaelabError if it is None or of another shape."""
    if tensor is None or tensor.shape != shape:
        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}, not {shape}"
        raise SaelabError(f"{folder / WEIGHTS}: {name} is {found}")
    return tensor


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


def _object(parent: dict[str, Any], name: str) -> dict[str, Any]:
    """The JSON object `name` in `parent`; empty if there is none. Raises TypeError if it is something else."""
    found = parent.get(name)
    if not isinstance(found, dict | None):
        raise TypeError(f"{name} is {found!r}, not an object")
    return found or {}


def _figures(evaluation: Path) -> dict[str, Any]:
    """The figures in a run's evaluation; empty if it is missing or damaged, so that the weights still load."""
    try:
        return read_json(evaluation, "")
    except SaelabError:
        return {}


def _checked_architecture(config: dict[str, Any], n_features: int, folder: Path) -> str:
    """The architecture of a checkpoint. Raises SaelabError if saelab does not compute it exactly."""
    expected = {
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    for key, supported in expected.items():
        if config.get(key, supported) != supported:
            raise SaelabError(f"{folder / CONFIG}: {key} is {config[key]!r}; this version computes {supported!r} only")
    architecture, k = config.get("architecture"), config.get("k")
    if architecture not in (*_WITH_K, "jumprelu", "standard"):
        raise SaelabError(
            f"{folder / CONFIG}: architecture is {architecture!r}; this version computes topk, jumprelu, standard and "
            f"{GROUP_MAX}"
        )
    if architecture == GROUP_MAX and isinstance(k, int) and k > 0 and n_features % k:
        raise SaelabError(f"{folder / CONFIG}: k is {k}, and {n_features} features are not k equal groups")
    if architecture in _WITH_K and not (isinstance(k, int) and 1 <= k <= n_features):
        raise SaelabError(f"{folder / CONFIG}: k is {k!r}, not between 1 and d_sae")
    return architecture
