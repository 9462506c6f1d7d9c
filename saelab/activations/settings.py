"""Where a run gets its activations from, and how a cache of them is written."""

from dataclasses import dataclass, field
from typing import Literal

from saelab.errors import SettingError
from saelab.lm.settings import dtype_name


@dataclass(frozen=True)
class StreamSettings:
    """Straight from the language model, nothing on disk (source.py)."""

    buffer_tokens: int = 131_072
    """Tokens that are shuffled together, rounded down to whole batches, at least two; at d_in 256, 138 MB, with
    gradients 273 MB."""
    rows_per_forward: int = 32
    """Rows in one forward pass of the language model."""

    def __post_init__(self) -> None:
        _check_positive(self, "buffer_tokens", "rows_per_forward")


@dataclass(frozen=True)
class CacheSource:
    """From a folder that `saelab cache` wrote (reader.py)."""

    path: str
    """The cache's folder."""
    buffer_tokens: int = 131_072
    """Tokens that are shuffled together, at least 16 batches. Two such buffers are held, in the cache's dtype."""

    def __post_init__(self) -> None:
        if not self.path:
            raise SettingError("path: is empty")
        _check_positive(self, "buffer_tokens")


@dataclass(frozen=True)
class ActivationSettings:
    """From a cache where one is given, else from the model."""

    stream: StreamSettings = field(default_factory=StreamSettings)
    cache: CacheSource | None = None
    special_tokens: bool = False
    """Whether BOS and other special tokens are trained on too. No metric ever counts them."""


@dataclass(frozen=True)
class CacheSettings:
    """How `saelab cache` writes. Every one of these is part of the cache's identity."""

    dtype: str = "bfloat16"
    """Precision on disk: bfloat16, float16 or float32. Gradients are float32 in a float32 cache, else bfloat16: in
    float16 most would be 0."""
    sites: tuple[str, ...] = ()
    """Sites written in the same forward pass; the run's `site` where none is given."""
    gradients: bool | None = None
    """Whether the gradients of the model's loss are written too; they need full passes, forward and backward. Default:
    where the run's affinity needs them."""
    rows_per_forward: int = 32
    """Rows in one forward pass. Results depend on it in their last bits, so a cache has one."""
    shard_tokens: int = 131_072
    """Tokens (special ones counted) in a shard, rounded down to whole passes, at least one. Two shards of every site
    are held in memory; a kill loses these and the one before them, if that is still on its way to the disk."""
    lanes: int = 1
    """Streams that the documents are divided into. Under torchrun each process writes lanes of its own, so there must
    be at least as many lanes as processes. Equal lanes, equal cache, by however many processes of as many threads."""
    nonfinite: Literal["error", "skip"] = "error"
    """What NaN and infinite activations are: an error, or tokens that are left out and counted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if len(set(self.sites)) != len(self.sites):
            raise SettingError(f"sites: {', '.join(self.sites)} names a site twice")
        _check_positive(self, "rows_per_forward", "shard_tokens", "lanes")


def _check_positive(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise SettingError(f"{name}: {getattr(settings, name)} is not a positive number")
