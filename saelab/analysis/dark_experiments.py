"""What is tried with the parts of the error (parts.py): each experiment of the paper is a function.

cost_in_ce            what the model loses, and what each part gives back
pursued               the same dictionary with codes found by gradient pursuit
trained_on_part       a new autoencoder trained on one part

dark_relations.py has those that take other autoencoders.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.affine import check_affine
from saelab.analysis.decomposition import decompose
from saelab.analysis.gradient_pursuit import gradient_pursuit
from saelab.analysis.intervals import Interval, add_by_row, interval, ratio
from saelab.analysis.least_squares import LinearMap
from saelab.analysis.parts import Blocks, Decomposition, Split, parts_of
from saelab.analysis.spliced_loss import log_probabilities, stand_in
from saelab.encoded import Autoencoder, Block
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.lm.splice import SplicedRuns
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.new import new_autoencoder
from saelab.sae.settings import AuxSettings, SaeSettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer


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
    """Relative change of FVU: -0.05 is 5% less."""
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
        parts = parts_of(block.x, sae.decode(block.codes, block.x), linear)
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
    check_affine(sae, "dark_matter: pursuit_tokens")
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
                yield getattr(parts_of(block.x, sae.decode(block.codes, block.x), linear), which).float()

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
