"""Thresholds that replace a batch-wide allocation in inference, set on held-out text."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saelab.corpus import Corpus
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.runs.job import Say, quiet
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
    densities are those of `Trained`: a scalar, ``[n_features]``, or None if inference needs no thresholds. Raises
    SaelabError if the rows hold no ordinary token.
    """
    if densities is None:
        return {}
    if not lm.ordinary(rows).any():
        raise SaelabError(
            "calibration: the held-out rows hold no ordinary token, only special ones, so thresholds cannot be set; "
            "use another text"
        )

    def activations() -> Iterator[Tensor]:
        blocks = iter(rows.split(rows_per_forward))
        for block in track(blocks, "calibration", rows.numel(), lambda block: block.numel()):
            ids = block.to(lm.device).long()
            yield lm.activations(ids, [site])[site][lm.ordinary(ids)].float() * scale

    calibration = thresholds_for(sae.pre_activations, activations(), densities, rows.numel())
    sae.threshold = calibration.threshold.to(sae.W_dec).reshape(-1)
    return {"calibration_tokens": calibration.tokens, "rough_thresholds": int(calibration.flagged.sum())}


def calibration_rows(corpus: Corpus, evaluated_tokens: int, say: Say = quiet) -> Tensor:
    """Held-out rows of `corpus` for `calibrate`, int32 ``[rows, context]``, with about `CALIBRATION_TOKENS` tokens.

    They come after the rows that an evaluation on `evaluated_tokens` reads; if there is too little text, they are the
    last rows, and `say` reports it. Raises SaelabError if no text is held out.
    """
    held_out = torch.from_numpy(corpus.held_out_rows(evaluated_tokens + CALIBRATION_TOKENS))
    context = held_out.shape[1]
    if len(held_out) * (context - 1) < evaluated_tokens + CALIBRATION_TOKENS:
        say("note: there is so little held-out text that thresholds are set on rows that evaluation also reads")
    return held_out[-(calibration_tokens(context) // context) :]


def calibration_tokens(context: int) -> int:
    """Tokens, BOS included, of the rows that `calibration_rows` returns if there is enough text."""
    return math.ceil(CALIBRATION_TOKENS / (context - 1)) * context
