"""Dead features: every figure equals its dense formula, and planted reasons are found."""

import copy
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
        if first <= 3 < first + len(part):
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

    smallest = torch.where(active, pre, torch.inf).amin(-1)
    bar = sae.threshold if threshold else smallest[smallest.isfinite()].mean()[None]
    assert bar is not None
    highest = pre.amax((0, 1))
    why = why_dead(sae, density > 0, ordinary.mean((0, 1)), highest, bar, settings.duplicate)
    assert found.reason.tolist() == why.reason.tolist() and sum(found.reasons.values()) == found.dead
    assert found.lacking == pytest.approx((bar.expand(F) - highest)[never].detach().numpy(), rel=1e-4, abs=1e-5)
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec[never][:, None], sae.W_dec[density > 0], dim=2)
    assert found.twin.tolist() == (density > 0).nonzero().squeeze(1)[cosines.argmax(1)].tolist()


def test_a_changed_feature_reaches_what_its_reason_says() -> None:
    """The counterfactual of each reason, made true in the weights, makes the feature exceed the bar on the text."""
    sae, x = made_up(threshold=True)
    found = dead(sae, blocks(sae, x, 7), ROWS)
    ordinary = torch.cat([x[:3, 1:], x[4:, 1:]])
    mean, alive = ordinary.mean((0, 1)), torch.from_numpy(found.density > 0)
    w, b, shift = sae.W_enc.detach(), sae.b_enc.detach(), sae.W_enc.detach() @ (mean - sae.b_dec.detach())
    usual_b, usual_shift = b[alive].median(), shift[alive].median()
    assert found.reasons["bias"] > 3 and sae.threshold is not None
    for feature, code in zip(found.dead_features.tolist(), found.reason.tolist(), strict=True):
        along = ((ordinary - mean) @ w[feature]).max()
        own, bar = along + shift[feature] + b[feature], sae.threshold[feature]
        assert (own > bar) == (REASONS[code] == "crowded")
        if REASONS[code] == "bias":
            assert along + shift[feature] + usual_b > bar
        elif REASONS[code] in ("mean", "direction"):
            assert along + shift[feature] + usual_b <= bar
            assert (along + usual_shift + b[feature] > bar) == (REASONS[code] == "mean")


def test_reasons_of_a_crosscoder_do_not_depend_on_the_scales_of_its_sites() -> None:
    sae, x = made_up(threshold=True)
    ordinary = torch.cat([x[:3, 1:], x[4:, 1:]]).flatten(0, 1)
    assert sae.threshold is not None
    alive = (sae.pre_activations(ordinary) > sae.threshold).any(0)
    sae.W_enc.data[~alive] *= 0.2
    sae.b_enc.data[~alive] = sae.b_enc[alive].median().item()

    def why(factors: torch.Tensor) -> Why:
        scaled = copy.deepcopy(sae)
        scaled.W_enc.data.mul_(factors)
        for table in (scaled.W_dec, scaled.b_dec):
            table.data.div_(factors)
        found = ordinary / factors
        highest = scaled.pre_activations(found).amax(0)
        scaled.site_widths, scaled.metadata = widths, {"saelab": {"input_scale": factors[[0, -1]].tolist()}}
        return why_dead(scaled, alive, found.mean(0), highest, sae.threshold, 0.9)

    widths = (sae.d_in // 2, sae.d_in - sae.d_in // 2)
    one, other = (why(torch.tensor(scales).repeat_interleave(torch.tensor(widths))) for scales in ([1.0, 1], [1, 1e-3]))
    assert one.reason.tolist() == other.reason.tolist() and one.twin.tolist() == other.twin.tolist()
    assert one.twin_cosine == pytest.approx(other.twin_cosine, abs=1e-5)
    assert one.reason.tolist().count(REASONS.index("norm")) > 2


def test_blocks_of_any_size_give_the_same_and_intervals_are_those_of_rows() -> None:
    sae, x = made_up()
    one, many = (dead(sae, blocks(sae, x, size), ROWS) for size in (ROWS, 3))
    assert one.l0 == pytest.approx(many.l0) and one.under_used == many.under_used and one.reasons == many.reasons
    assert one.dead_on_half == many.dead_on_half and one.lacking == pytest.approx(many.lacking, rel=1e-4, abs=1e-5)
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
    """The reasons found of 100 features that are dead because of `reason`, of 900; and their number.

    The encoder rows of the living lie along 800 directions of the tokens, across their mean, of length 6.
    """
    generator = torch.Generator().manual_seed(seed)
    d, n, living = 64, 900, 800

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    direction = unit(d)
    outside = torch.nn.functional.one_hot(torch.tensor(d - 1), d).float()  # where tokens have only noise
    direction[-1] = 0
    rows = unit(living, d) * (1 - outside)
    directions = torch.nn.functional.normalize(rows - torch.outer(rows @ direction, direction) / direction.norm() ** 2)
    strength = torch.where(rand(4000, living) < 0.01, 3 + 3 * rand(4000, living), 0.0)
    x = strength @ directions + 6 * direction
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    few, some = slice(living, n), n - living
    W_enc = torch.cat([directions, directions[:some]]) * (0.8 + 0.4 * rand(n, 1))
    W_dec, b_enc = torch.cat([directions, unit(some, d)]), -1 - 0.6 * rand(n)
    if reason == "bias":
        b_enc[few] = -14 - 4 * rand(some)
    elif reason == "mean":
        W_enc[few] -= direction * (2.5 + 0.5 * rand(some, 1))
    elif reason == "norm":
        W_enc[few] *= 0.02 + 0.15 * rand(some, 1)
    elif reason == "duplicate":
        W_dec[few] = directions[:some] + 0.03 * torch.randn(some, d, generator=generator)
        b_enc[few] = -14.0
    elif reason == "several":
        b_enc[few] = -14 - 4 * rand(some)
        W_enc[few] -= direction * (2.5 + 0.5 * rand(some, 1))
    elif reason == "direction":
        W_enc[few] = outside * (0.8 + 0.4 * rand(some, 1))
    sae = SparseAutoencoder(d, n, 8)
    with torch.no_grad():
        for parameter, value in ((sae.W_enc, W_enc), (sae.W_dec, W_dec), (sae.b_enc, b_enc)):
            parameter.copy_(value)
        sae.b_dec.zero_()
    alive = torch.arange(n) < living
    return why_dead(sae, alive, x.mean(0), sae.pre_activations(x).amax(0), torch.tensor([1.0]), 0.9), some


@pytest.mark.parametrize("reason", REASONS)
def test_planted_reasons_are_found(reason: str) -> None:
    for seed in range(3):
        why, number = planted(reason, seed)
        assert (why.reason == REASONS.index(reason)).sum() >= 0.95 * number, np.bincount(why.reason)
        if reason == "duplicate":
            assert (why.twin == np.arange(number)).all() and why.twin_cosine.min() > 0.9


def test_reasons_are_known_when_nothing_lives_or_nothing_is_dead() -> None:
    sae, x = made_up()
    highest = sae.pre_activations(x.flatten(0, 1)).amax(0)
    moments = x.mean((0, 1)), highest, torch.tensor([1.0])
    nothing = why_dead(sae, torch.zeros(F, dtype=torch.bool), *moments, 0.9)
    assert len(nothing.reason) == F and (nothing.twin == -1).all()
    expected = ["crowded" if each > 1 else "direction" for each in highest.tolist()]
    assert [REASONS[i] for i in nothing.reason] == expected
    assert len(why_dead(sae, torch.ones(F, dtype=torch.bool), *moments, 0.9).reason) == 0
