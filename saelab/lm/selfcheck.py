"""Finds out what the sites of an architecture hold, on a small model with random weights.

Names of sites mean what TransformerLens means by them, but a module may give something else than its name says. So our
values, read from the Hugging Face modules, are compared with those of the bridge's own hooks, and the outputs of
attention and MLPs with the residual stream.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from saelab.errors import SaelabError, brief
from saelab.lm.architecture import adds_biases_twice
from saelab.lm.layout import POSITIONS, ROWS, Layout, layout_of, with_changed_tokens
from saelab.lm.model import LanguageModel
from saelab.lm.sites import bridge_of, general_name, read_values
from saelab.lm.small_model import ATTEMPTS, random_model, smaller

_TOLERANCE = 1e-3
"""Largest relative difference of values that count as equal; all are float32."""
_BLOCK = re.compile(r"((?:.+\.)?blocks\.\d+)\.(.+)")
_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_ADDED = ("hook_attn_out", "attn.hook_out", "hook_mlp_out", "mlp.hook_out")


@dataclass(frozen=True)
class SiteMeanings:
    """What the sites of an architecture hold, by their `general_name`."""

    disputed: Mapping[str, str]
    """Sites that hold something else than their names say, and what is wrong, as the end of a sentence."""
    residual: frozenset[str]
    """Sites that hold the residual stream, or what is added to it, up to one factor for all tokens."""


_known: dict[str, SiteMeanings] = {}
"""Results by configuration, because a process may load a model several times."""


def site_meanings(model: nn.Module) -> SiteMeanings:
    """What the sites of `model` hold, from a small model of its architecture.

    Sites at which the bridge records nothing, or no vector per token, are not compared with it, and no site is if the
    bridge cannot run the architecture. Raises SaelabError if no small model of this architecture can be made.
    """
    config: Any = model.config
    key = type(model).__name__ + config.to_json_string()
    if key not in _known:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # making models draws random numbers
            _known[key] = _measured(model)
    return _known[key]


def in_residual_stream(lm: LanguageModel, site: str) -> bool:
    """Whether `site` holds the residual stream or what is added to it, so that a logit lens means something there.

    False too if no small model of this architecture can be made. In Gemma 2 and 3, for example, the outputs of the
    attention and MLP modules are normalised before they are added: their sites are not in the stream, but those of the
    norms after them are.
    """
    try:
        return general_name(site) in site_meanings(lm.model).residual
    except SaelabError:
        return False


def _measured(model: nn.Module) -> SiteMeanings:
    """`site_meanings` from the first small model that can be made, and that the bridge can run too if there is one."""
    problems, without_bridge = [], None
    for sizes, layers in ATTEMPTS:
        try:
            config = smaller(model.config, sizes, layers)
            if adds_biases_twice(config):
                config._attn_implementation = "eager"  # the bridge's attention adds them twice, too
            small, rewired = random_model(config), random_model(config)
            rewired.load_state_dict(small.state_dict())
            rewired.set_attn_implementation("eager")  # type: ignore[operator]
            bridge, sites = bridge_of(rewired)
            ours = _vectors(lambda ids, lm=small, at=sites: read_values(lm, at, partial(lm, ids, use_cache=False)))
            without_bridge = without_bridge or ours
            return _meanings(ours, _vectors(lambda ids, bridge=bridge: dict(bridge.run_with_cache(ids)[1])))
        except Exception as error:  # of the model's or the bridge's code, which may check sizes against each other
            problems.append(brief(error))
    if without_bridge:
        return _meanings(without_bridge, {})
    raise SaelabError(
        f"model: the meaning of the names of its sites cannot be checked, because no small {type(model).__name__} can "
        f"be made from its configuration ({problems[0]}); `model.self_check=false` skips the check"
    )


def _vectors(values: Callable[[Tensor], dict[str, Any]]) -> dict[str, Tensor]:
    """The values for some rows that have a layout, one vector per token: ``[ROWS, POSITIONS, d_in]`` by site."""
    rows = torch.arange(1, 1 + ROWS * POSITIONS).view(ROWS, POSITIONS)
    before, after = values(rows), values(with_changed_tokens(rows, rows[0] + 1))
    found = {name: layout_of(before[name], after[name]) for name in before.keys() & after.keys()}
    vectors = {
        name: layout.flatten(before[name], ROWS, POSITIONS)
        for name, layout in found.items()
        if isinstance(layout, Layout)
    }
    if not all(value.isfinite().all() for value in vectors.values()):
        raise ValueError("it gives NaN or infinite values")
    return vectors


def _meanings(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> SiteMeanings:
    disputed, residual, other = {}, set(), set()
    for site, value in ours.items():
        stream, added = _at_block(ours, site)
        fits = any(_proportional(value, part) for part in (*stream, *added))
        (residual if fits else other).add(general_name(site))
        if site in theirs and not _equal(value, theirs[site]):
            disputed[general_name(site)] = "its module gives other values than TransformerLens records by this name"
        elif site.endswith(_ADDED) and any(_equal(value, part) for part in stream):
            disputed[general_name(site)] = "its module adds to the residual stream and gives the sum"
    return SiteMeanings(disputed, frozenset(residual - other))


def _at_block(values: dict[str, Tensor], site: str) -> tuple[list[Tensor], list[Tensor]]:
    """The residual stream at the block of `site`, and what is added to it there; both empty if it is in no block."""
    match = _BLOCK.fullmatch(site)
    if match is None:
        return [], []
    at = {name: values[f"{match[1]}.{name}"] for name in (*_STREAM, *_ADDED) if f"{match[1]}.{name}" in values}
    shape = next((at[name].shape for name in _STREAM if name in at), None)
    at = {name: value for name, value in at.items() if value.shape == shape}
    stream = [at[name] for name in _STREAM if name in at]
    added = [later - earlier for earlier, later in combinations(stream, 2)]
    if len(stream) == 2:  # attention and MLP side by side: what one adds is the rest of what the other adds
        added += [total - at[name] for total in added for name in _ADDED if name in at]
    return stream, added


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * b.norm())


def _proportional(value: Tensor, part: Tensor) -> bool:
    """Whether `part` is `value` times one number; some models scale what they add."""
    if value.shape != part.shape or not value.any():
        return False
    return _equal(value * ((value * part).sum() / value.square().sum()), part)
