"""Encoders: from x to the scores that allocation sees, and to the values of the entries that it picks.

    z = (x - b_dec) W_enc^T + b_enc         scores, for both

    linear       value = relu(z)
    jumprelu     value = z if z > theta, else 0; theta of each feature is trained by straight-through estimators
                 (Rajamanoharan et al. 2024, arXiv 2407.14435, section 3), with a rectangle of width `bandwidth` and
                 height 1 as the kernel K((z - theta) / bandwidth)
    gated        value = relu(exp(r) (z - b_enc) + b_mag) if z > 0, else 0, with r and b_mag of each feature: z decides
                 what is active, and the magnitude has a scale and a bias of its own (Rajamanoharan et al. 2024,
                 arXiv 2404.16014)

tied and aligned are linear; their rows of W_enc are bound to those of W_dec (model.py).

`scores` is dense, one tile at a time, without gradients. `pre` and `values` are sparse, in float32 (or the parameters'
wider dtype), and carry the gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.profiler import record_function

from saelab.codes import Codes
from saelab.kernels import per_entry, sddmm

_TILE_ELEMENTS = {"cpu": {torch.bfloat16: 2**22, torch.float32: 3 * 2**22}}
"""Pre-activations per tile on a CPU: 8 MB in bfloat16, which stay in its cache; 50 MB in float32, where every product
repacks the whole encoder, so fewer, larger tiles are a few percent faster."""
_TILE_ELSEWHERE = 2**30
"""Pre-activations per tile on a GPU."""


class Scratch:
    """Buffers reused across steps; fresh allocations would cost a page fault per 4 KB."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size or buffer.device != device:
            self._buffers[name, dtype] = buffer = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def bf16(self, name: str, rows: Tensor) -> Tensor:
        """A copy of `rows` in bfloat16."""
        return self.get(name, tuple(rows.shape), torch.bfloat16, rows.device).copy_(rows)

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def __deepcopy__(self, memo: dict) -> "Scratch":
        return Scratch()


class Tile(NamedTuple):
    """A part of the dense ``[tokens, n_features]`` matrix."""

    tokens: slice
    features: slice


class Encoder(Protocol):
    """How a `SparseAutoencoder` encodes. It refers to the parameters themselves, so gradients reach them."""

    def scores(self, centred: Tensor, tile: Tile, scratch: Scratch) -> Tensor:
        """z of one tile in the dtype of centred ``[tokens, d_in]``, in a buffer that the next tile overwrites."""
        ...

    def pre(self, pattern: Codes, x: Tensor, centre: Tensor | None, known: Tensor | None = None) -> Tensor:
        """z at the entries of `pattern`, ``[nnz]``, with gradients; centre ``[d_in]`` is subtracted from x.

        x is ``[tokens, d_in]``. `known`: the result, if the caller has it; then only its gradients are computed.
        """
        ...

    def values(self, pre: Tensor, pattern: Codes) -> Tensor:
        """Values of the entries of `pattern` whose pre-activations are `pre`, both ``[nnz]``; 0 if not active."""
        ...

    def active(self, pre: Tensor, pattern: Codes) -> Tensor:
        """1 for the active entries, else 0, ``[nnz]``; if thresholds are trained, with their gradient."""
        ...

    def penalised(self, pre: Tensor, values: Tensor) -> Tensor:
        """What a sparsity loss keeps small, ``[nnz]``: the values, or what decides whether entries are active."""
        ...

    def cut(self) -> Tensor:
        """Bound that a score must exceed for a threshold rule to pick it in training, ``[1]`` or ``[n_features]``."""
        ...


@dataclass(frozen=True)
class Linear:
    """The encoder of TopK and ReLU autoencoders."""

    W_enc: Tensor
    b_enc: Tensor
    read: Tensor | None = None
    """A copy of W_enc in bfloat16 that is read instead of it; its gradients reach W_enc."""

    def scores(self, centred: Tensor, tile: Tile, scratch: Scratch) -> Tensor:
        return _dense_pre(self.W_enc, self.b_enc, self.read, centred, tile, scratch)

    def pre(self, pattern: Codes, x: Tensor, centre: Tensor | None, known: Tensor | None = None) -> Tensor:
        return sddmm(pattern, x, self.W_enc, self.b_enc, centre=centre, known=known, read=self.read)

    def values(self, pre: Tensor, pattern: Codes) -> Tensor:
        return pre.relu() * (pattern.values > 0).to(pre.dtype)  # a slot that was not filled stays 0

    def active(self, pre: Tensor, pattern: Codes) -> Tensor:
        return (self.values(pre.detach(), pattern) > 0).to(pre.dtype)

    def penalised(self, pre: Tensor, values: Tensor) -> Tensor:
        return values

    def cut(self) -> Tensor:
        return self.b_enc.new_zeros(1)


@dataclass(frozen=True)
class Gated(Linear):
    """The encoder of gated autoencoders in training. z is that of the gate, whose bias is b_enc."""

    r_mag: Tensor = field(kw_only=True)
    """Logarithm of the scale of each feature's magnitude, ``[n_features]``, a parameter."""
    b_mag: Tensor = field(kw_only=True)
    """Bias of each feature's magnitude, ``[n_features]``, a parameter."""

    def values(self, pre: Tensor, pattern: Codes) -> Tensor:
        scale, b_mag = per_entry(pattern, self.r_mag.exp()), per_entry(pattern, self.b_mag)
        magnitude = scale * (pre - per_entry(pattern, self.b_enc)) + b_mag
        return magnitude.relu() * ((pattern.values > 0) & (pre > 0)).to(pre.dtype)

    def penalised(self, pre: Tensor, values: Tensor) -> Tensor:
        return pre.relu()


@dataclass(frozen=True)
class JumpReLU:
    """The encoder of JumpReLU autoencoders in training; `log_threshold` ``[n_features]`` is a parameter."""

    W_enc: Tensor
    b_enc: Tensor
    read: Tensor | None
    """As in `Linear`."""
    log_threshold: Tensor
    bandwidth: float
    """Width of the window around theta whose entries move it, in units of z."""

    def scores(self, centred: Tensor, tile: Tile, scratch: Scratch) -> Tensor:
        return _dense_pre(self.W_enc, self.b_enc, self.read, centred, tile, scratch)

    def pre(self, pattern: Codes, x: Tensor, centre: Tensor | None, known: Tensor | None = None) -> Tensor:
        return sddmm(pattern, x, self.W_enc, self.b_enc, centre=centre, known=known, read=self.read)

    def values(self, pre: Tensor, pattern: Codes) -> Tensor:
        return _JumpReLU.apply(pre, per_entry(pattern, self.log_threshold.exp()), self.bandwidth)

    def active(self, pre: Tensor, pattern: Codes) -> Tensor:
        return _Step.apply(pre, per_entry(pattern, self.log_threshold.exp()), self.bandwidth)

    def penalised(self, pre: Tensor, values: Tensor) -> Tensor:
        return values

    def cut(self) -> Tensor:
        """theta minus half the bandwidth: entries of the window that lie below theta are not active, but move it."""
        return self.log_threshold.detach().exp() - self.bandwidth / 2


def tiles(tokens: int, n_features: int, device: torch.device, bf16: bool, whole_columns: bool) -> Iterator[Tile]:
    """Tiles that cover the dense matrix; each holds all tokens if `whole_columns`.

    In float32 they are runs of tokens. In bfloat16 they are runs of features, since the encoder is cast tile by tile.
    """
    of_device = _TILE_ELEMENTS.get(device.type, {})
    elements = of_device.get(torch.bfloat16 if bf16 else torch.float32, _TILE_ELSEWHERE)
    if bf16:
        whole = whole_columns and device.type != "cpu"  # ColumnBounds takes all features at once there
        for features in _runs(n_features, n_features if whole else elements // max(1, tokens)):
            yield Tile(slice(0, tokens), features)
    else:
        for rows in _runs(tokens, tokens if whole_columns else elements // n_features):
            yield Tile(rows, slice(0, n_features))


def _runs(n: int, length: int) -> Iterator[slice]:
    """Slices that cover range(n), of almost equal lengths, multiples of 64 near `length`; one slice if n is 0."""
    pieces = max(1, -(-n // max(1, length)))
    step = max(64, -(-n // pieces // 64) * 64)
    for start in range(0, max(1, n), step):
        yield slice(start, min(start + step, n))


def _dense_pre(
    W_enc: Tensor, b_enc: Tensor, read: Tensor | None, centred: Tensor, tile: Tile, scratch: Scratch
) -> Tensor:
    with record_function("encoder matmul"), torch.no_grad():
        x, b = centred[tile.tokens], b_enc[tile.features].to(centred.dtype)
        W = (W_enc if read is None else read)[tile.features]
        if W.dtype != x.dtype:
            W = scratch.get("W_enc", tuple(W.shape), x.dtype, W.device).copy_(W)
        return torch.addmm(b, x, W.T, out=scratch.get("pre", (len(x), len(W)), x.dtype, x.device))


class _JumpReLU(torch.autograd.Function):
    """``pre * (pre > threshold)``.

    Straight-through gradient: 1 to pre if it exceeds the threshold, -(threshold / bandwidth) K to the threshold.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        window = _window(pre, threshold, ctx.bandwidth)
        return grad * (pre > threshold), -grad * threshold / ctx.bandwidth * window, None


class _Step(torch.autograd.Function):
    """``(pre > threshold)`` as 0 or 1. Straight-through gradient: none to pre, -(1 / bandwidth) K to the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        return None, -grad / ctx.bandwidth * _window(pre, threshold, ctx.bandwidth), None


def _window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel K((pre - threshold) / bandwidth), bool."""
    return (pre - threshold).abs() < bandwidth / 2
