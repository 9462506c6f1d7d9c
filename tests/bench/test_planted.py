"""Autoencoders on activations whose features are known: every combination trains, and what is planted is found."""

import itertools
import math
import re
from dataclasses import replace

import planted as script
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from planted_truth import (
    Planted,
    Sample,
    Scores,
    cosine_similarity,
    draw,
    largest_matching,
    learn,
    plant,
    random_dictionary,
    score,
    set_l0,
)

from saelab.sae.settings import AllocationSettings, SaeSettings
from saelab.training.settings import TrainingSettings

D, N_TRUE, K, TOKENS = 32, 64, 3, 60_000


@pytest.fixture(scope="module")
def small() -> tuple[Planted, Sample]:
    planted = plant(D, N_TRUE, K, exponent=0.7, shift=5.0, noise=0.1, seed=1)
    return planted, draw(planted, TOKENS, 2)


def test_activations_are_what_was_planted(small: tuple[Planted, Sample]) -> None:
    planted, data = small
    assert planted.directions.norm(dim=1) == pytest.approx(1, abs=1e-5)
    assert float(planted.probabilities.sum()) == pytest.approx(K) and (planted.probabilities.diff() <= 0).all()
    assert data.x.square().sum(1).mean() == pytest.approx(D, rel=0.03)
    again = draw(planted, TOKENS, 2)
    assert torch.equal(again.x, data.x) and torch.equal(again.labels, data.labels)
    assert not torch.equal(draw(planted, 100_000, 3).x, data.x)


def test_gradients_are_those_of_the_readout(small: tuple[Planted, Sample]) -> None:
    planted, data = small
    x = data.x[:50].clone().requires_grad_(True)
    F.cross_entropy(x @ planted.readout, data.labels[:50], reduction="sum").backward()
    torch.testing.assert_close(x.grad, data.gradients[:50], atol=1e-5, rtol=1e-4)
    assert F.cross_entropy(data.x @ planted.readout, data.labels) < math.log(32) - 0.5  # the labels can be learnt


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_the_matching_is_the_largest_of_all(n: int, m: int, data: st.DataObject) -> None:
    allowed = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=n, max_size=n)))
    found = largest_matching(allowed)
    assert all(allowed[row, column] for row, column in found.items()) and len(set(found.values())) == len(found)
    padded = F.pad(allowed, (0, n))  # columns that stand for "no partner"
    best = max(sum(int(padded[i, c]) for i, c in enumerate(p)) for p in itertools.permutations(range(m + n), n))
    assert len(found) == best


def test_a_permuted_dictionary_is_recovered_and_a_random_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(300, 64, generator=generator), dim=1)
    permuted = 2.5 * directions[torch.randperm(300, generator=generator)]
    assert len(largest_matching(cosine_similarity(directions, permuted) > 0.9)) == 300
    twice = torch.cat([permuted[:100], permuted[:100], permuted[:100]])  # one partner each, however many copies
    assert len(largest_matching(cosine_similarity(directions, twice) > 0.9)) == 100
    other = torch.randn(3000, 64, generator=generator)
    assert len(largest_matching(cosine_similarity(directions, other) > 0.9)) < 3


def trained_scores(small: tuple[Planted, Sample], settings: SaeSettings) -> Scores:
    planted, data = small
    sae, densities, _ = learn(settings, TrainingSettings(TOKENS, 256, 1e-2), data, seed=0)
    k = set_l0(sae, densities, K, draw(planted, 8192, 5).x)
    return score(sae, planted, draw(planted, 20_000, 4), k)


@pytest.mark.parametrize("allocation", ["token_choice", "mutual_choice", "feature_choice"])
def test_training_finds_most_of_what_is_planted_at_the_l0_asked_for(
    small: tuple[Planted, Sample], allocation: str
) -> None:
    planted, data = small
    settings = SaeSettings(N_TRUE, K, allocation=AllocationSettings(allocation))
    found = trained_scores(small, settings)
    random = random_dictionary(settings, data, seed=0)
    chance = score(random, planted, draw(planted, 20_000, 4), set_l0(random, None, K, data.x[:4096]))
    assert found.l0 == pytest.approx(K, rel=0.03)
    assert found.recovered > 0.7 and chance.recovered < 0.1
    assert found.mean_cosine > chance.mean_cosine + 0.2
    assert found.fvu < 0.5 * chance.fvu and found.delta_ce < chance.delta_ce


def test_the_random_start_is_not_the_planted_dictionary() -> None:
    """Equal seeds must not give the autoencoder the planted directions."""
    for seed in range(3):
        planted = plant(D, N_TRUE, K, exponent=1.0, shift=5.0, noise=0.1, seed=seed)
        start = random_dictionary(SaeSettings(N_TRUE, K), draw(planted, 500, seed), seed)
        assert len(largest_matching(cosine_similarity(planted.directions, start.W_dec) > 0.9)) == 0


def test_verdicts_come_from_the_numbers() -> None:
    def made(**changed: float) -> Scores:
        usual = Scores(
            k=8, l0=8, recovered=0.8, mean_cosine=0.9, fvu=0.3, dead=0.2, under_used=0.3, delta_ce=0.1, tokens=100
        )
        return replace(usual, **changed)  # type: ignore[arg-type]

    table = {name: [made(), made()] for name in (*script.methods(16, 8), script.RANDOM)}
    *equal, chance = script.comparisons(table)
    assert {comparison.verdict for comparison in equal} == {"not shown"}
    assert chance.verdict == "not shown (the opposite in every seed)"
    table["mutual choice; aux_k"] = [made(fvu=0.2), made(fvu=0.25)]
    table["mutual choice; none"] = [made(fvu=0.4), made(fvu=0.35)]
    table["mutual choice; aux_zipf"] = [made(fvu=0.2), made(fvu=0.35)]
    table[script.RANDOM] = [made(recovered=0.07), made(recovered=0.0)]
    verdicts = {c.claim: c.verdict for c in script.comparisons(table)}
    assert verdicts["FVU: mutual choice; aux_k < token choice; aux_k"] == "shown"
    assert verdicts["FVU: mutual choice; none < token choice; none"].endswith("(the opposite in every seed)")
    assert verdicts["FVU: mutual choice; aux_zipf < token choice; aux_zipf"] == "not shown"
    assert verdicts[f"recovered: {script.RANDOM} < a tenth of the worst trained method"] == "shown"
    text = script.report(table, script.USUAL, 1000)
    assert len(re.findall(r"\| +shown \|", text)) == 2 and "L0 further than 2% from 8: none." in text
    table["token choice; none"][0] = made(l0=8.5)
    assert "token choice; none (8.50, seed 0)" in script.report(table, script.USUAL, 1000)
