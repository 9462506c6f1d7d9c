"""Linear maps fitted by least squares to sums over tokens, so that no matrix of tokens is kept.

    train, validation = Moments(d, k), Moments(d, k)
    train.add(x, y)  # any number of times
    best = fit(train, best_ridge(train, validation))
    best(x)  # [tokens, k]

Sums are float64. A ridge is a multiple of the mean eigenvalue of the inputs' second moment (with an intercept: of their
covariance), so it has no unit; the intercept is not penalised. With ridge 0, directions in which the inputs have less
than 1e-12 of the largest second moment are left out (1e-6 in x: `torch.linalg.lstsq` on the tokens could keep smaller
ones).
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_SMALLEST = 1e-12


class LinearMap(NamedTuple):
    """``x @ weights + bias``, in float64."""

    weights: Tensor
    """``[d, k]``"""
    bias: Tensor
    """``[k]``; 0 without an intercept."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.to(self.weights.dtype), self.weights)


class Moments:
    """Sums over tokens of inputs x ``[tokens, d]``, targets y ``[tokens, k]`` and their products, float64.

    Memory: ``d (d + k)`` numbers of 8 bytes.
    """

    def __init__(self, d: int, k: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens = 0
        self.x, self.y, self.yy = zeros(d), zeros(k), zeros(k)
        self.xx, self.xy = zeros(d, d), zeros(d, k)

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.double(), y.double()
        self.tokens += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def of_targets(self, which: slice) -> "Moments":
        """The same sums, of some of the targets; shares the memory."""
        part = copy.copy(self)
        part.y, part.yy, part.xy = self.y[which], self.yy[which], self.xy[:, which]
        return part


def fit(moments: Moments, ridge: float = 0.0, *, intercept: bool = False) -> LinearMap:
    """The map with the least ``sum ||y - map(x)||^2 + ridge * scale * ||weights||^2``; `scale` is the mean eigenvalue
    times the number of tokens."""
    return _maps(moments, [ridge], intercept)[0]


def best_ridge(train: Moments, validation: Moments, *, intercept: bool = False) -> float:
    """The one of `RIDGES` whose map, fitted to `train`, has the least summed squared error on `validation`."""
    errors = [squared_error(each, validation).sum().item() for each in _maps(train, RIDGES, intercept)]
    return RIDGES[int(np.argmin(errors))]


def squared_error(linear: LinearMap, moments: Moments) -> Tensor:
    """``sum (y - map(x))^2`` over the tokens of `moments`, ``[k]``."""
    w, b, m = linear.weights, linear.bias, moments
    of_map = (w * (m.xx @ w)).sum(0) + 2 * b * (m.x @ w) + m.tokens * b.square()
    return m.yy - 2 * ((w * m.xy).sum(0) + b * m.y) + of_map


def _maps(m: Moments, ridges: Sequence[float], intercept: bool) -> list[LinearMap]:
    """A map for each ridge, from one decomposition."""
    mean_x, mean_y = m.x / max(1, m.tokens), m.y / max(1, m.tokens)
    xx, xy = m.xx, m.xy
    if intercept:
        xx, xy = xx - torch.outer(m.x, mean_x), xy - torch.outer(m.x, mean_y)
    values, vectors = torch.linalg.eigh(xx)
    values = values.clamp_min(0)
    rotated, scale = vectors.T @ xy, values.mean()
    found = []
    for ridge in ridges:
        divisor = values + ridge * scale
        kept = divisor > _SMALLEST * values[-1]
        weights = vectors @ (rotated * torch.where(kept, 1 / divisor.clamp_min(1e-300), 0.0)[:, None])
        found.append(LinearMap(weights, mean_y - mean_x @ weights if intercept else torch.zeros_like(mean_y)))
    return found


def r2(sums: np.ndarray) -> np.ndarray:
    """``1 - sum (y - map(x))^2 / sum (y - mean y)^2`` of one target, from sums over tokens ``[..., 4]``.

    They are those of the squared error, of y, of y^2 and of the tokens.
    """
    error, y, yy, tokens = (sums[..., i] for i in range(4))
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - error / (yy - y**2 / tokens)


def mean_r2(sums: np.ndarray) -> np.ndarray:
    """The mean over k targets of `r2`, from sums ``[..., 3 k + 1]``: k squared errors, k of y, k of y^2, the tokens."""
    k = (sums.shape[-1] - 1) // 3
    error, y, yy = (sums[..., i * k : (i + 1) * k] for i in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (1 - error / (yy - y**2 / sums[..., -1:])).mean(-1)
