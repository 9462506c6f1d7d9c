"""Codes are the same matrix however they are made, cut, joined, compacted, transposed or stored."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saelab.codes import Codes, concatenate, load, save
from saelab.errors import SaelabError


def random_codes(seed: int, tokens: int = 7, n_features: int = 9) -> Codes:
    """A ragged matrix with empty rows and some entries of value zero."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(tokens, n_features, generator=generator)
    dense[torch.rand(tokens, n_features, generator=generator) < 0.6] = 0
    dense[tokens // 2] = 0
    mask = (dense > 0) | (torch.rand(tokens, n_features, generator=generator) < 0.1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
    return Codes(dense[mask], mask.nonzero()[:, 1], offsets, n_features)


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


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_mask_and_triples_in_any_order_make_the_matrix(seed: int) -> None:
    codes = random_codes(seed)
    dense = codes.to_dense()
    assert torch.equal(Codes.from_mask(dense > 0, dense).to_dense(), dense)
    shuffled = torch.randperm(codes.nnz, generator=torch.Generator().manual_seed(seed))
    triples = (t[shuffled] for t in (codes.row_of_entry(), codes.features, codes.values))
    assert torch.equal(Codes.from_triples(*triples, (codes.tokens, codes.n_features)).to_dense(), dense)


@pytest.mark.parametrize("token, feature", [(3, 0), (-1, 0), (0, 4), (0, -1)])
def test_triples_out_of_range_are_refused(token: int, feature: int) -> None:
    with pytest.raises(ValueError, match="out of range: there are"):
        Codes.from_triples(torch.tensor([token]), torch.tensor([feature]), torch.ones(1), (3, 4))


@given(st.integers(0, 10_000), st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=30, deadline=None)
def test_the_transpose_is_that_of_the_dense_matrix_in_order_of_tokens(seed: int, index: torch.dtype) -> None:
    codes = random_codes(seed)
    codes = Codes(codes.values, codes.features.to(index), codes.offsets.to(index), codes.n_features)
    turned = codes.transpose()
    assert (turned.tokens, turned.n_features) == (codes.n_features, codes.tokens)
    assert torch.equal(turned.to_dense(), codes.to_dense().T)
    assert torch.equal(turned.transpose().to_dense(), codes.to_dense())
    feature = turned.row_of_entry()
    assert bool((turned.features.diff()[feature.diff() == 0] >= 0).all())


def test_codes_of_one_pattern_share_what_was_sorted_and_no_others() -> None:
    codes = random_codes(3)
    codes.transpose()
    doubled = codes.with_values(2 * codes.values)
    assert doubled.transpose().features is codes.transpose().features
    assert torch.equal(doubled.transpose().to_dense(), 2 * codes.to_dense().T)
    assert torch.equal(codes[1:4].transpose().to_dense(), codes.to_dense()[1:4].T)
    assert torch.equal(codes.compact().transpose().to_dense(), codes.to_dense().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_gives_back_the_same_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    for codes in (random_codes(1), random_codes(1)[:0]):
        codes = codes.with_values(codes.values.to(dtype))
        save(codes, tmp_path / "codes.safetensors")
        found = load(tmp_path / "codes.safetensors")
        assert torch.equal(found.values, codes.values) and found.values.dtype == dtype
        assert torch.equal(found.features, codes.features) and torch.equal(found.offsets, codes.offsets)
        assert found.n_features == codes.n_features
    assert [file.name for file in tmp_path.iterdir()] == ["codes.safetensors"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    with pytest.raises(SaelabError, match="cannot be read as codes"):
        load(path)
    save(random_codes(1), path)
    whole = path.read_bytes()
    for kept in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(SaelabError, match="cannot be read as codes"):
            load(path)
    path.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(SaelabError, match="cannot be read as codes"):
        load(path)


GOOD = {"values": torch.ones(3), "features": torch.tensor([0, 1, 0]), "offsets": torch.tensor([0, 2, 3])}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"values": torch.ones(2)}, "2 values but 3 features"),
        ({"values": torch.ones(3, 1)}, "not three one-dimensional tensors"),
        ({"offsets": torch.zeros(0, dtype=torch.long)}, "not three one-dimensional tensors"),
        ({"values": torch.ones(3, dtype=torch.long)}, "floating-point"),
        ({"features": torch.zeros(3)}, "floating-point"),
        ({"offsets": torch.tensor([0, 2, 4])}, "do not rise from 0 to the 3"),
        ({"offsets": torch.tensor([1, 2, 3])}, "do not rise"),
        ({"offsets": torch.tensor([0, 4, 3])}, "do not rise"),
        ({"features": torch.tensor([0, 2, 0])}, "out of range: there are 2"),
        ({"features": torch.tensor([0, -1, 0])}, "out of range: there are 2"),
    ],
)
def test_tensors_that_are_no_matrix_are_refused(tmp_path: Path, change: dict[str, torch.Tensor], message: str) -> None:
    path = tmp_path / "codes.safetensors"
    save_file({**GOOD, **change}, path, {"n_features": "2"})
    with pytest.raises(SaelabError, match=message):
        load(path)


@pytest.mark.parametrize("metadata", [None, {"n_features": "many"}])
def test_a_file_without_a_number_of_features_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(GOOD, tmp_path / "codes.safetensors", metadata)
    with pytest.raises(SaelabError, match="cannot be read as codes"):
        load(tmp_path / "codes.safetensors")
