"""Thresholds equal those of a full sort, whatever the batches, and give fresh tokens the target density."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelab.sae import thresholds
from saelab.sae.allocation.capacity import expected_densities
from saelab.sae.initial import initialise
from saelab.sae.model import SparseAutoencoder
from saelab.sae.thresholds import calibrate

D, F, K = 32, 200, 8


def encoder(seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Pre-activations of features that differ in scale and bias, so that no common threshold fits all."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(D, F, generator=generator) * torch.linspace(0.3, 2, F)
    b = torch.randn(F, generator=generator)
    return lambda x: x @ W + b


def data(tokens: int, seed: int) -> Tensor:
    """Heavy-tailed activations ``[tokens, D]``."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(tokens, 1, generator=generator) + 0.2
    return torch.randn(tokens, D, generator=generator) * scale


def of_features(tokens: int = 1000) -> Tensor:
    """The densities of a Zipf curve, some of the densest features capped, in random order ``[F]``."""
    order = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    return expected_densities(F, K, tokens, 1.3, 0.0)[order]


def by_full_sort(pre: Tensor, densities: Tensor) -> Tensor:
    """The quantile of each column of relu(pre) (of the whole, for a scalar density), by its definition."""
    columns = pre.relu().double().reshape(-1, 1) if densities.ndim == 0 else pre.relu().double()
    found = []
    for column, density in zip(columns.T, densities.reshape(-1).tolist(), strict=True):
        falling = [*column.sort(descending=True).values.tolist(), 0.0]
        position = density * (len(column) + 1)
        first = max(1, int(position))
        here, after = falling[first - 1], falling[min(first, len(falling) - 1)]
        found.append(here + max(0.0, math.log(position / first) / math.log1p(1 / first)) * (after - here))
    return torch.tensor(found).reshape(densities.shape)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 60),
    batch=st.integers(1, 60),
    per_feature=st.booleans(),
    announced=st.sampled_from([None, 0, 25]),
    seed=st.integers(0, 100),
)
def test_equals_a_full_sort_of_all_pre_activations(
    tokens: int, batch: int, per_feature: bool, announced: int | None, seed: int
) -> None:
    pre = torch.randn(tokens, 7, generator=torch.Generator().manual_seed(seed))
    pre = (pre * 4).round() / 4 if seed % 2 else pre  # half of the cases are full of ties
    pre[:, 0] = -1
    densities = torch.rand(7, generator=torch.Generator().manual_seed(seed + 1)).double() if per_feature else None
    densities = torch.tensor(0.2, dtype=torch.float64) if densities is None else densities
    most = None if announced is None else tokens + announced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "BLOCK_ENTRIES", 20)  # blocks of two tokens, and frequent pruning
        found = calibrate(lambda x: x, iter(pre.split(batch)), densities, most)
    torch.testing.assert_close(found.threshold, by_full_sort(pre, densities))
    assert found.threshold.dtype == pre.dtype and (found.threshold >= 0).all()
    assert found.tokens == tokens
    torch.testing.assert_close(found.expected_hits, densities * tokens * (1 if per_feature else 7))
    assert torch.equal(found.flagged, found.expected_hits < 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("position", [1, 12])
def test_every_precision_is_exact_to_its_last_bit(dtype: torch.dtype, per_feature: bool, position: int) -> None:
    """A threshold at a sample is exactly that sample, from subnormal to the largest, with frequent pruning."""
    generator, info = torch.Generator().manual_seed(0), torch.finfo(dtype)
    tokens = 63 if per_feature else 73  # so that samples + 1 is a power of two, and no density is rounded
    for scale in (16 * info.tiny * info.eps, 1.0, info.max / 64):
        whole, bits = (torch.randint(low, 16, (tokens, 7), generator=generator).double() for low in (-15, 0))
        pre = (whole * (1 + info.eps * bits) * scale).to(dtype)
        columns = pre if per_feature else pre.reshape(-1, 1)
        density = torch.tensor(position / (len(columns) + 1), dtype=torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thresholds, "BLOCK_ENTRIES", 20)
            patch.setattr(thresholds, "_PART", 7)
            found = calibrate(lambda x: x, pre.split(9), density.expand(7) if per_feature else density).threshold
        assert found.dtype == dtype
        exact = columns.sort(dim=0, descending=True).values[position - 1]
        assert (exact > 0).all() and torch.equal(found.reshape(-1), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_feature", [False, True])
def test_an_infinite_entry_is_the_largest_and_nan_is_no_entry(dtype: torch.dtype, per_feature: bool) -> None:
    column = torch.tensor([1.0, math.nan, 4.0, math.inf, 3.0, -math.inf, 2.0], dtype=dtype)
    pre = torch.stack([column, torch.full_like(column, math.nan), column.clamp_max(9.0)], 1)
    if not per_feature:
        pre = column[:, None]
    for position in (1, 2, 3, 5, 7):  # inf, 4, 3, 1 of the first column; none is left at 7
        density = torch.tensor(position / 8, dtype=torch.float64)
        found = calibrate(lambda x: x, pre.split(2), density.expand(pre.shape[1]) if per_feature else density).threshold
        expected = {1: math.nan, 2: 4.0, 3: 3.0, 5: 1.0, 7: 0.0}[position]  # inf + 0 x -inf
        if per_feature:
            expected = [expected, 0.0, {1: 9.0}.get(position, expected)]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True)


def test_how_the_tokens_are_batched_does_not_matter_nor_does_their_order() -> None:
    x, pre = data(3000, 1), encoder()
    one = calibrate(pre, [x], of_features())
    many = calibrate(pre, x[torch.randperm(len(x))].split(70), of_features())
    torch.testing.assert_close(one.threshold, many.threshold)


def test_held_out_l0_and_density_follow_a_common_threshold() -> None:
    """Mutual choice: k features per token on average on fresh tokens."""
    pre, tokens = encoder(), 20_000
    found = calibrate(pre, data(tokens, 1).split(512), torch.tensor(K / F, dtype=torch.float64))
    assert found.threshold.ndim == 0
    active = pre(data(tokens, 2)) > found.threshold
    assert active.sum(1).double().mean() == pytest.approx(K, rel=0.03)


def test_held_out_l0_and_density_follow_thresholds_of_features() -> None:
    """Feature choice: k per token within 3%, and within 10% the density of every tenth of the ranks."""
    pre, tokens = encoder(), 40_000
    densities = of_features()
    found = calibrate(pre, data(tokens, 1).split(512), densities)
    active = pre(data(tokens, 2)) > found.threshold
    reachable = densities.minimum((pre(data(tokens, 1)) > 0).double().mean(0))  # relu: no more than all positives
    assert active.sum(1).double().mean() == pytest.approx(float(reachable.sum()), rel=0.03)
    for tenth in densities.argsort(descending=True).split(F // 10):
        assert active[:, tenth].double().mean() == pytest.approx(float(reachable[tenth].mean()), rel=0.1)


@pytest.mark.parametrize(("capacity", "lowest", "highest"), [(1, 0.5, 0.7), (2, 0.68, 0.82), (32, 0.95, 1.02)])
def test_the_mean_of_batch_minima_would_be_biased(capacity: int, lowest: float, highest: float) -> None:
    """The usual estimate, over batches in which each feature has `capacity` tokens, is why saelab uses quantiles."""
    size, batches = 64 * capacity, 2000 // capacity
    pre = encoder()
    minima = torch.stack([pre(data(size, s)).topk(capacity, dim=0).values[-1] for s in range(batches)]).mean(0)
    fresh = pre(data(100_000, 10_001))
    density = capacity / size
    assert lowest < (fresh > minima).double().mean() / density < highest
    x = torch.cat([data(size, s) for s in range(batches)])
    ours = calibrate(pre, [x], torch.full((F,), density, dtype=torch.float64)).threshold
    assert (fresh > ours).double().mean() / density == pytest.approx(1, abs=0.02)


def test_a_fractional_number_of_hits_is_not_biased() -> None:
    """Thresholds for 2.4 of 100 samples let 0.024 of fresh ones through, on average over many features."""
    many = 4000
    generator = torch.Generator().manual_seed(5)
    densities = torch.full((many,), 0.024, dtype=torch.float64)
    found = calibrate(lambda x: x, [torch.randn(100, many, generator=generator)], densities)
    fresh = torch.randn(2000, many, generator=generator) > found.threshold
    assert fresh.double().mean() == pytest.approx(0.024, rel=0.03)
    assert found.flagged.all()


def test_features_of_few_expected_hits_are_flagged() -> None:
    densities = torch.tensor([0.5, 0.11, 0.09, 0.001], dtype=torch.float64)
    found = calibrate(lambda x: x, [torch.randn(100, 4)], densities)
    assert found.flagged.tolist() == [False, False, True, True]
    assert found.threshold[3] == found.threshold[3].clamp_min(0) and found.threshold.isfinite().all()


def test_memory_follows_the_budget() -> None:
    """From 20,000 tokens of 200 features it keeps about k * tokens entries, a 25th of all."""
    kept = []
    original = thresholds._Largest._prune

    def prune(self: thresholds._Largest) -> None:
        kept.append(self._filled)
        original(self)

    def batches() -> Iterator[Tensor]:
        for seed in range(40):
            yield data(500, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "BLOCK_ENTRIES", 500 * F)
        patch.setattr(thresholds._Largest, "_prune", prune)
        calibrate(encoder(), batches(), of_features(), 20_000)
    assert max(kept) < 3 * K * 20_000


def test_more_tokens_than_announced_and_none_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the 5"):
        calibrate(encoder(), [data(3, 0), data(3, 1)], of_features(), 5)
    with pytest.raises(ValueError, match="not a single token"):
        calibrate(encoder(), [], of_features())


def test_an_autoencoder_with_thresholds_encodes_every_token_by_itself() -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, K)
    initialise(sae, data(500, 1))
    found = calibrate(sae.pre_activations, [data(4000, 2)], of_features())
    sae.threshold = found.threshold
    x = data(50, 3)
    batched = sae.encode(x).to_dense()
    single = torch.cat([sae.encode(token[None]).to_dense() for token in x])
    near = ((sae.pre_activations(x) - found.threshold).abs() < 1e-5 * found.threshold).float()
    torch.testing.assert_close(batched * (1 - near), single * (1 - near), rtol=1e-5, atol=1e-5)
    assert (batched > 0).any()


def test_pruning_a_full_group_sets_the_bound_to_its_smallest_entry() -> None:
    """The bound is not the entry that came last, or later entries would be lost."""
    largest = thresholds._Largest(torch.tensor([2.0]), torch.empty(1, 1), 100)
    largest.see(torch.tensor([[1.0], [2.0], [9.0]]))
    largest._prune()
    assert largest.bounds.item() == 1
    largest.see(torch.tensor([[5.0]]))
    assert [largest.at(torch.tensor([position])).item() for position in (1, 2, 3)] == [9, 5, 2]
