"""Linear CKA of sparse codes equals the dense formula, in any blocks and tiles, and its intervals are over rows."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
import torch

from saelab.analysis import cka as module
from saelab.analysis.cka import Cka, PairedCodes
from saelab.codes import Codes
from saelab.errors import SaelabError


def sparse(dense: np.ndarray) -> Codes:
    scores = torch.from_numpy(dense.astype(np.float32))
    return Codes.from_mask(scores > 0, scores)


def dense_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (each.astype(np.float32).astype(np.float64) for each in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).__pow__(2).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))


def made_up(rows: int, per_row: int, seed: int, f_a: int = 30, f_b: int = 17) -> tuple[np.ndarray, ...]:
    """Codes of two autoencoders that share causes, which are alike within a row; and the row of each token."""
    rng, world = np.random.default_rng(seed), np.random.default_rng(99)
    cause = 0.5 * rng.standard_normal((rows, 1, 6)) + rng.standard_normal((rows, per_row, 6))
    flat = cause.reshape(-1, 6)
    x, y = (np.maximum(flat @ world.standard_normal((6, f)) - 1.5, 0) for f in (f_a, f_b))
    return x, y, np.repeat(np.arange(rows), per_row)


def found(x: np.ndarray, y: np.ndarray, row: np.ndarray, block: int = 10**6) -> Cka:
    codes = PairedCodes()
    for start in range(0, len(x), block):
        part = slice(start, start + block)
        codes.add(sparse(x[part]), sparse(y[part]), row[part])
    return codes.cka()


def test_it_equals_the_dense_formula_in_any_blocks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, row = made_up(40, 7, 0)
    x[:, 3], y[:, 2] = x[:, 3] + 50, 0  # a feature that is always active, with a mean far above its spread; one never
    whole = found(x, y, row)
    assert whole.cka.value == pytest.approx(dense_cka(x, y), rel=1e-9) and 0.3 < whole.cka.value < 0.999
    assert (whole.tokens, whole.rows, whole.features) == (280, 40, (30, 17))
    monkeypatch.setattr(module, "_MOST_PAIRS", 700)  # tiles of a few features
    tiled = found(x, y, row, block=23)
    assert tiled.cka == pytest.approx(whole.cka, rel=1e-9) and tiled.by_chance == pytest.approx(whole.by_chance)
    assert found(y, x, row).cka.value == pytest.approx(whole.cka.value, rel=1e-9)
    assert found(x, x, row).cka == pytest.approx((1, 1, 1))
    assert found(x, 3 * x[:, ::-1], row).cka.value == pytest.approx(1)
    assert whole.plot().to_json() and len(whole.to_frame()) == 6


def test_the_interval_is_that_of_leaving_out_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, row = made_up(25, 5, 1)  # fewer rows than groups: each row is one
    left = np.array([dense_cka(x[row != r], y[row != r]) for r in range(25)])
    reach = 2.0639 * np.sqrt(24 * left.var())  # Student's t, 24 degrees of freedom
    value, low, high = found(x, y, row).cka
    assert (low, high) == pytest.approx((value - reach, value + reach), rel=1e-4)
    alone = found(x[:5], y[:5], row[:5]).cka
    assert alone.value == pytest.approx(dense_cka(x[:5], y[:5])) and np.isnan(alone.low)


def test_95_percent_intervals_contain_the_truth_in_90_to_98_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUPS", 12)
    truth = dense_cka(*made_up(20_000, 6, 5, 8, 6)[:2])
    hits = 0
    for seed in range(100):
        x, y, row = made_up(60, 6, 100 + seed, 8, 6)
        low, high = found(x, y, row).cka[1:]
        hits += low <= truth <= high
    assert 0.90 <= hits / 100 <= 0.98


def test_by_chance_is_the_mean_over_all_orders_of_the_tokens() -> None:
    x, y, row = made_up(2, 3, 2, 5, 4)
    orders = [dense_cka(x, y[list(order)]) for order in permutations(range(6))]
    assert found(x, y, row).by_chance == pytest.approx(np.mean(orders), rel=1e-9)
    x, y, row = made_up(50, 6, 2)
    assert found(x, y, row).by_chance < 0.2 * found(x, y, row).cka.value
    unrelated = found(x, y[np.random.default_rng(1).permutation(300)], row)
    assert unrelated.cka.value == pytest.approx(unrelated.by_chance, abs=0.05)


@pytest.mark.parametrize(("per_row", "dense"), [(50, True), (1, False)])
def test_a_tile_is_dense_if_many_entries_meet_in_it(per_row: int, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, row = made_up(40, per_row, 3)
    monkeypatch.setattr(module, "_CELLS_PER_PAIR", 1)
    tiles, make = [], module._dense_parts
    monkeypatch.setattr(module, "_dense_parts", lambda *args: tiles.append(1) or make(*args))
    assert found(x, y, row).cka.value == pytest.approx(dense_cka(x, y), rel=1e-9) and bool(tiles) == dense


def test_many_features_take_little_memory() -> None:
    """2^17 features: Y^T X would have 2^34 entries."""
    rng = np.random.default_rng(0)
    codes = []
    for _ in range(2):
        values, features = rng.random((200, 4)), rng.integers(0, 2**17, (200, 4))
        codes.append(Codes.from_topk(torch.from_numpy(values).float(), torch.from_numpy(features), 2**17))
    pair = PairedCodes()
    pair.add(codes[0], codes[1], np.arange(200) // 20)
    tracemalloc.start()
    found = pair.cka()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    used = [each.features.unique() for each in codes]
    x, y = (each.to_dense()[:, features].double().numpy() for each, features in zip(codes, used, strict=True))
    assert found.cka.value == pytest.approx(dense_cka(x, y)) and peak < 200e6


def test_what_has_no_cka_is_refused() -> None:
    x, y, row = made_up(4, 3, 0)
    with pytest.raises(SaelabError, match="codes of 12 and 11 tokens"):
        PairedCodes().add(sparse(x), sparse(y[:11]), row)
    with pytest.raises(SaelabError, match="fewer than two tokens"):
        PairedCodes().cka()
    with pytest.raises(SaelabError, match="no feature varies"):
        found(0 * x, y, row)
