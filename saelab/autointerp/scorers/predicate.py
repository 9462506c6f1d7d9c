"""Predicate: how far is an explanation right that can be run? Exact, and asks nobody.

For explanations with a program, or whose text is a predicate in words (`predicates.py`). A window fits if the predicate
is active on one of its tokens. The headline figure is balanced accuracy over the windows, as in detection, so that the
two can be compared. Over the tokens of these windows:

    token_precision, token_recall, token_F1   counts of tokens, active or not
    correlation                               Pearson's, of the predicate, 0 or 1, and the activation

`Judged.marked` are the tokens on which the predicate is active.
"""

import math
from collections.abc import Sequence

import numpy as np

from saelab.analysis.intervals import Interval
from saelab.autointerp.contexts import Context, Contexts
from saelab.autointerp.metrics import balanced_accuracy_interval, confusion
from saelab.autointerp.predicates import from_program, parse
from saelab.autointerp.records import Explanation, Score
from saelab.errors import SaelabError

MODEL = "exact"
"""The judge, as scores name it: there is none."""


def predicate(contexts: Contexts, explanation: Explanation) -> Score:
    """The score; NaN, with a note, if the explanation cannot be run."""
    windows = [*contexts.positives, *contexts.negatives]
    try:
        run = parse(explanation.text) if explanation.program is None else from_program(explanation.program)
        if run is None:
            return _without(contexts, explanation, "the explanation is no program")
        active = [run.active(each.example.tokens) for each in windows]
    except SaelabError as error:
        return _without(contexts, explanation, str(error))
    truth = np.arange(len(windows)) < len(contexts.positives)
    judged = tuple(
        each.judged(float(on.any()), marked=tuple(np.flatnonzero(on).tolist()))
        for each, on in zip(windows, active, strict=True)
    )
    return Score(
        feature=contexts.feature,
        score="predicate",
        explanation=explanation.key,
        model=MODEL,
        value=balanced_accuracy_interval(np.array([a.any() for a in active], bool), truth),
        unit="balanced accuracy",
        figures=confusion(judged) | _of_tokens(windows, active),
        note=contexts.lacking,
        judged=judged,
    )


def _without(contexts: Contexts, explanation: Explanation, note: str) -> Score:
    nothing = Interval(math.nan, math.nan, math.nan)
    return Score(contexts.feature, "predicate", explanation.key, MODEL, nothing, "balanced accuracy", note=note)


def _of_tokens(windows: Sequence[Context], active: Sequence[np.ndarray]) -> dict[str, float]:
    z = np.concatenate([np.zeros(0), *(each.example.activations for each in windows)])
    said = np.concatenate([np.zeros(0, bool), *active])
    both, union = int((said & (z > 0)).sum()), int(said.sum()) + int((z > 0).sum())
    varied = len(z) > 0 and z.std() > 0 and said.std() > 0
    return {
        "token_precision": both / int(said.sum()) if said.any() else math.nan,
        "token_recall": both / int((z > 0).sum()) if (z > 0).any() else math.nan,
        "token_F1": 2 * both / union if union else math.nan,
        "correlation": float(np.corrcoef(said, z)[0, 1]) if varied else math.nan,
    }
