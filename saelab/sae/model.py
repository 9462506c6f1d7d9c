"""The sparse autoencoder: x -> sparse codes -> reconstruction.

    pre = (x - b_dec) W_enc^T + b_enc        codes = pre where it is selected        xhat = codes W_dec + b_dec

What is selected: affinity.py, allocation.py, and for inference thresholds.py. The encoder is kept as rows too,
``W_enc [n_features, d_in]``: then both gradients are the same sparse product.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from saelab.codes import Codes, concatenate
from saelab.kernels import sddmm, spmm
from saelab.sae.affinity import alignment, worth
from saelab.sae.allocation.rules import Rule, TokenChoice
from saelab.sae.allocation.selection import Encoder, Scratch, Wanted, pre_activations, select
from saelab.sae.losses import auxiliary, batch_fvu

MULTI_FACTOR = 4
"""Multi-TopK reconstructs once more with so many times the budget (Gao et al. 2024, app. B)."""

LIFT = 1e-3
"""The pre-activation that `lift` gives a silent feature on its nearest token; activations have E||x||^2 = d_in."""


class TrainingPass(NamedTuple):
    """What one training step computes on a batch; all losses are scalars with gradients."""

    codes: Codes
    """The selected entries, with their gradients."""
    fvu: Tensor
    """Batch FVU, the reconstruction loss."""
    multi: Tensor
    """Batch FVU of the reconstruction with four times the budget; 0 where it was not asked for."""
    aux: Tensor
    """Auxiliary loss before its coefficient; 0 where no feature is wanted."""
    reached: Tensor
    """Share of the wanted features that the auxiliary loss sends a gradient to; 0 where none is wanted."""


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder.

    Parameters: W_enc and W_dec ``[n_features, d_in]``, b_enc ``[n_features]``, b_dec ``[d_in]``.
    """

    threshold: Tensor | None
    """What a pre-activation must exceed to be active in inference: ``[1]`` (one for all: mutual choice), or
    ``[n_features]`` (feature choice). None: every token keeps its k largest (token choice)."""

    def __init__(self, d_in: int, n_features: int, k: int, metadata: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.d_in, self.n_features, self.k = d_in, n_features, k
        self.beta = 0.0
        """Weight of the gradient in the affinity it was trained with; evaluation does without, but for the oracle."""
        self.metadata = metadata or {}
        """Where the autoencoder comes from: model, site, context and our own facts (the checkpoint's metadata)."""
        self.W_enc = nn.Parameter(torch.empty(n_features, d_in))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(torch.empty(n_features, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", None, persistent=False)
        self._scratch = Scratch()

    @torch.no_grad()
    def encode(self, x: Tensor, gradients: Tensor | None = None) -> Codes:
        """Active features of each token: x ``[..., d_in]`` -> codes over the flattened tokens, values above 0 only.

        A token's features do not depend on the other tokens given. With `gradients` of the language model's loss, in
        the shape of x, selection is by the gradient affinity, as in training: an oracle, for they know the next token.
        """
        centred = x.reshape(-1, self.d_in).to(self.W_enc.dtype) - self.b_dec
        aligned = None if gradients is None else alignment(gradients.reshape(-1, self.d_in), self.beta)
        encoder = self._encoder(Scratch())  # of its own: several threads may encode at once
        if self.threshold is None:
            selections, _ = select(encoder, centred, [TokenChoice(self.k)], aligned, low=False)
            return selections[0].pattern.with_values(selections[0].pre).compact()
        parts, cut = [], self.threshold.clamp_min(0)
        for tile, pre in pre_activations(encoder, centred, low=False):
            scores = pre
            if aligned is not None:
                scores = worth(pre, aligned.gradients[tile.tokens] @ self.W_dec.T, aligned.beta)
            parts.append(Codes.from_mask(scores > cut, pre))
        return concatenate(parts)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction of each token, ``[tokens, d_in]``."""
        return spmm(codes, self.W_dec) + self.b_dec

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction in the shape and dtype of x ``[..., d_in]``."""
        return self.decode(self.encode(x)).view(x.shape).to(x.dtype)

    @torch.no_grad()
    def pre_activations(self, x: Tensor) -> Tensor:
        """The dense pre-activations of a few tokens: x ``[tokens, d_in]`` -> ``[tokens, n_features]``."""
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc.T)

    def training_pass(
        self,
        x: Tensor,
        rule: Rule,
        *,
        gradients: Tensor | None = None,
        beta: float = 0.0,
        low: bool = False,
        multi: bool = False,
        wanted: Wanted | None = None,
    ) -> TrainingPass:
        """Codes and losses of a batch ``[tokens, d_in]``, differentiable.

        `rule` allocates the budget; `gradients` ``[tokens, d_in]`` and `beta` make the affinity; `low` lets bfloat16
        propose the candidates; `multi` adds the reconstruction with four times the budget; `wanted` are the features
        that the auxiliary loss is for.
        """
        rules = [rule.times(MULTI_FACTOR), rule] if multi else [rule]
        with torch.no_grad():
            aligned = None if gradients is None else alignment(gradients, beta)
            selections, strongest = select(self._encoder(self._scratch), x - self.b_dec, rules, aligned, low, wanted)
        with record_function("decode"):
            codes = []
            for pattern, pre in selections:
                filled = (pattern.values > 0).to(pre.dtype)
                values = sddmm(pattern, x, self.W_enc, self.b_enc, centre=self.b_dec, known=pre).relu() * filled
                codes.append(pattern.with_values(values))
            reconstruction = self.decode(codes[-1])
            fvu = batch_fvu(x, reconstruction)
            multi_fvu = batch_fvu(x, self.decode(codes[0])) if multi else x.new_zeros(())
        aux = reached = x.new_zeros(())
        if wanted is not None and strongest is not None:
            aux, explaining = auxiliary(
                x - reconstruction, strongest, not low, x - self.b_dec, self.W_enc, self.b_enc, self.W_dec
            )
            reached = (explaining.firing_counts() > 0).sum() / wanted.mask.sum().clamp_min(1)
        return TrainingPass(codes[-1], fvu, multi_fvu, aux, reached)

    def _encoder(self, scratch: Scratch) -> Encoder:
        return Encoder(self.W_enc.detach(), self.b_enc.detach(), self.W_dec.detach(), scratch)

    @torch.no_grad()
    def initialise(self, sample: Tensor, b_dec_init: str = "mean") -> None:
        """Random unit decoder rows, encoder = decoder, b_dec at the centre of `sample` ``[tokens, d_in]``.

        The encoder is then scaled so that the first reconstruction of the sample has the least squared error a
        common factor can give.
        """
        self.W_dec.normal_()
        self.renormalise_decoder()
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()
        self.b_dec.copy_(sample.mean(0) if b_dec_init == "mean" else geometric_median(sample))
        centred = sample[:4096] - self.b_dec
        first = spmm(self.encode(sample[:4096]), self.W_dec)
        self.W_enc.mul_((centred * first).sum() / first.square().sum().clamp_min(1e-12))

    @torch.no_grad()
    def renormalise_decoder(self) -> None:
        """Scale every decoder row to unit length."""
        self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def folded(self, scale: float) -> "SparseAutoencoder":
        """The same function on unscaled data, for an autoencoder trained on ``scale * x``.

        Biases and threshold are divided by the scale, the matrices untouched: relu and selection commute with a scale.
        """
        folded = copy.deepcopy(self)
        folded.b_enc.div_(scale)
        folded.b_dec.div_(scale)
        if folded.threshold is not None:
            folded.threshold = folded.threshold / scale
        return folded

    @torch.no_grad()
    def lift(self, x: Tensor, mask: Tensor) -> None:
        """Raise the bias of those features of `mask` that no token of x activates, until the nearest one just does.

        No gradient reaches a feature whose pre-activations are all negative, whatever the auxiliary loss: this is the
        remedy. x ``[tokens, d_in]``, mask ``[n_features]`` bool.
        """
        # the host may wait on a CPU, and look at these features alone; elsewhere it looks at all
        which = mask.nonzero().squeeze(1) if mask.device.type == "cpu" else torch.arange(len(mask), device=mask.device)
        for rows in which.split(4096):
            highest = torch.addmm(self.b_enc[rows], x - self.b_dec, self.W_enc[rows].T).amax(0)
            self.b_enc[rows] += torch.where(mask[rows] & (highest <= 0), LIFT - highest, 0.0)


@torch.no_grad()
def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to `points` ``[n, d]`` (Weiszfeld's iteration), ``[d]``.

    Stops when a step moves it by less than `tolerance` times its distance to the points.
    """
    median = points.mean(0)
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(points - median, dim=1).clamp_min(1e-12)
        weights = 1 / distance
        new = (weights[:, None] * points).sum(0) / weights.sum()
        moved = torch.linalg.vector_norm(new - median)
        median = new
        if moved < tolerance * distance.mean():
            break
    return median
