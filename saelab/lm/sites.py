"""TransformerLens' site names, and their modules in a Hugging Face model.

TransformerLens' TransformerBridge resolves the names (``blocks.2.hook_resid_post``), so they mean the same in every
architecture. The bridge needs only a model's shapes, so it gets an outline whose tensors have no numbers.
"""

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
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
    """All sites of the model in `folder`, by name: TransformerLens' hook points at the input or output of a module."""
    with no_numbers():
        return bridge_of(outline(folder))[1]


def bridge_of(model: nn.Module) -> tuple[Any, dict[str, Site]]:
    """TransformerLens' bridge around `model`, which it rewires, and the model's sites by name.

    The bridge's components refer to modules, whose names are the same in every model of the configuration.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # TransformerLens goes by it
    names = {id(module): name for name, module in model.named_modules()}
    # Without a tokenizer or a processor: reading those takes time, and to get one TransformerLens may run pip.
    bridge = build_bridge_from_module(
        model, determine_architecture_from_hf_config(config), hf_config=config, device="cpu"
    )
    sites: dict[int, Site] = {}
    for component in bridge.modules():
        if getattr(component, "name", "") is None:
            continue  # it has no module, as OPT's MLP, and refers to the block that it is a part of
        name = names.get(id(getattr(component, "original_component", None)))
        for side in ("hook_in", "hook_out"):
            point = getattr(component, side, None)
            if name is not None and isinstance(point, nn.Module):
                sites[id(point)] = Site(name, side)
    return bridge, {name: sites[id(point)] for name, point in bridge.hook_dict.items() if id(point) in sites}


def general_name(site: str) -> str:
    """The name of `site` without the numbers of blocks: ``blocks.2.hook_out`` -> ``blocks.N.hook_out``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", site)


def hook(
    model: nn.Module, site: Site, function: Callable[[Tensor], Tensor | None]
) -> torch.utils.hooks.RemovableHandle:
    """Call `function` on the value at `site` in every forward pass; its result, unless None, replaces the value.

    The value is a module's first argument, or its output; of several outputs, the first.
    """
    module = model.get_submodule(site.module)

    def on_input(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        first = next(iter(inspect.signature(module.forward).parameters))
        first = first if first in kwargs else next(iter(kwargs))
        new = function(kwargs[first])
        return None if new is None else (args, {**kwargs, first: new})

    def on_output(_: nn.Module, __: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return function(output)
        if isinstance(output, Mapping):  # transformers' ModelOutput
            first = next(iter(output))
            new = function(output[first])
            return None if new is None else type(output)(**{**output, first: new})
        new = function(output[0])
        return None if new is None else type(output)([new, *output[1:]])

    if site.side == "hook_in":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output)


class _Stop(Exception):
    """Ends a forward pass after the last requested site."""


def read_values(model: nn.Module, sites: Mapping[str, Site], forward: Callable[[], Any]) -> dict[str, Any]:
    """Values at `sites`, as the modules give them, from one `forward()`, which ends after the last.

    Sites that the pass does not run are left out.
    """
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[[Any], None]:
        def read(value: Any) -> None:
            more = len(found.keys() | {name}) < len(sites)
            # A copy, because the model may add to `value` in place on its way to the next site.
            found[name] = value.clone() if more and isinstance(value, Tensor) else value
            if not more:
                raise _Stop

        return read

    with ExitStack() as hooks:
        for name, site in sites.items():
            hooks.enter_context(hook(model, site, keep(name)))
        with suppress(_Stop):
            forward()
    return found
