"""What is stored: explanations, scores, and every judged example. Needs no torch.

An explanation is of one feature; a score is of one explanation, or, for scores without explanation, of the feature.
Both are lines of JSON, so that a run that is killed keeps the lines that it wrote.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from saelab.analysis.intervals import Interval

SHUFFLED = "shuffled "
"""What the kind of an explanation begins with that was made for another feature: a control."""

MANUAL = "manual"
"""The kind of an explanation that a person wrote; it stands for the model too, and `author` has the name."""
EFFECT: Final = "effect"
"""The kind of an explanation that says what comes after the feature, when it is made stronger."""
About = Literal["context", "effect"]
"""What an explanation is about: when the feature is active, or what comes after it."""


@dataclass(frozen=True)
class Explanation:
    """A text that says when a feature is active, or, of the kind `EFFECT`, what comes after it."""

    feature: int
    text: str
    """"" if the explainer's answer could not be read; `answer` has it."""
    kind: str
    """How it was made: `default`, `contrastive`, `lexical`, `effect`, `manual` ...; `shuffled X`: another feature's."""
    model: str
    """The model that wrote it; `lexical` for the offline explainer, which is no language model; `manual` for none."""
    author: str = ""
    """The person who wrote or edited it; "" for a model."""
    program: dict[str, Any] | None = None
    """The explanation as something that can be run on tokens (predicates.py); None for plain text."""
    answer: str = ""
    """The explainer's whole answer."""
    tokens: int = 0
    """Tokens of its prompt and its answer."""
    note: str = ""
    """Why there is no text, or of how few windows it was made."""
    attempt: int = 0
    """0; 1 if the feature was explained again in the same way, and so on."""

    @property
    def about(self) -> About:
        return about_of(self.kind)

    @property
    def key(self) -> str:
        """Identifies the explanation among those of a run."""
        again = (str(self.attempt),) * bool(self.attempt)
        return _hash(str(self.feature), self.kind, self.model, self.author, self.text, *again)


def about_of(kind: str) -> About:
    """What explanations of this kind, or controls of them, are about."""
    return EFFECT if kind.removeprefix(SHUFFLED) == EFFECT else "context"


@dataclass(frozen=True)
class Judged:
    """One example and what the judge said of it."""

    row: int
    position: int
    """Position of the strongest token; in a silent window, of the token for which it was chosen."""
    start: int
    """Position of the window in its row."""
    length: int
    """Tokens of the window."""
    quantile: int
    """Part of the feature's windows that it is from, 0 the strongest; -1 if the feature is silent on it."""
    truth: bool
    """What a perfect judge would say."""
    said: float | None
    """Probability, similarity or score that the judge gave; None if its answer could not be read."""
    marked: tuple[int, ...] = ()
    """Indices of the tokens that were marked in the window."""
    answer: str = ""
    """The judge's answer if it could not be read; for intervention, the texts that were written, as JSON."""


@dataclass(frozen=True)
class Score:
    """A score with its interval and everything it was counted from."""

    feature: int
    score: str
    """Its name, that of the file in `saelab.autointerp.scorers`."""
    explanation: str
    """`Explanation.key`; "" for a score of the feature itself."""
    model: str
    """The judge."""
    value: Interval
    """The headline figure with its 95% interval; NaN if there is none."""
    unit: str
    """Unit of the value: `AUROC`, `balanced accuracy`, `nats`, `correlation`."""
    figures: dict[str, float] = field(default_factory=dict)
    """Further figures by name: accuracy, precision, recall, F1, true_positive ... , by quantile `recall: 0` ..."""
    unread: int = 0
    """Answers that could not be read. Their examples are in no figure."""
    note: str = ""
    """Why there is no value, for example too few examples."""
    tokens: int = 0
    """Tokens of all prompts and answers of the judge."""
    judged: tuple[Judged, ...] = ()

    @property
    def key(self) -> str:
        """Identifies the score among those of a run."""
        return score_key(self.feature, self.score, self.explanation, self.model)


def score_key(feature: int, score: str, explanation: str, model: str) -> str:
    """`Score.key` of the score with these fields."""
    return _hash(str(feature), score, explanation, model)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]
