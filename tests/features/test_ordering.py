"""Sorting and grouping equal numpy's slower ways."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.features.ordering import group_starts, largest, offsets_of, ranges, stable_order


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(st.integers(0, 5) | st.integers(0, 2**40), max_size=60))
def test_stable_order_is_numpys(keys: list[int]) -> None:
    array = np.array(keys, np.int64)
    np.testing.assert_array_equal(stable_order(array), np.argsort(array, kind="stable"))


def test_a_key_that_does_not_fit_beside_its_index_is_not_sorted_wrongly() -> None:
    with pytest.raises(AssertionError, match="does not fit"):
        stable_order(np.array([2**61, 1]))


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.5, 1.0, 2.0, 3e-40])), max_size=60),
    most=st.integers(1, 5),
)
def test_the_largest_of_each_owner_are_those_at_or_above_the_last_of_them(
    entries: list[tuple[int, float]], most: int
) -> None:
    owner = np.sort(np.array([each for each, _ in entries], np.int64))
    values = np.array([value for _, value in entries], np.float32)
    expected = []
    for i, value in enumerate(values):
        own = np.sort(values[owner == owner[i]])[::-1]
        expected += [i] if value >= own[min(most, len(own)) - 1] else []
    np.testing.assert_array_equal(largest(owner, values, most), expected)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), max_size=12))
def test_ranges_and_groups_follow_from_offsets(lengths: list[int]) -> None:
    offsets = offsets_of(np.array(lengths, np.int64))
    starts = offsets[:-1] * 10
    found = ranges(starts, np.array(lengths, np.int64))
    assert found.tolist() == [start + i for start, n in zip(starts, lengths, strict=True) for i in range(n)]
    groups = np.repeat(np.arange(len(lengths)), lengths)
    assert group_starts(groups).tolist() == [start for start, n in zip(offsets, lengths, strict=False) if n]
