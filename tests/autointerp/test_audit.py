"""The audit of a score: its judged examples in groups, and the question that the judge was asked."""

from pathlib import Path

import numpy as np
import pytest

from saelab.analysis.intervals import Interval
from saelab.autointerp.audit import asked, example_of, groups
from saelab.autointerp.metrics import confusion
from saelab.autointerp.records import Judged, Score
from saelab.autointerp.store import explanations, scores
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.runs import autointerp
from tests.autointerp.test_stages import INPUTS, SETTINGS, Oracle, made


def judged(*pairs: tuple[bool, float | None]) -> tuple[Judged, ...]:
    return tuple(Judged(i, 0, 0, 8, 0 if truth else -1, truth, said) for i, (truth, said) in enumerate(pairs))


def score(examples: tuple[Judged, ...], name: str = "detection", unit: str = "balanced accuracy") -> Score:
    return Score(1, name, "", "j", Interval(0.5, 0, 1), unit, judged=examples)


def rows(found: Score) -> list[tuple[str, bool, list[int]]]:
    return [(group.title, group.mistake, [each.row for each in group.judged]) for group in groups(found)]


def test_verdicts_are_the_cells_of_the_confusion_matrix_mistakes_and_the_clearest_first() -> None:
    found = score(judged((True, 0.9), (True, 0.3), (False, 0.6), (True, 0.1), (False, 0.0), (True, None), (False, 0.8)))
    assert rows(found) == [
        ("should be 1, the judge says 0", True, [3, 1]),
        ("should be 0, the judge says 1", True, [6, 2]),
        ("should be 1, the judge says 1", False, [0]),
        ("should be 0, the judge says 0", False, [4]),
        ("the answer could not be read", False, [5]),
    ]
    cells = confusion(found.judged)
    assert [cells[name] for name in ("false_negative", "false_positive", "true_positive", "true_negative")] == [
        2,
        2,
        1,
        1,
    ]


def test_values_are_mistakes_if_half_of_the_other_kind_is_on_the_wrong_side() -> None:
    rng = np.random.default_rng(0)
    examples = judged(
        *[(bool(truth), float(value)) for truth, value in zip(rng.random(40) < 0.5, rng.random(40), strict=True)]
    )
    found = groups(score(examples, "embedding", "AUROC"))
    assert sum(len(group.judged) for group in found) == 40
    for group in found:
        for each in group.judged:
            others = np.array([other.said for other in examples if other.truth != each.truth])
            wrong = (others >= each.said) if each.truth else (others <= each.said)
            assert group.mistake == (wrong.mean() >= 0.5)
            assert group.title.startswith("active" if each.truth else "silent")
    worst = [group.judged[0].said for group in found if group.mistake]
    assert worst == [min(e.said or 0 for e in found[0].judged), max(e.said or 0 for e in found[1].judged)]
    assert [group.title for group in groups(score(judged((True, 1.0)), "embedding", "AUROC"))] == ["active"]


def test_each_question_about_an_intruder_is_a_group() -> None:
    windows = [(False, 0.0)] * 4 + [(True, 1.0)]
    wrong = [(False, 1.0), *[(False, 0.0)] * 3, (True, 0.0)]
    unread = [(False, None)] * 4 + [(True, None)]
    found = rows(score(judged(*windows, *wrong, *unread), "intruder", "accuracy"))
    assert [(title.partition(": ")[2], mistake, which[0]) for title, mistake, which in found] == [
        ("another one was picked", True, 5),
        ("found", False, 0),
        ("the answer could not be read", False, 10),
    ]


def test_windows_and_questions_are_those_that_the_judge_saw(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    database = open_database(run / "features")
    autointerp.explain(run, "0:3", llm=Oracle(), settings=SETTINGS)
    autointerp.score(run, ["detection", "fuzzing", "embedding"], llm=(client := Oracle()))
    autointerp.score(run, ["intruder", "intruder_embedding"])
    by_key = {each.explanation.key: each.explanation for each in explanations(run / "autointerp", INPUTS)}
    kinds = set()
    for each in scores(run / "autointerp", INPUTS):
        question = asked(database, each, by_key.get(each.score.explanation))
        kinds.add((each.score.score, each.score.model, question is not None))
        if each.score.model == "oracle":
            assert question in client.asked
        for example in each.score.judged[:3]:
            found = example_of(database, each.score.feature, example)
            assert (found.row, found.start, len(found.tokens)) == (example.row, example.start, example.length)
            if each.score.score == "detection":
                assert bool((found.activations > 0).any()) == example.truth
    assert kinds == {
        ("detection", "oracle", True),
        ("fuzzing", "oracle", True),
        ("embedding", "TF-IDF", False),
        ("intruder", "lexical", True),
        ("intruder", "TF-IDF", False),
    }
    with pytest.raises(SaelabError, match="not within the text"):
        example_of(database, 1, Judged(10**6, 0, 0, 8, 0, True, 1.0))
