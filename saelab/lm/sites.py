"""TransformerLens' site names, and their modules in a Hugging Face model.

TransformerLens' TransformerBridge resolves the names (``blocks.2.hook_resid_post``), so they mean the same in every
architecture. The bridge needs only a model's shapes, so it gets an outline whose tensors have no numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saelab.lm.outline import outline
from saelab.memory import no_numbers


@dataclass(frozen=True)
class Site:
    """A hook point in the Hugging Face model: the input or the output of a module."""

    module: str
    side: Literal["hook_in", "hook_out"]


def resolve_sites(folder: Path) -> dict[str, Site]:
    """All TransformerLens hook points that are the input or the output of a module of the model in `folder`, by name.

    The bridge rewires the outline that it gets. Its components refer to the outline's modules, whose names are the same
    in every model made from the folder.
    """
    from transformer_lens.model_bridge import TransformerBridge

    with no_numbers():
        model = outline(folder)
        names = {id(module): name for name, module in model.named_modules()}
        bridge = TransformerBridge.boot_transformers(str(folder), hf_model=model, device="cpu", dtype=torch.float32)
        sites: dict[int, Site] = {}
        for component in bridge.modules():
            name = names.get(id(getattr(component, "original_component", None)))
            for side in ("hook_in", "hook_out"):
                point = getattr(component, side, None)
                if name is not None and isinstance(point, nn.Module):
                    sites[id(point)] = Site(name, side)
        return {name: sites[id(point)] for name, point in bridge.hook_dict.items() if id(point) in sites}


def hook(
    model: nn.Module, site: Site, function: Callable[[Tensor], Tensor | None]
) -> torch.utils.hooks.RemovableHandle:
    """Call `function` on the value at `site` in every forward pass; its result, unless None, replaces the value."""
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
