"""Intruder: one silent window in each question, found by a judge that knows, at chance by one that guesses."""

import json
import math

import numpy as np
import pytest

from saelab.autointerp.contexts import Context, Contexts
from saelab.autointerp.embedders import tfidf
from saelab.autointerp.llm.protocol import Reply
from saelab.autointerp.scorers.intruder import SHOWN, picked, questions, read, requests, score
from saelab.autointerp.settings import ScoreSettings
from saelab.features.examples import Example

SETTINGS = ScoreSettings()


def feature(positives: int = 24, negatives: int = 30, parts: int = 3) -> Contexts:
    def context(row: int, tokens: list[str], active: int, quantile: int) -> Context:
        z = np.zeros(len(tokens), np.float32)
        z[:active] = 1
        return Context(Example(row, 0, float(z.max()), 0, np.arange(len(tokens)), tokens, z), quantile)

    yes = [context(i, [" cat", " cat", f" w{i}"], 1 + i % 2, i * parts // positives) for i in range(positives)]
    no = [context(100 + i, [f" a{i}", f" b{i}", f" c{i}"], 0, -1) for i in range(negatives)]
    return Contexts(1, 1.0, (), tuple(yes), tuple(no), positives, "")


def test_a_question_has_one_silent_window_and_uses_none_twice() -> None:
    asked = questions(feature(), SETTINGS)
    assert len(asked) == 6 and requests(feature(), SETTINGS) == requests(feature(), SETTINGS)
    used = [each.example.row for question in asked for each in question.windows]
    assert len(set(used)) == len(used) == 6 * SHOWN
    for question in asked:
        assert [each.quantile == -1 for each in question.windows] == [i == question.intruder for i in range(SHOWN)]
        assert len({each.quantile for each in question.windows}) == 2
        assert 1 <= len(question.marked[question.intruder]) <= 2
    places = {question.intruder for seed in range(5) for question in questions(feature(), ScoreSettings(seed=seed))}
    assert places == set(range(SHOWN))
    assert len(questions(feature(negatives=2), SETTINGS)) == 2


def test_one_that_knows_scores_1_and_one_that_guesses_a_fifth() -> None:
    contexts, asked = feature(400, 100, 5), requests(feature(400, 100, 5), SETTINGS)
    right = [Reply(json.dumps({"odd": 1 + q.intruder}), None, 50, 5) for q in questions(contexts, SETTINGS)]
    found = score(contexts, right, SETTINGS, "oracle")
    assert len(asked) == 100 and found.value.value == 1 and found.value.low > 0.95 and found.tokens == 5500
    assert found.figures["chance"] == 0.2 and [found.figures[f"accuracy: {part}"] for part in range(5)] == [1] * 5
    guess = [Reply(str(1 + i % SHOWN)) for i in np.random.default_rng(0).permutation(100)]
    found = score(contexts, guess, SETTINGS, "random")
    assert found.value.low <= 0.2 <= found.value.high
    found = score(contexts, [Reply("none of them")] * 60 + right[60:], SETTINGS, "garbage")
    assert found.unread == 60 and found.value.value == 1 and sum(each.said is None for each in found.judged) == 300


def test_offline_the_window_that_shares_least_is_picked() -> None:
    contexts = feature()
    texts = ["".join(each.example.tokens) for each in [*contexts.positives, *contexts.negatives]]
    assert picked(contexts, tfidf(texts), SETTINGS, "tf-idf").value.value == 1
    blind = picked(contexts, lambda texts: np.ones((len(texts), 1)), SETTINGS, "blind")
    assert blind.value.value == np.mean([q.intruder == 0 for q in questions(contexts, SETTINGS)])


@pytest.mark.parametrize(
    ("answer", "index"), [('{"odd": 5}', 4), ("1", 0), ("6", None), ("0", None), ("", None), ("999999999999", None)]
)
def test_answers(answer: str, index: int | None) -> None:
    assert read(answer) == index


def test_too_few_windows_are_said() -> None:
    found = score(feature(positives=3, parts=1), [], SETTINGS, "m")
    assert math.isnan(found.value.value) and "too few windows" in found.note
