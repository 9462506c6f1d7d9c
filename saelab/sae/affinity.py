"""Affinity: the score of a (token, feature) match. Allocations maximise the sum of scores.

activation    z, the pre-activation (no allocation picks an entry at or below zero)
cosine        z / |e|^p, e the feature's row of W_enc: no feature wins by a long row. With p = 1 the order within a
              token is that of the cosines of x - b_dec and e, apart from b_enc; p = 0 is activation, and p between them
              blends cosine and magnitude
gradient      z (1 + beta |d . g|), d the feature's decoder direction and g the gradient of the language model's loss at
              the token (gradient-aware TopK: Olmo et al. 2024, arXiv 2411.10397)

z |d . g| is the first-order change of the loss if the feature were removed from the token. The paper's abstract gives
the score; that plain z is added, that g comes from the clean run's cross-entropy summed over the row, and that g is
divided by its root mean square over the batch, are our reconstruction. So g decides more on tokens where it is longer;
dividing each token's g by its own root mean square instead is no better on planted features (docs/results.md). The
score only decides which entries are selected: neither d nor g receives a gradient through it. g depends on the next
token, so evaluation selects by activation.

Cosine is ours: of arXiv 2606.15054 we know only the idea, a learned blend of cosine and magnitude in selection. Here p
is set, not learned, because a selection gives it no gradient; e receives none through the score either. The length of
x - b_dec is left out. Within a token it changes nothing; between tokens (mutual and feature choice) dividing by it
would move the budget to tokens with little to explain, and inference would need thresholds in units of each token's
length. Without it the weights can take the score in exactly (`SparseAutoencoder.take_in_affinity`): W_enc and b_enc
over |e|^p, and W_dec times |e|^p, select the same entries by z alone and reconstruct the same. Activations are then the
scores.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from saelab.codes import Codes
from saelab.kernels import per_entry, sddmm
from saelab.sae.encoder import Scratch, Tile


class Affinity(Protocol):
    """Scores from pre-activations, other than these themselves."""

    roundings: ClassVar[float]
    """Error of a bfloat16 score, as a multiple of that of a pre-activation."""

    def tile(self, pre: Tensor, tile: Tile, W_dec: Tensor, scratch: Scratch) -> Tensor:
        """Scores of the pre-activations of a tile, in their precision; they may be overwritten."""
        ...

    def entries(self, pre: Tensor, pattern: Codes, W_dec: Tensor) -> Tensor:
        """Scores of entries in the precision of their pre-activations ``[nnz]``."""
        ...


@dataclass(frozen=True)
class Alignment:
    """The gradient affinity."""

    gradients: Tensor
    """g of each token with root mean square 1 over the batch, ``[tokens, d_in]``."""
    beta: float
    roundings: ClassVar[float] = 1.0

    def tile(self, pre: Tensor, tile: Tile, W_dec: Tensor, scratch: Scratch) -> Tensor:
        with record_function("encoder matmul"):
            W = W_dec[tile.features]
            if pre.dtype == torch.bfloat16:
                W = scratch.bf16("W_dec", W)
            g = self.gradients[tile.tokens].to(pre.dtype)
            aligned = torch.mm(g, W.T, out=scratch.get("aligned", tuple(pre.shape), pre.dtype, pre.device))
        with record_function("selection"):
            return score(pre, aligned, self.beta, out=aligned)

    def entries(self, pre: Tensor, pattern: Codes, W_dec: Tensor) -> Tensor:
        return score(pre, sddmm(pattern, self.gradients, W_dec), self.beta)


@dataclass(frozen=True)
class Cosine:
    """The cosine affinity."""

    factors: Tensor
    """1 / |e|^p of each feature, ``[n_features]``."""
    roundings: ClassVar[float] = 1.5
    """That of the factor and that of the product."""

    def tile(self, pre: Tensor, tile: Tile, W_dec: Tensor, scratch: Scratch) -> Tensor:
        with record_function("selection"):
            return pre.mul_(self.factors[tile.features].to(pre.dtype))

    def entries(self, pre: Tensor, pattern: Codes, W_dec: Tensor) -> Tensor:
        return pre * per_entry(pattern, self.factors)


def cosine(W_enc: Tensor, power: float) -> Cosine | None:
    """The cosine affinity of an encoder ``[n_features, d_in]``; None (plain activation) if the power is 0."""
    if power == 0:
        return None
    kind = torch.promote_types(W_enc.dtype, torch.float32)
    return Cosine(torch.linalg.vector_norm(W_enc.detach(), dim=1, dtype=kind).clamp_min(1e-12).pow(-power))


def alignment(gradients: Tensor | None, beta: float) -> Alignment | None:
    """`gradients` ``[tokens, d_in]`` normalised over the batch; None (plain activation) without gradients or beta."""
    if beta == 0 or gradients is None:
        return None
    g = gradients.detach().to(torch.promote_types(gradients.dtype, torch.float32))
    return Alignment(g / g.square().mean().sqrt().clamp_min(torch.finfo(g.dtype).tiny), beta)


def score(pre: Tensor, aligned: Tensor, beta: float, *, out: Tensor | None = None) -> Tensor:
    """``pre * (1 + beta * |aligned|)``; pre and aligned = d . g of one shape, `out` may be `aligned` itself.

    The factor is positive, so the score of a pre-activation at or below zero stays there.
    """
    magnitude = torch.abs(aligned, out=out)
    return torch.addcmul(pre, pre, magnitude, value=beta, out=out)
