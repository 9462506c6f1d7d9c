"""Attention of a layer, taken apart: patterns and values of its heads, and the linear maps around them.

    z[t, h] = sum over s of pattern[h, t, s] * v[s, h]          site `hook_z`, heads side by side
    v[s]    = norm(x[s]) W_V + b_V                              x: site `hook_resid_pre`
    out[t]  = z[t] W_O + b_O                                    site `hook_attn_out`

In grouped-query attention, several heads share one v.

transformers calls one function with the queries, keys and values of a layer. `recorded_heads` puts a function there
that calls the model's own eager attention and keeps the pattern and the values, so no architecture's layout of weights
matters. For the same reason W_V and W_O are measured: unit vectors replace the attention's input. Whatever these
formulas do not describe (a gate on z, values that are normalised) is noticed, and an error.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saelab.errors import SaelabError
from saelab.lm.lens import Lens, Norm, fitted_norm, logit_lens
from saelab.lm.model import LanguageModel
from saelab.lm.sites import hook

_NAME = "saelab_recorded"
_Z = re.compile(r"blocks\.(\d+)\.attn\.hook_z")


class Heads(NamedTuple):
    """Patterns and values of one layer's heads on some rows."""

    pattern: Tensor
    """Weight of each source position at each destination, ``[rows, heads, context, context]``; 0 for later sources."""
    values: Tensor
    """v at each source, ``[rows, value heads, context, d_head]``. Value head ``h // (heads // value heads)`` is h's."""

    @property
    def n_heads(self) -> int:
        return self.pattern.shape[1]

    @property
    def d_head(self) -> int:
        return self.values.shape[-1]

    @property
    def value_head(self) -> Tensor:
        """The value head of each head, ``[heads]`` int64."""
        heads = torch.arange(self.n_heads, device=self.values.device)
        return heads // (self.n_heads // self.values.shape[1])

    def z(self) -> Tensor:
        """The weighted sum of the values, heads side by side, ``[rows, context, heads * d_head]``."""
        return (self.pattern @ self.values[:, self.value_head]).transpose(1, 2).flatten(2)

    def double(self) -> "Heads":
        return Heads(self.pattern.double(), self.values.double())


class Affine(NamedTuple):
    """The map x -> x @ weight + bias, in float64."""

    weight: Tensor
    """``[d_in, d_out]``"""
    bias: Tensor
    """``[d_out]``"""


class LayerMaps(NamedTuple):
    """The maps around a layer's heads; `layer_maps` measures them."""

    norm: Norm
    """Between the residual stream and the attention's input."""
    values: Affine
    """From the attention's input to values, ``[d_model, value heads * d_head]``."""
    output: Affine
    """From z to what the attention gives, ``[heads * d_head, d_model]``."""


def layer_of(site: str | None) -> int:
    """The layer of a site ``blocks.N.attn.hook_z``. Raises SaelabError for any other site."""
    match = _Z.fullmatch(site or "")
    if match is None:
        raise SaelabError(
            f"site: {site or 'none'} is not the output of attention heads; this analysis needs an autoencoder of "
            "blocks.N.attn.hook_z"
        )
    return int(match[1])


def site_of(layer: int) -> str:
    """The site at which autoencoders of the heads' outputs are trained."""
    return f"blocks.{layer}.attn.hook_z"


@torch.no_grad()
def read_heads(
    lm: LanguageModel, rows: Tensor, layers: Iterable[int], sites: Iterable[str] = ()
) -> tuple[dict[int, Heads], dict[str, Tensor]]:
    """The heads of `layers` on `rows` ``[rows, context]``, and the activations at `sites`, from one pass.

    Everything is in the model's dtype. Memory: rows x heads x context^2 numbers per layer. Raises SaelabError if the
    model's attention is not a weighted sum of values, or cannot be recorded.
    """
    layers = list(dict.fromkeys(layers))
    outputs = [site_of(layer) for layer in layers]
    names = list(dict.fromkeys([*outputs, *sites]))
    lm.measure(names)
    heads: dict[int, Heads] = {}
    with recorded_heads(lm, layers, heads.__setitem__):
        values = lm.activations(rows, names)
    for layer, site in zip(layers, outputs, strict=True):
        _check_sum(lm, site, heads.get(layer), values[site])
    return heads, values


@contextmanager
def recorded_heads(lm: LanguageModel, layers: Iterable[int], take: Callable[[int, Heads], None]) -> Iterator[None]:
    """Within the context every pass calls `take` with each of `layers` that it runs, and its heads.

    Attention is then the model's own eager one. Only one layer's pattern is in memory, unless `take` keeps them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    layer_of_module = {id(_attention(lm, layer)): layer for layer in layers}

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise _unrecordable(lm)
        output, pattern = eager(module, *args, **kwargs)
        if id(module) in layer_of_module:
            take(layer_of_module[id(module)], Heads(pattern, args[2]))
        return output, pattern

    model: Any = lm.model
    before = lm.attention
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
    try:
        try:
            model.set_attn_implementation(_NAME)
        except (ValueError, KeyError) as error:
            raise _unrecordable(lm) from error
        if lm.attention != _NAME:
            raise _unrecordable(lm)
        yield
    finally:
        if lm.attention == _NAME:
            model.set_attn_implementation(before)


def layer_maps(lm: LanguageModel, layer: int) -> LayerMaps:
    """The linear maps around the heads of a layer, measured with d_model tokens in some passes up to there.

    Raises SaelabError if the norm before the layer's attention is neither RMSNorm, LayerNorm nor nothing.
    """
    return LayerMaps(input_norm(lm, layer), value_map(lm, layer), output_map(lm, layer))


@torch.no_grad()
def value_map(lm: LanguageModel, layer: int) -> Affine:
    """From the attention's input (after the norm) to the values of the layer, ``[d_model, value heads * d_head]``.

    Measured on d_model + 1 tokens.
    """
    site = f"blocks.{layer}.attn.hook_in"
    vectors = torch.eye(lm.width(site), dtype=lm.dtype, device=lm.device)
    vectors = torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])
    context = min(64, lm.max_context or 64)
    rows = torch.zeros(-(-len(vectors) // context), context, dtype=torch.long, device=lm.device)
    padded = vectors.new_zeros(rows.numel(), vectors.shape[1])
    padded[: len(vectors)] = vectors
    lm.measure([site_of(layer)])
    heads: dict[int, Heads] = {}
    with (
        recorded_heads(lm, [layer], heads.__setitem__),
        hook(lm.model, lm.site(site), lambda value: padded.view(value.shape).to(value)),
    ):
        lm.activations(rows, [site_of(layer)])
    values = heads[layer].values.transpose(1, 2).flatten(2).flatten(0, 1)[: len(vectors)].double()
    return Affine(values[1:] - values[0], values[0])


@torch.no_grad()
def output_map(lm: LanguageModel, layer: int) -> Affine:
    """From z, heads side by side, to what the attention gives: W_O ``[heads * d_head, d_model]`` and b_O."""
    site = lm.site(site_of(layer))
    module = lm.model.get_submodule(site.module)
    width = lm.width(site_of(layer))
    vectors = torch.eye(width, dtype=lm.dtype, device=lm.device)
    out = module(torch.cat([vectors.new_zeros(1, width), vectors])).double().to(lm.device)
    return Affine(out[1:] - out[0], out[0])


def check_output(lm: LanguageModel, layer: int, output: Affine, z: Tensor, out: Tensor) -> None:
    """Raises SaelabError if what a layer's attention adds to the residual stream is not the map of its heads' outputs.

    z ``[..., heads * d_head]`` and out ``[..., d_model]`` are the activations at hook_z and hook_attn_out.
    """
    expected = z.double() @ output.weight + output.bias
    if (expected - out).norm() > (1e-4 if lm.dtype in (torch.float32, torch.float64) else 0.05) * out.norm():
        raise SaelabError(
            f"model: what the attention of layer {layer} of {lm.name} adds to the residual stream is not linear in its "
            "heads' outputs, so features there cannot be attributed further"
        )


def direct_lens(lm: LanguageModel, site: str) -> Lens | None:
    """`logit_lens`; at the outputs of a layer's heads, hook_z, that of what they add to the residual stream by W_O.

    So the logits of a direction at hook_z are those of the direct path: later layers' use of it is left out, as
    elsewhere. None, too, if the attention's output is not a linear map of z, as with a norm after it.
    """
    match = _Z.fullmatch(site)
    if match is None:
        return logit_lens(lm, site)
    layer = int(match[1])
    out = f"blocks.{layer}.hook_attn_out"
    lens = logit_lens(lm, out) if out in lm.sites else None
    if lens is None:
        return None
    output = output_map(lm, layer)
    found = lm.activations(torch.arange(8, device=lm.device)[None], [site, out])
    try:
        check_output(lm, layer, output, found[site], found[out])
    except SaelabError:
        return None
    return lens._replace(output=output.weight.to(lens.gain.dtype), words=f"{lens.words}, after the layer's W_O")


def input_norm(lm: LanguageModel, layer: int) -> Norm:
    """The norm between the residual stream and the layer's attention. Raises SaelabError if none of ours fits."""
    before, after = (lm.site(f"blocks.{layer}.{name}") for name in ("hook_resid_pre", "attn.hook_in"))
    norm = fitted_norm(lm, before, after)
    if norm is None:
        raise SaelabError(
            f"model: what {lm.name} does between the residual stream and the attention of layer {layer} is neither "
            "RMSNorm, LayerNorm nor nothing, so values cannot be attributed to parts of the residual stream"
        )
    return norm


def _attention(lm: LanguageModel, layer: int) -> nn.Module:
    return lm.model.get_submodule(lm.site(f"blocks.{layer}.attn.hook_in").module)


def _check_sum(lm: LanguageModel, site: str, heads: Heads | None, z: Tensor) -> None:
    if heads is None:
        raise _unrecordable(lm)
    tolerance = 1e-4 if lm.dtype in (torch.float32, torch.float64) else 0.02
    fits = heads.pattern.ndim == 4 and heads.n_heads * heads.d_head == z.shape[-1]
    if not fits or (heads.z() - z).norm() > tolerance * z.norm():
        raise SaelabError(
            f"model: {site} of {lm.name} is not the sum of its values weighted by the attention pattern, so features "
            "there cannot be attributed to heads and source positions"
        )


def _unrecordable(lm: LanguageModel) -> SaelabError:
    return SaelabError(
        f"model: transformers' {type(lm.model).__name__} does not give its attention pattern and values to other code, "
        "so features cannot be attributed to heads and source positions"
    )
