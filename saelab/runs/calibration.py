"""Thresholds that replace a batch-wide allocation in inference, set on held-out text."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from saelab.activations.sinks import within
from saelab.activations.stream import read_activations
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
    largest_norm: float = math.inf,
    rows_per_forward: int = 16,
    track: Track = silent,
) -> dict[str, Any]:
    """Set the thresholds of `sae` so that they reproduce `densities`; returns the facts recorded in the checkpoint.

    `rows` ``[rows, context]`` are held-out token ids; `sae` was trained on `scale` times the activations at `site` with
    norms up to `largest_norm` (before scaling). The densities are those of `Trained`: a scalar, ``[n_features]``, or
    None if inference needs no thresholds. Raises SaelabError, with row and position, if an activation is NaN or
    infinite, and if no token is left.
    """
    if densities is None:
        return {}

    def activations() -> Iterator[Tensor]:
        batches = read_activations(lm, rows.cpu().numpy(), site, rows_per_forward)
        for batch in track(batches, "calibration", rows.numel(), len):
            keep = within(batch.values, largest_norm)
            values = batch.values if keep is None else batch.values[keep]
            if len(values):
                yield values * scale

    some = activations()
    first = next(some, None)
    if first is None:
        raise SaelabError(
            "calibration: the held-out rows hold no ordinary token that training would not leave out, so thresholds "
            "cannot be set; use another text"
        )
    calibration = thresholds_for(sae.pre_activations, chain([first], some), densities, rows.numel())
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
