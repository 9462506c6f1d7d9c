"""Induction scores and ablations are what they say, on models whose answer is known or computed in another way."""

import numpy as np
import pytest
import torch

from saelab.analysis.attention import induction as module
from saelab.analysis.attention.ablation import FeatureAt, ablated_logits, path_effect
from saelab.analysis.attention.causal import Question, Size, circuit_test
from saelab.analysis.attention.circuit import open_circuit
from saelab.analysis.attention.induction import PrefixScores, corrupted, prefix_scores, repeated_rows, without_match
from saelab.analysis.attention.prompt import read_prompt
from saelab.errors import SaelabError
from saelab.lm.attention import Heads, read_heads
from tests.analysis.attention.made import RESID, Z, active_feature, autoencoder, double_model, ids_of, lm_of
from tests.tiny import random_rows

LOWER = "blocks.1.attn.hook_z"


def test_rows_differ_in_the_token_that_stops_matching_and_nothing_else_repeats() -> None:
    lm = lm_of("gpt2")
    texts, source = repeated_rows(lm, 5, 30, seed=0)
    assert len(texts) == 6 and texts[0].shape == (30, 64)
    for n, text in enumerate(texts):
        assert (text[:, 0] == lm.tokenizer.bos_token_id).all()
        for row, s in zip(text, source.tolist(), strict=True):
            assert len(set(row.tolist())) == 64 - n
            if n:
                assert torch.equal(row[64 - n :], row[s - n : s])
        if n:
            changed = text != texts[n - 1]
            assert (changed.sum(1) <= n).all() and changed[:, :-n].sum() == 0
    with pytest.raises(SaelabError, match="31 matching tokens need rows of at least 65 tokens"):
        repeated_rows(lm, 31, 3, seed=0)


def test_from_one_length_to_the_next_only_one_token_changes() -> None:
    texts, _ = repeated_rows(lm_of("gpt2"), 5, 30, seed=0)
    for n in range(1, 6):
        changed = texts[n] != texts[n - 1]
        assert changed.sum(1).tolist() == [1] * 30 and changed[:, -n].all()


def test_heads_with_a_known_prefix_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pattern is planted: head 0 needs one matching token, head 1 two, head 2 none of it."""
    real = module.recorded_heads

    def planted(heads: Heads, text: torch.Tensor) -> Heads:
        pattern = torch.zeros_like(heads.pattern)
        for row in range(len(text)):
            ids = text[row].tolist()
            for head, need in ((0, 1), (1, 2)):
                hits = [s for s in range(need, 63) if ids[s - need : s] == ids[64 - need :]]
                pattern[row, head, -1, hits[0] if hits else 0] = 1.0
        pattern[:, 2:, -1, 0] = 1.0
        return Heads(pattern, heads.values)

    lm, seen = lm_of("gpt2"), []
    forward = lm.activations
    monkeypatch.setattr(lm, "activations", lambda rows, sites: (seen.append(rows), forward(rows, sites))[1])
    monkeypatch.setattr(
        module,
        "recorded_heads",
        lambda lm, layers, take: real(lm, layers, lambda layer, heads: take(layer, planted(heads, seen[-1]))),
    )
    found = prefix_scores(lm, longest=3, rows=5)
    assert found.mean.shape == (4, 3, 4)
    np.testing.assert_array_equal(found.mean[:, 1, 0], [0, 1, 1, 1])
    np.testing.assert_array_equal(found.mean[:, 1, 1], [0, 0, 1, 1])
    assert found.kinds() == {
        f"{layer}.{head}": kind for layer in range(3) for head, kind in enumerate(["short prefix", "long prefix"])
    }
    assert found.score(2, 1, 2).value == 1 and "head 2.1, long prefix: score with 2 matching" in found.figures()
    assert found.plot().to_json()


def test_scores_and_activations_are_those_of_plain_runs() -> None:
    lm = lm_of("llama")
    sae = autoencoder(lm)
    found = prefix_scores(lm, sae, longest=2, rows=20, seed=3)
    texts, source = repeated_rows(lm, 2, 20, seed=3)
    for n, text in enumerate(texts):
        heads, values = read_heads(lm, text, [0, 1, 2])
        for layer in range(3):
            for row in range(20):
                expected = heads[layer].pattern[row, :, -1, int(source[row])]
                np.testing.assert_allclose(found.scores[n, row, layer], expected, atol=1e-5)
        z = sae.encode(values[Z][:, -1]).to_dense().mean(0)
        np.testing.assert_allclose(found.activations[n], z, rtol=1e-3, atol=1e-4)
    assert isinstance(found, PrefixScores)
    made = PrefixScores(1, np.array([0]), np.zeros((3, 1, 1, 1)), np.array([[1, 0, 2.0], [0, 0, 0], [9, 1, 3]]))
    assert made.induction_features().tolist() == [0, 1]


def test_a_corrupted_token_changes_a_feature_as_in_a_plain_run() -> None:
    lm = lm_of("gpt2")
    sae, rows = autoencoder(lm), random_rows(lm, 3, 12)
    feature = active_feature(sae, lm, rows[1], 9)
    found = corrupted(sae, lm, rows, feature, [(1, 9), (0, 7), (2, 2)], farthest=8)
    assert found.shape == (3, 9)
    z = lm.activations(rows[1:2, :10], [Z])[Z][0, -1:]
    clean = sae.encode(z).to_dense()[0, feature]
    assert found[0, 0] == pytest.approx(float(clean), rel=1e-4) and float(clean) > 0
    assert np.isfinite(found[0, 1:9]).all() and len(set(found[0].tolist())) > 3
    assert np.isnan(found[1, 1]) and np.isfinite(found[1, 2])  # a special token is one back
    assert np.isnan(found[2, 2:]).all() and np.isfinite(found[2, 1])  # BOS, and before the row


def test_a_broken_match_changes_the_earlier_occurrences_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("gpt2")
    sae = autoencoder(lm)
    rows = torch.tensor([[0, 9, 20, 21, 9, 22, 23, 24, 25, 26, 9, 30], [0, *range(40, 51)]])
    seen: list[torch.Tensor] = []
    forward = lm.activations
    monkeypatch.setattr(lm, "activations", lambda texts, sites: (seen.append(texts), forward(texts, sites))[1])
    found = without_match(sae, lm, rows, 3, [(0, 10), (1, 8)])
    assert found.shape == (2, 3) and np.isfinite(found[0]).all() and np.isnan(found[1]).all()
    texts = next(each for each in seen if each.shape == (3, 11))
    assert torch.equal(texts[0], rows[0, :11])
    assert (texts[1] != texts[0]).nonzero().squeeze(1).tolist() == [1, 4]
    changed = (texts[2] != texts[0]).nonzero().squeeze(1).tolist()
    assert len(changed) == 2 and not set(changed) & {0, 1, 2, 4, 5, 10}  # neither the matches nor what follows them
    assert not set(texts[1, [1, 4]].tolist()) & set(rows[0].tolist())
    monkeypatch.undo()
    for column in range(3):
        z = sae.encode(lm.activations(texts[column : column + 1], [Z])[Z][0, -1:]).to_dense()[0, 3]
        assert found[0, column] == pytest.approx(float(z), abs=1e-4)


def test_ablation_takes_out_what_the_feature_adds_and_keeps_the_error() -> None:
    lm = double_model("llama")
    ids, saes = ids_of(lm), {1: autoencoder(lm, LOWER, seed=5), 2: autoencoder(lm)}
    feature = active_feature(saes[2], lm, ids, 9)
    prompt = read_prompt(lm, ids, [2])
    z = prompt.values[Z]
    codes = saes[2].encode(z[9][None].float())
    value = float(codes.values[codes.features == feature])
    new = z.clone()
    new[9] -= value * saes[2].W_dec[feature].double()
    expected = lm.spliced_logits(ids[None], Z, lambda x: new[prompt.ordinary])[0]
    found = ablated_logits(saes, lm, ids, [FeatureAt(2, 9, feature)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((found - lm.logits(ids[None])[0])[9].abs().max()) > 1e-3
    torch.testing.assert_close(found[:9], lm.logits(ids[None])[0, :9], rtol=0, atol=1e-9)
    new = z.clone()
    new[9] = saes[2].decode(codes)[0].double()
    without_error = lm.spliced_logits(ids[None], Z, lambda x: new[prompt.ordinary])[0]
    torch.testing.assert_close(ablated_logits(saes, lm, ids, [FeatureAt(2, 9, None)]), without_error, rtol=0, atol=1e-4)
    inactive = next(f for f in range(48) if f not in codes.features.tolist())
    clean = lm.logits(ids[None])[0]
    torch.testing.assert_close(ablated_logits(saes, lm, ids, [FeatureAt(2, 9, inactive)]), clean, rtol=0, atol=1e-5)
    with pytest.raises(SaelabError, match="no autoencoder of layer 0"):
        ablated_logits(saes, lm, ids, [FeatureAt(0, 9, 1)])
    with pytest.raises(SaelabError, match="position 0 is special"):
        ablated_logits(saes, lm, ids, [FeatureAt(2, 0, 1)])


def test_the_effect_along_a_path_is_that_of_a_plain_splice() -> None:
    lm = double_model("gpt2")
    saes = {LOWER: autoencoder(lm, LOWER, seed=5), Z: autoencoder(lm)}
    circuit, ids = open_circuit(lm, saes), ids_of(lm)
    upper = FeatureAt(2, 11, active_feature(saes[Z], lm, ids, 11))
    lower = FeatureAt(1, 6, active_feature(saes[LOWER], lm, ids, 6, LOWER))
    effect = path_effect(circuit, ids, lower, upper)
    assert all(map(np.isfinite, effect)) and effect.direct != 0 and effect.total != effect.direct
    prompt = circuit.read(ids)
    features, values = prompt.codes(saes[LOWER], LOWER, 6)
    added = float(values[features == lower.feature]) * saes[LOWER].W_dec[lower.feature].double()
    added = added @ circuit.maps[1].output.weight
    x = prompt.values[RESID].clone()
    x[6] -= added
    with lm.spliced(ids[None], RESID, lambda _: x[prompt.ordinary]):
        z = lm.activations(ids[None], [Z])[Z][0, 11]
    fall = (prompt.values[Z][11] - z) @ saes[Z].W_enc[upper.feature].double()
    assert effect.direct == pytest.approx(float(fall), abs=1e-6)
    with pytest.raises(SaelabError, match="is not below"):
        path_effect(circuit, ids, upper, lower)
    with pytest.raises(SaelabError, match="is not active at position 6"):
        path_effect(circuit, ids, lower._replace(feature=next(f for f in range(48) if f not in features)), upper)
    with pytest.raises(SaelabError, match="not from or to an error"):
        path_effect(circuit, ids, FeatureAt(1, 6, None), upper)


def test_controls_of_a_circuit_are_as_large_and_spare_its_features() -> None:
    lm = lm_of("gpt2")
    sae = autoencoder(lm, k=12)
    x = lm.activations(random_rows(lm, 2, 12), [Z])[Z][1, 9].float()
    codes = sae.encode(x[None])
    order = codes.values.argsort(descending=True)
    chosen = codes.features[order[:3]].long()
    length = sae.W_dec.norm(dim=1)
    generator = torch.Generator().manual_seed(0)

    size = Size(sae, set(chosen.tolist()))
    taken = [size.features(generator)(x) for _ in range(3)]
    target = (codes.values * length[codes.features.long()])[torch.isin(codes.features.long(), chosen)].sum()
    assert size.masses == pytest.approx([3 * float(target)] * 2)
    others = sae.W_dec[[f for f in codes.features.tolist() if f not in chosen.tolist()]].double()
    for vector in taken:
        parts = torch.linalg.lstsq(others.T, vector.double()).solution
        assert float((parts @ others - vector).norm()) < 1e-4 * float(vector.norm()) and float(parts.min()) > -1e-3
        assert float((parts * others.norm(dim=1)).sum()) == pytest.approx(float(target), rel=1e-3)
    assert not torch.allclose(taken[0], taken[1])

    written = sum(float(codes.values[codes.features == f]) * sae.W_dec[f] for f in chosen)
    direction = size.direction(generator)(x)
    assert float(direction.norm()) == pytest.approx(float(torch.as_tensor(written).norm()), rel=1e-4)
    all_but_one = Size(sae, set(codes.features[order[:11]].tolist()))
    all_but_one.features(generator)(x)  # the others have less than the circuit
    assert all_but_one.masses[0] < 0.2 * all_but_one.masses[1]


def test_a_circuit_that_attribution_finds_matters_more_than_random_features() -> None:
    """The last layer's features write straight into the logits, so attribution and ablation nearly agree."""
    lm = lm_of("gpt2")
    sae = autoencoder(lm, k=12)
    rows = random_rows(lm, 6, 12, seed=2)
    questions = [
        Question(row.tolist(), int(logits.argmax()), 7)
        for row, logits in zip(rows, lm.logits(rows)[:, -1], strict=True)
    ]
    found = circuit_test({2: sae}, lm, questions, features=3, single=4)
    assert found.questions == 6 and found.correlation > 0.7
    assert found.clean.value > found.ablated.value and found.effect_over_random.value > 0
    assert found.clean.low <= found.clean.value <= found.clean.high
    assert found.random_mass.value == pytest.approx(1, abs=0.2) and found.effect_over_direction.value > 0
    assert "correlation of attribution and ablation" in repr(found) and found.plot().to_json()
    with pytest.raises(SaelabError, match="no question"):
        circuit_test({2: sae}, lm, [])
