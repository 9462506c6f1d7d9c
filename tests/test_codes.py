"""Codes hold the same matrix however they are cut, joined or compacted."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.codes import Codes, concatenate


def random_codes(seed: int, tokens: int = 7, n_features: int = 9) -> Codes:
    """A ragged matrix with empty rows and some entries of value zero."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(tokens, n_features, generator=generator)
    dense[torch.rand(tokens, n_features, generator=generator) < 0.6] = 0
    dense[tokens // 2] = 0
    place = (dense > 0) | (torch.rand(tokens, n_features, generator=generator) < 0.1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), place.sum(1).cumsum(0)])
    return Codes(dense[place], place.nonzero()[:, 1], offsets, n_features)


@given(st.integers(0, 10_000), st.integers(-2, 9), st.integers(-2, 9))
@settings(max_examples=50, deadline=None)
def test_slices_joins_and_compaction_keep_the_matrix(seed: int, start: int, stop: int) -> None:
    codes = random_codes(seed)
    dense = codes.to_dense()
    assert torch.equal(codes[start:stop].to_dense(), dense[start:stop])
    assert torch.equal(concatenate([codes, codes[:3], codes[3:]]).to_dense(), torch.cat([dense, dense]))
    assert torch.equal(codes.compact().to_dense(), dense)
    assert bool((codes.compact().values != 0).all())


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_counts_are_those_of_the_dense_matrix(seed: int) -> None:
    codes = random_codes(seed)
    active = codes.to_dense() > 0
    assert torch.equal(codes.l0(), active.sum(1))
    assert torch.equal(codes.firing_counts(), active.sum(0))
    assert codes.l0().sum() == codes.firing_counts().sum() == codes.compact().nnz


def test_topk_rows_are_equally_long_even_with_no_tokens() -> None:
    values, features = torch.rand(0, 4), torch.zeros(0, 4, dtype=torch.long)
    codes = Codes.from_topk(values, features, 10)
    assert codes.tokens == 0 and codes.nnz == 0 and codes.to_dense().shape == (0, 10)
