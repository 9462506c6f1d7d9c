"""Families of attention features by the distance that they read from (claim T3), and which heads they read through.

A feature's direct attribution at a token t, by source s, is split by kind of source. Only what raises the
pre-activation counts, so that the shares of a token add up to 1; a feature's shares are means over sampled tokens:

current     s = t
previous    s = t - 1
short       2 to `SHORT` tokens back
long        farther back
start       s = 0, unless it is one of the first two

induction   beside these: the share of sources before t that follow an earlier occurrence of the token of t

A feature belongs to the family `induction` if that share is at least one half, and twice that of attention that is
equal on all sources; else to the kind of source with the largest share. Up to `PER_ROW` tokens of each row and
`per_feature` tokens in all are sampled of each feature, in the order of the rows.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.attention.direct import contributions
from saelab.analysis.attention.report import DISTANCES, FAMILIES
from saelab.analysis.attention.scores import repeats
from saelab.codes import Codes
from saelab.lm.attention import Heads
from saelab.sae.model import SparseAutoencoder

SHORT = 8
PER_ROW = 2
_COLUMNS = len(DISTANCES) + 2
"""Sums by source, of induction, and of induction's chance."""
_AT_ONCE = 2**22
"""Contributions in memory at once."""


@dataclass(frozen=True, eq=False)
class FamilyShares:
    """Sums over sampled tokens, by feature; `add` fills it."""

    sums: np.ndarray
    """Shares by kind of source, of induction, and its chance, ``[n_features, 7]`` float64."""
    by_head: np.ndarray
    """Shares by head, ``[n_features, heads]`` float64."""
    counts: np.ndarray
    """Sampled tokens, ``[n_features]`` float64."""
    drawn: np.ndarray
    """`sums` in resamples of the rows, ``[resamples, n_features, 7]`` float32."""
    draws: np.ndarray
    """How often each row is in each resample, ``[resamples, rows]``."""
    per_feature: int

    @classmethod
    def empty(cls, n_features: int, heads: int, draws: np.ndarray, per_feature: int) -> "FamilyShares":
        sums, by_head, counts = np.zeros((n_features, _COLUMNS)), np.zeros((n_features, heads)), np.zeros(n_features)
        drawn = np.zeros((len(draws), n_features, _COLUMNS), np.float32)
        return cls(sums, by_head, counts, drawn, draws, per_feature)

    def add(
        self, sae: SparseAutoencoder, ids: Tensor, positions: Tensor, codes: Codes, heads: Heads, row: int
    ) -> tuple[Tensor, Tensor]:
        """Add a row of text, its number `row`: token ids ``[context]``, and the codes at some of its positions.

        Returns the features that were sampled, ``[n]``, and the shares of sources in each, ``[n, context]``.
        """
        token, feature = self._sample(codes)
        if not len(token):
            return feature, codes.values.new_zeros(0, len(ids))
        at = positions[token]
        step = max(1, _AT_ONCE // (heads.n_heads * len(ids)))
        parts, sources = [], []
        for t, f in zip(at.split(step), feature.split(step), strict=True):
            found = contributions(heads, sae.W_enc[f].float(), t).clamp_min(0)
            found /= found.sum((1, 2), keepdim=True).clamp_min(1e-30)
            kinds = source_kinds(ids, t).to(found.dtype)
            by_source = found.sum(1)
            shares = torch.cat([torch.einsum("ns,nks->nk", by_source, kinds[:, :-1]), kinds[:, -1].sum(1, True)], 1)
            parts.append(torch.cat([shares, found.sum(2)], 1))
            sources.append(by_source)
        values, f = torch.cat(parts).double().cpu().numpy(), feature.cpu().numpy()
        here = np.zeros((len(self.counts), values.shape[1]))
        np.add.at(here, f, values)
        touched = np.flatnonzero(np.bincount(f, minlength=len(here)))
        self.sums[touched] += here[touched, :_COLUMNS]
        self.by_head[touched] += here[touched, _COLUMNS:]
        np.add.at(self.counts, f, 1)
        often = self.draws[:, row].astype(np.float32)
        self.drawn[:, touched] += often[:, None, None] * here[touched, :_COLUMNS].astype(np.float32)
        return feature, torch.cat(sources)

    def _sample(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """Token and feature of the entries that are sampled: up to `PER_ROW` of each feature, spread over the row."""
        by_feature = codes.compact().transpose()  # [n_features, tokens]
        length = by_feature.offsets.diff()
        left = torch.from_numpy(self.per_feature - self.counts).to(length).clamp(0, PER_ROW)
        n = torch.minimum(length, left)
        feature = torch.arange(len(n), device=n.device).repeat_interleave(n)
        rank = torch.arange(len(feature), device=n.device) - (n.cumsum(0) - n)[feature]
        entry = by_feature.offsets[:-1][feature] + rank * length[feature] // n[feature]
        return by_feature.features[entry].long(), feature

    def shares(self) -> np.ndarray:
        """Mean shares by kind of source, induction's, and its chance, ``[n_features, 7]``; NaN if never sampled."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums / self.counts[:, None]

    def head_shares(self) -> np.ndarray:
        """Mean shares by head, ``[n_features, heads]``; NaN if never sampled."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.by_head / self.counts[:, None]


def source_kinds(ids: Tensor, at: Tensor) -> Tensor:
    """Which sources are of each kind, of induction, and its chance, for destinations `at`: ``[n, 7, context]``.

    The chance is a weight: 1 / (t + 1) on sources of induction.
    """
    distance = at[:, None] - torch.arange(len(ids), device=ids.device)
    start = (torch.arange(len(ids), device=ids.device) == 0) & (distance > 1)
    _, after = repeats(ids, at)
    kinds = [
        distance == 0,
        distance == 1,
        (distance > 1) & (distance <= SHORT) & ~start,
        (distance > SHORT) & ~start,
        start,
        after,
        after / (at[:, None] + 1),
    ]
    return torch.stack([kind.to(torch.float32) for kind in kinds], 1)


def families(shares: np.ndarray) -> np.ndarray:
    """The family of each feature, its index in `FAMILIES`, from shares ``[..., n_features, 7]``; -1 if they are NaN.

    Sums instead of mean shares give the same.
    """
    sources, induction, chance = shares[..., :5], shares[..., 5], shares[..., 6]
    total = sources.sum(-1)
    family = np.where(total > 0, np.nan_to_num(sources).argmax(-1), -1)
    is_induction = (total > 0) & (induction >= 0.5 * total) & (induction >= 2 * chance)
    return np.where(is_induction, FAMILIES.index("induction"), family)
