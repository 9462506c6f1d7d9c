"""What is read from a short text equals the same on its dense codes."""

import numpy as np
import pytest

from saelab.analysis.short_text import ShortText, changes


def short(z: np.ndarray) -> ShortText:
    """The text with activations z ``[tokens, n_features]``."""
    token, features = z.nonzero()
    counts = (z > 0).sum(1)
    ids = np.arange(len(z))
    return ShortText(ids, [f"t{i}" for i in ids], np.r_[0, counts.cumsum()], features, z[token, features])


@pytest.fixture
def z() -> np.ndarray:
    rng = np.random.default_rng(0)
    z = (rng.exponential(2.0, (9, 30)) * (rng.random((9, 30)) < 0.2)).astype(np.float32)
    z[0] = 0  # BOS
    return z


def test_rows_and_columns_of_the_codes(z: np.ndarray) -> None:
    text = short(z)
    assert len(text) == 9 and text.l0.tolist() == (z > 0).sum(1).tolist()
    for token in range(9):
        features, values = text.at(token)
        assert features.tolist() == z[token].nonzero()[0].tolist() and values.tolist() == z[token][features].tolist()
    for feature in range(30):
        assert text.of(feature).tolist() == z[:, feature].tolist()
    features, maxima = text.maxima()
    assert features.tolist() == z.any(0).nonzero()[0].tolist() and maxima.tolist() == z.max(0)[features].tolist()


def test_similarity_is_the_cosine_of_codes(z: np.ndarray) -> None:
    norms = np.linalg.norm(z, axis=1)
    norms[norms == 0] = np.inf
    np.testing.assert_allclose(short(z).similarity(), z @ z.T / np.outer(norms, norms), atol=1e-6)
    assert not short(z).similarity()[0].any() and not short(np.zeros((3, 4), np.float32)).similarity().any()


def test_changes_are_those_of_the_largest_activations(z: np.ndarray) -> None:
    other = z[2:].copy()
    other[:, 4] = 0
    other[0, 5] = 50
    found = changes(short(z), short(other))
    difference = other.max(0) - z.max(0)
    assert set(found.features.tolist()) == set(difference.nonzero()[0].tolist())
    assert found.before.tolist() == z.max(0)[found.features].tolist()
    assert found.after.tolist() == other.max(0)[found.features].tolist()
    assert (np.diff(np.abs(difference[found.features])) <= 0).all()
    assert not len(changes(short(z), short(z)).features)
