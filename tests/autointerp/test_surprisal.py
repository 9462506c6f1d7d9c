"""Surprisal is a difference of cross-entropies per token, and its AUROC."""

import math

import numpy as np
import pytest
import torch

from saelab.autointerp.contexts import Context, Contexts
from saelab.autointerp.likelihood import log_probabilities
from saelab.autointerp.llm.local import LocalModel
from saelab.autointerp.metrics import auroc
from saelab.autointerp.records import Explanation
from saelab.autointerp.scorers.surprisal import DUMMY, prompt, surprisal
from saelab.features.examples import Example
from tests.tiny import long_language_model

CATS = ["the cat sat", "a cat purred", "cat food is here", "my cat"]
OTHERS = ["stocks fell again", "a train left", "rain over hills", "code"]


def context(row: int, words: str, part: int) -> Context:
    tokens = [f"{'' if not i else ' '}{word}" for i, word in enumerate(words.split())]
    z = np.zeros(len(tokens), np.float32)
    z[0] = part >= 0
    return Context(Example(row, 0, float(z[0]), 0, np.arange(len(tokens), dtype=np.int32), tokens, z), part)


def feature(*, lacking: str = "") -> Contexts:
    positives = tuple(context(i, words, i // 2) for i, words in enumerate(CATS))
    negatives = tuple(context(20 + i, words, -1) for i, words in enumerate(OTHERS))
    return Contexts(3, 1.0, (), positives, negatives, 4, lacking)


class Reader:
    """A made-up model of one-character tokens that expects the words of the description."""

    name = "reader"

    def __init__(self, longest: int = 10**6) -> None:
        self.longest, self.seen = longest, []

    def logprobs(self, texts: list[str]) -> list[tuple[list[str], list[float]]]:
        self.seen += texts
        return [self._one(text) if len(text) <= self.longest else ([], []) for text in texts]

    def _one(self, text: str) -> tuple[list[str], list[float]]:
        about = text.partition("Description: ")[2].partition("\n")[0].lower()
        window = text.partition("Text:\n")[2]
        nats = 1.0 if not set(about.split()).isdisjoint(window.split()) else 2.0
        return list(text), [0.0, *[-nats] * (len(text) - 1)]


def test_a_description_that_helps_the_model_scores_1_and_one_that_does_not_0_5() -> None:
    found = surprisal(feature(), Explanation(3, "a\n cat", "manual", ""), Reader())
    assert found.value.value == 1 - 0.5 / 4, "`a` is in one of four silent windows too"
    found = surprisal(feature(lacking="few"), Explanation(3, "Cat", "manual", ""), base := Reader())
    assert found.value == (1, 1, 1) and found.unit == "AUROC" and found.score == "surprisal" and found.model == "reader"
    assert [each.said for each in found.judged] == [1.0] * 4 + [0.0] * 4 and found.note == "few"
    assert [each.truth for each in found.judged] == [True] * 4 + [False] * 4
    expected = {"active": 1, "silent": 0, "too_long": 0, "nats: 0": 1, "AUROC: 0": 1, "nats: 1": 1, "AUROC: 1": 1}
    assert found.figures == expected and found.tokens == sum(map(len, base.seen)) and len(base.seen) == 16
    assert surprisal(feature(), Explanation(3, "xyzzy", "manual", ""), Reader()).value.value == 0.5
    assert surprisal(feature(), Explanation(3, DUMMY, "manual", ""), base := Reader()).value.value == 0.5
    assert len(base.seen) == 8, "equal prompts are read once"


def test_windows_that_do_not_fit_are_in_no_figure_and_are_reported() -> None:
    longest = len(prompt(DUMMY)) + len("my cat sat")
    base, explained = Reader(longest), Explanation(3, "cat", "manual", "")
    found = surprisal(feature(), explained, base)
    out = sum(len(words) > len("my cat sat") for words in [*CATS, *OTHERS])
    assert [each.said is None for each in found.judged] == [len(words) > 10 for words in [*CATS, *OTHERS]]
    assert 0 < out < 8 and found.figures["too_long"] == out and found.value.value == 1
    assert found.note == f"{out} of 8 windows do not fit into the model's context with the prompt"
    none = surprisal(feature(), explained, Reader(3))
    assert math.isnan(none.value.value) and none.figures["too_long"] == 8 and math.isnan(none.figures["active"])


def test_it_equals_a_loop_over_tokens() -> None:
    lm, explained = long_language_model(), Explanation(3, "a dog", "manual", "")
    found = surprisal(feature(), explained, LocalModel(lm))

    def cross_entropy(description: str, words: str) -> float:
        before = prompt(description)
        encoded = lm.tokenizer(before + words, add_special_tokens=False, return_offsets_mapping=True)
        log_p = lm.logits(torch.tensor([[lm.tokenizer.bos_token_id, *encoded.input_ids]]))[0].log_softmax(-1)
        total, n = 0.0, 0
        for i, (token, (_, end)) in enumerate(zip(encoded.input_ids, encoded.offset_mapping, strict=True)):
            if end > len(before):
                total, n = total - float(log_p[i, token]), n + 1
        assert n >= len(words.split()), "the first token counts"
        return total / n

    expected = [cross_entropy(DUMMY, words) - cross_entropy("a dog", words) for words in [*CATS, *OTHERS]]
    assert [each.said for each in found.judged] == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == 8 and found.value.value == auroc(np.array(expected), np.arange(8) < 4)
    assert found.figures["AUROC: 1"] == auroc(np.array(expected[2:]), np.arange(6) < 2)
    assert found.figures["nats: 0"] == pytest.approx(np.mean(expected[:2]), abs=1e-4)


def test_a_token_of_both_texts_counts_as_the_second_s() -> None:
    class Pairs:
        name = "pairs"

        def logprobs(self, texts: list[str]) -> list[tuple[list[str], list[float]]]:
            return [
                ([t[i : i + 2] for i in range(0, len(t), 2)], [-float(i) for i in range(len(t) // 2)]) for t in texts
            ]

    found, read = log_probabilities(Pairs(), [("abc", "def"), ("ab", "cdef"), ("abc", "def")])
    assert [each.tolist() for each in found] == [[-1.0, -2.0]] * 3 and read == 6
