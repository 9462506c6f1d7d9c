"""Settings of a run's source of activations, and of writing a cache."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from saelab.errors import SettingError, check_positive
from saelab.files import expanded
from saelab.lm.settings import dtype_name

NORMALISED = ("layer_norm", "constant_norm_rescale")
INPUTS = ("scale", "centre", "whiten", *NORMALISED)
MAX_LANES = 4096
"""Most lanes of a cache: each one reads the text from its beginning."""
MAX_ROWS = 10**6
"""Most rows in a pass of the model: far more than memory takes, and few enough to count their bytes."""


@dataclass(frozen=True)
class StreamSettings:
    """Activations straight from the language model, nothing on disk (source.py)."""

    buffer_tokens: int = 131_072
    """Tokens that are shuffled together, rounded down to whole batches, at least two; at d_in 256, 138 MB, with
    gradients 273 MB."""
    rows_per_forward: int = 32
    """Rows in one forward pass of the language model."""

    def __post_init__(self) -> None:
        check_positive(self, "buffer_tokens", "rows_per_forward")
        _check_rows(self.rows_per_forward)


@dataclass(frozen=True)
class CacheSource:
    """Activations from a folder that `saelab cache` wrote (reader.py)."""

    path: str
    """The cache's folder."""
    buffer_tokens: int = 131_072
    """Tokens that are shuffled together, at least 16 batches. Memory has two such buffers, in the cache's dtype."""

    def __post_init__(self) -> None:
        if not self.path:
            raise SettingError("path: is empty")
        object.__setattr__(self, "path", expanded(self.path, "path"))
        check_positive(self, "buffer_tokens")


@dataclass(frozen=True)
class ArraySource:
    """Activations from an array on disk, without a language model (array/). The last rows, as many as
    `corpus.held_out` says, are held out."""

    path: str
    """A ``.npy`` or ``.safetensors`` file with a matrix ``[rows, d_in]``, or a folder of such files, which are read in
    the order of their names."""
    tensor: str | None = None
    """Name of the matrix in ``.safetensors`` files that hold several."""
    labels: str | None = None
    """A file with a line for each row, what stands for the row in the feature database: ``.jsonl`` (a text or number in
    each line), or plain text. Default: the number of the row."""
    buffer_tokens: int = 131_072
    """Rows that are shuffled together, at least 16 batches. Memory has two such buffers."""

    def __post_init__(self) -> None:
        for name in ("path", "labels"):
            value = getattr(self, name)
            if value == "":
                raise SettingError(f"{name}: is empty")
            if value is not None:
                object.__setattr__(self, name, expanded(value, name))
        check_positive(self, "buffer_tokens")


@dataclass(frozen=True)
class ActivationSettings:
    """Activations from an array or a cache if one is given, else from the model."""

    stream: StreamSettings = field(default_factory=StreamSettings)
    cache: CacheSource | None = None
    array: ArraySource | None = None
    special_tokens: bool = False
    """Whether BOS and other special tokens are trained on too. No metric counts them."""
    inputs: str = "scale"
    """What is done to activations before training: scale (so that E||x||^2 = d_in), centre (the mean of the first
    activations is subtracted first), whiten (the covariance becomes the identity), or a normalisation of each token by
    SAELens' name: layer_norm (mean 0, standard deviation 1) or constant_norm_rescale (length sqrt(d_in)). The saved
    weights contain it, and the checkpoint names a normalisation."""
    max_norm: float | None = None
    """Tokens whose norm is above this many times the median norm of the first activations, at one of the sites if there
    are several, are left out of training, of the input scale and of the thresholds, and their batches are smaller: 10
    leaves out attention sinks. Default: none is left out. Evaluation counts all tokens, and gives FVU and delta CE
    without sinks too."""

    def __post_init__(self) -> None:
        if self.array is not None and self.cache is not None:
            raise SettingError("array: there is a cache too; remove one of them")
        if self.inputs not in INPUTS:
            raise SettingError(f"inputs: {self.inputs!r} is not {', '.join(INPUTS[:-1])} or {INPUTS[-1]}")
        if self.max_norm is not None and not 1 < self.max_norm < math.inf:
            raise SettingError(
                f"max_norm: {self.max_norm} is not a number above 1; at 1 or less, half of the tokens would be left out"
            )


@dataclass(frozen=True)
class CacheSettings:
    """How `saelab cache` writes. Every one of these settings is part of the cache's identity."""

    dtype: str = "bfloat16"
    """Precision on disk: bfloat16, float16 or float32. Gradients are float32 in a float32 cache, else bfloat16: in
    float16 most would be 0."""
    sites: tuple[str, ...] = ()
    """Sites written in the same forward pass; the run's `site` if none is given."""
    gradients: bool | None = None
    """Whether the gradients of the model's loss are written too; they need full passes, forward and backward. Default:
    if the run's affinity needs them."""
    rows_per_forward: int = 32
    """Rows in one forward pass. Results depend on it in their last bits, so a cache has one."""
    shard_tokens: int = 131_072
    """Tokens (special ones counted) in a shard, rounded down to whole passes, at least one. Memory has two
    shards of every site; a kill loses them, and the shard before them if it is still being written."""
    lanes: int = 1
    """Streams that the documents are divided into. Under torchrun each process writes its own lanes, so there must be
    at least as many lanes as processes. With as many threads in each, the number of processes changes no byte."""
    nonfinite: Literal["error", "skip"] = "error"
    """Treatment of NaN and infinite activations: an error, or their tokens are left out and counted (skip). On held-out
    text they are an error in any case: a figure over the rest, or a loss after such a token, would say nothing."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        twice = [site for site, times in Counter(self.sites).items() if times > 1]
        if twice:
            raise SettingError(f"sites: {twice[0]} is given twice; name each site once")
        check_positive(self, "rows_per_forward", "shard_tokens", "lanes")
        _check_rows(self.rows_per_forward)
        if self.lanes > MAX_LANES:
            raise SettingError(f"lanes: {self.lanes:,} is more than {MAX_LANES:,}; one for each process is enough")


def _check_rows(rows: int) -> None:
    if rows > MAX_ROWS:
        raise SettingError(f"rows_per_forward: {rows:,} rows do not fit into memory; at most {MAX_ROWS:,}")
