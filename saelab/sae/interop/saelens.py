"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``. Our own checkpoints are such folders.

Read is what SAELens 6 loads, with configurations of earlier versions, and the checkpoints of its trainer: their
thresholds and decoder norms are folded as SAELens does for its final files, and so is a scale in
``activation_scaler.json``. Architectures whose name begins with ``saelab_`` are ours, in the same layout.
"""

import math
import re
import sys
from typing import Any

import torch

from saelab.errors import SaelabError, did_you_mean
from saelab.sae.interop.stored import Config, Stored
from saelab.sae.interop.weights import From, built, fold_decoder_norms, fold_gate, set_groups, vector
from saelab.sae.layout import CONFIG
from saelab.sae.model import SparseAutoencoder
from saelab.sae.normalisation import NORMALISATIONS

NAME = "SAELens"
MARKS = ({"W_enc", "W_dec"},)
"""Sets of names of tensors, one of which a file of this kind has."""
SUFFIX = ".safetensors"

GROUP_MAX = "groupmax"
_ALONE = {"standard": "relu", "topk": "topk", "jumprelu": "threshold", "gated": "gated"}
_IN_TRAINING = {"batchtopk": "batch", "matryoshka_batchtopk": "batch"}
_TRANSCODERS = {
    "transcoder": ("relu", False),
    "skip_transcoder": ("relu", True),
    "jumprelu_transcoder": ("threshold", False),
    "jumprelu_skip_transcoder": ("threshold", True),
}
CROSSES = "_crosscoder"
"""What the names of our crosscoders end with."""
OURS = "saelab_"
"""What names of architectures begin with that SAELens does not have."""
_REFUSED = {
    "abstopk": "its activations can be negative, and saelab's features are positive",
    "matching_pursuit": "its features depend on each other, one after another, and saelab encodes all at once",
    "temporal": "its features depend on earlier tokens",
}
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_METADATA = ("model_name", "hook_name", "hook_head_index", "prepend_bos", "context_size", "dataset_path")
_METADATA += ("hook_name_out",)


def architecture_of(rule: str, *, transcodes: bool, skip: bool, crosses: bool = False) -> str:
    """The name of an architecture; `rule` is that of inference: relu, topk, threshold or groupmax."""
    if crosses:
        return f"{OURS}{_name(rule)}{CROSSES}"
    if transcodes:
        known = {value: name for name, value in _TRANSCODERS.items()}
        if (rule, skip) in known:
            return known[rule, skip]
        return f"{OURS}{_name(rule)}_{'skip_' if skip else ''}transcoder"
    return f"{OURS}{_name(rule)}{'_skip' * skip}" if skip or rule == GROUP_MAX else _name(rule)


def rule_of(sae: SparseAutoencoder) -> str:
    """The rule of inference: relu, topk, threshold or groupmax."""
    if sae.threshold is None:
        return GROUP_MAX if sae.groups else "topk"
    return "threshold" if bool((sae.threshold > 0).any()) else "relu"


def _name(rule: str) -> str:
    return next((name for name, value in _ALONE.items() if value == rule), rule)


def _taken_apart(config: Config) -> tuple[str, bool, bool]:
    """The rule of inference, and whether it transcodes and skips. Raises SaelabError for an unknown architecture."""
    name = config.text("architecture", "standard")
    if name.startswith(OURS) and name.endswith(CROSSES):
        name = name.removesuffix(CROSSES) if name == f"{OURS}{GROUP_MAX}{CROSSES}" else name[len(OURS) : -len(CROSSES)]
    if name in _TRANSCODERS:
        rule, skip = _TRANSCODERS[name]
        return rule, True, skip
    for rule in ("relu", "topk", "threshold", GROUP_MAX):
        for transcodes in (False, True):
            for skip in (False, True):
                if name == architecture_of(rule, transcodes=transcodes, skip=skip):
                    return rule, transcodes, skip
    known = {**_ALONE, **_IN_TRAINING}
    if name in known:
        return known[name], False, False
    why = _REFUSED.get(name)
    if why is not None:
        raise SaelabError(f"{config.path}: architecture {name!r} cannot be loaded: {why}")
    names = [*known, *_TRANSCODERS]
    raise SaelabError(
        f"{config.path}: architecture is {name!r}; known are {', '.join(names)}.{did_you_mean(name, names)}"
    )


def read(stored: Stored) -> SparseAutoencoder:
    """The autoencoder in `stored`, with the configuration beside it.

    Raises SaelabError if saelab cannot compute it, or if its files are damaged or contradict each other.
    """
    config = _current(Config.read(stored.path.parent / CONFIG))
    rule, transcodes, skip = _taken_apart(config)
    metadata = config.section("metadata")
    ours = metadata.section("saelab")
    normalisation = _normalisation(config)
    names = {"W_enc": From("W_enc", turned=True), "W_dec": From("W_dec"), "b_dec": From("b_dec")}
    if skip:
        names["W_skip"] = From("W_skip")
    if rule != "gated" and ("b_enc" in stored.kinds or ours.values):
        names["b_enc"] = From("b_enc")
    sizes = {"d_in": config.size("d_in"), "d_out": config.size("d_out"), "n_features": config.size("d_sae")}
    if any(sizes[name] is None for name in ("d_in", "n_features")):
        raise SaelabError(f"{config.path}: d_in or d_sae is missing; use another copy")
    also = {"gated": ("b_gate", "b_mag", "r_mag"), "batch": ("topk_threshold",)}.get(rule, ())
    if rule == "threshold":
        also = ("log_threshold",) if "log_threshold" in stored.kinds else ("threshold",)
    also += _unused(stored)
    sae = built(stored, names, config, sizes, transcodes=transcodes, also=also)
    sae.metadata, sae.beta = dict(metadata.values), _number(ours, "beta")
    if config.text("architecture", "standard").endswith(CROSSES):
        sae.site_widths = _site_widths(config, sae.d_in)
        _check_scales(ours, len(sae.site_widths))
    sae.centred = config.flag("apply_b_dec_to_input", True) and not transcodes
    scale = _scale(config, stored) if normalisation == "expected_average_only_in" else 1.0
    sae.normalisation = normalisation if normalisation in NORMALISATIONS else None
    return _with_rule(sae, stored, config, rule, ours, scale)


@torch.no_grad()
def _with_rule(
    sae: SparseAutoencoder, stored: Stored, config: Config, rule: str, ours: Config, scale: float
) -> SparseAutoencoder:
    """`sae` with its rule of inference, and `scale` of the input and decoder norms folded into its weights."""
    n, rescaled = sae.n_features, config.flag("rescale_acts_by_decoder_norm", False)
    if scale != 1:
        sae.W_enc.mul_(scale)
        sae.W_dec.div_(scale)
        sae.b_dec.div_(scale)
    if rescaled and rule in ("topk", "batch"):
        fold_decoder_norms(sae)
    k = config.size("k")
    if rule in ("topk", GROUP_MAX):
        if k is None or k > n:
            raise SaelabError(f"{config.path}: k is {config.values.get('k')!r}, not between 1 and d_sae")
        if rule == GROUP_MAX:
            set_groups(sae, k, str(config.path))
        sae.k = k
    else:
        sae.k = ours.size("k", n) or n
    if rule == "relu":
        sae.threshold = torch.zeros(1)
    elif rule == "threshold":
        logarithms = "log_threshold" in stored.kinds
        found = vector(stored, "log_threshold" if logarithms else "threshold", n)
        sae.threshold = found.exp() if logarithms else found
    elif rule == "batch":
        sae.threshold = vector(stored, "topk_threshold", 1) / (scale if rescaled else 1)
    elif rule == "gated":
        fold_gate(sae, *(vector(stored, name, n) for name in ("b_gate", "b_mag", "r_mag")))
    return sae


def _site_widths(config: Config, d_in: int) -> tuple[int, ...]:
    """The widths of the sites of a crosscoder. Raises SaelabError if they are not numbers that add up to d_in."""
    found = config.values.get("site_widths")
    if not isinstance(found, list) or not all(type(each) is int and each > 0 for each in found) or sum(found) != d_in:
        raise config.wrong("site_widths", f"a list of whole numbers that add up to d_in, {d_in}")
    return tuple(found)


def _check_scales(ours: Config, sites: int) -> None:
    """Raises SaelabError if the scales of a crosscoder's sites are there, and are not a positive number for each."""
    found = ours.values.get("input_scale")
    right = isinstance(found, list) and len(found) == sites
    if found is not None and not (right and all(type(each) in (int, float) and 0 < each < math.inf for each in found)):
        raise ours.wrong("input_scale", f"a list of {sites} positive numbers, one for each site")


def _normalisation(config: Config) -> str:
    """The name of the normalisation. Raises SaelabError if there is none of the name."""
    reshape, name = config.text("reshape_activations", "none"), config.text("normalize_activations", "none")
    if reshape not in ("none", "hook_z"):  # hook_z joins the heads' outputs, as saelab's sites have them anyway
        raise config.wrong("reshape_activations", "none or hook_z")
    known = ("none", "expected_average_only_in", *NORMALISATIONS, "covariance_whitening")
    if name not in known:
        raise config.wrong("normalize_activations", " or ".join(known))
    if name == "covariance_whitening" and (config.path.parent / "activation_whitening.safetensors").exists():
        raise SaelabError(
            f"{config.path}: the whitening of the input is not folded into these weights; load the inference model "
            "that SAELens writes at the end of training"
        )
    return name


def _scale(config: Config, stored: Stored) -> float:
    """The factor of the input in ``activation_scaler.json``; 1 without one, as SAELens computes then."""
    path = stored.path.with_name("activation_scaler.json")
    if not path.exists():
        return 1.0
    found = Config.read(path)
    scale = found.values.get("scaling_factor")
    if scale is None:
        return 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise found.wrong("scaling_factor", "a positive number")
    return float(scale)


def _unused(stored: Stored) -> tuple[str, ...]:
    """``scaling_factor``, which early versions wrote, if it is 1 throughout. Raises SaelabError if it is not."""
    if "scaling_factor" not in stored.kinds:
        return ()
    if not bool((stored.read("scaling_factor") == 1).all()):
        raise SaelabError(f"{stored.path}: has a finetuned scaling_factor, which SAELens 6 does not compute either")
    return ("scaling_factor",)


def _number(config: Config, name: str) -> float:
    value = config.values.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise config.wrong(name, "a number")
    return float(value)


def _current(config: Config) -> Config:
    """`config` in the form of SAELens 6."""
    metadata = config.section("metadata")
    version = metadata.values.get("sae_lens_version", config.values.get("sae_lens_version"))
    major = re.match(r"\d+", str(version))
    if "saelab" in metadata.values or (major is not None and int(major[0]) >= 6):
        return config
    found: dict[str, Any] = {_RENAMED.get(name, name): value for name, value in config.values.items()}
    activation = found.get("activation_fn", "relu")
    if activation == "topk":
        found |= {"architecture": "topk", "k": config.section("activation_fn_kwargs").values.get("k", found.get("k"))}
    elif activation != "relu":
        raise SaelabError(f"{config.path}: activation_fn is {activation!r}; saelab computes relu and topk")
    if isinstance(found.get("normalize_activations"), bool):
        found["normalize_activations"] = "expected_average_only_in" if found["normalize_activations"] else "none"
    found["metadata"] = {name: found[name] for name in _METADATA if name in found} | dict(metadata.values)
    return Config(config.path, found)
