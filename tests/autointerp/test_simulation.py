"""Simulation is the correlation of predicted and real activations over all tokens."""

import json
import math

import numpy as np
import pytest

from saelab.autointerp.contexts import Context, Contexts
from saelab.autointerp.llm.protocol import Reply
from saelab.autointerp.records import Explanation
from saelab.autointerp.scorers.simulation import read, requests, score
from saelab.features.examples import Example

EXPLANATION = Explanation(2, "names", "manual", "")


@pytest.fixture
def contexts() -> Contexts:
    rng = np.random.default_rng(0)

    def context(row: int, active: bool) -> Context:
        z = (rng.random(6) * (rng.random(6) < 0.5) * active + 0.1 * active).astype(np.float32)
        tokens = [f"t{i}\n" for i in range(6)]
        return Context(Example(row, 0, float(z.max()), 0, np.arange(6), tokens, z), 0 if active else -1)

    yes, no = (tuple(context(10 * kind + i, bool(kind)) for i in range(8)) for kind in (1, 0))
    return Contexts(2, 1.0, (), yes, no, 8, "")


def test_it_is_pearsons_correlation(contexts: Contexts) -> None:
    rng, asked = np.random.default_rng(1), requests(contexts, EXPLANATION)
    assert len(asked) == 16 and json.dumps([f"t{i}\n" for i in range(6)]) in asked[0].messages[1][1]
    answers = [rng.integers(0, 11, 6).tolist() for _ in asked]
    replies = [Reply(json.dumps({"activations": each}), None, 30, 12) for each in answers]
    replies[3] = Reply("[1, 2]")
    found = score(contexts, EXPLANATION, replies, "m")
    windows = [*contexts.positives, *contexts.negatives]
    kept = [i for i in range(16) if i != 3]
    z = np.concatenate([windows[i].example.activations for i in kept])
    assert found.value.value == pytest.approx(np.corrcoef(z, np.concatenate([answers[i] for i in kept]))[0, 1])
    assert found.value.low <= found.value.value <= found.value.high and found.unread == 1 and found.tokens == 15 * 42
    exact = [Reply(str(np.ceil(10 * each.example.activations).astype(int).tolist())) for each in windows]
    assert score(contexts, EXPLANATION, exact, "oracle").value.value > 0.97
    constant = score(contexts, EXPLANATION, [Reply(str([0] * 6))] * 16, "m")
    assert math.isnan(constant.value.value) and constant.unread == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[1, 0,10]", [1, 0, 10]),
        ("[1,2,3] or rather [0, 0, 0]", [0, 0, 0]),
        ("[1, 11, 0]", None),
        ("[1, 2]", None),
        ("[1,,2]", None),
        ("", None),
    ],
)
def test_answers(answer: str, expected: list[int] | None) -> None:
    assert read(answer, 3) == expected
