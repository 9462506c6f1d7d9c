"""A model with the weights of its folder, and the check that these are its weights: all of them, and no others.

transformers fills weights that a checkpoint lacks with random numbers, and ignores those that it does not know. So a
model must find all its weights, in their shapes. Two kinds may be missing: tied weights, and buffers of whole numbers
or booleans (masks, positions), which the model makes. Weights in the checkpoint that the model does not use are an
error if they are in one of its modules, as a layer above `num_hidden_layers` or a bias that the config leaves out.
They are none if they are a module beside it (a vision tower, the head of another task, a layer that predicts further
tokens), or what older versions of transformers saved besides weights (masks, positions, rotary frequencies).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from saelab.errors import SaelabError, brief
from saelab.lm.architecture import Architecture
from saelab.lm.pretrained import weight_files

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_ROTARY = ("inv_freq", "cos_cached", "sin_cached")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class _Stored(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str
    shape: list[int]


def load_model(folder: Path, architecture: Architecture, dtype: torch.dtype, device_map: str | None) -> nn.Module:
    """The model of `folder` with its weights, on the CPU if there is no `device_map`.

    Raises SaelabError, to be completed with the model's name, if weights are missing, damaged, quantised, not those of
    the config, or not finite.
    """
    from transformers import AutoModelForCausalLM

    stored = _stored(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=architecture.config,
            dtype=dtype,
            attn_implementation=architecture.attention,
            key_mapping=architecture.renamed,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, with the names
            output_loading_info=True,
        )
    except RuntimeError as error:  # transformers merges weights, as those of experts, and finds that some are missing
        gaps = _gaps(stored)
        if gaps:
            raise SaelabError(f"its checkpoint seems to lack {_some(gaps)}; {_AGAIN}") from error
        raise
    model, found = loaded
    _check_complete(model, found, stored)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SaelabError(
            f"it does not fit on the GPUs in {str(dtype).removeprefix('torch.')}: a part of it would be loaded again "
            "in every pass, which is too slow to be useful; `model.dtype=bf16` may help"
        )
    _check_finite(model)
    return model


_AGAIN = "check that config.json and weights belong together, and download or save the model again"


def _stored(folder: Path) -> dict[str, _Stored]:
    """All tensors in the weight files of `folder`, by name, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, _Stored] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    stored[name] = _Stored(tensor.get_dtype(), tensor.get_shape())
        except FileNotFoundError as error:
            raise SaelabError(f"{path.name}, a part of its weights, is missing; download it again") from error
        except (SafetensorError, OSError) as error:
            raise SaelabError(f"{path.name} is damaged or cut short ({brief(error)}); download it again") from error
    packed = [name for name, tensor in stored.items() if tensor.dtype not in _FLOATS and len(tensor.shape) in (2, 3)]
    packed = [name for name in packed if stored[name].dtype not in ("I64", "BOOL")]  # positions and masks
    if packed:
        raise SaelabError(
            f"its weights are quantised ({stored[packed[0]].dtype}: {_some(packed)}), and saelab runs models in "
            "float32, bfloat16 or float16; use the model that it was made from"
        )
    return stored


def _check_complete(model: nn.Module, found: Mapping[str, Any], stored: Mapping[str, _Stored]) -> None:
    """Raises SaelabError by the rule at the head of this file. `found`: transformers' loading info."""
    made = {name for name, buffer in model.named_buffers() if not buffer.is_floating_point()}
    missing, unused = set(found["missing_keys"]) - made, set(found["unexpected_keys"])
    if missing:
        instead = f" It has {_some(unused)} instead." if unused else ""
        raise SaelabError(
            f"its checkpoint lacks {_some(missing)}, which transformers would fill with random numbers.{instead} "
            f"So {_AGAIN}"
        )
    if found["mismatched_keys"]:
        names = [f"{name} {list(there)}, not {list(here)}" for name, there, here in found["mismatched_keys"]]
        raise SaelabError(f"its checkpoint has other shapes than its config.json says: {_some(names)}; {_AGAIN}")
    unused -= {name for name, _ in model.named_buffers()}  # those that the model computes
    base = getattr(model, "base_model_prefix", "")
    modules = {_NUMBER.sub("#", f"{name}.") for name, _ in model.named_modules() if name not in ("", base)}
    ours = {name for name in unused if _is_learned(name, stored) and _in_modules(name, base, modules)}
    ours -= _further_layers(ours, model.config)
    if ours:
        raise SaelabError(
            f"its checkpoint has weights that config.json leaves out of the model: {_some(ours)}; {_AGAIN}"
        )


def _further_layers(names: Iterable[str], config: Any) -> set[str]:
    """Those of `names` in the layers that predict further tokens (DeepSeek-V3's), which follow the model's own."""
    layers, further = (getattr(config, name, None) or 0 for name in ("num_hidden_layers", "num_nextn_predict_layers"))
    numbers = ((name, _NUMBER.search(name)) for name in names)
    return {name for name, number in numbers if number and layers <= int(number[0]) < layers + further}


def _is_learned(name: str, stored: Mapping[str, _Stored]) -> bool:
    """False for what older versions of transformers saved besides weights, as ``attn.bias``, a mask."""
    tensor = stored.get(name)
    if tensor is None:  # transformers has renamed it
        return True
    return tensor.dtype in _FLOATS and len(tensor.shape) in (1, 2, 3) and not name.endswith(_ROTARY)


def _in_modules(name: str, base: str, modules: set[str]) -> bool:
    """Whether the weight `name` is within one of `modules`, whose numbers are replaced by ``#``."""
    parts = _NUMBER.sub("#", name if name.startswith(f"{base}.") else f".{name}").strip(".").split(".")
    above = [".".join(parts[:i]) + "." for i in range(1, len(parts))]
    return any(path in modules or f"{base}.{path}" in modules for path in above)


def _gaps(names: Iterable[str]) -> list[str]:
    """Names that the numbers of the others lead one to expect: of layer 1, expert 3 if other layers have one."""
    there: dict[str, set[tuple[str, ...]]] = defaultdict(set)  # numbers by pattern
    for name in names:
        there[_NUMBER.sub("#", name)].add(tuple(_NUMBER.findall(name)))
    beside: dict[str, set[tuple[str, ...]]] = defaultdict(set)  # numbers by what comes before the last one
    for pattern, numbers in there.items():
        beside[pattern.rpartition("#")[0]] |= numbers
    gaps = []
    for pattern, numbers in there.items():
        expected = product(*map(set, zip(*beside[pattern.rpartition("#")[0]], strict=True)))
        gaps += [pattern.replace("#", "{}").format(*values) for values in expected if values not in numbers]
    return gaps


def _check_finite(model: nn.Module) -> None:
    bad = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if bad:
        narrow = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        advice = "with model.dtype=bf16 or fp32 they may fit" if narrow else "download or save the model again"
        raise SaelabError(f"its weights have NaN or infinite values: {_some(bad)}; {advice}")


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    least, most = tensor.detach().aminmax()  # NaN if there is one; unlike isfinite, no second tensor
    return bool(torch.isfinite(least) and torch.isfinite(most))


def _some(names: Iterable[str], n: int = 3) -> str:
    """Up to `n` of the names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
