"""A world of planted features for synth.py, after the recipe of SynthSAEBench-16k v2.

    x = bias + sum of active features of magnitude * direction

Firing     feature r, from 1, fires with a probability on a Zipf curve between `p_max` and `p_min`. Features fire
           together or apart: normal numbers with correlations of low rank, cut at each feature's quantile
Hierarchy  the first features are trees: the roots, then their children, theirs, and so on. A child fires only if its
           parent does, and at most one child of a parent: of several, one by lot. Before that, a child fires with its
           probability over its parent's, times one plus the sum of the others' (over the parent's), up to 1: so each
           has about its own probability in the end, unless children are together as frequent as their parent
Magnitude  normal; the mean falls in a straight line over the features, and each feature has a deviation of its own.
           A child's is multiplied by its parent's over the mean of that
Directions random unit vectors, pushed apart by a few steps of Adam

The recipe is that of the library SAELens (docs/synth_sae_bench.md there); this is written from its description, and
random numbers are drawn in another order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.codes import Codes
from saelab.kernels import spmm

_ROWS = 1024
"""Rows of the dictionary whose cosines with all others are computed at a time."""
_LEAST_OWN = 0.01
"""Least share of a feature's variance that is not common to others."""


@dataclass(frozen=True)
class Recipe:
    """All parameters of a world; the defaults are those of SynthSAEBench-16k v2."""

    n_true: int = 16_384
    d_in: int = 768
    exponent: float = 0.5
    p_max: float = 0.4
    p_min: float = 5e-4
    roots: int = 128
    branching: int = 4
    depth: int = 3
    """Generations of children below the roots."""
    rank: int = 25
    correlation: float = 0.1
    """Standard deviation of the loadings of a feature on the common factors."""
    first_magnitude: float = 5.0
    last_magnitude: float = 4.0
    spread: tuple[float, float] = (0.5, 0.5)
    """Mean and deviation of the normal distribution whose absolute values are the deviations of magnitudes."""
    bias: float = 0.5
    """Length of the bias."""
    steps: int = 100
    """Steps that push the directions apart."""
    lr: float = 3e-4
    seed: int = 42

    @property
    def generations(self) -> list[slice]:
        """The features of the hierarchy by generation, the roots first."""
        found, start, size = [], 0, self.roots
        for _ in range(self.depth + 1):
            found.append(slice(start, start + size))
            start, size = start + size, size * self.branching
        return found


class World(NamedTuple):
    """Tensors of a world, by feature ``[n_true]`` unless said otherwise."""

    recipe: Recipe
    directions: Tensor
    """Unit vectors ``[n_true, d_in]``."""
    bias: Tensor
    """``[d_in]``"""
    probabilities: Tensor
    """Planned share of samples with each feature."""
    bound: Tensor
    """What the normal number of a feature must exceed for it to fire, before the hierarchy."""
    loadings: Tensor
    """``[n_true, rank]``"""
    own: Tensor
    """Deviation of the part of the normal number that is not common to others."""
    magnitude: Tensor
    deviation: Tensor


class Drawn(NamedTuple):
    x: Tensor
    """``[samples, d_in]``"""
    truth: Codes
    """Magnitudes of the planted features that are active."""


def build(recipe: Recipe, device: str = "cpu") -> World:
    """The world of a recipe; the same on every device, but for rounding."""
    generator = torch.Generator().manual_seed(recipe.seed)
    n = recipe.n_true
    loadings = recipe.correlation * torch.randn(n, recipe.rank, generator=generator)
    longest = (1 - _LEAST_OWN) ** 0.5
    loadings *= (longest / torch.linalg.vector_norm(loadings, dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    mean, deviation = recipe.spread
    deviation = (mean + deviation * torch.randn(n, generator=generator)).abs()
    bias = F.normalize(torch.randn(recipe.d_in, generator=generator), dim=0) * recipe.bias
    directions = F.normalize(torch.randn(n, recipe.d_in, generator=generator), dim=1).to(device)
    planned = zipf(recipe)
    raised = compensated(planned, recipe)
    return World(
        recipe,
        spread_apart(directions, recipe.steps, recipe.lr),
        bias.to(device),
        planned.float().to(device),
        (2**0.5 * torch.erfinv(1 - 2 * raised)).float().to(device),
        loadings.to(device),
        (1 - loadings.square().sum(1)).sqrt().to(device),
        torch.linspace(recipe.first_magnitude, recipe.last_magnitude, n, device=device),
        deviation.to(device),
    )


def zipf(recipe: Recipe) -> Tensor:
    """rank ** -exponent, scaled and moved so that it falls from p_max to p_min, ``[n_true]`` float64."""
    curve = torch.arange(1, recipe.n_true + 1, dtype=torch.float64) ** -recipe.exponent
    curve = (curve - curve[-1]) / (curve[0] - curve[-1])
    return recipe.p_min + (recipe.p_max - recipe.p_min) * curve


def compensated(planned: Tensor, recipe: Recipe) -> Tensor:
    """Probabilities of firing before the hierarchy removes children, for the `planned` ones after it; up to 1."""
    raised = planned.clone()
    for above, below in zip(recipe.generations, recipe.generations[1:], strict=False):
        parents, children = planned[above, None], planned[below].view(-1, recipe.branching)
        rivals = children.sum(1, keepdim=True) - children
        raised[below] = (children / parents * (1 + rivals / parents)).flatten()
    return raised.clamp_max(1)


def spread_apart(directions: Tensor, steps: int, lr: float) -> Tensor:
    """Unit vectors after `steps` of Adam on the squares of their products, with n times the error of their lengths."""
    moved = directions.clone().requires_grad_(True)
    adam = torch.optim.Adam([moved], lr=lr)
    for _ in range(steps):
        adam.zero_grad()
        for start in range(0, len(moved), _ROWS):
            products = moved[start : start + _ROWS] @ moved.T
            lengths = products.diagonal(start)
            apart = products.square().sum() - lengths.square().sum()
            (apart + len(moved) * (lengths - 1).square().sum()).backward()
        adam.step()
    return F.normalize(moved.detach(), dim=1)


@torch.no_grad()
def draw(world: World, samples: int, generator: torch.Generator) -> Drawn:
    """Independent samples; `generator` is on the world's device."""
    recipe, device = world.recipe, world.directions.device
    common = torch.randn(samples, recipe.rank, generator=generator, device=device)
    normal = torch.randn(samples, recipe.n_true, generator=generator, device=device)
    firing = Codes.from_mask(
        torch.addmm(-world.bound, common, world.loadings.T).addcmul_(normal, world.own) > 0, normal
    )
    deviations = torch.randn(firing.nnz, generator=generator, device=device) * world.deviation[firing.features]
    magnitudes = firing.with_values((world.magnitude[firing.features] + deviations).clamp_min(0)).to_dense()
    for above, below in zip(recipe.generations, recipe.generations[1:], strict=False):
        factors = magnitudes[:, above] / world.magnitude[above]
        children = magnitudes[:, below].view(samples, -1, recipe.branching)
        children *= factors[..., None]  # 0 if the parent does not fire
        rivals = (children > 0).sum(-1) > 1
        crowded = children[rivals]
        lots = torch.rand(crowded.shape, generator=generator, device=device).masked_fill_(crowded == 0, -1)
        chosen = F.one_hot(lots.argmax(-1), recipe.branching)
        children[rivals] = crowded * chosen
    truth = Codes.from_mask(magnitudes > 0, magnitudes)
    return Drawn(spmm(truth, world.directions) + world.bias, truth)


def drawn(world: World, samples: int, seed: int, block: int) -> Iterator[Drawn]:
    """`samples` samples, `block` at a time; the same ones for the same arguments on the same kind of device."""
    generator = torch.Generator(world.directions.device).manual_seed(seed)
    for start in range(0, samples, block):
        yield draw(world, min(block, samples - start), generator)
