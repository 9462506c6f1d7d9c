"""Which features are dead or under-used, and the budget of each step's allocation."""

import pytest
import torch

from saelab.sae.allocation.candidates import runs_of
from saelab.sae.allocation.capacity import expected_densities
from saelab.sae.allocation.methods import Allocation, FeatureAllocation, allocation_of
from saelab.sae.allocation.rules import FeatureChoice, MutualChoice, Rule, TokenChoice
from saelab.sae.encoder import Linear
from saelab.sae.losses import under_used
from saelab.sae.settings import AllocationSettings, AuxSettings, SaeSettings
from saelab.training.usage import Usage

F, K, TOKENS = 200, 4, 100


def usage_after(counts: torch.Tensor, settings: SaeSettings, steps: int = 120, dead_after: int = 1000) -> Usage:
    usage = Usage(settings, dead_after, torch.device("cpu"))
    for _ in range(steps):
        usage.observe(counts, TOKENS)
    return usage


def test_densities_are_means_and_silence_is_counted_in_tokens() -> None:
    usage = Usage(SaeSettings(3, 1), 250, torch.device("cpu"))
    for counts in ([5, 0, 1], [7, 0, 0], [0, 0, 0]):
        usage.observe(torch.tensor(counts), TOKENS)
    torch.testing.assert_close(usage.densities, torch.tensor([0.04, 0.0, 1 / 300], dtype=torch.float64))
    assert usage.silent_for.tolist() == [100, 300, 200]
    assert usage.dead().tolist() == [False, True, False]


def test_aux_k_targets_dead_features_and_none_targets_nothing() -> None:
    counts = torch.ones(F).long()
    counts[:7] = 0
    for name, expected in (("aux_k", 7), ("none", None)):
        targets = usage_after(counts, SaeSettings(F, K, aux=AuxSettings(name))).targets(TOKENS)
        assert (None if targets is None else int(targets.sum())) == expected


def test_aux_zipf_also_targets_features_far_below_the_curve_but_never_the_densest() -> None:
    settings = SaeSettings(F, K, aux=AuxSettings("aux_zipf", exponent=1.0, shift=5.0))
    expected = expected_densities(F, K, TOKENS, 1.0, 5.0)
    counts = (expected * 10 * TOKENS).round().long()  # ten times as large, in steps of a tenth of a token
    low = torch.tensor([150, 160, 170])
    counts[low] //= 4
    usage = usage_after(counts, settings)
    usage.densities /= 10
    targets = usage.targets(TOKENS)
    assert targets is not None
    # now they rank last, and the curve at the last ranks is still more than twice their density
    assert set(low.tolist()) <= set(targets.nonzero().squeeze(1).tolist()) and int(targets.sum()) < 10

    uniform = K / F
    dense = torch.full((F,), 1.1 * uniform, dtype=torch.float64)
    assert not under_used(dense, torch.full((F,), 1.0, dtype=torch.float64), 0.5, uniform).any()


def test_if_only_dead_features_are_under_used_aux_zipf_is_aux_k() -> None:
    counts = torch.full((F,), 2).long()
    counts[30:40] = 0
    masks = [
        usage_after(counts, SaeSettings(F, K, aux=AuxSettings(name, exponent=0.0, shift=0.0))).targets(TOKENS)
        for name in ("aux_k", "aux_zipf")
    ]
    assert masks[0] is not None and masks[1] is not None
    assert torch.equal(masks[0], masks[1]) and int(masks[0].sum()) == 10


ENCODER = Linear(torch.zeros(F, 1), torch.zeros(F))
RANK = torch.arange(1, F + 1, dtype=torch.float64)
DENSITIES = (1000 * (RANK + 3) ** -1.2).round().flip(0) / TOKENS


def made(options: AllocationSettings, steps: int = 100) -> Allocation:
    settings = SaeSettings(F, K, allocation=options)
    return allocation_of(settings)(settings, steps)


def rule_of(allocation: Allocation, step: int) -> Rule:
    return allocation.rule(step, TOKENS, DENSITIES, ENCODER)


def test_token_and_mutual_choice_do_not_change() -> None:
    token, mutual = made(AllocationSettings("token_choice")), made(AllocationSettings("mutual_choice"))
    assert rule_of(token, 7) == TokenChoice(K) and rule_of(mutual, 7) == MutualChoice(K)
    assert token.target() is None and not token.calibrated
    target = mutual.target()
    assert target is not None and target.item() == pytest.approx(K / F) and mutual.calibrated


@pytest.mark.parametrize("capacity", ["uniform", "zipf"])
def test_feature_choice_begins_after_its_share_and_spends_the_budget_exactly(capacity: str) -> None:
    allocation = made(AllocationSettings("feature_choice", capacity=capacity, after=0.3))
    assert isinstance(allocation, FeatureAllocation)
    assert rule_of(allocation, 29) == MutualChoice(K) and allocation.facts() == {"curve": None}
    total = torch.zeros(F)
    for step in range(30, 100):
        rule = rule_of(allocation, step)
        assert isinstance(rule, FeatureChoice)
        assert int(rule.capacities.sum()) == rule.total == K * TOKENS and int(rule.capacities.max()) <= TOKENS
        total += rule.capacities
    densities = allocation.target()
    assert densities.sum().item() == pytest.approx(K)
    torch.testing.assert_close(total / 70 / TOKENS, densities.float(), atol=0.002, rtol=0)
    if capacity == "zipf":  # fitted to densities of exponent 1.2 and shift 3, the densest features being the last
        assert allocation.curve is not None and allocation.curve[0] == pytest.approx(1.2, abs=0.1)
        assert bool((densities[-12:].diff() > 0).all())  # the features without ties
    else:
        torch.testing.assert_close(densities, torch.full((F,), K / F, dtype=torch.float64))


def test_the_bands_cover_every_rank_within_a_factor_of_two() -> None:
    capacities = torch.tensor([90.0, 60.5, 40.0, 9.0, 3.2, 1.5, 0.9, 0.2, 0.0])
    runs = runs_of(capacities)
    assert [start for start, _, _ in runs] == [0, *(stop for _, stop, _ in runs[:-1])] and runs[-1][1] == 9
    for start, stop, largest in runs:
        assert int(capacities[start:stop].ceil().max()) == largest
        assert bool((capacities[start:stop].ceil().clamp_min(1) >= max(1, largest // 2)).all())
