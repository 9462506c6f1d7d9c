"""Spreads, rank correlations and dealt budgets equal their dense formulas."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from saelab.analysis.adaptive import (
    SELECTIONS,
    PerToken,
    _largest,
    deal,
    rank_correlation,
    spread_over_features,
    spread_over_tokens,
)
from saelab.analysis.result import rebuilt, stored, with_arrays
from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.sae.initial import initialise
from saelab.sae.model import SparseAutoencoder

ROWS, CONTEXT, D_IN, F, K = 6, 11, 8, 24, 4


def autoencoder(threshold: float | None = None) -> SparseAutoencoder:
    torch.manual_seed(1)
    sae = SparseAutoencoder(D_IN, F, K)
    initialise(sae, torch.randn(400, D_IN))
    if threshold is not None:
        sae.threshold = torch.tensor([threshold])
    return sae.requires_grad_(False)


def blocks(sae: SparseAutoencoder) -> list[Block]:
    """Two rows each; the first position of a row is special, and tokens differ in norm."""
    torch.manual_seed(2)
    found = []
    for first in range(0, ROWS, 2):
        row, position = torch.ones(2, CONTEXT - 1).nonzero(as_tuple=True)
        x = torch.randn(len(row), D_IN) * torch.rand(len(row), 1).add(0.3) + 0.5
        places = (first + row) * CONTEXT + position + 1
        found.append(Block(torch.zeros(2, CONTEXT, dtype=torch.long), first, places, x, sae.encode(x)))
    return found


def per_token(sae: SparseAutoencoder) -> dict[str, np.ndarray]:
    found = PerToken(sae, ROWS)
    for block in blocks(sae):
        found.add(block)
    return found.arrays()


def whole(sae: SparseAutoencoder) -> tuple[Tensor, Tensor]:
    """x and dense codes of all tokens."""
    parts = blocks(sae)
    return torch.cat([b.x for b in parts]), torch.cat([b.codes.to_dense() for b in parts])


def test_numbers_errors_and_counts_per_token_are_the_dense_ones() -> None:
    sae = autoencoder(0.2)
    found, (x, codes) = per_token(sae), whole(sae)
    error = (x - codes @ sae.W_dec - sae.b_dec).double().square().sum(1)
    spread = (x - x.mean(0)).double().square().sum(1).mean()
    np.testing.assert_allclose(found["error"], error / spread, rtol=1e-5)
    np.testing.assert_array_equal(found["l0"], (codes > 0).sum(1))
    np.testing.assert_array_equal(found["counts"], (codes > 0).sum(0))
    np.testing.assert_array_equal(found["row"], np.repeat(np.arange(ROWS), CONTEXT - 1))
    by_row = (codes > 0).view(ROWS, -1, F).sum(1)
    numbers = np.random.default_rng(0).multinomial(ROWS, np.full(ROWS, 1 / ROWS), 200)
    np.testing.assert_array_equal(found["drawn"], numbers @ by_row.numpy())


def test_a_spread_is_its_dense_formula_and_its_interval_that_of_repeated_rows() -> None:
    numbers = np.random.default_rng(0)
    values, row = numbers.gamma(1.0, size=90), np.repeat(np.arange(30), 3)
    found = spread_over_tokens("made up", values, row, 30)

    def dense(v: np.ndarray) -> tuple[float, float]:
        return float(np.abs(v[:, None] - v).mean() / (2 * v.mean())), float(np.sort(v)[-len(v) // 10 :].sum() / v.sum())

    assert (found.gini.value, found.top_tenth.value) == pytest.approx(dense(values))
    assert found.mean.value == pytest.approx(values.mean()) and found.deviation.value == pytest.approx(values.std())
    assert found.quantiles[2] == pytest.approx(np.median(values))
    assert found.lorenz[90] == pytest.approx(1 - found.top_tenth.value)
    drawn = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), 200)
    slow = [dense(np.concatenate([values[row == r] for r in np.repeat(np.arange(30), each)]))[0] for each in drawn]
    np.testing.assert_allclose(found.gini[1:], np.quantile(slow, [0.025, 0.975]))
    equal = spread_over_tokens("equal", np.full(90, 3.0), row, 30)
    assert equal.gini == pytest.approx((0, 0, 0), abs=1e-12) and equal.top_tenth.value == pytest.approx(0.1)


def test_a_spread_over_features_has_intervals_around_the_figure() -> None:
    found = per_token(autoencoder(0.2))
    spread = spread_over_features("tokens per feature", found["counts"], found["drawn"])
    v = found["counts"].astype(float)
    assert spread.gini.value == pytest.approx(np.abs(v[:, None] - v).mean() / (2 * v.mean()))
    assert spread.gini.low < spread.gini.value < spread.gini.high and spread.n == F
    assert "tokens per feature" in repr(spread) and len(spread.plot().data) == 2
    figures, arrays = stored(spread)
    assert rebuilt(type(spread), with_arrays(figures, arrays)).gini == spread.gini


def test_the_rank_correlation_is_spearmans() -> None:
    numbers = np.random.default_rng(0)
    a = numbers.integers(0, 9, 400)  # ties
    b, row = a + numbers.normal(size=400), np.repeat(np.arange(40), 10)
    found = rank_correlation(a, b, row, 40)
    assert found.value == pytest.approx(spearmanr(a, b).statistic) and found.low < found.value < found.high
    assert np.isnan(rank_correlation(np.ones(400), b, row, 40).value)


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_dealt_budgets_have_the_fvu_of_dense_masks(threshold: float | None) -> None:
    sae = autoencoder(threshold)
    l0 = per_token(sae)["l0"]
    found, (x, codes) = deal(sae, blocks(sae), ROWS, l0, seed=3), whole(sae)
    pre = sae.pre_activations(x).clamp_min(0)
    numbers = np.random.default_rng(3)
    even = np.full(len(l0), l0.sum() // len(l0))
    even[numbers.permutation(len(l0))[: l0.sum() % len(l0)]] += 1
    rank = pre.argsort(1, descending=True).argsort(1)
    masks = {"own": codes > 0, "constant": rank < torch.tensor(even)[:, None]}
    masks["dealt"] = rank < torch.tensor(numbers.permutation(l0))[:, None]
    size = 2 * (CONTEXT - 1)
    bars = [
        p.flatten().sort(descending=True).values[int((c > 0).sum()) - 1]
        for p, c in zip(pre.split(size), codes.split(size), strict=True)
    ]
    masks["batch-wide"] = pre >= torch.stack(bars).repeat_interleave(size)[:, None]
    for name in SELECTIONS:
        error = (x - (pre * masks[name]) @ sae.W_dec - sae.b_dec).square().sum()
        assert found.fvu[name].value == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-5)
        assert found.l0[name].value == pytest.approx(l0.mean(), rel=0.02)
    assert found.gain.value == pytest.approx(found.fvu["constant"].value - found.fvu["own"].value)
    assert found.gain_dealt.value == pytest.approx(found.fvu["constant"].value - found.fvu["dealt"].value)
    if threshold is None:  # every token has k already, so there is nothing to deal
        assert found.gain.value == pytest.approx(0, abs=1e-7) and found.gain_dealt.value == pytest.approx(0, abs=1e-7)
    else:
        assert found.gain.value > found.gain_dealt.value  # in these data the norms, so the difficulties, differ
    assert "gain over constant" in found.to_frame().index[-2] and len(found.plot().data) == 1


def test_text_without_ordinary_tokens_is_an_error() -> None:
    sae = autoencoder()
    with pytest.raises(SaelabError, match="ordinary token"):
        PerToken(sae, ROWS).arrays()
    with pytest.raises(SaelabError, match="ordinary token"):
        deal(sae, [], ROWS, np.zeros(0, np.int64))


def test_the_largest_entries_of_a_token_are_positive() -> None:
    pre = torch.tensor([[3.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    codes = _largest(pre, torch.tensor([2, 3]))
    assert codes.to_dense().tolist() == [[3, 0, 0, 2], [0, 0, 0, 5]]
