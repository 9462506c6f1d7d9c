"""The windows of a feature: disjoint, of the right kind, spread over the parts, the same every time."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saelab.autointerp.contexts import Context, Contexts, contexts
from saelab.autointerp.settings import ContextSettings
from saelab.errors import SaelabError, SettingError
from saelab.features.database import Database, open_database
from tests.features.dense import made_up, write_database

ROWS, CONTEXT, FEATURES = 60, 37, 12
SMALL = ContextSettings(window=8, explain=8, quantiles=4, positives=12, negatives=10)


@pytest.fixture(scope="module")
def z_and_tokens() -> tuple[np.ndarray, np.ndarray]:
    z, tokens, *_ = made_up(ROWS, CONTEXT, FEATURES, 50)
    z[..., 9] = 0  # never active
    z[..., 10] = 0
    z[3, 5, 10] = 1.0  # active once
    tokens[3, 5] = 7
    z[..., 11] = np.abs(z[..., 11]) + 0.1  # active everywhere
    tokens[20:25] = tokens[19]  # repeated text
    return z * (tokens != 0)[..., None], tokens  # token 0 is special


@pytest.fixture(scope="module")
def database(z_and_tokens: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Database:
    folder: Path = tmp_path_factory.mktemp("contexts") / "features"
    return open_database(write_database(folder, *z_and_tokens, [b"t%d " % i for i in range(50)]))


def every(found: Contexts) -> list[Context]:
    return [*found.explain, *found.positives, *found.negatives]


def places(found: list[Context] | tuple[Context, ...]) -> list[tuple[int, int]]:
    return [(each.example.row, each.example.position) for each in found]


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # hypothesis, of the database
@given(
    feature=st.integers(0, FEATURES - 1),
    sampling=st.sampled_from(["top", "random", "quantiles", "mix"]),
    negative=st.sampled_from(["random", "coactive", "decoder", "same_token"]),
    centred=st.booleans(),
    window=st.integers(1, CONTEXT),
    numbers=st.tuples(*[st.integers(1, 15)] * 3),
    seed=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_invariants(database, feature, sampling, negative, centred, window, numbers, seed) -> None:
    options = ContextSettings(
        window=window,
        explain=numbers[0],
        positives=numbers[1],
        negatives=numbers[2],
        sampling=sampling,
        negative=negative,
        centred=centred,
        seed=seed,
        quantiles=3,
    )
    found = contexts(database, feature, options)
    assert len(found.explain) <= numbers[0] and len(found.positives) <= numbers[1]
    assert len(found.negatives) <= numbers[2]
    asked = [len(found.explain) < numbers[0], len(found.positives) < numbers[1], len(found.negatives) < numbers[2]]
    assert bool(found.lacking) == any(asked)
    used = np.zeros((ROWS, CONTEXT), int)
    texts = set()
    for each in every(found):
        example = each.example
        assert len(example.tokens) == window and 0 <= example.start <= CONTEXT - window
        used[example.row, example.start : example.start + window] += 1
        texts.add(example.token_ids.tobytes())
        assert (each.quantile >= 0) == (example.activations.max() > 0)
        if each.quantile >= 0 and not centred:
            assert example.activation == example.activations.max() and example.start % window == 0
    assert used.max() <= 1 and len(texts) == len(every(found))
    again = contexts(database, feature, options)
    assert places(every(again)) == places(every(found))
    for kind in (found.explain, found.positives):
        strengths = [each.example.activation for each in kind]
        assert strengths == sorted(strengths, reverse=True)
        assert [each.quantile for each in kind] == sorted(each.quantile for each in kind)


def test_parts_have_equal_numbers_of_windows_and_are_drawn_from_equally(database, z_and_tokens) -> None:
    z, _ = z_and_tokens
    found = contexts(database, 0, SMALL)
    assert found.lacking == "" and found.maximum == pytest.approx(z[..., 0].max(), rel=1e-6)
    assert Counter(each.quantile for each in found.explain) == dict.fromkeys(range(4), 2)
    assert Counter(each.quantile for each in found.positives) == dict.fromkeys(range(4), 3)
    strongest = z[:, : CONTEXT // 8 * 8, 0].reshape(ROWS, -1, 8).max(-1)
    assert found.windows == (strongest > 0).sum()
    limits = -np.sort(-strongest[strongest > 0])
    for each in (*found.explain, *found.positives):
        rank = np.flatnonzero(np.isclose(limits, each.example.activation, rtol=1e-3))
        assert (rank * 4 // len(limits) == each.quantile).any()


def test_each_sampling_shows_what_it_says(database) -> None:
    top = contexts(database, 0, replace(SMALL, sampling="top"))
    strengths = [each.example.activation for each in every(contexts(database, 0, replace(SMALL, positives=300)))]
    assert [each.example.activation for each in top.explain] == sorted(strengths, reverse=True)[:8]
    mixed = contexts(database, 0, replace(SMALL, sampling="mix", explain=10))
    assert places(mixed.explain)[:2] == places(top.explain)[:2]
    assert {each.quantile for each in mixed.explain} == {0, 1, 2, 3}
    random = {places(contexts(database, 0, replace(SMALL, sampling="random", seed=s)).explain)[0] for s in range(8)}
    assert len(random) > 1


def test_each_kind_of_negatives_is_what_it_says(database, z_and_tokens) -> None:
    z, tokens = z_and_tokens
    for negative, column in (("coactive", "coactive_neighbours"), ("decoder", "decoder_neighbours")):
        near = [int(f) for f in database.table[column][0] if f >= 0]
        found = contexts(database, 0, replace(SMALL, negative=negative)).negatives
        assert found and all(z[row, position][near].max() > 0 for row, position in places(found))
    top = [int(token) for token in database.table["top_tokens"][0] if token >= 0]
    found = contexts(database, 0, replace(SMALL, negative="same_token")).negatives
    assert found and all(tokens[row, position] in top for row, position in places(found))


def test_features_with_too_few_windows_are_reported(database) -> None:
    never = contexts(database, 9, SMALL)
    assert not never.explain and not never.positives and len(never.negatives) == 10 and never.windows == 0
    assert never.lacking == "0 of 8 windows to explain, 0 of 12 windows positive"
    once = contexts(database, 10, SMALL)
    assert once.windows == 1 and places(once.positives) == [(3, 5)] and not once.explain
    always = contexts(database, 11, SMALL)
    assert always.lacking == "0 of 10 windows negative" and len(always.explain) == 8


def test_centred_windows_have_the_strongest_token_in_the_middle(database) -> None:
    found = contexts(database, 0, replace(SMALL, centred=True))
    inside = [each.example for each in found.explain if 4 <= each.example.position < CONTEXT - 4]
    assert inside and all(example.index == 4 for example in inside)


def test_bad_input_says_what_to_do(database) -> None:
    with pytest.raises(SaelabError, match="no feature 99"):
        contexts(database, 99, SMALL)
    with pytest.raises(SaelabError, match="window: 64 is more than the 37 tokens"):
        contexts(database, 0, ContextSettings(window=64))
    with pytest.raises(SettingError, match="explain: 0 is not a positive number"):
        ContextSettings(explain=0)
