"""Embedding scores are AUROCs of cosines, on vectors that are known."""

import math

import numpy as np
import pytest

from saelab.autointerp.contexts import Context, Contexts
from saelab.autointerp.embedders import tfidf
from saelab.autointerp.metrics import auroc
from saelab.autointerp.records import Explanation
from saelab.autointerp.scorers.embedding import embedding, example_embedding
from saelab.features.examples import Example


def context(row: int, words: str, active: float) -> Context:
    tokens = [f" {word}" for word in words.split()]
    z = np.zeros(len(tokens), np.float32)
    z[0] = active
    example = Example(row, 0, active, 0, np.arange(len(tokens), dtype=np.int32), tokens, z)
    return Context(example, 0 if active else -1)


CATS = ["the cat sat", "a cat purred loudly", "cat food is here", "my cat sleeps"]
OTHERS = ["stocks fell again", "a train left early", "rain over the hills", "code that runs"]


def feature(shift: int = 0) -> Contexts:
    explain = tuple(context(i, words, 2.0) for i, words in enumerate(["one cat ran", "that cat there"]))
    positives = tuple(context(10 + i, words, 1.0) for i, words in enumerate(CATS))
    negatives = tuple(context(20 + i, words, 0.0) for i, words in enumerate(OTHERS))
    return Contexts(3, 2.0, explain, positives, negatives, 6, "")


def test_windows_with_the_word_of_the_explanation_are_nearer() -> None:
    embed = tfidf([*CATS, *OTHERS])
    found = embedding(feature(), Explanation(3, "Cat!", "manual", ""), embed, "tf-idf")
    assert found.value.value == 1 and found.unit == "AUROC" and found.model == "tf-idf" and len(found.judged) == 8
    other = embedding(feature(), Explanation(3, "stocks, train, rain and code", "manual", ""), embed, "tf-idf")
    assert other.value.value == 0
    unknown = embedding(feature(), Explanation(3, "xyzzy", "manual", ""), embed, "tf-idf")
    assert unknown.value.value == 0.5


def test_it_is_the_auroc_of_the_cosines() -> None:
    rng = np.random.default_rng(0)
    vectors = {text: rng.normal(size=5) for text in ["x", *(f" {' '.join(w.split())}" for w in [*CATS, *OTHERS])]}

    def embed(texts):
        rows = np.array([vectors.get(text, np.ones(5)) for text in texts])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    found = embedding(feature(), Explanation(3, "x", "manual", ""), embed, "made-up")
    windows = embed([f" {words}" for words in [*CATS, *OTHERS]])
    expected = auroc(windows @ embed(["x"])[0], np.arange(8) < 4)
    assert found.value.value == pytest.approx(expected)
    free = example_embedding(feature(), embed, "made-up")
    known = embed(["".join(each.example.tokens) for each in feature().explain])
    assert free.value.value == pytest.approx(auroc((windows @ known.T).mean(1), np.arange(8) < 4))
    assert free.explanation == "" and [each.said for each in free.judged] == pytest.approx((windows @ known.T).mean(1))


def test_without_known_windows_there_is_no_score() -> None:
    bare = Contexts(3, 2.0, (), feature().positives, feature().negatives, 4, "0 of 2 windows to explain")
    found = example_embedding(bare, tfidf([*CATS]), "tf-idf")
    assert math.isnan(found.value.value) and found.note and not found.judged
    assert tfidf(["", " "])(["a"]).shape == (1, 1)
