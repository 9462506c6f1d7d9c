"""The sparse autoencoder: x -> sparse codes -> reconstruction (TopK: Gao et al. 2024, arXiv 2406.04093).

    pre = (x - b_dec) W_enc^T + b_enc        codes = top k of relu(pre)        xhat = codes W_dec + b_dec

The encoder is kept as rows too, ``W_enc [n_features, d_in]``: then both gradients are the same sparse product.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from saelab.codes import Codes, concatenate
from saelab.errors import SettingError
from saelab.kernels import sddmm, spmm
from saelab.sae.allocation import token_choice
from saelab.sae.losses import aux_k, batch_fvu

_ENCODE_ELEMENTS = 2**25
"""Pre-activations held at once by `encode`: 128 MB in float32."""


@dataclass(frozen=True)
class SaeSettings:
    n_features: int = 4096
    """Number of features (latents)."""
    k: int = 32
    """Features that may be active on a token."""
    aux: str = "aux_k"
    """Auxiliary loss for dead features: none or aux_k."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss."""
    aux_features: int | None = None
    """Dead features the auxiliary loss may use per token; default d_in / 2."""
    b_dec_init: str = "mean"
    """What b_dec starts from: mean or geometric_median of the first activations."""

    def __post_init__(self) -> None:
        if self.n_features < 1:
            raise SettingError(f"n_features: {self.n_features} is not a positive number")
        if not 1 <= self.k <= self.n_features:
            raise SettingError(f"k: {self.k} is not between 1 and n_features ({self.n_features})")
        if self.aux not in ("none", "aux_k"):
            raise SettingError(f"aux: {self.aux!r} is not none or aux_k")
        if not 0 <= self.aux_coefficient < math.inf:
            raise SettingError(f"aux_coefficient: {self.aux_coefficient} is not a number from 0 up")
        if self.aux_features is not None and self.aux_features < 1:
            raise SettingError(f"aux_features: {self.aux_features} is not a positive number")
        if self.b_dec_init not in ("mean", "geometric_median"):
            raise SettingError(f"b_dec_init: {self.b_dec_init!r} is not mean or geometric_median")


class TrainingPass(NamedTuple):
    """What one training step computes on a batch."""

    codes: Codes
    """The selected entries, with their gradients; k per token, value 0 where fewer were positive."""
    fvu: Tensor
    """Batch FVU, the reconstruction loss."""
    aux: Tensor
    """Auxiliary loss before its coefficient; 0 where no feature is dead."""


class SparseAutoencoder(nn.Module):
    """A TopK sparse autoencoder.

    Parameters: W_enc and W_dec ``[n_features, d_in]``, b_enc ``[n_features]``, b_dec ``[d_in]``.
    """

    def __init__(self, d_in: int, n_features: int, k: int, metadata: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.d_in, self.n_features, self.k = d_in, n_features, k
        self.metadata = metadata or {}
        """Where the autoencoder comes from: model, site, context and our own facts (the checkpoint's metadata)."""
        self.W_enc = nn.Parameter(torch.empty(n_features, d_in))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(torch.empty(n_features, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """Active features of each token: x ``[..., d_in]`` -> codes over the flattened tokens, values above 0 only."""
        flat = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        block = max(1, _ENCODE_ELEMENTS // self.n_features)
        parts = [token_choice(self._pre(piece - self.b_dec), self.k).compact() for piece in flat.split(block)]
        return concatenate(parts)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction of each token, ``[tokens, d_in]``."""
        return spmm(codes, self.W_dec) + self.b_dec

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction in the shape and dtype of x ``[..., d_in]``."""
        return self.decode(self.encode(x)).view(x.shape).to(x.dtype)

    def training_pass(self, x: Tensor, dead: Tensor | None, k_aux: int) -> TrainingPass:
        """Codes and losses of a batch ``[tokens, d_in]``, differentiable.

        `dead` are the indices of dead features for the auxiliary loss; None leaves it out.
        """
        with torch.no_grad(), record_function("encoder matmul"):
            pre = self._pre(x - self.b_dec)
        with torch.no_grad(), record_function("selection"):
            pattern = token_choice(pre, self.k)
            raw = pre.gather(1, pattern.features.view(len(x), self.k)).flatten()
        with record_function("decode"):
            centred = x - self.b_dec
            values = sddmm(pattern, centred, self.W_enc, self.b_enc, known=raw).relu()
            codes = Codes(values, pattern.features, pattern.offsets, self.n_features)
            reconstruction = self.decode(codes)
        aux = x.new_zeros(())
        if dead is not None and len(dead):
            aux = aux_k(x, reconstruction, pre, centred, self.W_enc, self.b_enc, self.W_dec, dead, k_aux)
        return TrainingPass(codes, batch_fvu(x, reconstruction), aux)

    def _pre(self, centred: Tensor) -> Tensor:
        return torch.addmm(self.b_enc, centred, self.W_enc.T)

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

        The biases are divided by the scale and the matrices untouched, because relu and top-k commute with a scale.
        """
        folded = copy.deepcopy(self)
        folded.b_enc.div_(scale)
        folded.b_dec.div_(scale)
        return folded


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
