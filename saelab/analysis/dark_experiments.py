"""What is tried with the parts of the error (decomposition.py): each experiment of the paper is a function here.

cost_in_ce            what the model loses, and what each part gives back
pursued               the same dictionary with codes found by gradient pursuit
trained_on_part       a new autoencoder trained on one part
from_other_sites      the parts predicted from reconstructions at other sites
of_missing_features   how much of the features that a wider autoencoder has, and this one lacks, is in which part
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.decomposition import Blocks, Decomposition, Parts, Split, decompose, parts_of
from saelab.analysis.gradient_pursuit import gradient_pursuit
from saelab.analysis.intervals import Interval, add_by_row, interval, ratio
from saelab.analysis.least_squares import LinearMap, Moments, fit, mean_r2
from saelab.analysis.similarity import match_decoders
from saelab.analysis.spliced_loss import log_probabilities, stand_in
from saelab.encoded import Autoencoder, Block, Reader, read_all
from saelab.errors import SaelabError
from saelab.kernels import sddmm
from saelab.lm.model import LanguageModel
from saelab.lm.splice import SplicedRuns
from saelab.sae.model import Batch, SparseAutoencoder, new_autoencoder
from saelab.sae.settings import AuxSettings, SaeSettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

TARGETS = ("error", "linear", "nonlinear")
KNOWN, MISSING = 0.9, 0.7
"""Cosine with the nearest decoder row from which a feature of a wider autoencoder counts as known, and below which it
counts as missing."""


class Cost(NamedTuple):
    """CE in nats per token with x replaced at the site, at every ordinary token, and what each part gives back."""

    tokens: int
    clean: Interval
    spliced: Interval
    """With Sae(x)."""
    with_linear: Interval
    """With Sae(x) + Linear, so only Nonlinear is missing."""
    with_nonlinear: Interval
    """With Sae(x) + Nonlinear."""
    recovered_by_linear: Interval
    """(spliced - with_linear) / (spliced - clean)"""
    recovered_by_nonlinear: Interval


class Pursuit(NamedTuple):
    """FVU of the encoder's codes and of as many features per token by gradient pursuit, on the same tokens.

    The linear map of each is fitted to the same tokens, fewer than elsewhere.
    """

    tokens: int
    tokens_of_fit: int
    fvu: Interval
    fvu_pursued: Interval
    change: Interval
    """Of FVU, relative: -0.05 is 5% less."""
    fvu_nonlinear: Interval
    fvu_nonlinear_pursued: Interval
    change_of_nonlinear: Interval


class OnPart(NamedTuple):
    """An autoencoder trained on one part of the error."""

    training_tokens: int
    n_features: int
    k: int
    fvu: float
    """On the scored tokens."""
    l0: float
    never_active: int


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


@torch.no_grad()
def cost_in_ce(
    sae: Autoencoder, linear: LinearMap, lm: LanguageModel, site: str, blocks: Iterable[Block], rows: int
) -> Cost:
    """The cost on the blocks of `rows` rows. Four runs of the model, which share the layers below the site.

    Positions count if the token and the next one are ordinary. Special tokens keep their activations. Raises
    SaelabError if there is no such position.
    """
    sums, runs = np.zeros((rows, 5)), SplicedRuns(lm, site)
    for block in blocks:
        parts = parts_of(block.x, sae.decode(block.codes), linear)
        keep = lm.scored(block.rows)
        targets = block.rows.roll(-1, 1)[keep]
        row = keep.nonzero(as_tuple=True)[0].cpu() + block.first_row
        put_in = (parts.reconstruction, parts.reconstruction + parts.linear, parts.reconstruction + parts.nonlinear)
        logits = runs(block.rows, [partial(stand_in, value) for value in put_in])
        losses = [F.nll_loss(log_probabilities(keep, each), targets, reduction="none") for each in logits]
        figures = torch.stack([*losses, torch.ones_like(losses[0])], 1).double().cpu()
        add_by_row(sums, row, figures)
    if not sums[:, 4].any():
        raise SaelabError("dark_matter: no position has an ordinary token followed by another, so there is no loss")

    def recovered(by: int) -> Interval:
        return interval(sums, lambda s: ratio(np.stack([s[..., 1] - s[..., by], s[..., 1] - s[..., 0]], -1)))

    clean, spliced, with_linear, with_nonlinear = (interval(sums[:, [i, 4]]) for i in range(4))
    tokens = int(sums[:, 4].sum())
    return Cost(tokens, clean, spliced, with_linear, with_nonlinear, recovered(2), recovered(3))


def pursued(sae: SparseAutoencoder, blocks: Blocks, split: Split, tokens: int, context: int) -> Pursuit:
    """Gradient pursuit on some rows of each set, about `tokens` tokens in all.

    Memory: the activations of these tokens and two codes of each. Cost: for each token the entries of its code times
    n_features * d_in multiply-adds.
    """
    rows = max(5, tokens // context)
    few = Split(*(part[: max(2, round(share * rows))] for part, share in zip(split, (2 / 3, 1e-9, 1 / 3), strict=True)))
    own = {name: list(blocks(part)) for name, part in few._asdict().items()}
    dictionary = sae.W_dec.detach()
    other = {
        name: [
            replace(block, codes=gradient_pursuit(block.x - sae.b_dec.detach(), dictionary, block.codes.l0()))
            for block in found
        ]
        for name, found in own.items()
    }

    def result(kept: Mapping[str, list[Block]]) -> Decomposition:
        by_rows = {id(part): kept[name] for name, part in few._asdict().items()}
        return decompose(sae, lambda numbers: by_rows[id(numbers)], few)[0]

    before, after = result(own), result(other)
    row = np.unique(before.token // context, return_inverse=True)[1]

    def change(name: str) -> Interval:
        sums = np.zeros((row.max() + 1, 2))
        add_by_row(sums, row, np.stack([getattr(after, name) ** 2, getattr(before, name) ** 2], 1))
        return interval(sums, lambda s: ratio(s) - 1)

    return Pursuit(
        before.tokens,
        before.tokens_of_fit,
        before.fvu,
        after.fvu,
        change("error_norm"),
        before.fvu_nonlinear,
        after.fvu_nonlinear,
        change("nonlinear_norm"),
    )


def trained_on_part(
    which: str, sae: Autoencoder, linear: LinearMap, blocks: Blocks, split: Split, tokens: int, seed: int = 0
) -> OnPart:
    """A TopK autoencoder trained on the part `which`, "linear" or "nonlinear".

    As in the paper: k 32 (or d_in / 8 if that is less), 16 d_in features, no auxiliary loss. It trains on the
    tokens that the linear map was fitted to, in random order, as often as `tokens` asks for. Memory: this part of all
    these tokens, float32.
    """

    def part(rows: np.ndarray) -> Iterator[Tensor]:
        for block in blocks(rows):
            with torch.no_grad():
                yield getattr(parts_of(block.x, sae.decode(block.codes), linear), which).float()

    x = torch.cat(list(part(split.fit)))
    scale = (x.shape[1] / x.square().sum(1).mean()).sqrt()
    x *= scale
    batch = min(1024, len(x))
    settings = TrainingSettings(tokens=max(tokens, batch), batch=batch, lr=2e-3)
    n_features = 16 * x.shape[1]
    shape = SaeSettings(n_features=n_features, k=max(1, min(32, x.shape[1] // 8)), aux=AuxSettings("none"))
    generator = torch.Generator().manual_seed(seed)
    new = new_autoencoder(shape, x[torch.randperm(len(x), generator=generator)[:8192].to(x.device)], seed=seed)
    trainer = Trainer(new, settings, shape)
    while not trainer.finished:
        for numbers in torch.randperm(len(x), generator=generator).to(x.device).split(batch):
            if len(numbers) == batch and not trainer.finished:
                trainer.step(Batch(x[numbers]))
    trainer.release()
    del x

    error = squared = active = seen = 0.0
    counts = torch.zeros(n_features, dtype=torch.long)
    total = torch.zeros(linear.weights.shape[1], dtype=torch.float64)
    for values in part(split.scored):
        values *= scale
        codes = new.encode(values)
        with torch.no_grad():
            error += (values.double() - new.decode(codes).double()).square().sum().item()
        squared += values.double().square().sum().item()
        total += values.double().sum(0).cpu()
        active, seen = active + codes.nnz, seen + len(values)
        counts += codes.firing_counts().cpu()
    fvu = error / (squared - total.square().sum().item() / seen)
    return OnPart(trainer.tokens, n_features, shape.k, fvu, active / seen, int((counts == 0).sum()))


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
        found[name] = of.decode(block.codes).double()

    def inputs_and_targets(block: Block) -> tuple[dict[str, Tensor], Tensor]:
        parts = parts_of(block.x, sae.decode(block.codes), linear)
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
            parts: Parts = parts_of(block.x, sae.decode(block.codes), linear)
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
