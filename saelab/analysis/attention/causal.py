"""Whether the features that attribution finds matter causally (claim T8), the autoencoders' errors kept.

A question is a text with two possible next tokens. A name that is re-used (the paper's IOI task), or an argument of a
function that is re-used in its body, against another that the text has too.

The circuit of a question is the features with the largest direct attribution to the logit difference at its last
position. They are ablated there at once. They are among the largest activations, so each control is as large:

random       other active features at the same position and layer, in random order, until their mass (activation times
             length of the decoder row, summed) is the circuit's; of the last one only the part that is needed
direction    a random direction, as long as the circuit's contribution, taken from the same activations
error        the autoencoders' errors
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.attention.ablation import FeatureAt, Taken, ablated_logits, changed_logits
from saelab.analysis.attention.logits import logit_attribution
from saelab.analysis.intervals import Interval, interval
from saelab.analysis.result import Result
from saelab.errors import SaelabError
from saelab.lm.attention import site_of
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import plotly.graph_objects as go


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
    """Without other features of the same mass."""
    random_mass: Interval
    """Mass of these over that of the circuit: below 1 if the other active features together have less."""
    direction: Interval
    """Without as much of a random direction."""
    without_error: Interval
    """Without the autoencoders' errors at the same position."""
    effect_over_random: Interval
    """(clean - ablated) - (clean - random)"""
    effect_over_direction: Interval
    """(clean - ablated) - (clean - direction)"""
    correlation: float
    """Between what attribution says a feature adds to the difference and what its ablation takes away, over all
    features that are active at the last position."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        return {
            "questions": self.questions,
            "features in the circuit": self.features,
            "logit difference (nats)": self.clean,
            "without the circuit's features (nats)": self.ablated,
            "without random active features of the same mass (nats)": self.random,
            "their mass over the circuit's": self.random_mass,
            "without random directions of the same length (nats)": self.direction,
            "without the errors (nats)": self.without_error,
            "effect beyond random features (nats)": self.effect_over_random,
            "effect beyond random directions (nats)": self.effect_over_direction,
            "correlation of attribution and ablation": self.correlation,
        }

    def plot(self) -> "go.Figure":
        """The logit difference of each run with its interval."""
        import plotly.graph_objects as go

        runs = {"clean": self.clean, "circuit": self.ablated, "random features": self.random}
        runs |= {"random direction": self.direction, "error": self.without_error}
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
    draws: int = 4,
    single: int = 8,
    seed: int = 0,
) -> CircuitTest:
    """Whether the features that attribution finds matter causally (claim T8).

    `saes` are autoencoders of heads' outputs by layer; a circuit has `features` features of all of them. Random
    controls are means over `draws` draws. On the first `single` questions each active feature is ablated by itself,
    for the correlation. Raises SaelabError if there is no question.
    """
    if not questions:
        raise SaelabError("attribution: there is no question to test a circuit on")
    generator = torch.Generator().manual_seed(seed)
    figures = []
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
        errors = [FeatureAt(layer, last, None) for layer in saes]

        def asked(logits: Tensor, question: Question = question) -> float:
            last = logits[-1].double()
            return float(last[question.answer] - last[question.other])

        def without(chosen: Iterable[FeatureAt], question: Question = question) -> float:
            return asked(ablated_logits(saes, lm, question.ids, chosen))

        sizes = {layer: Size(saes[layer], {one.feature for one in circuit if one.layer == layer}) for layer in saes}

        def control(by_layer: Mapping[int, Taken], question: Question = question, last: int = last) -> float:
            at = {(layer, last): take for layer, take in by_layer.items()}
            return asked(changed_logits(lm, question.ids, at))

        clean = without([])
        random = [control({n: size.features(generator) for n, size in sizes.items()}) for _ in range(draws)]
        taken, target = np.sum([size.masses for size in sizes.values()], 0)
        direction = [control({n: size.direction(generator) for n, size in sizes.items()}) for _ in range(draws)]
        share = taken / max(target, 1e-30)
        figures.append([clean, without(circuit), np.mean(random), share, np.mean(direction), without(errors)])
        if number < single:
            attributed += [value for value, _ in found]
            measured += [clean - without([one]) for _, one in found]
    clean, ablated, random, mass, direction, error = np.array(figures).T

    def mean(values: np.ndarray) -> Interval:
        return interval(np.stack([values, np.ones_like(values)], 1), seed=seed)

    return CircuitTest(
        questions=len(questions),
        features=features,
        clean=mean(clean),
        ablated=mean(ablated),
        random=mean(random),
        random_mass=mean(mass),
        direction=mean(direction),
        without_error=mean(error),
        effect_over_random=mean(random - ablated),
        effect_over_direction=mean(direction - ablated),
        correlation=float(np.corrcoef(attributed, measured)[0, 1]) if len(attributed) > 1 else float("nan"),
    )


class Size:
    """Controls of the size of what some features of an autoencoder contribute, at the activations that they change."""

    def __init__(self, sae: SparseAutoencoder, circuit: set[int | None]) -> None:
        self.sae, self.lengths = sae, sae.W_dec.norm(dim=1)
        self.circuit = torch.tensor(sorted(f for f in circuit if f is not None), dtype=torch.long)
        self.masses = np.zeros(2)
        """Sums over the calls of `features`: mass that was taken, and the circuit's."""

    def features(self, generator: torch.Generator) -> Taken:
        """Random other features of the same mass."""

        def taken(x: Tensor) -> Tensor:
            codes = self.sae.encode(x[None])
            mass = codes.values * self.lengths[codes.features.long()]
            own = torch.isin(codes.features.long(), self.circuit.to(x.device))
            target = mass[own].sum()
            others = (~own).nonzero().squeeze(1)
            others = others[torch.randperm(len(others), generator=generator).to(x.device)]
            before = mass[others].cumsum(0) - mass[others]
            part = torch.zeros_like(mass)
            part[others] = ((target - before) / mass[others].clamp_min(1e-30)).clamp(0, 1)
            self.masses += [float((mass * part).sum()), float(target)]
            return self.sae.decode(codes.with_values(codes.values * part))[0] - self.sae.b_dec

        return taken

    def direction(self, generator: torch.Generator) -> Taken:
        """A random direction of the same length."""

        def taken(x: Tensor) -> Tensor:
            codes = self.sae.encode(x[None])
            own = torch.isin(codes.features.long(), self.circuit.to(x.device))
            length = (self.sae.decode(codes.with_values(codes.values * own))[0] - self.sae.b_dec).norm()
            return length * F.normalize(torch.randn(len(x), generator=generator), dim=0).to(x.device)

        return taken
