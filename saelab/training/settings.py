"""Settings of a training: length, learning rate, checkpoints, processes."""

import math
from dataclasses import dataclass, field

from saelab.errors import SettingError, check_positive

SCHEDULES = ("linear", "cosine")
PRECISIONS = ("float32", "bfloat16")
MAX_DEAD_AFTER = 10_000_000
DEAD_SHARE = 0.10


@dataclass(frozen=True)
class ParallelSettings:
    """How torchrun's processes share the work; their number is the product. The trained weights do not depend on it."""

    data: int | None = None
    """Parts that the tokens of a batch are divided into; null: as many as there are processes for."""
    features: int = 1
    """Parts that the features of the autoencoder are divided into."""

    def __post_init__(self) -> None:
        for name in ("data", "features"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name}: {value} is not a positive number")


@dataclass(frozen=True)
class CheckpointSettings:
    """How often the state is written from which `saelab train --resume` continues."""

    minutes: float | None = 10.0
    """Minutes of training between two states; null: not by time."""
    tokens: int | None = None
    """Tokens between two states; null: not by tokens."""
    keep: int = 2
    """Number of the last states that are kept. Each takes three times the autoencoder, in float32, and once more with
    `training.ema`."""

    def __post_init__(self) -> None:
        for name in ("minutes", "tokens", "keep"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingError(f"{name}: {value} is not a positive number")


@dataclass(frozen=True)
class TrainingSettings:
    tokens: int = 1_000_000
    """Ordinary tokens (no BOS, no other special token) to train on."""
    batch: int = 2048
    """Tokens per step."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from zero."""
    decay: float = 0.5
    """Share of the last steps over which the rate falls to zero."""
    schedule: str = "linear"
    """Shape of that fall: linear or cosine."""
    clip: float = 1.0
    """Norm that larger gradients are scaled down to."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other, so that a step needs the memory of one part."""
    precision: str = "float32"
    """Precision of the copies of W_enc and W_dec that a step reads: float32 (no copies) or bfloat16. Weights, gradients
    and moments stay in float32."""
    ema: float | None = None
    """Decay per step of an average of the weights, such as 0.999, which the checkpoint then has. null: no average."""
    resample: int | None = None
    """Tokens between two resamplings of dead features (resample.py); null: none."""
    log_every: int = 10
    """Steps between lines of metrics."""
    log: str | None = None
    """Where lines of metrics go besides `metrics.jsonl`: tensorboard, wandb or null, nowhere."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "batch", "log_every")
        if self.log not in (None, "tensorboard", "wandb"):
            raise SettingError(f"log: {self.log!r} is none of tensorboard, wandb and null")
        if self.resample is not None and self.resample < 1:
            raise SettingError(f"resample: {self.resample} is not a positive number")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"{name}: {getattr(self, name)} is not a positive number")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name}: {getattr(self, name)} is not a share between 0 and 1")
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise SettingError(f"{name}: {getattr(self, name)!r} is not {' or '.join(choices)}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise SettingError(f"ema: {self.ema} is not a number between 0 and 1")
        if self.batch < 2:
            raise SettingError(f"batch: {self.batch} token has no variance to explain; at least 2 are needed")
        if self.accumulate < 1 or self.batch % self.accumulate or self.batch // self.accumulate < 2:
            raise SettingError(
                f"accumulate: a batch of {self.batch} cannot be cut into {self.accumulate} equal parts of at least 2 "
                "tokens"
            )
        if self.batch > self.tokens:
            raise SettingError(f"batch: {self.batch} is more than the {self.tokens} tokens of the run")

    @property
    def steps(self) -> int:
        """Number of training steps of whole batches."""
        return self.tokens // self.batch

    @property
    def dead_after(self) -> int:
        """Tokens without an activation after which training counts a feature as dead."""
        return min(MAX_DEAD_AFTER, round(DEAD_SHARE * self.tokens))
