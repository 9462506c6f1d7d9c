"""A group is permuted as a whole and cut into equal batches; nothing is carried over; only the seed sets the order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.activations.shuffle import Group, cut_group, generator, group_tokens
from saelab.activations.stream import ActivationBatch
from saelab.errors import SaelabError
from tests.activations.shuffled import shuffled


def tokens(n: int, gradients: bool = False) -> ActivationBatch:
    """Made-up activations: every field of a token follows from its number."""
    number = torch.arange(n)
    values = number[:, None] + torch.tensor([0.0, 0.25, 0.5])
    return ActivationBatch(values, number, number // 7, number % 7, -values if gradients else None)


def pieces(batch: ActivationBatch, sizes: list[int]) -> list[ActivationBatch]:
    ends = np.cumsum(sizes)
    return [batch[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]


@settings(deadline=None)
@given(n=st.integers(1, 400), batch=st.integers(1, 450), seed=st.integers(0, 2**64), group=st.integers(0, 10**6))
def test_a_group_is_cut_into_the_fewest_equal_batches_from_any_batch_on(n, batch, seed, group) -> None:
    batches = cut_group(n, batch, seed, group)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    sizes = [len(index) for index in batches]
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1 and len(batches) == -(-n // batch)
    if n % batch == 0:
        assert set(sizes) == {batch}
    for at in range(len(batches)):
        rest = cut_group(n, batch, seed, group, offset=sum(sizes[:at]))
        assert len(rest) == len(batches) - at
        assert all(np.array_equal(a, b) for a, b in zip(rest, batches[at:], strict=True))


@pytest.mark.parametrize("offset", [-20, 1, 19, 100, 120])
def test_an_offset_at_which_no_batch_begins_is_refused(offset: int) -> None:
    with pytest.raises(SaelabError, match=rf"no batch of 20 tokens begins at {offset} of a group of 100 tokens"):
        cut_group(100, 20, 0, 0, offset=offset)


def test_a_groups_order_depends_on_seed_and_group_and_not_on_the_batch() -> None:
    def order(batch: int, seed: int, *group: int) -> list[int]:
        return np.concatenate(cut_group(300, batch, seed, *group)).tolist()

    assert order(20, 1, 5) == order(7, 1, 5) == order(300, 1, 5)
    others = [order(20, 2, 5), order(20, 1, 6), order(20, 1, 5, 0), order(20, 1, 0, 5), order(20, 1)]
    assert len({tuple(other) for other in [order(20, 1, 5), *others]}) == 6
    first = generator(1, 5).random()
    generator(1, 6).random(10)
    assert generator(1, 5).random() == first, "not on the draws of other generators"


@settings(deadline=None)
@given(buffer=st.integers(1, 10**7), batch=st.integers(1, 10**5))
def test_a_group_is_whole_batches_and_no_more_than_the_buffer_but_for_two(buffer: int, batch: int) -> None:
    n = group_tokens(buffer, batch)
    assert n % batch == 0 and n >= 2 * batch
    assert n == 2 * batch or buffer - batch < n <= buffer


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=20),
    batch=st.integers(1, 30),
    buffer=st.integers(1, 200),
    gradients=st.booleans(),
)
def test_every_token_comes_once_with_its_fields_and_in_its_own_group(
    sizes: list[int], batch: int, buffer: int, gradients: bool
) -> None:
    whole = tokens(sum(sizes), gradients)
    found = list(shuffled(pieces(whole, sizes), batch, buffer, 3))
    order = torch.cat([b.tokens for b in found]) if found else torch.arange(0)
    group = group_tokens(buffer, batch)
    for at in range(0, len(whole), group):
        assert sorted(order[at : at + group].tolist()) == list(range(at, min(at + group, len(whole)))), (
            "nothing carried"
        )
    for b in found:
        for field, expected in zip(b.fields, whole[b.tokens].fields, strict=True):
            assert torch.equal(field, expected)
        assert (b.gradients is not None) == gradients
    full = len(whole) // group * (group // batch)
    assert all(len(b) == batch for b in found[:full]) and all(0 < len(b) <= batch for b in found[full:])


def test_neither_gradients_nor_the_sizes_of_passes_change_the_order() -> None:
    def order(sizes: list[int], gradients: bool = False, seed: int = 7) -> list[int]:
        passes = pieces(tokens(500, gradients), sizes)
        return torch.cat([b.tokens for b in shuffled(passes, 20, 100, seed)]).tolist()

    first = order([64] * 7 + [52])
    assert order([64] * 7 + [52], gradients=True) == order([1] * 500) == order([500]) == first
    assert order([500], seed=8) != first


def test_batches_stay_as_they_are_when_the_group_is_filled_again() -> None:
    kept = list(shuffled([tokens(500)], 20, 100, 0))
    now = [b.values.clone() for b in shuffled([tokens(500)], 20, 100, 0)]
    assert all(torch.equal(b.values, values) for b, values in zip(kept, now, strict=True))


def test_neighbours_share_a_batch_as_often_as_by_chance_and_order_is_uncorrelated() -> None:
    """Batches of 64 in groups of 2048: two neighbours of a group share one in 63 of 2047 cases. Rank correlations
    within a group are of size 1 / sqrt(2048); their mean over 80 groups is of size 0.0025."""
    batches = list(shuffled([tokens(2048 * 80)], 64, 2048, 0))
    batch_of = torch.empty(2048 * 80, dtype=torch.long)
    for number, batch in enumerate(batches):
        batch_of[batch.tokens] = number
    shared = (batch_of[1:] == batch_of[:-1]).double().mean().item()
    assert shared == pytest.approx(63 / 2047, rel=0.1)
    order = torch.cat([batch.tokens for batch in batches]).double().view(80, 2048)
    centred = order - order.mean(1, keepdim=True)
    position = torch.arange(2048.0, dtype=torch.double) - 1023.5
    correlations = centred @ position / (centred.norm(dim=1) * position.norm())
    assert correlations.abs().max() < 5 / 2048**0.5 and correlations.mean().abs() < 5 / (80 * 2048) ** 0.5


def test_a_group_takes_what_fits_and_returns_the_rest() -> None:
    group = Group(10)
    with pytest.raises(ValueError, match="nothing has been added"):
        _ = group.content
    assert len(group.add(tokens(4))) == 0 and group.tokens == 4
    rest = group.add(tokens(9))
    assert rest.tokens.tolist() == [6, 7, 8] and group.tokens == 10
    assert group.content.tokens.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    address = group.content.values.data_ptr()
    group.clear()
    group.add(rest)
    assert group.content.tokens.tolist() == [6, 7, 8] and group.content.values.data_ptr() == address
