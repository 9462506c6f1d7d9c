"""Records on disk: what is written is read again, whatever it holds, and a kill costs at most the last line."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelab.analysis.intervals import Interval
from saelab.autointerp.choice import NEAR, chosen, matched, pairs, strangers
from saelab.autointerp.records import Explanation, Judged, Score
from saelab.autointerp.settings import ContextSettings, ScoreSettings
from saelab.autointerp.store import EXPLANATIONS, SCORES, explanations, explanations_by_key, scores, writing
from saelab.errors import SaelabError
from saelab.features.database import open_database
from tests.features.dense import made_up, write_database

OF, ASKED = ContextSettings(window=8), ScoreSettings(batch=3)
EXPLANATION = Explanation(7, 'a \ud800 \u2028 "text"\n', "manual", "m", "me", {"tokens": ["a"]}, "whole", 5, "few")
JUDGED = (Judged(1, 2, 0, 8, 3, True, 0.1 + 0.2, (1, 2)), Judged(4, 5, 1, 8, -1, False, None, (), "??"))
SCORE = Score(
    7, "detection", EXPLANATION.key, "judge", Interval(0.5, math.nan, math.nan), "AUROC", {"F1": 0.25}, 1, "", 9, JUDGED
)


def write(folder: Path, *records: Explanation | Score, inputs: str = "a") -> None:
    with writing(folder, inputs) as writer:
        for each in records:
            if isinstance(each, Explanation):
                writer.explanation(each, OF)
            else:
                writer.score(each, OF, ASKED)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "a", EXPLANATION, SCORE)
    assert list(explanations(tmp_path / "a", "a")) == [(EXPLANATION, OF)]
    ((found, of, asked),) = scores(tmp_path / "a", "a")
    assert (of, asked) == (OF, ASKED) and repr(found) == repr(SCORE)
    ((found, _, _),) = scores(tmp_path / "a", "a", judged=False)
    assert found.judged == ()


def test_the_last_line_of_a_key_counts_and_other_databases_do_not(tmp_path: Path) -> None:
    later = Explanation(7, EXPLANATION.text, "manual", "m", "me", note="later")
    other = Explanation(8, "b", "manual", "m")
    write(tmp_path, EXPLANATION, other)
    write(tmp_path, later)
    write(tmp_path, Explanation(9, "c", "manual", "m"), inputs="b")
    assert [each.explanation for each in explanations(tmp_path, "a")] == [other, later]
    assert [each.explanation for each in explanations(tmp_path, "a", 7)] == [later]
    assert [each.explanation.feature for each in explanations(tmp_path, "b")] == [9]


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_line_that_a_kill_cut_off_is_not_read_and_is_removed(tmp_path: Path, kept: int) -> None:
    write(tmp_path, EXPLANATION)
    whole = (tmp_path / EXPLANATIONS).read_bytes()
    (tmp_path / EXPLANATIONS).write_bytes(whole + whole[:kept])
    assert len(list(explanations(tmp_path, "a"))) == 1
    write(tmp_path, other := Explanation(8, "b", "manual", "m"))
    assert [each.explanation for each in explanations(tmp_path, "a")] == [EXPLANATION, other]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write(tmp_path, SCORE)
    line = (tmp_path / SCORES).read_bytes()
    (tmp_path / SCORES).write_bytes(b"x\n" + line)
    with pytest.raises(SaelabError, match="line 1: is damaged"):
        list(scores(tmp_path, "a"))
    (tmp_path / SCORES).write_bytes(line[:200] + b"\n" + line)
    (tmp_path / SCORES).write_bytes(line.replace(b"AUROC", b"AUR\xffC"))
    with pytest.raises(SaelabError, match="cannot be read as a line"):
        list(scores(tmp_path, "a"))


def test_explanations_by_key_are_those_of_the_file(tmp_path: Path) -> None:
    others = [Explanation(f, f"text {f}", "default", "m") for f in (9, 3, 5)]
    write(tmp_path, EXPLANATION, *others, replace(EXPLANATION, answer="the last one counts"))
    write(tmp_path, Explanation(1, "of another database", "default", "m"), inputs="b")
    with explanations_by_key(tmp_path, "a") as by_key:
        for each, _ in explanations(tmp_path, "a"):
            assert by_key(each.key) == each
        assert by_key(EXPLANATION.key).answer == "the last one counts"  # type: ignore[union-attr]
        assert by_key("") is None and by_key("0" * 16) is None and by_key("f" * 16) is None
        assert by_key(Explanation(1, "of another database", "default", "m").key) is None
    with explanations_by_key(tmp_path / "nothing", "a") as by_key:
        assert by_key("f" * 16) is None


def test_records_without_newer_settings_have_their_defaults(tmp_path: Path) -> None:
    write(tmp_path, SCORE)
    line = (tmp_path / SCORES).read_text()
    (tmp_path / SCORES).write_text(re.sub(r', "steering": \{[^}]*\}', "", line))
    assert "steering" in line and "steering" not in (tmp_path / SCORES).read_text()
    assert [asked for _, _, asked in scores(tmp_path, "a")] == [ASKED]


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    with writing(tmp_path, "a"), pytest.raises(SaelabError, match="another process"):
        write(tmp_path, SCORE)


def test_lines_are_strict_json(tmp_path: Path) -> None:
    write(tmp_path, SCORE)

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    json.loads((tmp_path / SCORES).read_text("ascii"), parse_constant=no_constant)


def test_features_are_chosen_by_index_range_and_draw(tmp_path: Path) -> None:
    z, tokens = made_up(20, 32, 40, 50)
    vocabulary = [b"<eos>", *(f"{i} ".encode() for i in range(49))]
    database = open_database(write_database(tmp_path / "f", z, tokens, vocabulary))
    assert chosen(database, "7, 3,5:8,38:") == [3, 5, 6, 7, 38, 39]
    assert chosen(database, ":2") == [0, 1]
    assert chosen(database, "9 - 11,5:7, 9") == [5, 6, 9, 10, 11]
    drawn = chosen(database, "random:10")
    assert drawn == chosen(database, "random:10") and len(set(drawn)) == 10 and 7 not in drawn
    n_active = np.asarray(database.table["n_active"])
    ordered = [f for f in np.argsort(n_active, kind="stable").tolist() if n_active[f]]
    ranks = sorted(ordered.index(f) for f in drawn)  # one of each tenth
    assert all(len(ordered) * i // 10 <= rank < len(ordered) * (i + 1) // 10 + 1 for i, rank in enumerate(ranks))
    assert chosen(database, "random:999") == sorted(ordered)
    for wrong in ("", "x", "40", "3:41", "3-40", "-1", "random:0", ":0", "5,,7"):
        with pytest.raises(SaelabError, match="features: "):
            chosen(database, wrong)
    for empty in ("5:2", "5:5", "7,5:3", "41:40"):
        with pytest.raises(SaelabError, match="is not a range of features: the end of first:end is not in it"):
            chosen(database, empty)


def test_pairs_are_near_in_density_and_as_many_as_can_be() -> None:
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (10 ** rng.uniform(-4, -1, rng.integers(1, 12)) for _ in range(2))
        found = pairs(a, b)
        near = np.maximum(a[:, None] / b, b / a[:, None]) <= NEAR
        assert all(near[i, j] for i, j in found)
        assert len({i for i, _ in found}) == len({j for _, j in found}) == len(found)
        rows, columns = linear_sum_assignment(~near)
        assert len(found) == near[rows, columns].sum()


def test_matched_features_are_the_nearest_left() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.integers(0, 40, rng.integers(1, 30)) / 1000 for _ in range(2))  # with zeros and ties
        left, expected = {i for i, each in enumerate(a) if each}, []
        for wanted in sorted(b[b > 0], reverse=True):
            near = min((max(a[i] / wanted, wanted / a[i]) for i in left), default=np.inf)
            if near <= NEAR:
                chosen_one = min(i for i in left if np.isclose(max(a[i] / wanted, wanted / a[i]), near, rtol=1e-12))
                expected.append(a[chosen_one])
                left.remove(chosen_one)
        found = matched(a, b)
        assert len(set(found)) == len(found) == len(expected) and found == sorted(found)
        np.testing.assert_allclose(np.sort(a[found]), np.sort(expected))
    same = rng.uniform(0.001, 0.2, 50)
    assert matched(same, same[::-1]) == list(range(50))


def test_strangers_are_nearest_in_density_and_have_another_text() -> None:
    density = np.array([0.4, 0.1, 0.2, 0.3])
    assert strangers(density, ["a", "b", "c", "d"]).tolist() == [3, 2, 3, 0]
    assert strangers(density, ["a", "b", "b", "a"]).tolist() == [2, 3, 3, 2]
    assert strangers(density, ["a"] * 4).tolist() == [-1] * 4
    assert strangers(density[:0], []).tolist() == []


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), st.sampled_from("abc")), max_size=12))
def test_strangers_are_those_of_a_search_in_the_order_of_densities(features: list[tuple[float, str]]) -> None:
    density, texts = np.array([d for d, _ in features]), [text for _, text in features]
    order = np.argsort(density, kind="stable").tolist()
    for feature, found in enumerate(strangers(density, texts).tolist()):
        rank = order.index(feature)
        others = [(abs(at - rank), -at, other) for at, other in enumerate(order) if texts[other] != texts[feature]]
        assert found == (min(others)[2] if others else -1)
