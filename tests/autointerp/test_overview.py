"""The overview of explanations and scores: what the store reads, at once and piece by piece."""

import csv
import io
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saelab.analysis.intervals import Interval
from saelab.autointerp.overview import Measure, Source, overview, records
from saelab.autointerp.records import SHUFFLED, Explanation, Score
from saelab.autointerp.settings import ContextSettings, ScoreSettings
from saelab.autointerp.store import EXPLANATIONS, SCORES, explanations, lines_from, score_at, scores, writing
from saelab.autointerp.tables import table_of
from saelab.errors import SaelabError
from saelab.features.database import open_database
from tests.autointerp.test_stages import INPUTS, N, made

OF, ASKED = ContextSettings(), ScoreSettings()
LEXICAL = Explanation(2, "The Token", "lexical", "lexical", answer="F1 1.0")
MANUAL = Explanation(2, "words of a person", "manual", "manual", "Ann")
CONTROL = replace(LEXICAL, text="another", kind=SHUFFLED + "lexical", note="the explanation of feature 4")
UNREAD = Explanation(3, "", "default", "gpt", answer="??")
OTHER = Explanation(4, "another", "lexical", "lexical")


def scored(of: Explanation | None, value: float, score: str = "detection", judge: str = "j", feature: int = 2) -> Score:
    ends = Interval(value, value - 0.1, value + 0.1)
    return Score(feature, score, of.key if of else "", judge, ends, "AUROC")


def write(folder: Path, *found: Explanation | Score, inputs: str = INPUTS) -> None:
    with writing(folder, inputs) as writer:
        for each in found:
            if isinstance(each, Explanation):
                writer.explanation(each, OF)
            else:
                writer.score(each, OF, ASKED)


ALL = (
    LEXICAL,
    scored(LEXICAL, 0.25),
    OTHER,
    CONTROL,
    UNREAD,
    scored(CONTROL, 0.5),
    scored(None, math.nan, "intruder", feature=4),
    scored(None, 0.75, "intruder"),
    scored(LEXICAL, 0.875),
)


def test_the_overview_has_the_latest_explanation_of_each_feature_with_its_scores_and_those_of_its_control(
    tmp_path: Path,
) -> None:
    assert not overview(tmp_path / "none", INPUTS, N).latest
    write(tmp_path, *ALL)
    write(tmp_path, replace(OTHER, text="of another database"), inputs="b")
    found = overview(tmp_path, INPUTS, N)
    two = found.explanation(2)
    assert two is not None and (two.text, two.source) == ("The Token", Source("lexical", "lexical", ""))
    assert found.explanation(3) is None and [*found.latest] == [2, 4]
    assert found.search(" the  TOKEN").tolist() == [2] and found.search("o").tolist() == [2, 4]
    own, control = found.columns["detection by j"]
    np.testing.assert_array_equal(own, [np.nan, np.nan, 0.875, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(control, [np.nan, np.nan, 0.5, np.nan, np.nan, np.nan])
    own, control = found.columns["intruder by j"]
    assert own[2] == 0.75 and np.isnan(own[4]) and np.isnan(control).all()
    assert found.measures == (Measure("detection", "j", "AUROC"), Measure("intruder", "j", "AUROC"))
    by_source = {each.source: each.values.tolist() for each in found.points("detection by j")}
    assert by_source == {two.source: [0.875], Source(CONTROL.kind, "lexical", ""): [0.5]}
    assert [(each.source, each.values.tolist()) for each in found.points("intruder by j")] == [(None, [0.75])]


def test_records_of_a_feature_are_those_that_the_store_reads(tmp_path: Path) -> None:
    write(tmp_path, *ALL)
    found = overview(tmp_path, INPUTS, N)
    for feature in range(N):
        explained, own = records(tmp_path, found, feature)
        assert explained == list(explanations(tmp_path, INPUTS, feature))
        assert repr(own) == repr(list(scores(tmp_path, INPUTS, feature, judged=False)))
    (line,) = found.scores[found.scores["value"] == 0.875]
    assert score_at(tmp_path, int(line["offset"])).score == scored(LEXICAL, 0.875)


def test_reading_on_equals_reading_anew(tmp_path: Path) -> None:
    known = None
    for number, each in enumerate((*ALL, MANUAL, scored(MANUAL, 0.1), LEXICAL)):
        write(tmp_path, each)
        known = overview(tmp_path, INPUTS, N, known)
        whole = overview(tmp_path, INPUTS, N)
        assert [*known.explanations.items()] == [*whole.explanations.items()] and known.read == whole.read, number
        assert repr(known.scores.tolist()) == repr(whole.scores.tolist())  # NaN too
        np.testing.assert_array_equal([*known.columns.values()], [*whole.columns.values()])
    assert known is not None
    latest = known.explanation(2)
    assert latest is not None and latest.text == LEXICAL.text, "it was written again, after the one by hand"
    again = overview(tmp_path, INPUTS, N, known)
    assert again.read == known.read and len(again.scores) == 5
    shutil.rmtree(tmp_path)
    write(tmp_path, OTHER)
    assert [*overview(tmp_path, INPUTS, N, known).latest] == [4], "other files"


def test_a_text_that_looks_like_judged_examples_is_read(tmp_path: Path) -> None:
    odd = replace(LEXICAL, text='", "judged": [1], "x": [')
    write(tmp_path, odd, replace(scored(odd, 0.5), note='{"a": 1, "judged": [[2]]}'))
    assert [each["text"] for _, _, each in lines_from(tmp_path / EXPLANATIONS, INPUTS)] == [odd.text]
    ((_, _, line),) = lines_from(tmp_path / SCORES, INPUTS)
    assert line["note"] == '{"a": 1, "judged": [[2]]}' and "judged" not in line


def test_damaged_lines_are_named_and_unfinished_ones_are_left(tmp_path: Path) -> None:
    write(tmp_path, LEXICAL)
    known = overview(tmp_path, INPUTS, N)
    with (tmp_path / EXPLANATIONS).open("a") as file:
        file.write('{"feature": 4, "key"')
    assert overview(tmp_path, INPUTS, N, known).read == known.read
    with (tmp_path / EXPLANATIONS).open("a") as file:
        file.write(": 1}\n")
    for before in (None, known):
        with pytest.raises(SaelabError, match=r"explanations\.jsonl, .*damaged"):
            overview(tmp_path, INPUTS, N, before)


def test_the_table_has_a_line_for_each_feature_and_no_formulas(tmp_path: Path) -> None:
    database = open_database(made(tmp_path / "run") / "features")
    write(tmp_path / "a", *ALL, replace(OTHER, text="=HYPERLINK(1)", author="-Eve"))
    known = overview(tmp_path / "a", INPUTS, N)
    rows = list(csv.DictReader(io.StringIO(table_of(database, np.array([4, 2]), known))))
    assert [row["feature"] for row in rows] == ["4", "2"]
    assert rows[0]["explanation"] == "'=HYPERLINK(1)" and rows[0]["author"] == "'-Eve"
    assert (rows[1]["explanation"], rows[1]["kind"]) == ("The Token", "lexical")
    assert (rows[1]["detection by j"], rows[1]["detection by j, shuffled"]) == ("0.875", "0.5")
    assert rows[0]["detection by j"] == "" and "intruder by j, shuffled" not in rows[0]
    assert float(rows[1]["density"]) == pytest.approx(database.feature(2).density, rel=1e-5)
