"""Reads the decoder of a run's checkpoint without torch."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from saelab.errors import SaelabError, brief
from saelab.runs import folder


def decoder_rows(run: Path | str) -> np.ndarray:
    """W_dec ``[n_features, d]`` of a run's checkpoint. Raises SaelabError if there is none, or it is damaged."""
    path = folder.weights(Path(run))
    if not path.is_file():
        raise SaelabError(
            f"{run}: there is no checkpoint ({path.name} is missing); finish its training, then come back"
        )
    try:
        with safe_open(path, framework="numpy") as tensors:
            rows = tensors.get_tensor("W_dec")
        if rows.ndim != 2 or not np.isfinite(rows).all():
            raise ValueError(f"W_dec is of shape {list(rows.shape)}, or has values that are not finite")
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise SaelabError(f"{path}: the decoder cannot be read ({brief(error)}); train the run again") from error
    return rows
