"""Thresholds that take the place of a batch-wide allocation in inference, set on held-out text."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder
from saelab.sae.thresholds import CALIBRATION_TOKENS
from saelab.sae.thresholds import calibrate as thresholds_for


def calibrate(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    densities: Tensor | None,
    *,
    scale: float = 1.0,
    rows_per_forward: int = 16,
    track: Track = silent,
) -> dict[str, Any]:
    """Set the thresholds of `sae` so that they reproduce `densities`; returns the facts recorded in the checkpoint.

    `rows` ``[rows, context]`` are held-out token ids; `sae` was trained on `scale` times the activations at `site`. The
    densities are those of `Trained`: a scalar, ``[n_features]``, or None, which needs no thresholds.
    """
    if densities is None:
        return {}

    def activations() -> Iterator[Tensor]:
        blocks = iter(rows.split(rows_per_forward))
        for block in track(blocks, "calibration", rows.numel(), lambda block: block.numel()):
            ids = block.to(lm.device).long()
            yield lm.activations(ids, [site])[site][lm.ordinary(ids)].float() * scale

    calibration = thresholds_for(sae.pre_activations, activations(), densities, rows.numel())
    sae.threshold = calibration.threshold.to(sae.W_dec).reshape(-1)
    return {"calibration_tokens": calibration.tokens, "rough_thresholds": int(calibration.flagged.sum())}


def calibration_rows(held_out: Tensor, evaluated_tokens: int) -> tuple[Tensor, bool]:
    """The last `CALIBRATION_TOKENS` of held-out rows ``[rows, context]``; and whether evaluation does not read them."""
    per_row = held_out.shape[1] - 1
    enough = len(held_out) * per_row >= evaluated_tokens + CALIBRATION_TOKENS
    rows = math.ceil(CALIBRATION_TOKENS / per_row)
    return held_out[-rows:], enough
