"""Sites of a Hugging Face model that the user loaded, replaced in every pass that anyone makes: `generate`, a training.

A `LanguageModel` knows the rows of its passes. Here a hook on the model's body notes the token ids and the padding of
each pass instead. With a KV cache a pass reads the new tokens only, so only their activations are there to be replaced;
keys and values of earlier tokens were made from their replacements.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import EinopsError
from torch import Tensor, nn

from saelab.errors import SaelabError, brief, did_you_mean
from saelab.lm.installers import no_installers
from saelab.lm.layout import POSITIONS, ROWS, Layout, layout_of, measuring_rows
from saelab.lm.selfcheck import site_meanings
from saelab.lm.sites import Site, bridge_of, general_name, hook, read_values
from saelab.memory import no_numbers

_measuring: ContextVar[bool] = ContextVar("_measuring", default=False)
_known: dict[str, dict[str, Site]] = {}
"""Sites by configuration, because a context may be entered for every prompt."""


@dataclass(frozen=True)
class OpenSite:
    """A site of a model; `open_site` makes it."""

    name: str
    place: Site
    layout: Layout
    d_in: int
    device: torch.device


@torch.no_grad()
def open_site(model: nn.Module, name: str) -> OpenSite:
    """The site `name` of `model`. Runs two passes over 14 tokens up to there, and leaves the model as it is.

    Raises SaelabError if TransformerLens does not know the model, if it has no such site or one that does not hold what
    its name says, or if the site has no vector per token.
    """
    sites = _sites(model)
    what = type(model).__name__
    if name not in sites:
        raise SaelabError(f"{what} has no site {name!r}.{did_you_mean(name, sites)}")
    if problem := _disputed(model).get(general_name(name)):
        raise SaelabError(f"{name} of {what} is not what its name says: {problem}; choose another site")
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
    special = torch.tensor([*named_ids(model)], dtype=ids.dtype, device=ids.device)
    token = _measuring.set(True)  # splices that are open already would change what is measured
    try:
        rows, changed = measuring_rows(ids[~torch.isin(ids, special)])
        before, after = (
            read_values(model, {name: sites[name]}, partial(model, input_ids=each, use_cache=False)).get(name)
            for each in (rows, changed)
        )
    finally:
        _measuring.reset(token)
    if before is None:
        raise SaelabError(f"site: a forward pass of {what} does not run {name}; choose another site")
    layout = layout_of(before, after)
    if isinstance(layout, str):
        raise SaelabError(f"{name} of {what} {layout}; choose another site")
    return OpenSite(name, sites[name], layout, layout.flatten(before, ROWS, POSITIONS).shape[-1], before.device)


def named_ids(model: nn.Module) -> frozenset[int]:
    """The ids of BOS, EOS and PAD that the configurations of `model` name."""
    configs = (getattr(model, "config", None), getattr(model, "generation_config", None))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = [getattr(config, name, None) for config in configs for name in names]
    return frozenset(i for each in found for i in (each if isinstance(each, list | tuple) else [each]) if i is not None)


@contextmanager
def replaced(
    model: nn.Module, site: OpenSite, special: Collection[int], replace: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Within the context, every pass of `model` has other activations at `site`.

    `replace` maps the activations of all ordinary tokens of a pass, ``[tokens, d_in]`` in the model's dtype, to their
    replacements. Padding and the tokens whose ids are in `special` stay clean; if a pass reads embeddings instead of
    ids, only padding does.
    """
    body: Any = getattr(model, "base_model", model)
    names = list(inspect.signature(body.forward).parameters)
    ordinary: list[Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
        ordinary[:] = [_ordinary({**dict(zip(names, args, strict=False)), **kwargs}, special)]

    def splice(value: Tensor) -> Tensor | None:
        if _measuring.get():
            return None
        if not ordinary:
            raise SaelabError(f"splice: a part of {type(model).__name__} was called; call the whole model")
        keep = ordinary[0].to(value.device)
        try:
            flat = site.layout.flatten(value, *keep.shape).clone()
        except EinopsError as error:
            raise SaelabError(
                f"splice: {site.name} has shape {list(value.shape)} in a pass over tokens {list(keep.shape)}, not one "
                "vector per token; choose another site"
            ) from error
        if keep.any():
            flat[keep] = replace(flat[keep]).to(flat)
        return site.layout.restore(flat, value)

    with body.register_forward_pre_hook(note, with_kwargs=True), hook(model, site.place, splice):
        yield


def _ordinary(given: dict[str, Any], special: Collection[int]) -> Tensor:
    """True where a token of the pass with these arguments is neither special nor padding, ``[rows, positions]``."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None:
        embedded = given["inputs_embeds"]
        ordinary = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
    else:
        ordinary = ~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device))
    if isinstance(mask, Tensor) and mask.ndim == 2:  # all tokens so far; a pass with a cache reads the last ones
        ordinary &= mask[:, -ordinary.shape[1] :].to(ordinary.device).bool()
    return ordinary


def _sites(model: nn.Module) -> dict[str, Site]:
    from transformers import PreTrainedModel

    what = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise SaelabError(
            f"splice: {what} is not a transformers model; pass the one that AutoModelForCausalLM gave (of a "
            "LanguageModel, its `model`; of a PEFT model, its `get_base_model()`)"
        )
    if model.training:
        raise SaelabError(f"splice: {what} is in training mode, in which it draws random numbers; call model.eval()")
    key = what + model.config.to_json_string()
    if key not in _known:
        try:
            with no_installers(), no_numbers():
                _known[key] = bridge_of(type(model)(copy.deepcopy(model.config)))[1]
        except Exception as error:  # TransformerLens' own, or of the model's code
            raise SaelabError(f"splice: TransformerLens cannot read {what} ({brief(error)})") from error
    return _known[key]


def _disputed(model: nn.Module) -> Any:
    """Sites that do not hold what their names say; none if no small model can be made to find out."""
    try:
        with no_installers():
            return site_meanings(model).disputed
    except SaelabError:
        return {}
