import subprocess
import sys

import numpy as np
import pytest

from saelab.analysis import similarity
from saelab.analysis.similarity import match_decoders
from saelab.errors import SaelabError


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def test_a_permuted_copy_has_cosine_1_and_gives_the_permutation():
    a = rows(300, 24)
    order = np.random.default_rng(1).permutation(300)
    match = match_decoders(a, 3.5 * a[order])
    assert np.array_equal(order[match.best_of_a], np.arange(300)) and np.array_equal(match.best_of_b, order)
    assert np.allclose(match.cosine_of_a, 1) and match.mean_max_cosine == pytest.approx(1, abs=1e-6)
    assert match.mutual.all() and sorted(match.pairs[:, 0].tolist()) == list(range(300))
    assert len(match.born(0.99)) == len(match.died(0.99)) == 0


def test_blocks_give_what_the_whole_matrix_of_cosines_gives(monkeypatch):
    a, b = rows(130, 7), rows(90, 7, seed=1)
    a[5], b[9] = 0, b[2]  # a row of zeros, and two equal ones
    unit_a, unit_b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (a, b))
    cosines = unit_a @ unit_b.T
    monkeypatch.setattr(similarity, "_BLOCK", 32)
    match = match_decoders(a, b)
    real = np.arange(130) != 5
    assert np.array_equal(match.best_of_a[real], cosines.argmax(1)[real])
    assert np.array_equal(match.best_of_b, cosines.argmax(0))
    assert np.allclose(match.cosine_of_a, cosines.max(1), atol=1e-6) and match.cosine_of_a[5] == 0
    assert np.allclose(match.cosine_of_b, cosines.max(0), atol=1e-6)
    for i, (f, g) in enumerate(match.pairs):
        assert cosines[f].argmax() == g and cosines[:, g].argmax() == f
        assert i == 0 or cosines[f, g] <= cosines[tuple(match.pairs[i - 1])] + 1e-6
    died, born = match.died(0.6), match.born(0.6)
    assert set(died) == set(np.flatnonzero(cosines.max(1) < 0.6)) and 0 < len(died) < 130
    assert set(born) == set(np.flatnonzero(cosines.max(0) < 0.6))
    assert (np.diff(match.cosine_of_a[died]) >= 0).all()


def test_random_directions_have_the_cosine_of_chance():
    """The cosine of two random directions in d dimensions is distributed as t of t^2 ~ Beta(1/2, (d - 1) / 2)."""
    d, n = 64, 4000
    match = match_decoders(rows(500, d), rows(n, d, seed=1))
    draws = np.random.default_rng(2).beta(0.5, (d - 1) / 2, (500, n)) ** 0.5
    signs = np.random.default_rng(3).choice([-1, 1], (500, n))
    chance = (draws * signs).max(1)
    error = 4 * chance.std() / 500**0.5
    assert abs(match.mean_max_cosine - chance.mean()) < error < 0.02


def test_the_frame_and_the_plot_have_every_feature():
    match = match_decoders(rows(30, 4), rows(20, 4, seed=1))
    frame = match.to_frame()
    assert frame["feature"].tolist() == list(range(30)) and frame["mutual"].sum() == len(match.pairs)
    assert [sum(bar.y) for bar in match.plot().data] == [30, 20]
    same = match_decoders(a := rows(300, 24), a)
    assert same.cosine_of_a.max() > 1  # by rounding
    assert [sum(bar.y) for bar in same.plot().data] == [300, 300]


def test_decoders_of_different_widths_are_refused():
    with pytest.raises(SaelabError, match=r"\[3, 4\] and \[3, 5\] cannot be matched"):
        match_decoders(rows(3, 4), rows(3, 5))
    with pytest.raises(SaelabError, match="cannot be matched"):
        match_decoders(rows(3, 4), rows(0, 4))


def test_it_needs_no_torch():
    code = "import sys, saelab.analysis.similarity, saelab.runs.decoder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False"
