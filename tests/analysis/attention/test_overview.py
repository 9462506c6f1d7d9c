"""Scores of heads, families of features and polysemantic heads equal their definitions, written as loops."""

import math

import numpy as np
import pytest
import torch

from saelab.analysis.attention import families as families_module
from saelab.analysis.attention.direct import direct
from saelab.analysis.attention.families import FamilyShares, families
from saelab.analysis.attention.overview import attention, family_shares
from saelab.analysis.attention.polysemantic import Profiles, cluster_sizes, polysemanticity
from saelab.analysis.attention.prompt import read_prompt
from saelab.analysis.attention.report import ALIVE, FAMILIES, SCORES, Attention
from saelab.analysis.attention.scores import HeadScores
from saelab.analysis.intervals import draws as resamples_of_rows
from saelab.analysis.result import rebuilt, stored, with_arrays
from saelab.analysis.settings import AttentionSettings
from saelab.errors import SaelabError
from saelab.lm.attention import Heads, read_heads
from tests.analysis.attention.made import Z, autoencoder, lm_of
from tests.tiny import random_rows


def loop(pattern: torch.Tensor, ids: list[int], ordinary: list[bool]) -> dict[str, tuple[float, int]]:
    """Sum and count of each score of one head on one row."""
    found = {name: [0.0, 0] for name in SCORES}
    for t in range(1, len(ids)):
        if not ordinary[t]:
            continue
        A = pattern[t].tolist()
        same = [s for s in range(t) if ids[s] == ids[t]]
        after = [s for s in range(1, t) if ids[s - 1] == ids[t]]
        values = {
            "previous": A[t - 1],
            "self": A[t],
            "first": A[0],
            "duplicate": sum(A[s] for s in same) if same else None,
            "induction": sum(A[s] for s in after) if after else None,
            "entropy": -sum(a * math.log(a) for a in A if a > 0),
            "distance": sum(a * (t - s) for s, a in enumerate(A)),
        }
        for name, value in values.items():
            if value is not None:
                found[name][0] += value
                found[name][1] += 1
    return {name: (value, int(count)) for name, (value, count) in found.items()}


def test_scores_of_heads_are_their_definitions() -> None:
    lm = lm_of("llama")
    rows = random_rows(lm, 3, 16) % 12 + 2  # tokens come back
    rows[:, 0] = lm.tokenizer.bos_token_id
    rows[1, 7] = lm.tokenizer.eos_token_id
    heads, _ = read_heads(lm, rows, [1, 2])
    scores = HeadScores.empty(3, [1, 2], 4)
    ordinary = lm.ordinary(rows)
    for layer in (1, 2):
        for first in (0, 2):  # in blocks
            part = slice(first, first + 2)
            scores.add(rows[part], ordinary[part], layer, Heads(*(each[part] for each in heads[layer])), first)
    for row in range(3):
        for layer in (1, 2):
            for head in range(4):
                expected = loop(heads[layer].pattern[row, head], rows[row].tolist(), ordinary[row].tolist())
                found = scores.sums[row, layer - 1, head]
                assert found.tolist() == pytest.approx([value for value, _ in expected.values()], rel=1e-5)
                assert scores.counts[row].tolist() == [count for _, count in expected.values()]
    equal = torch.tril(torch.ones(16, 16)) / torch.arange(1, 17)[:, None]
    chance = [loop(equal, rows[row].tolist(), ordinary[row].tolist())["induction"] for row in range(3)]
    assert scores.chance_of("induction") == pytest.approx(sum(c[0] for c in chance) / sum(c[1] for c in chance))
    total = scores.sums[:, 1, 1, 0].sum() / scores.counts[:, 0].sum()
    assert scores.mean()[1, 1, 0] == pytest.approx(total)


def test_shares_by_source_are_those_of_direct_attribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families_module, "PER_ROW", 100)  # every token is sampled
    lm = lm_of("llama")
    sae, rows = autoencoder(lm), random_rows(lm, 2, 20) % 12 + 2
    draws = np.array([[1, 1], [2, 0], [0, 2]])
    found = FamilyShares.empty(48, 4, draws, per_feature=1000)
    expected, by_head, counts = np.zeros((2, 48, 7)), np.zeros((48, 4)), np.zeros(48)
    for row in range(2):
        ids = rows[row]
        prompt = read_prompt(lm, ids, [2])
        codes = sae.encode(prompt.values[Z].float())
        found.add(sae, ids, torch.arange(20), codes, Heads(*(each.float() for each in prompt.heads[2])), row)
        for t, feature in zip(codes.row_of_entry().tolist(), codes.features.tolist(), strict=True):
            if not bool(prompt.ordinary[t]):
                continue
            positive = direct(sae, prompt, 2, feature, t).contributions.clamp_min(0)
            positive = positive / positive.sum()
            for s, share in enumerate(positive.sum(0).tolist()):
                distance = t - s
                kind = 0 if distance == 0 else 1 if distance == 1 else 4 if s == 0 else 2 if distance <= 8 else 3
                expected[row, feature, kind] += share
                if 0 < s < t and ids[s - 1] == ids[t]:
                    expected[row, feature, 5] += share
                    expected[row, feature, 6] += 1 / (t + 1)
            by_head[feature] += positive.sum(1).numpy()
            counts[feature] += 1
    np.testing.assert_allclose(found.sums, expected.sum(0), atol=1e-4)
    np.testing.assert_allclose(found.by_head, by_head, atol=1e-4)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.drawn, np.einsum("dr,rfk->dfk", draws, expected), atol=1e-3)
    alive = counts > 0
    np.testing.assert_allclose(found.shares()[alive, :5].sum(1), 1, atol=1e-4)
    assert np.isnan(found.shares()[~alive]).all()


def test_no_feature_is_sampled_more_often_than_asked_for() -> None:
    lm = lm_of("gpt2")
    sae, rows = autoencoder(lm), random_rows(lm, 6, 20)
    found = FamilyShares.empty(48, 4, np.ones((1, 6), int), per_feature=5)
    for row in range(6):
        prompt = read_prompt(lm, rows[row], [2])
        codes, heads = sae.encode(prompt.values[Z].float()), Heads(*(each.float() for each in prompt.heads[2]))
        before = found.counts.copy()
        found.add(sae, rows[row], torch.arange(20), codes, heads, row)
        assert (found.counts - before <= np.minimum(2, codes.firing_counts().numpy())).all()
    assert found.counts.max() == 5


def test_families_are_the_largest_share_and_induction_first() -> None:
    shares = np.array(
        [
            [0.6, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0],
            [0.1, 0.6, 0.1, 0.1, 0.1, 0.4, 0.0],
            [0.0, 0.1, 0.2, 0.7, 0.0, 0.5, 0.1],
            [0.0, 0.1, 0.7, 0.2, 0.0, 0.5, 0.3],  # less than twice the chance
            [0.0, 0.0, 0.1, 0.2, 0.7, 0.0, 0.0],
            [np.nan] * 7,
        ]
    )
    found = families(shares)
    names = [FAMILIES[i] if i >= 0 else None for i in found]
    assert names == ["current", "previous", "induction", "short", "start", None]
    np.testing.assert_array_equal(families(7 * shares), found)


def test_clusters_of_features_and_heads_with_one_task() -> None:
    """Head 0's features are active on the same token, or read from it; head 1's have nothing in common."""
    top = np.stack([np.arange(12), np.arange(12, 24)])
    profiles = Profiles(np.arange(24), 30, 40)
    profiles.add_active(np.full(6, 3), np.arange(6), np.ones(6))
    profiles.add_active(np.arange(10, 28), np.arange(6, 24), np.ones(18))
    shares = np.zeros((7, 5))
    shares[:, 2] = 1
    profiles.add_read(np.array([9, 0, 7, 0, 0]), np.arange(5, 12), shares)  # feature 5 joins both halves
    alive = np.ones(30, bool)
    alive[[0, 1]] = False
    found = polysemanticity(top, (profiles.active, profiles.read), alive)
    assert found.features[0].tolist() == list(range(2, 12)) and found.features[1].tolist() == list(range(12, 22))
    assert found.clusters.tolist() == [1, 10] and found.largest.tolist() == [1.0, 0.1]
    assert found.polysemantic.tolist() == [False, True]
    assert 0.3 < found.control.mean() < 0.7
    few = polysemanticity(top, (profiles.active,), np.arange(30) < 3)
    assert few.features[0, :4].tolist() == [0, 1, 2, -1] and few.features[1, 0] == -1 and np.isnan(few.largest[1])
    same = np.eye(4, dtype=bool)
    same[0, 2] = same[2, 0] = same[2, 3] = same[3, 2] = True
    assert sorted(cluster_sizes(same, np.arange(4))) == [1, 3]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_whole_analysis_and_its_frames(kind: str) -> None:
    lm = lm_of(kind)
    sae, rows = autoencoder(lm, n_features=40), random_rows(lm, 9, 24)
    found = attention(sae, lm, rows, AttentionSettings(rows_per_forward=4))
    again = attention(sae, lm, rows, AttentionSettings(rows_per_forward=5))
    np.testing.assert_allclose(found.scores, again.scores, rtol=1e-5)
    assert found.scores.shape == (3, 4, 7) and found.tokens == int(lm.ordinary(rows).sum())
    z = lm.activations(rows, [Z])[Z][lm.ordinary(rows)]
    np.testing.assert_array_equal(found.counts, sae.encode(z).firing_counts().numpy())
    assert found.alive == (found.counts >= ALIVE).sum() >= 20
    assert (found.low <= found.scores + 1e-9).all() and (found.scores <= found.high + 1e-9).all()
    assert sum(share.value for share in found.families.values()) == pytest.approx(1)
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, low, high in found.families.values())
    assert sum(found.reads[name].value for name in FAMILIES[:5]) == pytest.approx(1)
    heads, features = found.heads(), found.features()
    assert len(heads) == 12 and np.nansum(heads["features"].to_numpy()) == found.alive
    assert heads["clusters"].to_numpy()[8:].tolist() == found.clusters.tolist()
    assert len(features) == (found.counts > 0).sum()
    figures, arrays = stored(found)
    other = rebuilt(Attention, with_arrays(figures, arrays))
    assert other.figures() == found.figures() and "induction" in repr(found)
    assert found.plot().to_json()


def test_95_percent_intervals_of_family_shares_contain_the_truth_in_90_to_98_percent() -> None:
    """Features that lean to a kind of source by what they are and, in each row, by the row."""
    rng, rows, n = np.random.default_rng(0), 40, 80
    values, intervals = [], []
    for _ in range(150):
        lean = rng.standard_normal((1, n, 5)) + rng.standard_normal((rows, 1, 5)) + rng.standard_normal((rows, n, 5))
        sums = np.zeros((rows, n, 7))
        sums[..., :5] = np.exp(lean) * (rng.random((rows, n, 1)) < 0.2)  # most features are in few rows
        drawn = families(np.tensordot(resamples_of_rows(rows, 100, rng), sums, 1))
        [first, *_] = family_shares(families(sums.sum(0)), drawn)
        values.append(first.value)
        intervals.append(first)
    truth = np.mean(values)
    hits = np.mean([each.low <= truth <= each.high for each in intervals])
    assert 0.90 <= hits <= 0.98
    [single, *_] = family_shares(np.array([0, 1]), np.zeros((0, 2), int))
    assert single.value == 0.5 and np.isnan(single.low)


def test_text_without_living_features_or_without_tokens_is_an_error() -> None:
    lm = lm_of("gpt2")
    with pytest.raises(SaelabError, match="no feature is active on 10 of the 3 tokens"):
        attention(autoencoder(lm), lm, torch.tensor([[0, 5, 6, 7]]), AttentionSettings())
    with pytest.raises(SaelabError, match="no token after their first"):
        attention(autoencoder(lm), lm, torch.zeros(2, 4, dtype=torch.long), AttentionSettings())
