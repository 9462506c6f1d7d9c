"""A crosscoder (Lindsey et al. 2024, Anthropic): one code for several sites, whose activations stand side by side.

    x' = [s_1 (x_1 - m_1), ..., s_n (x_n - m_n)]      z = (x' - b_dec) W_enc^T + b_enc      xhat' = codes W_dec + b_dec

It is an autoencoder of x' ``[tokens, sum d_l]``. Each site has a scale of its own, which makes E||x'_l||^2 = d_l; there
is a mean with `activations.inputs: centre`. What differs is the length of a decoder row, where one counts: it is the
sum over the sites of the lengths of the row's parts. (In the length of the whole a further site is almost free.)

    length of row d = sum_l ||d_l||

In training this length is kept at 1 (`sae.unit_norm`). That is a choice of units only: W_enc and W_dec may exchange a
factor. With it, selection by z is selection by z times the length, as papers on TopK crosscoders have it, and the
sparsity losses are those of the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saelab.sae.fold import fold
from saelab.sae.input_map import input_map
from saelab.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class SideBySide:
    """``x -> scales (x - mean)``, site by site: the input map of a crosscoder."""

    scale: tuple[float, ...]
    """The scale of each site."""
    widths: tuple[int, ...]
    mean: Tensor | None = None
    """``[sum of widths]``, or None: nothing is subtracted."""
    whitening: None = None
    normalisation: None = None

    @property
    def factors(self) -> Tensor:
        """The scale of each dimension, ``[sum of widths]``."""
        return torch.tensor(self.scale).repeat_interleave(torch.tensor(self.widths))

    def __call__(self, x: Tensor) -> Tensor:
        """The inputs of training: x ``[tokens, sum of widths]`` -> the same shape."""
        return (x if self.mean is None else x - self.mean.to(x)) * self.factors.to(x)

    def gradients(self, g: Tensor | None, x: Tensor) -> Tensor | None:
        return g

    @torch.no_grad()
    def folded(self, sae: SparseAutoencoder, target_scale: float = 1.0) -> SparseAutoencoder:
        """The crosscoder of x that computes what `sae`, trained on x', computes on x'; for inference.

        Its activations are those of `sae`. The lengths of its rows are no longer 1; `site_shares` takes those of x'.
        """
        folded = fold(sae, 1.0)
        factors = self.factors.to(folded.W_dec)
        folded.W_enc, folded.W_dec = nn.Parameter(folded.W_enc * factors), nn.Parameter(folded.W_dec / factors)
        folded.b_dec.div_(factors)
        if self.mean is not None:
            folded.b_dec.add_(self.mean.to(folded.b_dec))
        return folded


@torch.no_grad()
def side_by_side_map(name: str, sample: Tensor, widths: Sequence[int]) -> SideBySide:
    """The map called `name` (scale or centre), fitted to the first activations of each site side by side.

    Raises ValueError as `input_map` does.
    """
    found = [input_map(name, part) for part in sample.split(list(widths), 1)]
    means = [each.mean for each in found if each.mean is not None]
    return SideBySide(tuple(each.scale for each in found), tuple(widths), torch.cat(means) if means else None)


def factors_of(sae: SparseAutoencoder) -> Tensor:
    """The scale of each dimension of what `sae`, a crosscoder, reads, ``[d_in]``; 1 if the checkpoint says nothing."""
    scales, widths = (sae.metadata.get("saelab") or {}).get("input_scale"), sae.site_widths
    if not isinstance(scales, list | tuple) or len(scales) != len(widths):
        scales = [1.0] * len(widths)
    return SideBySide(tuple(map(float, scales)), widths).factors.to(sae.W_dec)


@torch.no_grad()
def comparable_rows(sae: SparseAutoencoder) -> tuple[Tensor, Tensor]:
    """Encoder and decoder rows, of which lengths and cosines mean something: ``[n_features, d]`` each.

    Those of a crosscoder are copies in the units of training, or the site with the largest activations would decide
    about decoder rows, and the one with the smallest about encoder rows. Of one site they are the weights themselves.
    """
    if len(sae.site_widths) < 2:
        return sae.W_enc, sae.W_dec
    factors = factors_of(sae)
    return sae.W_enc / factors, sae.W_dec * factors


@torch.no_grad()
def site_shares(sae: SparseAutoencoder) -> Tensor:
    """Share of each site in the length of each decoder row, ``[n_features, sites]``; each row adds up to 1.

    It is ||d_l|| / sum_l ||d_l|| with every site in the units of training, in which its mean square is 1 per dimension:
    1 for a feature of that site alone, and 1 / sites for one that is equally long at all. A row of zeros has shares 0.
    """
    parts = comparable_rows(sae)[1].split(list(sae.site_widths), 1)
    lengths = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], 1)
    return lengths / lengths.sum(1, keepdim=True).clamp_min(1e-12)
