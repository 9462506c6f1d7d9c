"""The features active together equal the dense formulas; those counted on a sample lie within the stated error."""

import numpy as np
import pytest

from saelab.features import coactivation
from saelab.features.coactivation import COLUMNS, coactive_columns, counted_entries
from saelab.features.layout import ACTIVITY, LIST_LENGTH
from tests.features import dense


def database(z: np.ndarray, tokens: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """The arrays of activations z ``[rows, context, n_features]``, the dense columns, and N; token 0 is special."""
    ordinary = tokens != 0
    z = (z * ordinary[..., None]).reshape(-1, z.shape[2])
    vocabulary = [b"%d" % i for i in range(tokens.max() + 1)]
    columns = dense.activity(z, tokens, ordinary)
    return dense.facts_of(z, tokens, ordinary, vocabulary), columns, int(ordinary.sum())


def columns(arrays: dict[str, np.ndarray], n_tokens: int) -> dict[str, np.ndarray]:
    arrays = {
        name: np.asarray(array, "i4" if name.endswith(("places", "features")) else None)
        for name, array in arrays.items()
    }
    blocks = list(coactive_columns(arrays, n_tokens))
    joined = {name: np.concatenate([block[name] for block in blocks]) for name in COLUMNS}
    for name, column in joined.items():
        dtype, *width = ACTIVITY[name]
        assert column.dtype == dtype and column.shape == (len(arrays["by_feature.offsets"]) - 1, *width)
    return joined


@pytest.mark.parametrize("shape", [(30, 16, 40), (3, 6, 300)])  # with fewer steps than features, these are sorted
def test_columns_equal_the_dense_formulas(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "_PART", 50)
    monkeypatch.setattr(coactivation, "_WAITING", 20)
    monkeypatch.setattr(coactivation, "_BLOCK", 16)
    z, tokens = dense.made_up(*shape, vocabulary=20)
    z[:, :, 2] = 1  # active on every token: correlated with nothing
    z[:, :, 5] = z[:, :, 4]  # always together
    arrays, expected, n = database(z, tokens)
    found = columns(arrays, n)
    for name in COLUMNS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, err_msg=name)
    assert (found["coactive_neighbours"][2] == -1).all() and found["coactive_neighbours"][4, 0] == 5
    assert found["coactive_phi"][4, 0] == found["coactive_jaccard"][4, 0] == 1
    assert (found["coactive_neighbours"][7] == -1).all()  # never active


def test_nothing_active_and_a_single_feature_have_empty_lists() -> None:
    tokens = np.arange(8).reshape(2, 4)
    for n_features in (1, 3):
        z = np.zeros((2, 4, n_features), np.float32)
        for value in (0, 1):
            z[0, 1:3, 0] = value
            arrays, _, n = database(z, tokens)
            found = columns(arrays, n)
            assert (found["coactive_neighbours"] == -1).all() and not found["coactive_phi"].any()


def test_only_pairs_of_two_common_features_are_estimated_and_phi_is_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    z, tokens = dense.made_up(60, 32, LIST_LENGTH + 1, vocabulary=40)  # every feature is in every other's list
    tokens[tokens == 0] = 1
    z[:, :, 9] = z[:, :, 0] * (np.random.default_rng(1).random(z.shape[:2]) < 0.1)
    arrays, _, n = database(z, tokens)
    exact = matrix(columns(arrays, n))
    counts = np.diff(arrays["by_feature.offsets"])
    monkeypatch.setattr(coactivation, "COACTIVATION_ENTRIES", 100)
    found = matrix(columns(arrays, n))
    both = np.minimum(counts[:, None], counts) > 100
    assert 0 < both.sum() < both.size and counts[9] <= 100 < counts[0]
    assert np.array_equal(found[~both], exact[~both])
    assert np.array_equal(found, found.T)
    assert not np.array_equal(found[both], exact[both])


def matrix(columns: dict[str, np.ndarray]) -> np.ndarray:
    """phi of each pair of features that is in a list, else 0."""
    phi = np.zeros((LIST_LENGTH + 1,) * 2)
    ids = columns["coactive_neighbours"]
    rows, places = (ids >= 0).nonzero()
    phi[rows, ids[rows, places]] = columns["coactive_phi"][rows, places]
    return phi


def test_the_estimate_is_unbiased_and_has_the_stated_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of phi over many made-up pairs, in units of the standard error of FORMAT.md."""
    rng, n, entries = np.random.default_rng(0), 5_000, 50
    monkeypatch.setattr(coactivation, "COACTIVATION_ENTRIES", entries)
    errors = []
    for _ in range(60):
        common = rng.random(n) < 0.3
        rarer = rng.random(n) < np.where(common, 0.2, 0.02)
        z = np.stack([common, rarer], 1).astype(np.float32)[None]
        arrays, expected, _ = database(z, np.ones((1, n), int))
        found = columns(arrays, n)
        a, b = sorted(np.diff(arrays["by_feature.offsets"]))
        error = 1 / np.sqrt(4 * entries) * np.sqrt(a / b / (1 - a / n) / (1 - b / n))
        errors.append((found["coactive_phi"][0, 0] - expected["coactive_phi"][0, 0]) / error)
    assert np.abs(np.mean(errors)) < 3 / np.sqrt(len(errors))
    assert 0.5 < np.std(errors) < 1.15


def test_all_entries_are_counted_or_one_of_each_equal_part() -> None:
    assert np.array_equal(counted_entries(4096), np.arange(4096))
    width = 3 + 5 / 4096
    picked, part = counted_entries(4096 * 3 + 5), np.arange(4096) * width
    assert ((picked > part - 1) & (picked < part + width)).all()
