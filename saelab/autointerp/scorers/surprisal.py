"""Surprisal: does an explanation make the windows in which the feature is active more likely to a language model?

The paper's score (arXiv 2410.13928, section 5). A model reads, in wording of ours,

    a fixed preamble, "Description: " and the explanation, and the window,

and again with `DUMMY` in the explanation's place. A window's score is its mean cross-entropy per token with the dummy
less that with the explanation, in nats: positive if the explanation helps. The feature's score is the AUROC of the
windows' scores, those with an activation against those without.

Unlike in the paper's code the window's first token counts too: the preamble stands before it, so it has a probability.
The paper's judge is Llama 3.1 70B. Any `BaseModel` will do, the subject model among them; small ones hardly read
descriptions. A window's text goes through the judge's own tokenizer.
"""

import math

import numpy as np

from saelab.autointerp.contexts import Contexts
from saelab.autointerp.likelihood import count_of_unfit, log_probabilities
from saelab.autointerp.llm.protocol import BaseModel
from saelab.autointerp.metrics import auroc, auroc_interval
from saelab.autointerp.records import Explanation, Score

PREAMBLE = "Here is a description of a kind of text, and then a text of this kind.\n\n"
DUMMY = "texts of all kinds, which have nothing in common"


def prompt(description: str) -> str:
    """What stands before a window."""
    return f"{PREAMBLE}Description: {' '.join(description.split())}\nText:\n"


def surprisal(contexts: Contexts, explanation: Explanation, base: BaseModel) -> Score:
    """The AUROC of the windows' scores.

    Figures: the mean score in nats of windows with an activation (`active`) and without (`silent`), for each part q of
    the feature's windows its mean (`nats: q`) and the AUROC of its windows against all silent ones (`AUROC: q`), and
    how many windows were too long (`too_long`); these are in no other figure.
    """
    windows = [*contexts.positives, *contexts.negatives]
    texts = ["".join(each.example.tokens) for each in windows]
    pairs = [(prompt(description), text) for description in (DUMMY, explanation.text) for text in texts]
    found, tokens = log_probabilities(base, pairs)
    dummy, explained = found[: len(texts)], found[len(texts) :]
    fits = np.array([len(a) > 0 and len(b) > 0 for a, b in zip(dummy, explained, strict=True)], bool)
    said = [b.mean() - a.mean() if fit else math.nan for a, b, fit in zip(dummy, explained, fits, strict=True)]
    values = np.array(said)[fits]
    part = np.array([each.quantile for each in windows], int)[fits]
    truth = part >= 0
    too_long = len(windows) - len(values)
    figures = {"active": _mean(values[truth]), "silent": _mean(values[~truth]), "too_long": float(too_long)}
    for q in sorted(set(part[truth].tolist())):
        chosen = (part == q) | ~truth
        figures |= {f"nats: {q}": _mean(values[part == q]), f"AUROC: {q}": auroc(values[chosen], truth[chosen])}
    judged = tuple(
        each.judged(float(value) if fit else None) for each, value, fit in zip(windows, said, fits, strict=True)
    )
    return Score(
        feature=contexts.feature,
        score="surprisal",
        explanation=explanation.key,
        model=base.name,
        value=auroc_interval(values, truth),
        unit="AUROC",
        figures=figures,
        note="; ".join(filter(None, (contexts.lacking, count_of_unfit(too_long, len(windows))))),
        tokens=tokens,
        judged=judged,
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
