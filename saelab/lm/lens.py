"""The logit lens: the linear map from the residual stream to the logits, through the final norm with its scale frozen.

What follows the last block is measured, not read from parameters: norms differ in their formulas (Gemma multiplies by 1
+ weight), and some models scale their logits or have no final norm. Chosen vectors replace the last block's output, and
then the unembedding's input, and what comes of them is fitted.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saelab.lm.layout import POSITIONS
from saelab.lm.model import LanguageModel
from saelab.lm.selfcheck import in_residual_stream
from saelab.lm.sites import Site, hook

_ROWS = 8
"""Rows of `POSITIONS` tokens in a measuring pass."""
_TOKEN_IDS = 256
"""Token ids whose logits are compared with the unembedding's products."""
_LARGE, _SMALL = 16.0, 0.25
"""Root mean squares of the compared logits: one that a soft-cap would change, and one far below it."""
_NO_NORM = "without a final norm, as the model has none"
_LAYER_NORM = "with the gain and the mean subtraction of the final norm (LayerNorm)"
_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    _NO_NORM: lambda x: x,
    "with the gain of the final norm (RMSNorm)": lambda x: x / _rms(x),
    _LAYER_NORM: lambda x: _centre(x) / _rms(_centre(x)),
}
"""Final norms, each without its gain and bias, by what the lens includes of it."""


class Lens(NamedTuple):
    """Logits of a direction in the residual stream; `logit_lens` makes it."""

    words: str
    """What the logits include of the final norm, and of what follows the unembedding."""
    unembedding: Tensor
    """``[vocabulary, d_model]``, in the model's dtype"""
    gain: Tensor
    """Gain of the final norm times the factor of the logits, ``[d_model]``, in float32, or float64 if the model is"""
    centred: bool
    """Whether the final norm subtracts the mean."""
    bias: Tensor
    """Bias of the final norm times the factor of the logits, ``[d_model]``"""
    factor: float
    """Logits over the products of the unembedding's input with the unembedding."""
    output: Tensor | None = None
    """The map from the site to the residual stream, ``[width, d_model]``; None if the site is in the stream."""

    @property
    def width(self) -> int:
        """Width of the site."""
        return self.unembedding.shape[1] if self.output is None else len(self.output)

    def at_head(self, directions: Tensor) -> Tensor:
        """What becomes of float32 directions ``[n, width]`` until the unembedding, ``[n, d_model]``.

        Their logits are ``at_head(directions) @ unembedding.T``.
        """
        written = directions if self.output is None else directions @ self.output
        return (_centre(written) if self.centred else written) * self.gain


class Norm(NamedTuple):
    """A norm of the residual stream: x -> gain * centred x / scale + bias; `fitted_norm` measures it."""

    words: str
    gain: Tensor
    """``[d_model]``, in float32, or float64 if the model is"""
    bias: Tensor
    """``[d_model]``"""
    centred: bool
    """Whether it subtracts the mean."""

    def linear(self, x: Tensor) -> Tensor:
        """The part that is linear in x ``[..., d_model]``, not yet divided by the scale."""
        return (_centre(x) if self.centred else x) * self.gain.to(x.dtype)


def logit_lens(lm: LanguageModel, site: str) -> Lens | None:
    """The lens for directions at `site`; None if the site is not in the residual stream, or if no linear map fits.

    A small change d of the residual stream changes the logits by the lens of d over the norm's scale, as long as the
    scale stays the same; if the model caps its logits, that is the change before the cap. Runs two passes of 56 tokens.
    """
    head, last = _head(lm), _last_block(lm)
    if last is None or not in_residual_stream(lm, site):
        return None
    norm, readout = fitted_norm(lm, last, head), _readout(lm, head)
    if norm is None or readout is None:
        return None
    factor, more = readout
    words = ", ".join([norm.words, *more])
    return Lens(words, lm.unembedding, norm.gain * factor, norm.centred, norm.bias * factor, factor)


@torch.no_grad()
def fitted_norm(lm: LanguageModel, before: Site, after: Site) -> Norm | None:
    """The norm between two sites of the residual stream's width, measured; None if no norm of `_NORMS` fits."""
    scales = torch.linspace(1, 4, _ROWS * POSITIONS, device=lm.device)[:, None]
    x = (scales * (_random(lm, lm.unembedding.shape[1]) + _random(lm, 1, seed=1))).to(lm.dtype)
    wide = torch.promote_types(lm.dtype, torch.float32)
    found: list[Tensor] = []
    with hook(lm.model, after, lambda value: found.append(value.to(lm.device).flatten(0, -2).to(wide))):
        _logits(lm, before, x)
    if not found or found[0].shape != x.shape:
        return None
    normed = {words: norm(x.to(wide)) for words, norm in _NORMS.items()}
    fits = {words: _fit(normed[words], found[0]) for words in _NORMS}
    words = min(fits, key=lambda words: fits[words][1])
    gain, error = fits[words]
    if error > _tolerance(lm):
        return None
    return Norm(words, gain, found[0].mean(0) - gain * normed[words].mean(0), words == _LAYER_NORM)


@torch.no_grad()
def norm_scale(lm: LanguageModel, lens: Lens, rows: Tensor) -> Tensor:
    """What the final norm divides the residual stream of each token by, ``[rows, context]`` float32.

    Ones if the model has no final norm. The constant that a norm adds under the root is left out.
    """
    if lens.words.startswith(_NO_NORM):
        return torch.ones(rows.shape, device=lm.device)
    last = last_site(lm)
    assert last is not None, "there would be no lens"
    x = lm.activations(rows, [last])[last].float()
    return _rms(_centre(x) if lens.centred else x).squeeze(-1)


def _readout(lm: LanguageModel, head: Site) -> tuple[float, list[str]] | None:
    """The factor from products with the unembedding to logits, and in words what else the model does to them.

    None if even small logits are not proportional to the products.
    """
    W_U = lm.unembedding
    ids = torch.linspace(0, len(W_U) - 1, _TOKEN_IDS, device=lm.device).long()
    rows = W_U[ids].float()
    y = _random(lm, W_U.shape[1])[: _ROWS * POSITIONS // 4]
    y = y / _rms(y @ rows.T)
    logits = _logits(lm, head, torch.cat([_LARGE * y, -_LARGE * y, _SMALL * y, -_SMALL * y]))[:, ids].float().chunk(4)
    products = (y.to(lm.dtype).float() @ rows.T).flatten()[:, None]
    for scale, (above, below), words in (
        (_LARGE, logits[:2], []),
        (_SMALL, logits[2:], ["before the soft-cap of the logits"]),
    ):
        factor, error = _fit(products, (above - below).flatten()[:, None] / (2 * scale))  # without the head's bias
        if error <= _tolerance(lm):
            same = abs(factor.item() - 1) <= _tolerance(lm)
            return (1.0, words) if same else (factor.item(), [f"with the logits' factor {factor.item():.4g}", *words])
    return None


def _logits(lm: LanguageModel, site: Site, vectors: Tensor) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of a pass with `vectors` ``[tokens, width]`` at `site`."""
    rows = torch.zeros(_ROWS, POSITIONS, dtype=torch.long, device=lm.device)

    def splice(value: Tensor) -> Tensor | None:
        return vectors.view(value.shape).to(value) if value.numel() == vectors.numel() else None

    with hook(lm.model, site, splice):
        return lm.logits(rows).flatten(0, 1)


def _fit(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Least squares of y on x, column by column: the slopes, and the error relative to the deviation of y."""
    x, y = x - x.mean(0), y - y.mean(0)
    slope = (x * y).sum(0) / x.square().sum(0)
    return slope, ((y - slope * x).norm() / y.norm()).item()


def _tolerance(lm: LanguageModel) -> float:
    return 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.02


def _head(lm: LanguageModel) -> Site:
    """The input of the unembedding."""
    head = lm.model.get_output_embeddings()  # type: ignore[operator]
    return Site(next(name for name, module in lm.model.named_modules() if module is head), "hook_in")


def _last_block(lm: LanguageModel) -> Site | None:
    """The output of the last block; None if TransformerLens numbers the blocks in another way."""
    name = last_site(lm)
    return None if name is None else lm.sites[name]


def last_site(lm: LanguageModel) -> str | None:
    """The name of the last block's output; None if TransformerLens numbers the blocks in another way."""
    matches = (re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", name) for name in lm.sites)
    numbers = [int(match[1]) for match in matches if match]
    return f"blocks.{max(numbers)}.hook_resid_post" if numbers else None


def _random(lm: LanguageModel, width: int, seed: int = 0) -> Tensor:
    return torch.randn(_ROWS * POSITIONS, width, generator=torch.Generator().manual_seed(seed)).to(lm.device)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
