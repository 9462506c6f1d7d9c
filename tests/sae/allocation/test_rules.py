"""Each allocation is the exact optimum under its constraint, whatever the ties, tiles and precision of the proposal."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelab.codes import Codes
from saelab.sae import encoder
from saelab.sae.allocation.candidates import Bands, Entries
from saelab.sae.allocation.gathered import own_rule
from saelab.sae.allocation.rules import FeatureChoice, GroupMax, MutualChoice, Rule, Threshold, TokenChoice
from saelab.sae.allocation.selection import _fixed, as_codes, in_order, select


def allocate(scores: Tensor, rule: Rule) -> Codes:
    """The fast way on dense scores, as one tile; the codes' values are the scores."""
    tokens, n_features = scores.shape
    bounds = rule.bounds(tokens, n_features, 0.0, scores.device)
    entries = in_order(bounds.final(bounds.candidates(scores, 0, 0)), n_features)
    return as_codes(entries, rule.keep(entries, tokens), rule.slots(tokens), tokens, n_features)[0]


def token_choice(scores: Tensor, k: int) -> Codes:
    return allocate(scores, TokenChoice(k))


def mutual_choice(scores: Tensor, k: int) -> Codes:
    return allocate(scores, MutualChoice(k))


def feature_choice(scores: Tensor, capacities: Tensor) -> Codes:
    return allocate(scores, FeatureChoice(capacities, int(capacities.sum())))


def dense(scores: Tensor, rule: Rule) -> Tensor:
    """The scores that the rule's own statement keeps, 0 elsewhere."""
    return scores.where(rule.mask(scores), 0.0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[Rule]]:
    tokens, n_features = draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 7, 32, 64, 96, 150]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scores = torch.randn(tokens, n_features, generator=generator) + draw(st.sampled_from([-1.0, 0.0, 1.0]))
    if draw(st.booleans()):
        scores = scores.round()  # many ties, many zeros
    k = draw(st.integers(1, min(8, n_features)))
    capacities = torch.randint(0, tokens + 1, (n_features,), generator=generator)
    cut = torch.randn(draw(st.sampled_from([1, n_features])), generator=generator)
    feature_choice = FeatureChoice(capacities, int(capacities.sum()))
    groups = draw(st.sampled_from([n for n in range(1, n_features + 1) if n_features % n == 0]))
    rules = [TokenChoice(k), MutualChoice(k), feature_choice, Threshold(cut), GroupMax(groups, n_features)]
    return scores, rules


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_fast_way_equals_every_rules_own_statement(problem: tuple[Tensor, list[Rule]]) -> None:
    scores, rules = problem
    for rule in rules:
        codes = allocate(scores, rule)
        assert torch.equal(codes.to_dense(), dense(scores, rule))
        assert bool((codes.values > 0).all()) and codes.nnz <= (rule.slots(len(scores)) or scores.numel())
        keys = codes.row_of_entry() * codes.n_features + codes.features
        assert bool((keys.diff() > 0).all())  # in order, nothing twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tiles_of_rounded_scores_propose_every_entry_of_the_exact_choice(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.randn(96, 256, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    capacities = torch.randint(0, 9, (256,))
    capacities[:3] = 96
    margin = 2**-6 if dtype == torch.bfloat16 else 0.0
    rules: list[Rule] = [TokenChoice(8), MutualChoice(8), FeatureChoice(capacities, int(capacities.sum()))]
    rules.append(Threshold(1.5 + torch.rand(256, dtype=scores.dtype)))
    rules += [GroupMax(k, 256) for k in (8, 2)]  # tiles have whole groups, and parts of them
    for rule, rows, columns in itertools.product(rules, (96, 32), (256, 64)):
        bounds = rule.bounds(96, 256, margin, scores.device)
        if bounds.whole_columns and rows < 96:
            continue
        found = [
            bounds.candidates(scores[r : r + rows, c : c + columns].to(dtype).contiguous(), r, c)
            for r in range(0, 96, rows)
            for c in range(0, 256, columns)
        ]
        entries = in_order(bounds.final(Entries(*(torch.cat(p) for p in zip(*found, strict=True)))), 256)
        exact = entries._replace(scores=scores[entries.tokens, entries.features])
        codes, _ = as_codes(exact, rule.keep(exact, 96), rule.slots(96), 96, 256)
        assert torch.equal(codes.to_dense(), dense(scores, rule))
        assert len(entries.tokens) < 0.5 * scores.numel()  # candidates are few


@pytest.mark.parametrize("bf16, cut", [(False, 0.0), (False, 0.7), (True, 0.7)])
@pytest.mark.parametrize("elements", [64 * 64, 2**20])
def test_a_thresholds_entries_come_in_order_whatever_the_tiles(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, elements: int, cut: float
) -> None:
    """Tiles are runs of tokens in float32, and of features in bfloat16."""
    monkeypatch.setitem(encoder._TILE_ELEMENTS, "cpu", dict.fromkeys((torch.bfloat16, torch.float32), elements))
    torch.manual_seed(0)
    x, W = torch.randn(128, 16), torch.randn(192, 16)
    linear, rule = encoder.Linear(W, torch.zeros(192)), Threshold(torch.full((1,), cut))
    ((pattern, pre),), _ = select(linear, W, x, [rule], bf16=bf16, scratch=encoder.Scratch())
    scores = x @ W.T
    torch.testing.assert_close(pattern.to_dense(), dense(scores, rule))
    assert pre is not None and torch.equal(pre, pattern.values)
    assert bool(((pattern.row_of_entry() * 192 + pattern.features).diff() > 0).all())


def test_each_mask_is_the_best_under_its_constraint() -> None:
    """Against every mask of a 3 x 4 matrix."""
    torch.manual_seed(1)
    scores = torch.randn(3, 4) + 0.3
    capacities = torch.tensor([2, 1, 0, 3])
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12))).view(-1, 3, 4)
    sums = (masks * scores).sum((1, 2))
    allowed = {
        "token": (masks.sum(2) <= 2).all(1),
        "mutual": masks.sum((1, 2)) <= 6,
        "feature": (masks.sum(1) <= capacities).all(1),
    }
    found = {
        "token": token_choice(scores, 2),
        "mutual": mutual_choice(scores, 2),
        "feature": feature_choice(scores, capacities),
    }
    for name, codes in found.items():
        torch.testing.assert_close(codes.values.sum(), sums[allowed[name]].max())
    assert found["mutual"].values.sum() >= max(found["token"].values.sum(), found["feature"].values.sum())


def test_each_rules_own_statement_is_that_best_mask_too() -> None:
    torch.manual_seed(1)
    scores = torch.randn(3, 4) + 0.3
    capacities = torch.tensor([2, 1, 0, 3])
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12))).view(-1, 3, 4)
    sums = (masks * scores).sum((1, 2))
    for rule, allowed in (
        (TokenChoice(2), (masks.sum(2) <= 2).all(1)),
        (MutualChoice(2), masks.sum((1, 2)) <= 6),
        (FeatureChoice(capacities, 6), (masks.sum(1) <= capacities).all(1)),
    ):
        torch.testing.assert_close(dense(scores, rule).sum(), sums[allowed].max())


def test_counts_are_what_the_constraint_allows() -> None:
    torch.manual_seed(2)
    scores = torch.randn(50, 40) - 0.5
    positive = scores > 0
    assert torch.equal(token_choice(scores, 7).l0(), positive.sum(1).clamp_max(7))
    assert mutual_choice(scores, 7).nnz == min(7 * 50, int(positive.sum()))
    capacities = torch.randint(0, 30, (40,))
    found = feature_choice(scores, capacities)
    assert torch.equal(found.firing_counts(), torch.minimum(capacities, positive.sum(0)))
    assert torch.equal(mutual_choice(scores[:1], 7).to_dense(), token_choice(scores[:1], 7).to_dense())


def test_a_feature_that_may_have_nothing_gets_nothing_and_zeros_are_never_picked() -> None:
    scores = torch.zeros(6, 8)
    for codes in (token_choice(scores, 3), mutual_choice(scores, 3), feature_choice(scores, torch.full((8,), 2))):
        assert codes.nnz == 0 and codes.tokens == 6
    assert feature_choice(torch.ones(6, 8), torch.zeros(8, dtype=torch.long)).nnz == 0
    assert allocate(scores, Threshold(torch.tensor([-1.0]))).nnz == 0


def test_on_a_gpu_unfilled_slots_are_zero() -> None:
    """The code that a GPU runs: as many slots as the budget has, whatever was kept."""
    entries = Entries(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 3, 0, 2]), torch.tensor([2.0, -1.0, 3.0, 1.0]))
    keep = torch.tensor([True, True, True, False])
    codes, slots = _fixed(entries, keep & (entries.scores > 0), 3, 3, 5)
    assert codes.nnz == 3 and len(slots) == 3
    expected = torch.zeros(3, 5)
    expected[0, 1], expected[1, 0] = 2.0, 3.0
    assert torch.equal(codes.to_dense(), expected)
    assert torch.equal(codes.l0(), torch.tensor([1, 1, 0]))


def test_a_fixed_number_of_candidates_contains_the_exact_choice() -> None:
    """The code that a GPU runs, on tiles of rounded scores; feature choice needs its bands."""
    torch.manual_seed(3)
    scores = torch.randn(64, 128)
    capacities = torch.randint(0, 9, (128,))
    order = torch.argsort(capacities, descending=True)
    largest = capacities[order].tolist()
    bands = Bands(order, [(start, start + 32, largest[start]) for start in range(0, 128, 32)])
    rules = [TokenChoice(8), MutualChoice(8), FeatureChoice(capacities, int(capacities.sum()), bands)]
    for rule in rules:
        entries = rule.bounds(64, 128, 2**-6, scores.device).fixed(scores.bfloat16())
        entries = in_order(entries, 128)
        exact = entries._replace(scores=scores[entries.tokens, entries.features])
        codes, _ = _fixed(exact, rule.keep(exact, 64) & (exact.scores > 0), rule.slots(64), 64, 128)
        assert torch.equal(codes.to_dense(), dense(scores, rule))


def test_features_without_capacity_are_one_band_and_all_features_keep_the_bands_they_have() -> None:
    """A GPU runs each band on its own, and waits where bands are made from capacities."""
    capacities = torch.tensor([0, 5, 0, 9, 1, 0, 4])
    assert Bands.of(capacities).runs == [(0, 3, 9), (3, 4, 1), (4, 7, 0)]
    rule = FeatureChoice(capacities, 19, Bands.of(capacities))
    assert own_rule(rule, slice(0, 7)) is rule
    part = own_rule(rule, slice(1, 4))
    assert isinstance(part, FeatureChoice) and part.capacities.tolist() == [5, 0, 9]


def test_group_max_keeps_the_largest_of_each_group_and_the_first_of_equal_ones() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, -1.0, -2.0, -3.0], [0.0, 0.0, 5.0, 1.0, 2.0, 2.0]])
    expected = torch.tensor([[0.0, 3.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0, 2.0, 0.0]])
    assert torch.equal(dense(scores, GroupMax(2, 6)), expected)
    assert torch.equal(allocate(scores, GroupMax(2, 6)).to_dense(), expected)
    one_of_all = torch.randn(20, 12)
    assert torch.equal(dense(one_of_all, GroupMax(1, 12)), dense(one_of_all, TokenChoice(1)))
    assert torch.equal(dense(one_of_all, GroupMax(12, 12)), one_of_all.relu())
    assert GroupMax(2, 24).times(4) == GroupMax(8, 24)


@pytest.mark.parametrize("margin", [0.0, 2**-6])
def test_the_fixed_number_of_candidates_of_a_gpu_has_the_largest_of_each_group(margin: float) -> None:
    scores = torch.randn(50, 24)
    bounds = GroupMax(4, 48).bounds(50, 24, margin, scores.device)
    found = bounds._fixed(scores.unflatten(1, (4, 6)))
    assert len(found.scores) == 50 * 4 * (4 if margin else 1)
    assert torch.equal(scores[found.tokens, found.features], found.scores)
    best = torch.zeros_like(scores).index_put_((found.tokens, found.features), found.scores)
    assert torch.equal(best.unflatten(1, (4, 6)).amax(2).relu(), scores.unflatten(1, (4, 6)).amax(2).relu())
