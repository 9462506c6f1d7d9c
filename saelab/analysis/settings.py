"""Settings of an evaluation, of the analyses, and of steering."""

import math
from dataclasses import dataclass, field
from typing import Literal

from saelab.errors import SettingError, check_positive


@dataclass(frozen=True)
class EvalSettings:
    tokens: int = 300_000
    """Held-out tokens for FVU, L0, cosine and never-active features; at least 300 k for a figure to report."""
    ce_tokens: int = 65_536
    """The first of these tokens, for CE and KL: four runs of the model, which share the layers below the site."""
    rows_per_forward: int = 16
    """Rows in one forward pass."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "ce_tokens", "rows_per_forward")


Mode = Literal["add", "clamp", "ablate"]
"""Ways of changing an activation; `saelab.analysis.steering` defines them."""
Where = Literal["all", "new"]
"""Tokens to steer: all ordinary ones, or only those that the model writes."""


@dataclass(frozen=True)
class Intervention:
    """A change of one feature's activation."""

    feature: int
    mode: Mode = "add"
    value: float = 0.0
    """In units of activation; `ablate` does not use it."""


@dataclass(frozen=True)
class DeadSettings:
    """Settings of `saelab.analysis.dead`."""

    tokens: int = 300_000
    """Held-out tokens; at least 300 k for a figure to report."""
    rows_per_forward: int = 16
    """Rows in one forward pass."""
    share: float = 0.5
    """A feature is under-used below this share of the density that the fitted curve expects of its rank."""
    dense: float = 0.1
    """Density above which a feature counts as dense."""
    duplicate: float = 0.9
    """Cosine of decoder rows from which a dead feature counts as a duplicate of a living one."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "rows_per_forward")
        for name in ("share", "dense", "duplicate"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingError(f"{name}: {getattr(self, name)} is not a number above 0 and up to 1")


@dataclass(frozen=True)
class AttentionSettings:
    """Settings of `saelab.analysis.attention.overview`."""

    tokens: int = 100_000
    """Held-out tokens."""
    rows_per_forward: int = 4
    """Rows in one forward pass; a layer's pattern takes 4 heads context^2 bytes for each."""
    per_feature: int = 50
    """Most tokens of each feature that are attributed to their sources."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "rows_per_forward", "per_feature")


@dataclass(frozen=True)
class DarkMatterSettings:
    """Settings of `saelab.analysis.dark_matter`."""

    tokens: int = 300_000
    """Held-out tokens: half of the rows for fits, a tenth for validation, the rest is scored."""
    rows_per_forward: int = 16
    """Rows in one forward pass."""
    ce_tokens: int = 32_768
    """The first of the scored tokens, for CE: four runs of the model, which share the layers below the site."""
    pursuit_tokens: int = 20_000
    """Tokens for gradient pursuit, two thirds of them for its fit; 0: none."""
    part_tokens: int = 0
    """Training tokens of each autoencoder trained on a part of the error; 0: none are trained."""
    sources: tuple[str, ...] = ()
    """Runs at other sites, from whose reconstructions the error is predicted."""
    wider: str | None = None
    """A run at the same site with more features: how much of those that this run lacks is in which part."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "rows_per_forward", "ce_tokens")
        for name in ("pursuit_tokens", "part_tokens"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}: {getattr(self, name)} is negative; 0 leaves this out")


@dataclass(frozen=True)
class SteeringSettings:
    """Settings of `saelab.analysis.steering_effects`."""

    tokens: int = 100_000
    """Held-out tokens to find each feature's strongest contexts in."""
    rows_per_forward: int = 16
    """Rows in one forward pass of that search."""
    features: int = 200
    """Features that are steered, drawn from those that are active in enough rows."""
    contexts: int = 8
    """Tokens at which each feature is steered, of each kind: its own strongest ones, and random ones."""
    scale: float = 0.5
    """Length that `add` adds, as a share of the mean norm of an activation."""
    targets: int = 10
    """Tokens whose logits the steering score is about."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "rows_per_forward", "features", "contexts", "targets")
        if not 0 < self.scale < math.inf:
            raise SettingError(f"scale: {self.scale} is not a positive number")


@dataclass(frozen=True)
class SimilaritySettings:
    """Settings of `saelab.analysis.similarities`."""

    other: tuple[str, ...] = ()
    """Runs on the same model that the run is compared with, at least one."""
    tokens: int = 100_000
    """Held-out tokens on which codes are compared."""
    rows_per_forward: int = 16
    """Rows in one forward pass."""
    meta_rows: int = 0
    """Decoder rows that the training of a meta-structure sees, such as 1,000,000; 0: none is trained."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "rows_per_forward")
        if self.meta_rows < 0:
            raise SettingError(f"meta_rows: {self.meta_rows} is negative; 0 leaves this out")


@dataclass(frozen=True)
class ExplanationsSettings:
    """Settings of the analysis `explanations` (`saelab/autointerp/similarity.py`)."""

    other: tuple[str, ...] = ()
    """Runs on the same model whose explanations are compared with the run's, at least one."""
    pair: Literal["site", "decoder", "explanation"] = "site"
    """How features are paired: by decoder rows, by explanations, or by decoder rows if the other run is of the same
    site and else by explanations. Sites of one residual stream also have decoder rows of one space."""
    embed: str | None = None
    """A sentence-transformers model, a folder or a name; None: TF-IDF of the explanations."""
    threshold: float = 0.5
    """Cosine of explanations from which a share of pairs is reported."""

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise SettingError(f"threshold: {self.threshold} is no cosine; give a number from -1 to 1")


@dataclass(frozen=True)
class ModelDiffSettings:
    """Settings of `saelab.analysis.model_diff`."""

    tokens: int = 300_000
    """Held-out tokens."""
    rows_per_forward: int = 16
    """Rows in one forward pass of each model."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "rows_per_forward")


@dataclass(frozen=True)
class AnalysisSettings:
    """A section for each analysis of `saelab.runs.analyses`, by its name."""

    dead: DeadSettings = field(default_factory=DeadSettings)
    """Dead, under-used and dense features."""
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    """Heads and families of features, for an autoencoder of blocks.N.attn.hook_z."""
    dark_matter: DarkMatterSettings = field(default_factory=DarkMatterSettings)
    """What the autoencoder leaves out: the linear and the nonlinear part of its error."""
    steering: SteeringSettings = field(default_factory=SteeringSettings)
    """What steering single features does to predictions."""
    similarity: SimilaritySettings = field(default_factory=SimilaritySettings)
    """How much of the autoencoder comes back in other runs."""
    explanations: ExplanationsSettings = field(default_factory=ExplanationsSettings)
    """How similar the features' explanations are to those of other runs."""
    model_diff: ModelDiffSettings = field(default_factory=ModelDiffSettings)
    """Which features of a crosscoder of two models are in both."""
