"""Dead features: every figure equals its dense formula, and planted reasons are found."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from saelab.analysis.dead import REASONS, Why, dead, silent_on_half, why_dead
from saelab.analysis.settings import DeadSettings
from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.sae.allocation.capacity import expected_densities, fit_zipf
from saelab.sae.model import SparseAutoencoder

D_IN, F, K, ROWS, CONTEXT = 24, 96, 4, 40, 9


def made_up(seed: int = 0, threshold: bool = False) -> tuple[SparseAutoencoder, Tensor]:
    """An autoencoder of which some features are never active, and activations ``[ROWS, CONTEXT, D_IN]``."""
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(D_IN, F, K)
    with torch.no_grad():
        for rows in (sae.W_enc, sae.W_dec):
            rows.copy_(torch.nn.functional.normalize(torch.randn(F, D_IN, generator=generator), dim=1))
        sae.b_enc.copy_(-torch.linspace(0, 3, F))
        sae.b_dec.copy_(torch.randn(D_IN, generator=generator) / 4)
    if threshold:
        sae.threshold = torch.rand(F, generator=generator)
    return sae, torch.randn(ROWS, CONTEXT, D_IN, generator=generator) + sae.b_dec.detach()


def blocks(sae: SparseAutoencoder, x: Tensor, size: int) -> Iterator[Block]:
    """Blocks of `size` rows; the first token of a row is special, and so are all of row 3."""
    for first in range(0, len(x), size):
        part = x[first : first + size]
        keep = torch.ones(part.shape[:2], dtype=torch.bool)
        keep[:, 0] = False
        if first <= 3 < first + size:
            keep[3 - first] = False
        row, position = keep.nonzero(as_tuple=True)
        here = part[keep]
        ids = torch.zeros(part.shape[:2], dtype=torch.long)
        if len(here):
            yield Block(ids, first, (row + first) * CONTEXT + position, here, sae.encode(here))


@pytest.mark.parametrize("threshold", [False, True])
def test_the_figures_equal_their_dense_formulas(threshold: bool) -> None:
    sae, x = made_up(threshold=threshold)
    settings = DeadSettings(dense=0.15)
    found = dead(sae, blocks(sae, x, 7), ROWS, settings, site="here")
    ordinary = torch.cat([x[:3, 1:], x[4:, 1:]])
    pre = (ordinary - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    if threshold:
        active = pre > sae.threshold
    else:
        active = (pre >= pre.topk(K, -1).values[..., -1:]) & (pre > 0)
    density = active.double().mean((0, 1))
    assert found.tokens == 39 * 8 and found.site == "here" and found.n_features == F
    assert found.density == pytest.approx(density.numpy(), abs=1e-12)
    assert found.l0.value == pytest.approx(density.sum().item())
    never = (density == 0).nonzero().squeeze(1)
    assert found.dead == len(never) > 5 and found.dead_features.tolist() == never.tolist()
    assert found.dense.value == (density > 0.15).sum() > 0

    fit = fit_zipf(density)
    expected = expected_densities(F, density.sum().item(), 10**6, fit.exponent, fit.shift)
    assert found.expected == pytest.approx(expected.numpy())
    order = density.sort(descending=True, stable=True).indices
    few = torch.zeros(F, dtype=torch.bool)
    few[order] = density[order] < 0.5 * expected
    few &= (density > 0) & (density < density.sum() / F)
    assert found.is_under_used.tolist() == few.tolist() and found.under_used.value == few.sum() > 0
    living = density[order][: F - len(never)]
    last = math.ceil(0.85 * len(living))
    tail = (living[last:] / expected[last : len(living)]).log10().mean()
    assert found.curve.tail == pytest.approx(tail.item()) and found.curve.r2 == pytest.approx(fit.r2)

    flat, mean = ordinary.reshape(-1, D_IN).double(), ordinary.reshape(-1, D_IN).double().mean(0)
    covariance = (flat - mean).T @ (flat - mean) / len(flat)
    smallest = torch.where(active, pre, torch.inf).amin(-1)
    bar = sae.threshold if threshold else smallest[smallest.isfinite()].mean()[None]
    assert bar is not None
    why = why_dead(sae, density > 0, mean, covariance, bar, settings.duplicate)
    assert found.reason.tolist() == why.reason.tolist() and sum(found.reasons.values()) == found.dead
    assert found.needed == pytest.approx(why.needed, rel=1e-5) and found.twin.tolist() == why.twin.tolist()
    w = sae.W_enc[never].double()
    spread = ((flat @ w.T).var(0, correction=0)).sqrt()
    needed = (bar.expand(F)[never] - ((flat @ w.T).mean(0) - w @ sae.b_dec.double() + sae.b_enc[never])) / spread
    assert found.needed == pytest.approx(needed.detach().numpy(), rel=1e-5)


def test_blocks_of_any_size_give_the_same_and_intervals_are_those_of_rows() -> None:
    sae, x = made_up()
    one, many = (dead(sae, blocks(sae, x, size), ROWS) for size in (ROWS, 3))
    assert one.l0 == pytest.approx(many.l0) and one.under_used == many.under_used and one.reasons == many.reasons
    assert one.dead_on_half == many.dead_on_half and one.needed == pytest.approx(many.needed, rel=1e-4)
    assert one.dense.low <= one.dense.value <= one.dense.high and one.curve.exponent.low < one.curve.exponent.high
    with pytest.raises(SaelabError, match="no ordinary token"):
        dead(sae, [], ROWS)


def test_dead_on_half_of_the_rows_is_the_mean_over_halves() -> None:
    numbers = np.random.default_rng(0)
    active = numbers.random((11, 30)) < 0.15
    halves = [numbers.choice(11, 5, replace=False) for _ in range(6000)]
    mean = np.mean([(~active[half].any(0)).sum() for half in halves])
    assert silent_on_half(torch.from_numpy(active.sum(0)), 11) == pytest.approx(mean, abs=0.1)


def planted(reason: str, seed: int) -> tuple[Why, int]:
    """The reasons found of 100 features that are dead because of `reason`, of 800 others that live; and their number.

    Activations have a mean of length 6 and covariance diag(lengths): pre-activations of the living need 1 to 4
    standard deviations to be active.
    """
    generator = torch.Generator().manual_seed(seed)
    d, n, living = 48, 900, 800

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = 0.5 + rand(d)
    mean = torch.nn.functional.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0) * 6
    sae = SparseAutoencoder(d, n, 8)
    W_enc, W_dec = (
        torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    direction = mean / mean.norm()
    W_enc = torch.nn.functional.normalize(W_enc - 0.98 * torch.outer(W_enc @ direction, direction), dim=1)
    W_enc *= 0.8 + 0.4 * rand(n, 1)
    b_enc = -0.6 * rand(n)
    few = slice(living, n)
    if reason == "bias":
        b_enc[few] = -8 - 4 * rand(n - living)
    elif reason == "mean":
        W_enc[few] -= direction * (1 + 0.5 * rand(n - living, 1))
    elif reason == "norm":
        W_enc[few] *= 0.02 + 0.1 * rand(n - living, 1)
    elif reason == "duplicate":
        W_dec[few] = W_dec[: n - living] + 0.03 * torch.randn(n - living, d, generator=generator, dtype=torch.float64)
        W_enc[few] = 0.9 * W_enc[: n - living]
    elif reason == "several":
        b_enc[few] = -8 - 4 * rand(n - living)
        W_enc[few] -= direction * (1.5 + 0.5 * rand(n - living, 1))
    with torch.no_grad():
        sae.W_enc.copy_(W_enc), sae.W_dec.copy_(W_dec), sae.b_enc.copy_(b_enc), sae.b_dec.zero_()
    alive = torch.arange(n) < living
    found = why_dead(sae, alive, mean, torch.diag(lengths.square()), torch.tensor([1.0]), 0.9)
    return found, n - living


@pytest.mark.parametrize("reason", REASONS)
def test_planted_reasons_are_found(reason: str) -> None:
    for seed in range(3):
        why, number = planted(reason, seed)
        assert (why.reason == REASONS.index(reason)).sum() >= 0.95 * number, np.bincount(why.reason)
        if reason == "duplicate":
            assert (why.twin == np.arange(number)).all() and why.twin_cosine.min() > 0.9


def test_reasons_are_known_when_nothing_lives_or_nothing_is_dead() -> None:
    sae, _ = made_up()
    moments = torch.zeros(D_IN), torch.eye(D_IN), torch.tensor([1.0])
    nothing = why_dead(sae, torch.zeros(F, dtype=torch.bool), *moments, 0.9)
    assert len(nothing.reason) == F and (nothing.twin == -1).all()
    assert {REASONS[i] for i in nothing.reason} == {"rare"}
    assert len(why_dead(sae, torch.ones(F, dtype=torch.bool), *moments, 0.9).reason) == 0
