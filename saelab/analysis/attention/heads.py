"""Head attribution by weights: how much of a feature's decoder row lies in each head's slice of z."""

import torch
from einops import rearrange
from torch import Tensor

from saelab.errors import SaelabError


@torch.no_grad()
def head_shares(W_dec: Tensor, n_heads: int) -> Tensor:
    """Share of each head in the decoder row of each feature, ``[n_features, n_heads]``, each row's sum is 1.

    The share of norms, not of squared norms: ``||W_dec[i, head k]|| / sum over l of ||W_dec[i, head l]||``. A row of
    zeros gives equal shares. Raises SaelabError if the width of `W_dec` ``[n_features, d_in]`` is not that of so many
    heads.
    """
    if W_dec.ndim != 2 or n_heads < 1 or W_dec.shape[1] % n_heads:
        raise SaelabError(f"attribution: decoder rows of shape {list(W_dec.shape)} do not divide into {n_heads} heads")
    norms = rearrange(W_dec, "f (h d) -> f h d", h=n_heads).norm(dim=-1)
    total = norms.sum(1, keepdim=True)
    return torch.where(total > 0, norms / total, 1 / n_heads)


def top_features(shares: Tensor, n: int = 10, among: Tensor | None = None) -> Tensor:
    """The `n` features with the largest share of each head, largest first, ``[n_heads, n]``.

    `shares` is that of `head_shares`; `among` limits the choice to some features, bool ``[n_features]``.
    """
    if among is not None:
        shares = shares.masked_fill(~among[:, None], -1)
    return shares.topk(n, dim=0).indices.T
