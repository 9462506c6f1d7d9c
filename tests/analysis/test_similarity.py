import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from saelab.analysis import matching
from saelab.analysis.matching import assign_decoders, match_decoders
from saelab.analysis.similarity import (
    absolute_cosine_by_chance,
    compare_decoders,
    random_rows,
)
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
    monkeypatch.setattr(matching, "_BLOCK", 32)
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


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def related(n_a: int, n_b: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of B that are copies of some of A's with noise of any strength, in another order."""
    rng = np.random.default_rng(2)
    a = rows(n_a, d)
    b = unit(a)[rng.permutation(np.resize(np.arange(n_a), n_b))]
    return a, b + rng.random((n_b, 1)) * rng.standard_normal(b.shape) / d**0.5


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (6, 4)])
def test_one_to_one_pairs_have_the_largest_sum_of_all_ways_to_pair(shape, monkeypatch):
    a, b = rows(shape[0], 3), rows(shape[1], 3, seed=5)
    cosines = np.maximum(unit(a) @ unit(b).T, 0)
    few = cosines if shape[0] <= shape[1] else cosines.T
    ways = itertools.permutations(range(few.shape[1]), len(few))
    most = max(few[np.arange(len(few)), list(way)].sum() for way in ways)
    for limit in (2**24, 0):
        monkeypatch.setattr(matching, "_MOST_COSINES", limit)
        found = assign_decoders(a, b)
        assert found.cosine.sum() == pytest.approx(most, abs=1e-5)
        assert found.mean_cosine == pytest.approx(most / len(few)) and found.features == shape


@pytest.mark.parametrize(("n_a", "n_b"), [(300, 300), (260, 330), (330, 260)])
def test_sparse_assignment_equals_the_hungarian_algorithm(n_a, n_b, monkeypatch):
    a, b = related(n_a, n_b, 24)
    dense = assign_decoders(a, b)
    monkeypatch.setattr(matching, "_MOST_COSINES", 0)
    monkeypatch.setattr(matching, "_BLOCK", 100)
    everything = assign_decoders(a, b, candidates=400)
    few = assign_decoders(a, b, candidates=16)
    assert np.array_equal(everything.pairs, dense.pairs) and np.allclose(everything.cosine, dense.cosine, atol=1e-6)
    assert 0.999 * dense.cosine.sum() <= few.cosine.sum() <= dense.cosine.sum() + 1e-3
    for found in (dense, few):
        left, right = found.pairs.T
        assert len(set(left.tolist())) == len(left) and len(set(right.tolist())) == len(right) <= min(n_a, n_b)
        assert np.allclose(found.cosine, (unit(a) @ unit(b).T)[left, right], atol=1e-6)
        assert (np.diff(found.cosine) <= 0).all() and (found.cosine > 0).all()
        assert found.share(0.8) == (found.cosine >= 0.8).sum() / min(n_a, n_b)


def test_a_pair_can_be_no_feature_s_best():
    """Both rows of A are nearest to the first of B; one of them takes the second."""
    a = np.array([[1, 0.1], [1, -0.3]])
    b = np.array([[1, 0.0], [0.5, -1]])
    assert match_decoders(a, b).best_of_a.tolist() == [0, 0]
    assert sorted(assign_decoders(a, b).pairs.tolist()) == [[0, 0], [1, 1]]


def test_many_features_are_matched_in_little_memory(monkeypatch):
    monkeypatch.setattr(matching, "_MOST_COSINES", 0)
    monkeypatch.setattr(matching, "_BLOCK", 300)
    a, b = rows(3000, 4), rows(3000, 4, seed=1)
    tracemalloc.start()
    found = assign_decoders(a, b, candidates=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.pairs) > 2500 and peak < 3000 * 3000 * 4 / 6  # of the matrix of cosines in float32


def test_the_nearest_rows_are_those_of_the_whole_matrix_however_few_a_block_adds(monkeypatch):
    a, b = rows(150, 6), rows(210, 6, seed=1)
    cosines = unit(a) @ unit(b).T
    monkeypatch.setattr(matching, "_BLOCK", 40)
    for few in (0.0, 0.02, 1.0):  # never, sometimes and always sorted by themselves
        monkeypatch.setattr(matching, "_FEW", few)
        near = matching._Near(matching._Nearest.start(150, 7), matching._Nearest.start(210, 9))
        matching.match_rows(a, b, near)
        for found, whole, n in ((near.of_a, cosines, 7), (near.of_b, cosines.T, 9)):
            assert (np.sort(found.index, 1) == np.sort(np.argsort(-whole, 1)[:, :n], 1)).all()
            assert np.allclose(np.take_along_axis(whole, found.index.astype(int), 1), found.cosine, atol=1e-6)


def test_random_rows_have_the_mean_and_the_covariance_of_the_unit_rows(monkeypatch):
    monkeypatch.setattr(matching, "_BLOCK", 3000)
    scales = np.linspace(2, 0.5, 48)
    like = (rows(8000, 48) * scales + 3 * (np.arange(48) == 0)).astype(np.float32)
    drawn, real = random_rows(like, np.random.default_rng(0)), unit(like)
    assert drawn.shape == like.shape and np.allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-5)
    assert np.allclose(drawn.mean(0), real.mean(0), atol=0.02) and real.mean(0)[0] > 0.3
    covariance = np.cov(real.T)
    assert np.allclose(np.cov(drawn.T), covariance, atol=0.2 * covariance[1, 1])  # scaling to length 1 changes it
    assert covariance[1, 1] > 10 * covariance[-1, -1]
    assert not np.array_equal(drawn, random_rows(like, np.random.default_rng(1)))


@pytest.mark.parametrize("d", [2, 16, 257])
def test_the_absolute_cosine_by_chance_is_that_of_random_directions(d):
    cosines = np.abs((unit(rows(4000, d)) * unit(rows(4000, d, seed=1))).sum(1))
    assert absolute_cosine_by_chance(d) == pytest.approx(cosines.mean(), abs=float(4 * cosines.std() / 4000**0.5))


def test_figures_stand_beside_chance_and_unrelated_decoders_are_no_better():
    a, b = related(200, 150, 32)
    found = compare_decoders(a, b, threshold=0.8)
    figures = found.figures()
    match, pairs = match_decoders(a, b), assign_decoders(a, b)
    assert figures["mean largest cosine, A's with B"] == pytest.approx(match.mean_max_cosine)
    assert figures["mean largest cosine, B's with A"] == pytest.approx(match.cosine_of_b.mean())
    assert match.mean_max_cosine_of_b == pytest.approx(match.cosine_of_b.mean())
    assert figures["mean cosine of one-to-one pairs"] == pytest.approx(pairs.mean_cosine)
    assert figures["share paired at a cosine of 0.8"] == pairs.share(0.8) > 0.4
    assert figures["share paired at a cosine of 0.8, by chance"] == 0
    assert [len(trace.x) for trace in found.plot().data] == [50] * 4 and len(found.to_frame()) == len(figures)

    common = 3 * rows(1, 32, seed=9)  # decoders that share a direction and nothing else
    none = compare_decoders(rows(200, 32, seed=7) + common, rows(150, 32, seed=8) + common).figures()
    for name in (
        "mean largest cosine, A's with B",
        "mean largest cosine, B's with A",
        "mean cosine of one-to-one pairs",
    ):
        assert figures[name] > 1.5 * figures[f"{name}, by chance"]
        assert none[name] == pytest.approx(none[f"{name}, by chance"], abs=0.01)
    assert none["mean largest cosine, A's with B"] > 0.8


def test_it_needs_no_torch():
    code = "import sys, saelab.analysis.similarity, saelab.runs.decoder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False"
