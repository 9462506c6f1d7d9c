"""A judge that answers the same whatever it is shown is found, and one that recognises little is not."""

from collections import Counter

import numpy as np
import pytest

from saelab.autointerp.constant import ANSWERS, Answers, same_answer_figures, warning
from saelab.autointerp.metrics import wilson


def verdicts(recall: float, questions: int) -> list[str]:
    """Answers to questions about five windows, of which a share `recall` of those with an activation is recognised."""
    rng = np.random.default_rng(0)
    truth = rng.permuted(np.tile([True, True, False, False, True], (questions, 1)), axis=1)
    said = truth & (rng.random(truth.shape) < recall)
    return [", ".join(map(str, each.astype(int).tolist())) for each in said]


def test_the_share_is_that_of_the_most_frequent_answer() -> None:
    answers = ["0, 1"] * 7 + ["1, 1"] * 3
    assert same_answer_figures(answers) == {ANSWERS: 10, "same answer 0, 1": 7}
    assert same_answer_figures([]) == {} and warning({}) == "" and warning({"accuracy": 1.0}) == ""
    several = Answers()
    for figures in (same_answer_figures(answers), same_answer_figures(["0, 1"] * 5), {"accuracy": 0.5}):
        several.add(figures)
    found = several.most_frequent()
    assert found is not None and found.answer == "0, 1" and found.share == wilson(12, 15)
    assert Counter(answers).most_common(1) == [("0, 1", 7)]


@pytest.mark.parametrize("questions", [20, 28, 400])
def test_constant_answers_are_told_from_weak_ones(questions: int) -> None:
    same = same_answer_figures(["0, 1, 0, 1, 0"] * questions)
    assert warning(same) == "the judge gives the same answers whatever it is shown: 0, 1, 0, 1, 0 to 100%"
    for recall in (1 / 8, 0.5, 1):
        assert warning(same_answer_figures(verdicts(recall, questions))) == ""


def test_a_few_questions_say_nothing() -> None:
    assert warning(same_answer_figures(["0, 1, 0, 1, 0"] * 10)) == ""
