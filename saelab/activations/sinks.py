"""Tokens and dimensions that hold most of the variance of some activations.

A *sink* is a token whose norm is above `SINK` times the median norm. Attention sinks are the usual case: a model gives
BOS, or the first token of a row without BOS, an activation some hundred times as long as others (Xiao et al. 2023,
arXiv 2309.17453; Sun et al. 2024, arXiv 2402.17762). Squared errors of few sinks outweigh those of all other tokens,
so training and FVU are then about the sinks. The same goes for a few dimensions with a huge variance.

variance        V = sum ||x - mean x||^2 over all tokens, sinks included
sink share      share of the tokens that are sinks
sink variance   (sum of ||x - mean x||^2 over the sinks) / V
top variance    share of the variance of all other tokens, about their own mean, in the 1% of dimensions (`TOP`, at
                least one) where it is largest; without the sinks, because these vary in few dimensions anyway
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SINK = 10.0
"""A sink's norm is above this many times the median norm."""
TOP = 0.01
"""Share of the dimensions that count as the largest."""
MEDIAN_TOKENS = 8192
"""`SinkSums` takes the median norm of this many tokens, the first; it is then known to some 1% of the norms' spread."""
_PART = 1024
"""Tokens of a sample that there is a float64 copy of at a time."""


@dataclass(frozen=True)
class Concentration:
    """The shares defined at the head of this file."""

    median_norm: float
    sink_share: float
    sink_variance: float
    """0 if all activations are equal."""
    top_variance: float
    """0 if all activations are equal."""
    top_dimensions: int
    """Number of dimensions that `top_variance` counts."""


class Moments(NamedTuple):
    """Sums over a set of tokens, float64."""

    tokens: int
    mean: Tensor
    """``[d_in]``"""
    deviation: Tensor
    """Sum of the squared deviations from the mean, by dimension, ``[d_in]``."""
    figures: Tensor
    """Sums of the figures of each token, ``[n_figures]``."""

    def merged(self, other: "Moments") -> "Moments":
        """The sums over the tokens of both."""
        n = self.tokens + other.tokens
        apart, share = other.mean - self.mean, other.tokens / max(1, n)
        deviation = self.deviation + other.deviation + apart.square() * (self.tokens * share)
        return Moments(n, self.mean + apart * share, deviation, self.figures + other.figures)


class SinkSums:
    """Sums over the tokens of a pass (`add`), with those over the sinks apart.

    The median norm is that of the first `median_tokens` tokens, whatever the blocks. Until they are there, the
    activations are kept: ``median_tokens * d_in`` float32 numbers and a block.
    """

    def __init__(self, median_tokens: int = MEDIAN_TOKENS) -> None:
        self.median_norm: float | None = None
        """None until `median_tokens` tokens or all are there."""
        self._median_tokens = median_tokens
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._others: Moments | None = None
        self._sinks: Moments | None = None

    @property
    def sink_norm(self) -> float:
        """Norm above which a token is a sink, once the median norm is known."""
        assert self.median_norm is not None
        return largest_norm(self.median_norm, SINK)

    def add(self, x: Tensor, figures: Tensor | None = None) -> None:
        """Add tokens x ``[tokens, d_in]`` with figures ``[tokens, n_figures]`` that are summed for both sets."""
        figures = x.new_empty(len(x), 0) if figures is None else figures
        part = x, torch.linalg.vector_norm(x, dim=1), figures
        if self.median_norm is not None:
            self._sum(*part)
            return
        self._waiting.append(part)
        if sum(len(x) for x, _, _ in self._waiting) >= self._median_tokens:
            self._sum_waiting()

    def result(self) -> tuple[Moments, Moments]:
        """The sums over the tokens that are not sinks, and over the sinks. Raises ValueError if there is no token."""
        if self.median_norm is None:
            self._sum_waiting()
        assert self._others is not None and self._sinks is not None
        return self._others, self._sinks

    def _sum_waiting(self) -> None:
        if not self._waiting:
            raise ValueError("no token was added")
        norms = torch.cat([norms for _, norms, _ in self._waiting])
        self.median_norm = norms[: self._median_tokens].median().item()
        for part in self._waiting:
            self._sum(*part)
        self._waiting.clear()

    def _sum(self, x: Tensor, norms: Tensor, figures: Tensor) -> None:
        above = norms > self.sink_norm
        others, sinks = _moments(x[~above] if above.any() else x, figures[~above]), _moments(x[above], figures[above])
        self._others = others if self._others is None else self._others.merged(others)
        self._sinks = sinks if self._sinks is None else self._sinks.merged(sinks)


def _moments(x: Tensor, figures: Tensor) -> Moments:
    exact = x.double()
    first = exact[0] if len(x) else exact.new_zeros(x.shape[1])
    apart = exact - first  # so that equal activations deviate by exactly 0
    mean = apart.sum(0) / max(1, len(x))
    return Moments(len(x), first + mean, (apart - mean).square_().sum(0), figures.double().sum(0))


def largest_norm(median_norm: float, times: float) -> float:
    """The bound `times` the median norm; infinite if the median is 0, because most tokens then have no activation."""
    return times * median_norm or math.inf


def within(sites: Sequence[Tensor], largest: Sequence[float]) -> Tensor | None:
    """Which tokens have at every site a norm up to the `largest` there, bool ``[tokens]``; None if all have.

    `sites` are the activations of the same tokens at one or several, each ``[tokens, width]``.
    """
    bounded = [(values, norm) for values, norm in zip(sites, largest, strict=True) if not math.isinf(norm)]
    keep = [torch.linalg.vector_norm(values, dim=1) <= norm for values, norm in bounded]
    return None if all(each.all() for each in keep) else torch.stack(keep).all(0)


def concentration(sums: SinkSums) -> Concentration:
    """The shares of the tokens of `sums`, of which there is at least one."""
    others, sinks = sums.result()
    assert sums.median_norm is not None
    whole = others.merged(sinks)
    total = whole.deviation.sum().item()
    about_mean = sinks.deviation.sum() + sinks.tokens * (sinks.mean - whole.mean).square().sum()
    top = math.ceil(TOP * len(whole.mean))
    rest, largest = others.deviation.sum().item(), others.deviation.topk(top).values.sum()
    return Concentration(
        median_norm=sums.median_norm,
        sink_share=sinks.tokens / whole.tokens,
        sink_variance=about_mean.item() / total if total else 0.0,
        top_variance=largest.item() / rest if rest else 0.0,
        top_dimensions=top,
    )


@torch.no_grad()
def measure(sample: Tensor) -> Concentration:
    """The shares of a sample ``[tokens, d_in]``; the median norm is that of all its tokens."""
    sums = SinkSums(len(sample))
    for part in sample.split(_PART):
        sums.add(part)
    return concentration(sums)
