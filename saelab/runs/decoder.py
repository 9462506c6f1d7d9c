"""Reads the decoder of a run's checkpoint without torch."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from saelab.errors import SaelabError, brief
from saelab.files import read_json, translate_read_errors
from saelab.runs import folder
from saelab.sae.layout import CONFIG

_AT_ONCE = 4096
"""Rows that `site_shares` reads at a time."""


def decoder_rows(run: Path | str, features: slice = slice(None)) -> np.ndarray:
    """W_dec ``[n_features, d]`` of a run's checkpoint, or its rows of some features.

    That of a crosscoder is in the units of training. Raises SaelabError if there is none, or it is damaged.
    """
    path = folder.weights(Path(run))
    if not path.is_file():
        raise SaelabError(
            f"{run}: there is no checkpoint ({path.name} is missing); finish its training, then come back"
        )
    try:
        with safe_open(path, framework="numpy") as tensors:
            rows = tensors.get_slice("W_dec")[features]
        if rows.ndim != 2 or not np.isfinite(rows).all():
            raise ValueError(f"W_dec is of shape {list(rows.shape)}, or has values that are not finite")
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise SaelabError(f"{path}: the decoder cannot be read ({brief(error)}); train the run again") from error
    factors = _factors(path.with_name(CONFIG), rows.shape[1])
    return rows if factors is None else rows * factors


def site_shares(run: Path | str, feature: int | None = None) -> np.ndarray:
    """Share of each site in the length of each feature's decoder row, ``[n_features, sites]``, as in
    `saelab.site_norms`; or that of one `feature`, ``[1, sites]``, or ``[0, sites]`` if there is no such feature.

    No columns for what is no crosscoder. Raises SaelabError as `decoder_rows`.
    """
    config = folder.weights(Path(run)).with_name(CONFIG)
    facts = read_json(config, "Train the run again.") if config.is_file() else {}
    widths, n_features = facts.get("site_widths"), facts.get("d_sae")
    if not widths or not isinstance(n_features, int):
        return np.zeros((0, 0))
    chosen = range(n_features) if feature is None else range(n_features)[feature : feature + 1]
    found = []
    for start in range(chosen.start, chosen.stop, _AT_ONCE):
        rows = decoder_rows(run, slice(start, min(start + _AT_ONCE, chosen.stop)))
        parts = np.split(rows.astype(np.float64), np.cumsum(widths)[:-1], axis=1)
        lengths = np.stack([np.linalg.norm(part, axis=1) for part in parts], axis=1)
        found.append(lengths / lengths.sum(1, keepdims=True).clip(1e-12))
    return np.concatenate([np.zeros((0, len(widths))), *found])


def _factors(config: Path, d: int) -> np.ndarray | None:
    """The scale of each of `d` dimensions of a crosscoder in training, ``[d]`` float32; None for other autoencoders."""
    remedy = "Train the run again."
    found = read_json(config, remedy) if config.is_file() else {}
    with translate_read_errors(config, "a checkpoint", remedy, (ValueError, TypeError, AttributeError)):
        widths, scales = found.get("site_widths"), (found.get("metadata") or {}).get("saelab", {}).get("input_scale")
        if widths is None or scales is None:
            return None
        if sum(widths) != d:
            raise ValueError(f"its sites have {sum(widths)} dimensions, and W_dec {d}")
        return np.repeat(np.array(scales, np.float32), widths)
