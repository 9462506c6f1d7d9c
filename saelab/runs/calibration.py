"""Thresholds that replace a batch-wide allocation in inference, set on text that evaluation does not read."""

import math
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.activations.sinks import within
from saelab.activations.stream import read_activations
from saelab.corpus import Corpus
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder
from saelab.sae.thresholds import CALIBRATION_TOKENS
from saelab.sae.thresholds import calibrate as thresholds_for

_ORDERS = 8
"""Orders of the training text that calibration reads the beginning of."""
_STRIDE = 8
"""Rows of training text that are read for each one that calibration uses."""


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

    `rows` ``[rows, context]`` are token ids (`calibration_rows`); `sae` was trained on `scale` times the activations at
    `site` with norms up to `largest_norm` (before scaling). The densities are those of `Trained`: a scalar,
    ``[n_features]``, or None if inference needs no thresholds. Raises SaelabError, with row and position, if an
    activation is NaN or infinite, and if no token is left.
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
            "calibration: the rows hold no ordinary token that training would not leave out, so thresholds cannot be "
            "set; use another text"
        )
    calibration = thresholds_for(sae.pre_activations, chain([first], some), densities, rows.numel())
    sae.threshold = calibration.threshold.to(sae.W_dec).reshape(-1)
    return {"calibration_tokens": calibration.tokens, "rough_thresholds": int(calibration.flagged.sum())}


def calibration_rows(corpus: Corpus, evaluated_tokens: int) -> Tensor:
    """Rows of `corpus` for `calibrate`, int32 ``[rows, context]``, with about `CALIBRATION_TOKENS` tokens.

    Up to half of them are held out, and come after the rows that an evaluation on `evaluated_tokens` reads; the others
    are spread over the training text. They depend on the corpus only. Raises SaelabError if no text is held out.

    A threshold for each feature needs many documents: a feature that is frequent in a few of them, and none of them is
    read, gets too low a threshold, and nothing makes up for it elsewhere. Training text has the most documents. But
    the language model and the autoencoder may know it, and then features are stronger there than on other text.
    """
    wanted = calibration_tokens(corpus.context) // corpus.context
    held_out = corpus.held_out_rows(evaluated_tokens + CALIBRATION_TOKENS)
    ordinary = (~np.isin(held_out, sorted(corpus.special_ids))).sum(1)
    unread = held_out[ordinary.cumsum() - ordinary >= evaluated_tokens]
    some = _evenly(unread, wanted // 2)
    return torch.from_numpy(np.concatenate([_spread(corpus, wanted - len(some)), some]))


def _spread(corpus: Corpus, wanted: int) -> np.ndarray:
    """Rows of many documents of the training text, `wanted` of them or all there are.

    Neighbours are of one document, and a large corpus has files of one topic. So they are every `_STRIDE`-th row from
    the beginnings of `_ORDERS` orders of the text; of a text too short for that, rows at equal distances.
    """
    first = list(islice(corpus.train_rows(seed=0), wanted * _STRIDE))
    if len(first) < wanted * _STRIDE:
        return _evenly(np.stack(first), wanted)
    rows = []
    for seed in range(_ORDERS):
        share = wanted * (seed + 1) // _ORDERS - wanted * seed // _ORDERS
        rows += islice(corpus.train_rows(seed=seed), 0, share * _STRIDE, _STRIDE)
    return np.stack(rows)


def _evenly(rows: np.ndarray, wanted: int) -> np.ndarray:
    """`wanted` of the rows, or all there are, at equal distances."""
    return rows[np.arange(wanted) * len(rows) // wanted] if wanted < len(rows) else rows


def calibration_tokens(context: int) -> int:
    """Tokens, BOS included, of the rows that `calibration_rows` returns if there is enough text."""
    return math.ceil(CALIBRATION_TOKENS / (context - 1)) * context
