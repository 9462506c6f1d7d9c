"""Thresholds that replace a batch-wide allocation in inference.

Thresholds need text of many documents. Above all those of single features: a feature that is frequent in few documents,
and in none that is read, gets too low a threshold, and nothing makes up for it elsewhere, so L0 is too high on other
text. The held-out text that evaluation leaves may be of few documents. Training text is of many, but the models may
know it, and then features are stronger on it. So the thresholds of features are set on training text, in relation to
each other, and their level on other rows of both texts. (On the same rows the level would be right already, and L0 stay
too high elsewhere.) The one threshold for all features of mutual choice is a level only.
"""

import math
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelab.activations.sites import Sites, as_sites
from saelab.activations.stream import ActivationModel, read_activations
from saelab.corpus import Corpus
from saelab.errors import SaelabError
from saelab.progress import Track, silent
from saelab.runs.job import Job, Say, quiet
from saelab.sae.input_map import UNCHANGED, InputMap
from saelab.sae.model import SparseAutoencoder
from saelab.sae.side_by_side import SideBySide
from saelab.sae.thresholds import CALIBRATION_TOKENS, Calibration
from saelab.sae.thresholds import calibrate as thresholds_for

_ORDERS = 8
"""Orders of the training text that calibration reads the beginning of."""
_STRIDE = 8
"""Rows of training text that are read for each one that calibration uses."""


class CalibrationRows(NamedTuple):
    """Token ids that thresholds are set on, int32 ``[rows, context]``."""

    held_out: Tensor
    training: Tensor
    """Rows of many documents of the training text."""


def calibrate(
    sae: SparseAutoencoder,
    lm: ActivationModel,
    rows: CalibrationRows,
    site: str | Sites,
    densities: Tensor | None,
    *,
    inputs: InputMap | SideBySide = UNCHANGED,
    within: Callable[[Tensor, Tensor | None], Tensor | None] | None = None,
    rows_per_forward: int = 16,
    track: Track = silent,
) -> dict[str, Any]:
    """Set the thresholds of `sae` so that they reproduce `densities`; returns the facts recorded in the checkpoint.

    `sae` was trained on `inputs` of the activations at `site`, of the tokens that `within` keeps, given the activations
    that it reads and those at its target (`Inputs.within`); None keeps all. The densities are those of `Trained`: a
    scalar, ``[n_features]``, or None if inference needs no thresholds. Raises SaelabError, with row and position, if an
    activation is NaN or infinite, and if no token is left.
    """
    if densities is None:
        return {}

    sites = as_sites(site)
    read = sites.inputs if within is None else sites.all

    def activations(text: Tensor) -> Iterator[Tensor]:
        batches = read_activations(lm, text.cpu().numpy(), read, rows_per_forward)
        for batch in track(batches, "calibration", text.numel(), len):
            values, target = batch.values, None
            if within is not None:
                if sites.target is not None:
                    values, target = values[:, : sae.d_in].contiguous(), values[:, sae.d_in :]
                keep = within(values, target)
                values = values if keep is None else values[keep]
            if len(values):
                yield inputs(values)

    def reproducing(densities: Tensor, text: Tensor, pre_activations: Callable[[Tensor], Tensor]) -> Calibration:
        some = activations(text)
        first = next(some, None)
        if first is None:
            raise SaelabError(
                "calibration: the rows hold no ordinary token that training would not leave out, so thresholds cannot "
                "be set; use another text"
            )
        return thresholds_for(pre_activations, chain([first], some), densities, text.numel())

    pre_activations, both = sae.pre_activations, torch.cat([rows.held_out, rows.training[1::2]])
    if densities.ndim == 0:
        found = reproducing(densities, both, pre_activations)
        threshold, tokens = found.threshold, found.tokens
    else:
        found = reproducing(densities, rows.training[::2], pre_activations)
        relative = found.threshold.to(sae.W_dec)
        # above 0 / 0, which is NaN, nothing is active; x / 0 is active whatever the factor, as above the threshold 0
        level = reproducing(densities.mean(), both, lambda x: pre_activations(x).div_(relative))
        threshold, tokens = level.threshold * relative, found.tokens + level.tokens
    sae.threshold = threshold.to(sae.W_dec).reshape(-1)
    return {"calibration_tokens": tokens, "rough_thresholds": int(found.flagged.sum())}


def rows_to_calibrate_on(job: Job) -> CalibrationRows:
    """The `calibration_rows` of a job; of an array as many of its rows, held out and trained on, at equal distances."""
    evaluated, array = job.settings.eval.tokens, job.array
    if array is None:
        return calibration_rows(job.corpus, evaluated, job.say)
    held_out, wanted = array.held_out_rows(array.rows), CALIBRATION_TOKENS
    if (unread := max(0, len(held_out) - evaluated)) < (few := math.ceil(wanted / 4)):
        job.say("note: so few rows are held out that thresholds are set on rows that evaluation also reads")
    held_out = _evenly(held_out[-max(unread, few) :], math.ceil(wanted / 2))
    return CalibrationRows(torch.from_numpy(held_out), torch.from_numpy(array.train_rows(wanted)))


def calibration_rows(corpus: Corpus, evaluated_tokens: int, say: Say = quiet) -> CalibrationRows:
    """The rows for `calibrate`: about `CALIBRATION_TOKENS` tokens of training text, and half as many held-out ones.

    They depend on the corpus only. The held-out ones are spread over those that come after the ones that an evaluation
    on `evaluated_tokens` reads; if there are too few of them, they are the last rows, and `say` reports it. Raises
    SaelabError if no text is held out.
    """
    wanted = calibration_tokens(corpus.context) // corpus.context
    held_out = corpus.held_out_rows(evaluated_tokens + CALIBRATION_TOKENS)
    ordinary = (~np.isin(held_out, sorted(corpus.special_ids))).sum(1)
    unread = int((ordinary.cumsum() - ordinary >= evaluated_tokens).sum())
    if unread < (few := math.ceil(wanted / 4)):
        say("note: there is so little held-out text that thresholds are set on rows that evaluation also reads")
    held_out = _evenly(held_out[-max(unread, few) :], math.ceil(wanted / 2))
    return CalibrationRows(torch.from_numpy(held_out), torch.from_numpy(_spread(corpus, wanted)))


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
    """`wanted` of the rows, at equal distances, or all there are."""
    return rows[np.arange(wanted) * len(rows) // wanted] if wanted < len(rows) else rows


def calibration_tokens(context: int) -> int:
    """The most tokens, BOS included, that a pass of `calibrate` over rows from `calibration_rows` reads."""
    return 2 * math.ceil(CALIBRATION_TOKENS / (context - 1) / 2) * context
