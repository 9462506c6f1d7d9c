"""Whether the features that attribution finds matter causally (claim T8), the autoencoders' errors kept.

A question is a text with two possible next tokens. A name that is re-used (the paper's IOI task), or an argument of a
function that is re-used in its body, against another that the text has too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from saelab.analysis.attention.ablation import FeatureAt, ablated_logits
from saelab.analysis.attention.logits import logit_attribution
from saelab.analysis.intervals import Interval, interval
from saelab.analysis.result import Result
from saelab.errors import SaelabError
from saelab.lm.attention import site_of
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    pass


class Question(NamedTuple):
    """A prompt with the answer that the model gives after it, and another one that the text could have made it give."""

    ids: Sequence[int]
    answer: int
    other: int


@dataclass(frozen=True, eq=False, repr=False)
class CircuitTest(Result):
    """Logit differences, answer minus other, in nats; means over questions. `circuit_test` makes it."""

    questions: int
    features: int
    """Features ablated in each."""
    clean: Interval
    ablated: Interval
    """Without the features of the circuit, errors kept."""
    random: Interval
    """Without as many other features that are active at the same position."""
    without_error: Interval
    """Without the autoencoders' errors at the same position."""
    effect_over_random: Interval
    """(clean - ablated) - (clean - random)"""
    correlation: float
    """Between what attribution says a feature adds to the difference and what its ablation takes away, over all
    features that are active at the last position."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        return {
            "questions": self.questions,
            "features in the circuit": self.features,
            "logit difference (nats)": self.clean,
            "without the circuit's features (nats)": self.ablated,
            "without as many random active features (nats)": self.random,
            "without the errors (nats)": self.without_error,
            "effect beyond random features (nats)": self.effect_over_random,
            "correlation of attribution and ablation": self.correlation,
        }

    def plot(self):
        """The logit difference of each run with its interval."""
        import plotly.graph_objects as go

        runs = {"clean": self.clean, "circuit": self.ablated, "random": self.random, "error": self.without_error}
        ends = {"symmetric": False, "array": [v.high - v.value for v in runs.values()]}
        ends["arrayminus"] = [v.value - v.low for v in runs.values()]
        figure = go.Figure(go.Bar(x=list(runs), y=[v.value for v in runs.values()], error_y=ends))
        return figure.update_layout(xaxis_title="ablated", yaxis_title="logit difference (nats)")


@torch.no_grad()
def circuit_test(
    saes: Mapping[int, SparseAutoencoder],
    lm: LanguageModel,
    questions: Sequence[Question],
    *,
    features: int = 5,
    single: int = 8,
    seed: int = 0,
) -> CircuitTest:
    """Whether the features that attribution finds matter causally (claim T8).

    The circuit of a question is the `features` features with the largest direct attribution to the logit difference at
    its last position, over all `saes`, which are autoencoders of heads' outputs by layer. They are ablated at once, and
    so are as many random ones of the other active features there. On the first `single` questions each active feature
    is ablated by itself, for the correlation.
    """
    if not questions:
        raise SaelabError("attribution: there is no question to test a circuit on")
    numbers = np.random.default_rng(seed)
    figures: list[list[float]] = []
    attributed: list[float] = []
    measured: list[float] = []
    for number, question in enumerate(questions):
        last = len(question.ids) - 1
        found: list[tuple[float, FeatureAt]] = []
        for layer, sae in saes.items():
            logits = logit_attribution(
                sae, lm, question.ids, last, question.answer, question.other, site=site_of(layer)
            )
            values = zip(logits.contributions.tolist(), logits.features.tolist(), strict=True)
            found += [(value, FeatureAt(layer, last, feature)) for value, feature in values]
        found.sort(key=lambda pair: -pair[0])
        circuit = [one for _, one in found[:features]]
        rest = [one for _, one in found[features:]]
        others = [rest[i] for i in numbers.permutation(len(rest))[:features]]
        errors = [FeatureAt(layer, last, None) for layer in saes]

        def difference(chosen: Iterable[FeatureAt], question: Question = question) -> float:
            logits = ablated_logits(saes, lm, question.ids, chosen)[-1].double()
            return float(logits[question.answer] - logits[question.other])

        clean = difference([])
        figures.append([clean, difference(circuit), difference(others), difference(errors)])
        if number < single:
            attributed += [value for value, _ in found]
            measured += [clean - difference([one]) for _, one in found]
    sums = np.array(figures)
    one = np.ones((len(sums), 1))

    def mean(values: np.ndarray) -> Interval:
        return interval(np.concatenate([values[:, None], one], 1), seed=seed)

    return CircuitTest(
        questions=len(questions),
        features=features,
        clean=mean(sums[:, 0]),
        ablated=mean(sums[:, 1]),
        random=mean(sums[:, 2]),
        without_error=mean(sums[:, 3]),
        effect_over_random=mean(sums[:, 2] - sums[:, 1]),
        correlation=float(np.corrcoef(attributed, measured)[0, 1]) if len(attributed) > 1 else float("nan"),
    )
