"""The parts of the error (parts.py) seen from other autoencoders: at other sites, and wider ones at the same site."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.intervals import Interval, add_by_row, interval
from saelab.analysis.least_squares import LinearMap, Moments, fit, mean_r2
from saelab.analysis.matching import match_decoders
from saelab.analysis.parts import Parts, Split, parts_of
from saelab.encoded import Autoencoder, Block, Reader, read_all
from saelab.kernels import sddmm
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

TARGETS = ("error", "linear", "nonlinear")
KNOWN, MISSING = 0.9, 0.7
"""Cosine with the nearest decoder row from which a feature of a wider autoencoder counts as known, and below which it
counts as missing."""


class Prediction(NamedTuple):
    """A part of the error predicted from reconstructions at other sites, without intercept, on scored tokens."""

    r2: Interval
    """Mean over dimensions of 1 - squared error / squared deviation."""
    left: Interval
    """sum ||part - prediction||^2 / sum ||part||^2: with the prediction added, this share of the part's FVU is left."""


class Missing(NamedTuple):
    """Contributions a_f d_f of a wider autoencoder's features to x: the share of each along d_f in the parts.

    The share of a part V is ``sum a <V, d> / sum a^2`` over tokens and features; d has unit length.
    """

    features: int
    in_linear: Interval
    in_nonlinear: Interval


def from_other_sites(
    sae: Autoencoder,
    linear: LinearMap,
    sources: Mapping[str, tuple[SparseAutoencoder, str]],
    lm: LanguageModel,
    site: str,
    rows: Tensor,
    split: Split,
    rows_per_forward: int,
) -> dict[str, dict[str, Prediction]]:
    """Predictions of each part of the error, by source and part.

    The sources are the reconstruction here, each of `sources` (an autoencoder with its site), all of these ("others"),
    and these with the one here ("all").
    """
    names = ["here", *sources, "others", "all"]
    moments: dict[str, Moments] = {}
    maps: dict[str, LinearMap] = {}
    sums = {name: torch.zeros(0) for name in names}
    found: dict[str, Tensor] = {}

    def keep(name: str, of: SparseAutoencoder, block: Block) -> None:
        found[name] = of.decode(block.codes, block.x).double()

    def inputs_and_targets(block: Block) -> tuple[dict[str, Tensor], Tensor]:
        parts = parts_of(block.x, sae.decode(block.codes, block.x), linear)
        found["here"] = parts.reconstruction
        here, *rest = inputs = {name: found[name] for name in names[:-2]}
        others = torch.cat([inputs[name] for name in rest], 1)
        inputs |= {"others": others, "all": torch.cat([inputs[here], others], 1)}
        return inputs, torch.cat(parts[2:], 1)

    def add(block: Block) -> None:
        inputs, targets = inputs_and_targets(block)
        for name, value in inputs.items():
            if name not in moments:
                moments[name] = Moments(value.shape[1], targets.shape[1], value.device)
            moments[name].add(value, targets)

    def score(block: Block) -> None:
        inputs, targets = inputs_and_targets(block)
        row = block.row_of_token()
        for name, value in inputs.items():
            off = (targets - maps[name](value)).square()
            figures = torch.cat([off, targets, targets.square(), torch.ones_like(off[:, :1])], 1).cpu()
            if not len(sums[name]):
                sums[name] = torch.zeros(len(split.scored), figures.shape[1], dtype=torch.float64)
            sums[name].index_add_(0, row, figures)

    def read(numbers: np.ndarray, take: Callable[[Block], None]) -> None:
        part = rows[torch.from_numpy(numbers)]
        readers = [(of, where, partial(keep, name, of)) for name, (of, where) in sources.items()]
        readings = [
            (of, where, [Reader(each, len(part), rows_per_forward)])
            for of, where, each in [*readers, (sae, site, take)]
        ]
        read_all(lm, part, readings)

    with torch.no_grad():
        read(split.fit, add)
        maps |= {name: fit(each) for name, each in moments.items()}
        read(split.scored, score)
    d = linear.weights.shape[1]
    n = len(TARGETS) * d

    def prediction(sums: np.ndarray, i: int) -> Prediction:
        own = [sums[:, j * n + i * d : j * n + (i + 1) * d] for j in range(3)]
        r2 = interval(np.concatenate([*own, sums[:, -1:]], 1), mean_r2, resamples=500)
        return Prediction(r2, interval(np.stack([own[0].sum(1), own[2].sum(1)], 1)))

    return {name: {part: prediction(each.numpy(), i) for i, part in enumerate(TARGETS)} for name, each in sums.items()}


def of_missing_features(
    sae: SparseAutoencoder,
    linear: LinearMap,
    wider: SparseAutoencoder,
    blocks: Iterable[Block],
    rows: int,
) -> dict[str, Missing]:
    """Shares of the features of `wider` that `sae` lacks ("missing") and of those it has ("known"), by decoder cosine.

    `blocks` are those of `sae`, of `rows` rows.
    """
    match = match_decoders(wider.W_dec.detach().cpu().numpy(), sae.W_dec.detach().cpu().numpy())
    cosine = torch.from_numpy(match.cosine_of_a)
    groups = {"known": cosine >= KNOWN, "missing": cosine < MISSING}
    sums = {name: np.zeros((rows, 3)) for name in groups}
    directions = F.normalize(wider.W_dec.detach(), dim=1)
    length = torch.linalg.vector_norm(wider.W_dec.detach(), dim=1)
    with torch.no_grad():
        for block in blocks:
            parts: Parts = parts_of(block.x, sae.decode(block.codes, block.x), linear)
            codes = wider.encode(block.x)
            along = [sddmm(codes, part.float(), directions).double().cpu() for part in parts[3:]]
            a = (codes.values * length[codes.features]).double().cpu()
            row = block.row_of_token()[codes.row_of_entry().cpu()]
            figures = torch.stack([a * along[0], a * along[1], a.square()], 1)
            for name, group in groups.items():
                own = group[codes.features.cpu()]
                add_by_row(sums[name], row[own], figures[own])
    return {
        name: Missing(int(group.sum()), interval(sums[name][:, [0, 2]]), interval(sums[name][:, [1, 2]]))
        for name, group in groups.items()
    }
