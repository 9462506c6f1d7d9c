"""Settings of explanations and scores."""

from dataclasses import dataclass
from typing import Literal

from saelab.errors import SettingError, check_positive

Sampling = Literal["top", "random", "quantiles", "mix"]
"""How examples are chosen for the explanation; `contexts.py` defines them."""
Negatives = Literal["random", "coactive", "decoder", "same_token"]
"""Where windows come from on which the feature is silent; `contexts.py` defines them."""


@dataclass(frozen=True)
class ContextSettings:
    """The windows of text that an explanation is made from, and those that it is scored on."""

    window: int = 32
    """Tokens of a window."""
    explain: int = 20
    """Windows that the explainer sees."""
    sampling: Sampling = "quantiles"
    quantiles: int = 10
    """Parts with equal numbers of windows that the feature's windows are divided into, strongest first."""
    positives: int = 50
    """Windows with an activation that a score is measured on, as many from each part."""
    negatives: int = 50
    """Windows without an activation that a score is measured on."""
    negative: Negatives = "random"
    centred: bool = False
    """Whether the strongest token of a window lies in its middle; else windows begin at multiples of their length."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "window", "explain", "quantiles", "positives", "negatives")


@dataclass(frozen=True)
class InterventionSettings:
    """How features are steered for an explanation of their effect, and for its score."""

    kl: float = 1.0
    """KL(clean || steered) of the next token, in nats, that the strength is tuned to; the mean over the prompts."""
    prompts: int = 32
    """Prompts that a score is measured on."""
    explain: int = 10
    """Prompts that an explanation is made from."""
    new_tokens: int = 8
    """Tokens that are written after each prompt."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.kl < float("inf"):
            raise SettingError(f"kl: {self.kl} is not a positive number")
        check_positive(self, "prompts", "explain", "new_tokens")


@dataclass(frozen=True)
class ScoreSettings:
    """How scores are made."""

    batch: int = 5
    """Windows in one request."""
    logprobs: bool = True
    """Whether log-probabilities are asked for; with them a verdict has a probability, and a score an AUROC."""
    seed: int = 0
    steering: InterventionSettings = InterventionSettings()

    def __post_init__(self) -> None:
        check_positive(self, "batch")
