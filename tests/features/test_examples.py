"""Examples of every kind are what they say, checked on the dense activations that the database was written from."""

from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest

from saelab.errors import SaelabError
from saelab.features.database import Database, open_database
from saelab.features.examples import Example, window_start
from saelab.features.near_misses import NearMisses, near_misses, nearest
from tests.features.dense import made_up, write_database

N_ROWS, CONTEXT, N_FEATURES, VOCABULARY = 300, 48, 12, 60
NEVER_ACTIVE = 7
WINDOW = 16
FEATURES = [0, 3, 5, 11]


class Dense:
    """A database and the activations ``[rows, context, n_features]`` that are stored in it."""

    def __init__(self, folder: Path) -> None:
        z, self.tokens = made_up(N_ROWS, CONTEXT, N_FEATURES, VOCABULARY)
        self.database = open_database(
            write_database(folder / "features", z, self.tokens, [b"t%d" % i for i in range(VOCABULARY)])
        )
        self.z = np.zeros((N_ROWS * CONTEXT, N_FEATURES), np.float32)
        for feature in range(N_FEATURES):
            places, values = self.database.facts.activations(feature)
            self.z[places, feature] = values
        self.z = self.z.reshape(z.shape)
        assert ((self.z > 0) == ((z > 0) & (self.tokens > 0)[..., None])).all()

    def check(self, example: Example, feature: int) -> None:
        """The example is a window of the text with the activations of the feature on it."""
        where = slice(example.start, example.start + len(example.tokens))
        np.testing.assert_array_equal(example.token_ids, self.tokens[example.row, where])
        np.testing.assert_array_equal(example.activations, self.z[example.row, where, feature])
        assert example.tokens == [f"t{token}" for token in example.token_ids]
        assert example.activation == self.z[example.row, example.position, feature]
        assert example.start >= 0 and example.start + len(example.tokens) <= CONTEXT

    def values(self, feature: int) -> np.ndarray:
        values = self.z[..., feature]
        return values[values > 0]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    return Dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def database(dense: Dense) -> Database:
    return dense.database


def places(examples: list[Example]) -> list[tuple[int, int]]:
    return [(example.row, example.position) for example in examples]


@pytest.mark.parametrize("feature", FEATURES)
def test_top_examples_are_the_strongest_activation_of_each_row(dense: Dense, feature: int) -> None:
    found = dense.database.examples(feature, window=WINDOW)
    best = np.sort(dense.z[..., feature].max(1))[::-1]
    np.testing.assert_allclose([example.activation for example in found], best[: len(found)], rtol=2**-10)
    assert len(found) == min(20, (best > 0).sum())
    assert len({example.row for example in found}) == len(found)
    for example in found:
        dense.check(example, feature)


@pytest.mark.parametrize("feature", FEATURES)
def test_examples_of_a_range_and_random_ones_are_drawn_from_exactly_those(dense: Dense, feature: int) -> None:
    low, high = np.quantile(dense.values(feature), [0.4, 0.6])
    inside = set(zip(*((dense.z[..., feature] >= low) & (dense.z[..., feature] <= high)).nonzero(), strict=True))
    everything = dense.database.examples(feature, "range", 10_000, WINDOW, low, high)
    assert set(places(everything)) == inside and len(everything) == len(inside)
    found = dense.database.examples(feature, "range", 8, WINDOW, low, high)
    strengths = [example.activation for example in found]
    assert len(found) == 8 and strengths == sorted(strengths, reverse=True)
    assert set(places(found)) < set(places(dense.database.examples(feature, "range", 9, WINDOW, low, high)))
    anywhere = dense.database.examples(feature, "random", 12, WINDOW)
    assert places(anywhere)[:5] == places(dense.database.examples(feature, "random", 5, WINDOW))
    assert len(set(places(anywhere))) == 12
    for example in found + anywhere:
        dense.check(example, feature)
        assert example.activation > 0


def test_a_random_example_is_any_activation_equally_often(dense: Dense) -> None:
    """The first third of the text has about a third of a draw of half of the activations."""
    order = places(dense.database.examples(0, "random", len(dense.values(0)) // 2, WINDOW))
    share = np.mean([row < N_ROWS // 3 for row, _ in order])
    assert abs(share - (dense.z[: N_ROWS // 3, :, 0] > 0).sum() / len(dense.values(0))) < 4 / len(order) ** 0.5


@pytest.mark.parametrize("feature", FEATURES)
def test_intervals_lie_between_deciles_and_cover_every_activation_once(dense: Dense, feature: int) -> None:
    found, values = dense.database.intervals(feature, 4, WINDOW), dense.values(feature)
    assert len(found) == 10 and sum(interval.share for interval in found) == pytest.approx(1)
    assert found[0].high == values.max() and found[-1].low == values.min()
    for stronger, weaker in pairwise(found):
        assert weaker.low <= weaker.high < stronger.low
    for interval in found:
        inside = (values >= interval.low) & (values <= interval.high)
        assert interval.share == inside.mean() and abs(interval.share - 0.1) < 1.5 / len(values)
        assert len(interval.examples) == min(4, inside.sum())
        again = dense.database.examples(feature, "range", 4, WINDOW, interval.low, interval.high)
        assert places(again) == places(interval.examples)
        for example in interval.examples:
            dense.check(example, feature)
            assert interval.low <= example.activation <= interval.high


def test_equal_activations_share_an_interval(tmp_path: Path) -> None:
    z, tokens = np.zeros((6, 10, 2), np.float32), np.ones((6, 10), int)
    z[:, :, 0] = 2.0 ** (np.arange(60).reshape(6, 10) % 3)
    z[2, 3, 1] = 5
    database = open_database(write_database(tmp_path / "features", z, tokens, [b"a", b"b"]))
    assert [(i.low, i.high, round(i.share, 6)) for i in database.intervals(0)] == [
        (4, 4, 0.333333),
        (2, 2, 0.333333),
        (1, 1, 0.333333),
    ]
    ((low, high, share, examples),) = database.intervals(1)
    assert (low, high, share, places(examples)) == (5, 5, 1, [(2, 3)])


@pytest.mark.parametrize("feature", FEATURES)
def test_the_tokens_of_a_range(dense: Dense, feature: int) -> None:
    low, high = np.quantile(dense.values(feature), [0.2, 0.9])
    inside = (dense.z[..., feature] >= low) & (dense.z[..., feature] <= high)
    counts = Counter(dense.tokens[inside].tolist())
    expected = sorted(counts, key=lambda token: (-counts[token], token))[:6]
    found = dense.database.tokens_in_range(feature, low, high, 6)
    assert found.n == inside.sum() and found.tokens.tolist() == expected
    np.testing.assert_allclose(found.shares, [counts[token] / inside.sum() for token in expected])
    peak = dense.tokens.flatten()[dense.z[..., feature].argmax()]
    assert found.peak_share == pytest.approx(counts[peak] / inside.sum())
    everything = dense.database.tokens_in_range(feature, 0, np.inf, VOCABULARY)
    assert everything.n == len(dense.values(feature)) and everything.shares.sum() == pytest.approx(1)
    nothing = dense.database.tokens_in_range(feature, high, low)
    assert (nothing.n, nothing.peak_share, len(nothing.tokens)) == (0, 0, 0)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """Feature 0 has 3 activations far above the others, feature 1 one that is no more than 5 times the others'."""
    z, tokens = made_up(40, 32, 3, 20)
    z = np.minimum(z, 9)
    z[[3, 8, 20], 1] = [[300, 0, 0], [4000, 0, 0], [90, 40, 0]]
    vocabulary = [b"t%d" % i for i in range(20)]
    return open_database(write_database(tmp_path_factory.mktemp("far") / "features", z, tokens, vocabulary))


def test_a_usual_maximum_leaves_out_what_is_far_above_all_other_activations(far: Database, dense: Dense) -> None:
    assert far.feature(0).usual_maximum == np.sort(far.facts.activations(0).values)[-4] < 9.01
    assert far.feature(1).usual_maximum == far.feature(1).maximum == 40
    for feature in range(N_FEATURES):
        assert dense.database.feature(feature).usual_maximum == dense.database.facts.maxima[feature]


@pytest.mark.parametrize("feature", [0, 1])
def test_each_bar_is_the_number_of_activations_in_its_range(far: Database, feature: int) -> None:
    counts, edges, logarithmic = far.feature(feature).bars
    assert logarithmic == (feature == 0) and counts.sum() == far.feature(feature).n_active
    if logarithmic:
        np.testing.assert_allclose(edges[1:] / edges[:-1], edges[1] / edges[0], rtol=1e-5)
        assert edges[0] == far.facts.activations(0).values.min() and np.flatnonzero(counts)[-4:].min() > 20
    else:
        assert counts.tolist() == far.feature(feature).histogram.tolist()
    assert edges[-1] == far.feature(feature).maximum
    highest = np.append(np.nextafter(edges[1:-1].astype(np.float32), np.float32(0)), edges[-1])
    for count, low, high in zip(counts.tolist(), edges.tolist(), highest.tolist(), strict=False):
        assert far.tokens_in_range(feature, low, high).n == count


def test_repeats_are_counted_and_not_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (6, 20))
    z = np.zeros((6, 20, 1), np.float32)
    z[:, 10, 0] = [6, 5, 4, 3, 2, 1]
    tokens[1, 7:14] = tokens[0, 7:14]  # repeats the strongest
    tokens[3, 7:14] = tokens[0, 7:14]
    tokens[4, 7:14] = tokens[2, 7:14]
    tokens[5, 7:13] = tokens[2, 7:13]  # the seventh token differs
    tokens[5, 13] = tokens[2, 13] % 49 + 1
    database = open_database(write_database(tmp_path / "features", z, tokens, [b"t%d" % i for i in range(50)]))
    assert [(example.row, example.repeats) for example in database.examples(0, distinct=True)] == [
        (0, 2),
        (2, 1),
        (5, 0),
    ]
    assert [example.row for example in database.examples(0, n=2, distinct=True)] == [0, 2]
    assert [(example.row, example.repeats) for example in database.examples(0)] == [(row, 0) for row in range(6)]


def all_windows(found: NearMisses, top: list[Example]) -> list[tuple[int, int]]:
    return [(example.row, example.start) for example in found.same_token + found.similar_text + top]


@pytest.mark.parametrize("feature", FEATURES)
def test_near_misses_are_inactive_and_overlap_nothing(dense: Dense, feature: int) -> None:
    database, top = dense.database, dense.database.examples(feature, window=WINDOW)
    found = database.near_misses(feature, 10, WINDOW)
    assert len(found.same_token) == len(found.similar_text) == 10 and found.searched == N_ROWS * CONTEXT
    for example in found.same_token + found.similar_text:
        dense.check(example, feature)
        assert example.activation == 0 and database.vocabulary.counts[example.token_ids[example.index]] > 0
    assert all(not example.activations.any() for example in found.similar_text)
    for (row, start), (other, begin) in combinations(all_windows(found, top), 2):
        assert row != other or abs(start - begin) >= WINDOW
    again = database.near_misses(feature, 10, WINDOW)
    assert all_windows(again, top) == all_windows(found, top)
    more = database.near_misses(feature, 12, WINDOW)
    assert places(more.same_token)[:10] == places(found.same_token)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_near_miss_at_the_same_token_has_the_peak_token_as_long_as_there_are_any(dense: Dense, feature: int) -> None:
    peak = int(dense.tokens.flatten()[dense.z[..., feature].argmax()])
    top = [token.token for token in dense.database.feature(feature).top_tokens]
    found = [int(e.token_ids[e.index]) for e in dense.database.near_misses(feature, 1000, WINDOW).same_token]
    assert found[0] == peak and set(found) <= {peak, *top}
    order = list(dict.fromkeys([peak, *top]))
    assert [order.index(token) for token in found] == sorted(order.index(token) for token in found)


def vector(window: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The TF-IDF vector of a window, by its definition."""
    idf = np.array([np.log(1 + counts.sum() / count) if count else 0 for count in counts])
    return np.bincount(window, minlength=len(counts)) * idf


@pytest.mark.parametrize("feature", FEATURES)
def test_similar_text_is_the_nearest_silent_text_by_the_dense_formula(dense: Dense, feature: int) -> None:
    counts = np.bincount(dense.tokens[dense.tokens > 0], minlength=VOCABULARY)
    top = dense.database.examples(feature, window=WINDOW)
    query = np.mean([v / np.linalg.norm(v) for v in (vector(e.token_ids, counts) for e in top)], 0)
    found = dense.database.near_misses(feature, 10, WINDOW)
    taken = [(example.row, example.start) for example in top + found.same_token]
    cosines = {}
    for row in range(N_ROWS):
        for start in range(0, CONTEXT, WINDOW):
            silent = not dense.z[row, start : start + WINDOW, feature].any()
            if silent and all(row != other or abs(start - begin) >= WINDOW for other, begin in taken):
                v = vector(dense.tokens[row, start : start + WINDOW], counts)
                cosines[row, start] = v @ query / np.linalg.norm(v) / np.linalg.norm(query)
    best = sorted(cosines, key=lambda where: (-cosines[where], where))[:10]
    assert [(example.row, example.start) for example in found.similar_text] == best
    for example in found.similar_text:
        weight = vector(example.token_ids, counts) / np.bincount(example.token_ids, minlength=VOCABULARY).clip(1)
        assert example.token_ids[example.index] == example.token_ids[(weight * query)[example.token_ids].argmax()]


def test_windows_that_are_passed_over_are_not_among_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.features.near_misses._CHUNK", 3)
    rng = np.random.default_rng(3)
    for _ in range(30):
        windows = rng.integers(0, rng.integers(2, 9), (rng.integers(1, 80), 5))
        idf, query = rng.random(9) * (rng.random(9) < 0.8), rng.random(9) * (rng.random(9) < 0.5)
        cosines = np.zeros(len(windows))
        for i, window in enumerate(windows):
            v = np.bincount(window, minlength=9) * idf
            if v @ query > 0:
                cosines[i] = v @ query / np.linalg.norm(v)
        n = int(rng.integers(1, 12))
        best = nearest(windows, idf, query, n)
        np.testing.assert_allclose(cosines[best], np.sort(cosines[cosines > 0])[::-1][:n])


def test_a_long_text_is_searched_in_rows_at_equal_distances(dense: Dense) -> None:
    database = dense.database
    found = near_misses(database.facts, database.table, database.vocabulary, 3, 10, WINDOW, searched=60 * CONTEXT + 5)
    assert found.searched == 60 * CONTEXT
    rows = {example.row for example in found.same_token + found.similar_text}
    assert rows <= set(range(0, N_ROWS, 5)) and max(rows) > N_ROWS / 2
    for example in found.same_token + found.similar_text:
        dense.check(example, 3)
        assert example.activation == 0


def test_a_never_active_feature_has_no_examples_of_any_kind(database: Database) -> None:
    assert [database.examples(NEVER_ACTIVE, kind) for kind in ("top", "range", "random")] == [[], [], []]
    assert database.intervals(NEVER_ACTIVE) == [] and database.tokens_in_range(NEVER_ACTIVE, 0, 1).n == 0
    found = database.near_misses(NEVER_ACTIVE)
    assert found.same_token == found.similar_text == []


def test_a_feature_that_does_not_exist_or_a_kind_is_an_error(database: Database) -> None:
    for read in (database.examples, database.intervals, database.near_misses):
        with pytest.raises(SaelabError, match="There is no feature 12"):
            read(12)
        for n, window, message in ((0, 8, "n: 0 is"), (-1, 8, "n: -1 is"), (3, 0, "window: 0 is")):
            with pytest.raises(SaelabError, match=f"{message} not a positive number"):
                read(0, n=n, window=window)
    with pytest.raises(SaelabError, match="There is no feature -1"):
        database.tokens_in_range(-1, 0, 1)
    with pytest.raises(SaelabError, match="the kinds are top, range and random"):
        database.examples(0, "best")  # type: ignore[arg-type]


def test_a_window_keeps_within_its_row_and_shows_text_before_its_token() -> None:
    assert [window_start(position, 9, 30) for position in (0, 5, 6, 20, 29)] == [0, 0, 0, 14, 21]
