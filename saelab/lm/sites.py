"""TransformerLens' site names, and where they lie in a Hugging Face model.

TransformerLens' TransformerBridge resolves the names (``blocks.2.hook_resid_post``), so they mean the same for every
architecture. The bridge needs a model's shape only, so it gets an outline: the model, its tensors holding no numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saelab.lm.outline import no_numbers, outline


@dataclass(frozen=True)
class Site:
    """Where a hook point lies in the Hugging Face model: a module's input or its output."""

    module: str
    side: Literal["hook_in", "hook_out"]


def resolve_sites(folder: Path) -> dict[str, Site]:
    """Every TransformerLens hook point that is the input or the output of a module of the model in `folder`.

    The bridge rewires the model that it is given. Its components hold that model's modules, and a module's name is the
    same in every model of the folder.
    """
    from transformer_lens.model_bridge import TransformerBridge

    with no_numbers():
        model = outline(folder)
        names = {id(module): name for name, module in model.named_modules()}
        bridge = TransformerBridge.boot_transformers(str(folder), hf_model=model, device="cpu", dtype=torch.float32)
        places: dict[int, Site] = {}
        for component in bridge.modules():
            name = names.get(id(getattr(component, "original_component", None)))
            for side in ("hook_in", "hook_out"):
                point = getattr(component, side, None)
                if name is not None and isinstance(point, nn.Module):
                    places[id(point)] = Site(name, side)
        return {name: places[id(point)] for name, point in bridge.hook_dict.items() if id(point) in places}


def hook(
    model: nn.Module, site: Site, function: Callable[[Tensor], Tensor | None]
) -> torch.utils.hooks.RemovableHandle:
    """Call `function` on the value at `site` in every forward pass; what it returns, if anything, replaces it."""
    module = model.get_submodule(site.module)

    def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    def on_output(_: nn.Module, __: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            new = function(output[0])
            return None if new is None else (new, *output[1:])
        return function(output)

    if site.side == "hook_in":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)
