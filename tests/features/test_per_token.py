"""Densities and L0 per token equal their dense formulas."""

import numpy as np
import pytest

from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.features.densities import density_histogram, rank_frequency
from saelab.features.per_token import active_per_token
from tests.features.dense import made_up, write_database


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    z, tokens = made_up(12, 16, 30, 40)
    z[:, 0] = 0
    vocabulary = [b"%d" % token for token in range(41)]
    return z, tokens, open_database(write_database(tmp_path_factory.mktemp("db") / "features", z, tokens, vocabulary))


def test_l0_per_token_equals_the_counts_of_dense_activations(made):
    z, tokens, database = made
    found = active_per_token(database.facts, database.vocabulary, n=7)
    active, ordinary = (z > 0).sum(-1), tokens != 0
    assert found.mean == pytest.approx(active[ordinary].mean())
    assert found.counts.tolist() == np.bincount(active[ordinary]).tolist()
    for token in range(41):
        here = active[ordinary & (tokens == token)]
        assert found.by_id[token] == pytest.approx(here.mean()) if len(here) else np.isnan(found.by_id[token])
    flat = np.where(ordinary, active, -1).flatten()
    assert found.hardest.tolist() == np.argsort(-flat, kind="stable")[:7].tolist()
    assert found.hardest_l0.tolist() == flat[found.hardest].tolist()
    assert not found.constant


def test_tokens_with_the_same_l0_are_constant(tmp_path):
    z = np.ones((3, 8, 4), np.float32)
    tokens = np.tile([0, *range(1, 8)], (3, 1))
    database = open_database(write_database(tmp_path / "features", z, tokens, [b"x"] * 8))
    found = active_per_token(database.facts, database.vocabulary)
    assert found.constant and found.mean == 4 and found.counts.tolist() == [0, 0, 0, 0, 21]


def test_a_text_with_unknown_tokens_is_damaged(made, tmp_path):
    z, tokens, _ = made
    folder = write_database(tmp_path / "features", z, tokens, [b"x"] * 41)
    path = folder / "tokens.npy"
    np.save(path, np.where(np.load(path) == 0, 41, np.load(path)).astype("<i4"))
    database = open_database(folder)
    with pytest.raises(SaelabError, match=r"tokens\.npy is damaged"):
        active_per_token(database.facts, database.vocabulary)


def test_the_histogram_counts_every_active_feature_once():
    density = 10 ** np.random.default_rng(0).uniform(-6, 0, 5000)
    density[:100] = 0
    edges, counts = density_histogram(density)
    assert counts.sum() == 4900 and edges[0] <= np.log10(density[100:].min()) and edges[-1] == 0
    assert counts[10] == ((np.log10(density[100:]) >= edges[10]) & (np.log10(density[100:]) < edges[11])).sum()
    assert density_histogram(np.zeros(3)).counts.sum() == 0


def test_density_by_rank_is_that_of_the_sorted_densities():
    density = np.random.default_rng(0).random(50_000) * (np.arange(50_000) % 10 > 0)
    ranks, densities = rank_frequency(density)
    assert 300 < len(ranks) <= 400 and ranks[0] == 1 and ranks[-1] == 45_000
    assert np.array_equal(densities, np.sort(density)[::-1][ranks - 1])
    assert rank_frequency(np.array([0.5, 0.0, 0.25])).ranks.tolist() == [1, 2]
    assert len(rank_frequency(np.zeros(4)).ranks) == 0
