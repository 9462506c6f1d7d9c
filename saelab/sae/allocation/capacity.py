"""Capacities for feature choice, the tokens of a batch that each feature may have: they follow a Zipf-Mandelbrot curve.

    m_r  in proportion to  (r + shift) ** -exponent,  r = 1 for the densest feature;  m_r <= tokens;  sum m_r = budget

Feature choice (Ayonrinde 2024, arXiv 2411.02124) gives features Zipf-shaped capacities. How the paper fits, caps and
rounds them is not known to us: these steps are our reconstruction. Capacities are by rank; `ranks` gives the rank of
each feature. Divided by the tokens of the batch, the curve is the density that aux_zipf expects at a rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_UNIT = 2**40
"""`draw_capacities` counts in fractions of a match of this size, in integers: sums are exact in any order, so a GPU
gives the same in every run. 2^22 features still fit an int64."""
_STEP = round(_UNIT * (math.sqrt(5) - 1) / 2)
"""The golden section of a unit: its multiples cover the unit more evenly than the multiples of any other number."""

_LOWEST_DENSITY = 1e-7
_TAIL = 0.15
"""Share of the last ranks that a fit leaves out: dying features lie below any curve through the others."""
_BINS = 256


@dataclass(frozen=True)
class ZipfFit:
    exponent: float
    shift: float
    r2: float
    """Share of the variance of log density that the curve explains; NaN if there were too few densities to fit."""


def zipf_capacities(n_features: int, total: float, tokens: int, exponent: float, shift: float) -> Tensor:
    """Real capacities by rank, ``[n_features]`` float64, which sum to `total` and do not exceed `tokens`.

    What the curve gives a rank beyond `tokens` goes to the later ranks in proportion to the curve, until all fit.
    Exponent 0 is uniform. If `total` is more than ``tokens * n_features`` every rank has `tokens`.
    """
    rank = torch.arange(1, n_features + 1, dtype=torch.float64)
    curve = ((rank + shift) / (1 + shift)).pow(-exponent).clamp_min(1e-280)
    below = curve.flip(0).cumsum(0).flip(0)
    # With the first c ranks full, rank c (from 0) gets share[c]. The curve falls, so if that fits, so do all after it.
    capped = torch.arange(n_features, dtype=torch.float64)
    share = (total - capped * tokens) * curve / below
    fits = (share <= tokens).nonzero()
    if not len(fits):
        return torch.full((n_features,), float(tokens), dtype=torch.float64)
    full = int(fits[0])
    left = (total - full * tokens) / below[full]
    return torch.where(capped < full, float(tokens), left * curve).clamp_max(tokens)


def expected_densities(n_features: int, k: float, tokens: int, exponent: float, shift: float) -> Tensor:
    """Share of a batch's tokens that the capped curve gives each rank, ``[n_features]`` float64."""
    return zipf_capacities(n_features, k * tokens, tokens, exponent, shift) / tokens


def draw_capacities(real: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Integer capacities of one step, ``[n_features]`` int64, and the carry for the next; the host does not wait.

    `real` ``[n_features]`` float64 sums to a whole budget. Every step the capacities sum to that budget, and each is
    the real one rounded down or up. `carry` is a scalar float64 in [0, 1), 0 at first.

    Laid end to end, the fractional parts cover a line; a match goes to each part that a comb with teeth one apart
    hits (systematic sampling). The carry is the comb's offset. It moves on by the golden section, so over the steps
    each part is hit as often as it is long: after T steps a feature's matches differ from T times its capacity by at
    most 1 + log(T) / log(1.618) (Denjoy-Koksma on the Zeckendorf form of T; less than 2 is usual), and a feature of
    capacity f < 1 never waits more than 4 / f steps.
    """
    floor = real.floor()
    parts = ((real - floor) * _UNIT).round().long()
    ends = parts.cumsum(0)
    whole = (ends[-1:] + _UNIT // 2) // _UNIT * _UNIT  # the parts sum to a whole number but for rounding
    ends = torch.cat([ends[:-1].minimum(whole), whole])
    offset = (carry * _UNIT).long()
    hit = torch.div(ends + offset, _UNIT, rounding_mode="floor")
    extra = hit.diff(prepend=torch.zeros_like(whole))
    return floor.long() + extra, ((offset + _STEP) % _UNIT).to(real.dtype) / _UNIT


def ranks(densities: Tensor) -> Tensor:
    """The rank of each feature, 0 the densest: densities ``[n_features]`` -> int64; ties to the lower feature."""
    order = torch.argsort(densities, descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def fit_zipf(densities: Tensor) -> ZipfFit:
    """The curve ``c * (rank + shift) ** -exponent`` nearest to `densities` ``[n_features]``, in any order.

    Least squares of log density. Each rank has weight 1 / rank, so that every factor of rank weighs the same;
    otherwise the tail would dominate. For each shift on a grid (0, and 1 to 10^5, then finer about the best) the
    exponent is a linear regression. Densities below 1e-7 and the last 15% of the others are left out. Exponent 1 and
    shift 0 if fewer than three densities are left.
    """
    sorted_densities = densities.detach().double().cpu().sort(descending=True).values
    usable = int((sorted_densities >= _LOWEST_DENSITY).sum())
    usable -= int(_TAIL * usable)
    if usable < 3:
        return ZipfFit(1.0, 0.0, math.nan)
    rank, log_density, weight = _bins(sorted_densities[:usable])
    shifts = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(0, 5, 400, dtype=torch.float64)])
    for _ in range(2):
        slope, r2 = _regress(torch.log(rank + shifts[:, None]), log_density, weight)
        best = int(r2.argmax())
        low, high = shifts[max(0, best - 1)], shifts[min(len(shifts) - 1, best + 1)]
        exponent, shift, quality = -float(slope[best]), float(shifts[best]), float(r2[best])
        shifts = torch.linspace(float(low), float(high), 201, dtype=torch.float64)
    return ZipfFit(max(0.0, exponent), shift, quality)


def _bins(densities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Falling densities in bins of about equal log width: mean rank, mean log density and weight, ``[bins]`` each."""
    rank = torch.arange(1, len(densities) + 1, dtype=torch.float64)
    # at the head, where log ranks are far apart, every rank is a bin of its own
    bin_of = (rank.log() / math.log(len(densities) + 1) * _BINS).long().unique_consecutive(return_inverse=True)[1]
    n = int(bin_of[-1]) + 1

    def total(x: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64).index_add_(0, bin_of, x)

    count = total(torch.ones_like(rank))
    return total(rank) / count, total(densities.log()) / count, total(1 / rank)


def _regress(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted linear regression of y ``[n]`` on each row of x ``[m, n]``: slopes and R^2, ``[m]`` each."""
    weight = weight / weight.sum()
    x = x - (x @ weight)[:, None]
    y = y - y @ weight
    slope = (x * y) @ weight / (x.square() @ weight)
    residual = (y - slope[:, None] * x).square() @ weight
    spread = y.square() @ weight
    return slope, torch.where(spread > 1e-20, 1 - residual / spread.clamp_min(1e-20), 1.0)
