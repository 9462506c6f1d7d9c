"""The table of scores: what each needs, and the questions that it asks about a feature.

To add one, write `scorers/NAME.py` and a line of `SCORERS`; what it asks goes into `Judges`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from saelab.autointerp.contexts import Contexts
from saelab.autointerp.embedders import Embedder
from saelab.autointerp.llm.protocol import BaseModel, Client, Reply, Request
from saelab.autointerp.records import About, Explanation, Score
from saelab.autointerp.scorers import detection, fuzzing, intruder, simulation
from saelab.autointerp.scorers.embedding import embedding, example_embedding
from saelab.autointerp.scorers.intervention import intervention
from saelab.autointerp.scorers.predicate import MODEL as EXACT
from saelab.autointerp.scorers.predicate import predicate
from saelab.autointerp.scorers.surprisal import surprisal
from saelab.autointerp.settings import ScoreSettings

if TYPE_CHECKING:
    from saelab.autointerp.steered_text import SteeredTexts  # with torch

CHANCE = {"AUROC": 0.5, "balanced accuracy": 0.5, "accuracy": 1 / intruder.SHOWN, "correlation": 0.0, "nats": 0.0}
"""The value of each unit that a judge reaches who knows nothing."""


@dataclass(frozen=True)
class Judges:
    """What scores ask."""

    client: Client
    embed: Embedder
    embedder: str
    """The name of `embed`."""
    settings: ScoreSettings = field(default_factory=ScoreSettings)
    base: BaseModel | None = None
    """Gives the log-probabilities of text; None if no score reads any."""
    steered: "Callable[[Contexts], SteeredTexts] | None" = None
    """Gives what the subject model writes after a feature's windows; None if no score reads it."""


Asked = tuple[Sequence[Request], Callable[[Sequence[Reply]], Score]]
"""The questions, none if nobody is asked, and the score from the replies."""


class Scorer(NamedTuple):
    asked: Callable[[Contexts, Explanation, Judges], Asked]
    model: Callable[[Judges], str]
    """The judge, as `Score.model` names it."""
    about: About | None = "context"
    """What the explanations that it scores are about; None: it scores the feature, and gets one without text."""
    record: str = ""
    """`Score.score` if it is not the scorer's name."""
    needs_model: bool = False
    """Whether the offline judge cannot make it."""
    needs_base: bool = False
    """Whether it reads log-probabilities of `Judges.base`."""
    needs_steering: bool = False
    """Whether it reads `Judges.steered` texts."""


def _judge(judges: Judges) -> str:
    return judges.client.name


def _embedder(judges: Judges) -> str:
    return judges.embedder


def _base(judges: Judges) -> BaseModel:
    assert judges.base is not None, "a score that reads log-probabilities needs Judges.base"
    return judges.base


def _intervention(c: Contexts, e: Explanation, by: Judges) -> Asked:
    def finish(_: Sequence[Reply]) -> Score:
        assert by.steered is not None, "intervention needs Judges.steered"
        return intervention(c, e, by.steered(c), _base(by), by.settings.steering)

    return (), finish


def _verdicts(scorer: ModuleType) -> Callable[[Contexts, Explanation, Judges], Asked]:
    def asked(c: Contexts, e: Explanation, by: Judges) -> Asked:
        finish = lambda replies: scorer.score(c, e, replies, by.settings, by.client.name)  # noqa: E731
        return scorer.requests(c, e, by.settings), finish

    return asked


SCORERS: dict[str, Scorer] = {
    "detection": Scorer(_verdicts(detection), _judge),
    "fuzzing": Scorer(_verdicts(fuzzing), _judge),
    "simulation": Scorer(
        lambda c, e, by: (simulation.requests(c, e), lambda replies: simulation.score(c, e, replies, by.client.name)),
        _judge,
        needs_model=True,
    ),
    "surprisal": Scorer(
        lambda c, e, by: ((), lambda _: surprisal(c, e, _base(by))), lambda by: _base(by).name, needs_base=True
    ),
    "intervention": Scorer(
        _intervention, lambda by: _base(by).name, about="effect", needs_base=True, needs_steering=True
    ),
    "embedding": Scorer(lambda c, e, by: ((), lambda _: embedding(c, e, by.embed, by.embedder)), _embedder),
    "predicate": Scorer(lambda c, e, by: ((), lambda _: predicate(c, e)), lambda by: EXACT),
    "intruder": Scorer(
        lambda c, e, by: (
            intruder.requests(c, by.settings),
            lambda replies: intruder.score(c, replies, by.settings, by.client.name),
        ),
        _judge,
        about=None,
    ),
    "intruder_embedding": Scorer(
        lambda c, e, by: ((), lambda _: intruder.picked(c, by.embed, by.settings, by.embedder)),
        _embedder,
        about=None,
        record="intruder",
    ),
    "example_embedding": Scorer(
        lambda c, e, by: ((), lambda _: example_embedding(c, by.embed, by.embedder)), _embedder, about=None
    ),
}
"""By the name that the user gives."""
DEFAULT = ("detection", "fuzzing", "embedding", "intruder", "predicate")
"""The scores that are made if none are named; the offline judge has answers to them too."""
