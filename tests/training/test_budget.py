"""Who is dead or under-used, and what each step's allocation may spend."""

import pytest
import torch

from saelab.sae.allocation.capacity import expected_densities
from saelab.sae.allocation.rules import FeatureChoice, MutualChoice, TokenChoice
from saelab.sae.losses import under_used
from saelab.sae.settings import AllocationSettings, AuxSettings, SaeSettings
from saelab.training.budget import Budget, Usage, _runs

F, K, TOKENS = 200, 4, 100


def usage_after(counts: torch.Tensor, settings: SaeSettings, steps: int = 120, dead_after: int = 1000) -> Usage:
    usage = Usage(F, settings, dead_after, torch.device("cpu"))
    for _ in range(steps):
        usage.observe(counts, TOKENS)
    return usage


def test_densities_are_means_and_silence_is_counted_in_tokens() -> None:
    usage = Usage(3, SaeSettings(3, 1), 250, torch.device("cpu"))
    for counts in ([5, 0, 1], [7, 0, 0], [0, 0, 0]):
        usage.observe(torch.tensor(counts), TOKENS)
    torch.testing.assert_close(usage.densities, torch.tensor([0.04, 0.0, 1 / 300], dtype=torch.float64))
    assert usage.silent_for.tolist() == [100, 300, 200]
    assert usage.dead().tolist() == [False, True, False]


def test_aux_k_is_for_the_dead_and_none_for_nobody() -> None:
    counts = torch.ones(F).long()
    counts[:7] = 0
    for name, expected in (("aux_k", 7), ("none", None)):
        wanted = usage_after(counts, SaeSettings(F, K, aux=AuxSettings(name))).wanted(TOKENS)
        assert (None if wanted is None else int(wanted.sum())) == expected


def test_aux_zipf_is_also_for_features_far_below_the_curve_but_never_for_the_densest() -> None:
    settings = SaeSettings(F, K, aux=AuxSettings("aux_zipf", exponent=1.0, shift=5.0))
    expected = expected_densities(F, K, TOKENS, 1.0, 5.0)
    counts = (expected * 10 * TOKENS).round().long()  # ten times as large, in steps of a tenth of a token
    low = torch.tensor([150, 160, 170])
    counts[low] //= 4
    usage = usage_after(counts, settings)
    usage.densities /= 10
    wanted = usage.wanted(TOKENS)
    assert wanted is not None
    # having sunk, they rank last, where the curve expects less: still more than twice what they have
    assert set(low.tolist()) <= set(wanted.nonzero().squeeze(1).tolist()) and int(wanted.sum()) < 10

    uniform = K / F
    dense = torch.full((F,), 1.1 * uniform, dtype=torch.float64)
    assert not under_used(dense, torch.full((F,), 1.0, dtype=torch.float64), 0.5, uniform).any()


def test_where_the_under_used_are_the_dead_aux_zipf_is_aux_k() -> None:
    counts = torch.full((F,), 2).long()
    counts[30:40] = 0
    masks = [
        usage_after(counts, SaeSettings(F, K, aux=AuxSettings(name, exponent=0.0, shift=0.0))).wanted(TOKENS)
        for name in ("aux_k", "aux_zipf")
    ]
    assert masks[0] is not None and masks[1] is not None
    assert torch.equal(masks[0], masks[1]) and int(masks[0].sum()) == 10


def budget(allocation: AllocationSettings, steps: int = 100) -> Budget:
    settings = SaeSettings(F, K, allocation=allocation)
    rank = torch.arange(1, F + 1, dtype=torch.float64)
    counts = (1000 * (rank + 3) ** -1.2).round().long()
    return Budget(settings, usage_after(counts.flip(0), settings), steps)


def test_token_and_mutual_choice_do_not_change() -> None:
    assert budget(AllocationSettings("token_choice")).rule(7, TOKENS) == TokenChoice(K)
    assert budget(AllocationSettings("mutual_choice")).rule(7, TOKENS) == MutualChoice(K)
    assert budget(AllocationSettings("token_choice")).target() is None
    target = budget(AllocationSettings("mutual_choice")).target()
    assert target is not None and target.item() == pytest.approx(K / F)


@pytest.mark.parametrize("capacity", ["uniform", "zipf"])
def test_feature_choice_begins_after_its_share_and_spends_the_budget_exactly(capacity: str) -> None:
    plan = budget(AllocationSettings("feature_choice", capacity=capacity, after=0.3))
    assert isinstance(plan.rule(29, TOKENS), MutualChoice) and plan.curve is None
    total = torch.zeros(F)
    for step in range(30, 100):
        rule = plan.rule(step, TOKENS)
        assert isinstance(rule, FeatureChoice)
        assert int(rule.capacities.sum()) == rule.total == K * TOKENS and int(rule.capacities.max()) <= TOKENS
        total += rule.capacities
    densities = plan.target()
    assert densities is not None and densities.sum().item() == pytest.approx(K)
    torch.testing.assert_close(total / 70 / TOKENS, densities.float(), atol=0.002, rtol=0)
    if capacity == "zipf":  # fitted to densities of exponent 1.2 and shift 3, the densest features being the last
        assert plan.curve is not None and plan.curve[0] == pytest.approx(1.2, abs=0.1)
        assert bool((densities[-12:].diff() > 0).all())  # those without ties
    else:
        torch.testing.assert_close(densities, torch.full((F,), K / F, dtype=torch.float64))


def test_the_ladder_covers_every_rank_within_a_factor_of_two() -> None:
    capacities = torch.tensor([90.0, 60.5, 40.0, 9.0, 3.2, 1.5, 0.9, 0.2, 0.0])
    runs = _runs(capacities)
    assert [start for start, _, _ in runs] == [0, *(stop for _, stop, _ in runs[:-1])] and runs[-1][1] == 9
    for start, stop, largest in runs:
        assert int(capacities[start:stop].ceil().max()) == largest
        assert bool((capacities[start:stop].ceil().clamp_min(1) >= max(1, largest // 2)).all())
