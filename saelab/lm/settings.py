"""Settings that choose a language model and its precision."""

from dataclasses import dataclass

from saelab.errors import SettingError
from saelab.files import expanded

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DEVICE_MAPS = ("auto", "balanced", "sequential")
_ATTENTION = ("auto", "sdpa", "eager")
SECOND = "@second"
"""What the name of a site of the second model ends in."""


def is_second(site: str) -> bool:
    """Whether `site` is a site of the second model."""
    return site.endswith(SECOND)


def models_in_words(model: str, second: str | None) -> str:
    """The names of a model and of the second one, if there is one, as one text."""
    return model if second is None else f"{model} ({SECOND}: {second})"


def dtype_name(name: str) -> str:
    """The long form of a dtype's name: ``bf16`` or ``bfloat16`` -> ``bfloat16``. Raises SettingError for others."""
    if name not in _DTYPES and name not in _DTYPES.values():
        raise SettingError(f"dtype: {name!r} is not float32, bfloat16 or float16 (in short fp32, bf16, fp16)")
    return _DTYPES.get(name, name)


@dataclass(frozen=True)
class ModelSettings:
    name: str = "demo"
    """``demo`` (the embedded model), a Hub id such as ``gpt2``, or a local Hugging Face folder."""
    dtype: str = "float32"
    """Precision the model runs in: float32, bfloat16 or float16 (or fp32, bf16, fp16). SAEs always see float32."""
    device_map: str | None = None
    """How accelerate spreads the layers of a model that is larger than one GPU over all GPUs: auto, balanced or
    sequential. The autoencoder is on the first GPU. Needs ``device: auto``; cpu and cuda:N are refused."""
    attention: str = "auto"
    """How attention is computed: sdpa (torch's fused kernels) or eager (plain matrix products, which keep one score for
    each pair of positions). auto is sdpa, or eager for an architecture that transformers or a soft cap on the scores
    leaves without sdpa, as Gemma 2. Both give the same values up to rounding."""

    self_check: bool = True
    """Whether the names and values of sites are checked when a model is loaded and when a site is first read
    (selfcheck.py, layout.py); takes less than a second. Without it a site may hold other values than its name says."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise SettingError("name: is empty; name a model, such as demo, a Hub id or a folder")
        object.__setattr__(self, "name", expanded(self.name, "name"))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.device_map is not None and self.device_map not in _DEVICE_MAPS:
            raise SettingError(f"device_map: {self.device_map!r} is not {', '.join(_DEVICE_MAPS)} or null")
        if self.attention not in _ATTENTION:
            raise SettingError(f"attention: {self.attention!r} is not {', '.join(_ATTENTION)}")
