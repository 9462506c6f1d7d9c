"""Absorption rates equal the ones that were built in, and the loop over words and features that the paper describes."""

import math

import pytest
import torch
from torch import Tensor

from saelab.analysis.absorption import absorption, logistic
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder

D = 12


def hierarchy(share: float, words: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """x, labels and the child: a parent on half of the words (e0), a child on `share` of the parent's (e1), others."""
    generator = torch.Generator().manual_seed(0)
    parent = torch.rand(words, generator=generator) < 0.5
    child = parent & (torch.rand(words, generator=generator) < share)
    others = (torch.rand(words, D - 2, generator=generator) < 0.2).float()
    return torch.cat([parent[:, None], child[:, None], others], 1).float(), parent.long() - 1, child


def autoencoder(left: float) -> SparseAutoencoder:
    """Feature 0, the parent's, keeps `left` of its activation where the child is; the child's has the rest."""
    sae = SparseAutoencoder(D, D, D)
    sae.threshold = torch.full((1,), 1e-3)
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.b_enc.zero_()
        sae.W_enc.copy_(torch.eye(D))
        sae.W_enc[0, 1] = left - 1
        sae.W_dec.copy_(torch.eye(D))
        sae.W_dec[1, 0] = 1 - left
    return sae.requires_grad_(False)


@pytest.mark.parametrize(("left", "full", "fraction"), [(0.0, 1.0, 1.0), (0.5, 0.0, 0.5), (1.0, 0.0, 0.0)])
def test_the_rates_are_those_of_a_planted_hierarchy(left: float, full: float, fraction: float) -> None:
    x, labels, child = hierarchy(0.05)
    train = torch.arange(len(x)) % 2 == 0
    found = absorption(autoencoder(left), x, labels, train)
    (concept,) = found.concepts
    rate = (child & ~train).sum().item() / ((labels == 0) & ~train).sum().item()
    assert concept.main == (0,) and concept.probe_f1 == 1 and found.left_out == 0
    assert concept.words == ((labels == 0) & ~train).sum() and rate > 0.03
    assert found.full.value == pytest.approx(full * rate, abs=1e-12)
    # p is not exactly e0, since the child, too, tells of the parent
    assert found.fraction.value == pytest.approx(fraction * rate, rel=0.15, abs=1e-12)
    assert found.fraction.low <= found.fraction.value <= found.fraction.high
    assert list(found.by_class().full) == [concept.full] and len(found.plot().to_plotly_json()["data"]) == 2


def test_a_child_that_is_a_large_part_of_the_class_is_a_main_feature_too() -> None:
    x, labels, _ = hierarchy(0.4)
    found = absorption(autoencoder(0.0), x, labels, torch.arange(len(x)) % 2 == 0)
    assert set(found.concepts[0].main) == {0, 1} and found.full.value == 0 and found.concepts[0].main_f1 == 1


def test_it_equals_the_loop_over_words_and_features() -> None:
    torch.manual_seed(1)
    words, n = 1200, 24
    sae = SparseAutoencoder(D, n, 6).requires_grad_(False)
    sae.W_dec.copy_(torch.randn(n, D))  # rows of any length
    sae.W_enc.copy_(torch.randn(n, D))
    x, labels = torch.randn(words, D), torch.randint(-1, 3, (words,))
    for label in range(3):
        x[labels == label, label] += 1.5
    train = torch.rand(words) < 0.5
    found = absorption(sae, x, labels, train)
    z = sae.encode(x).to_dense().double()
    for concept in found.concepts:
        weights, bias = logistic(x[train], labels[train] == concept.label)
        p, fulls, fractions = weights / weights.norm(), [], []
        for w in ((labels == concept.label) & ~train).nonzero().flatten().tolist():
            T = (x[w].double() @ p).item()
            if (x[w].double() @ weights + bias) <= 0 or T <= 0:
                continue
            parts = [(z[w, i] * (sae.W_dec[i].double() @ p)).item() for i in range(n)]
            cosines = [(sae.W_dec[i].double() @ p / sae.W_dec[i].double().norm()).item() for i in range(n)]
            active = [i for i in range(n) if z[w, i] > 0]
            best = max(active, key=parts.__getitem__)
            silent = all(z[w, i] == 0 for i in concept.main)
            fulls.append(float(silent and cosines[best] >= 0.025 and parts[best] >= 0.4 * T))
            P = sum(parts[i] for i in concept.main)
            others = [parts[i] for i in active if i not in concept.main and cosines[i] >= 0.1 and parts[i] > 0]
            A = sum(sorted(others)[-3:])
            if P >= T or A / T < 0.4:
                fractions.append(0.0)
            else:
                fractions.append(1.0 if P <= 0 else min(A, T - P) / (min(A, T - P) + P))
        assert concept.words == len(fulls)
        assert concept.full == pytest.approx(sum(fulls) / len(fulls))
        assert concept.fraction == pytest.approx(sum(fractions) / len(fractions))
    assert len(found.concepts) == 3
    assert any(0 < concept.full < 1 for concept in found.concepts)
    assert any(0 < concept.fraction < 1 for concept in found.concepts)
    assert found.full.value == pytest.approx(sum(each.full for each in found.concepts) / 3)


def test_the_probe_solves_its_problem_and_does_not_depend_on_the_unit_of_x() -> None:
    torch.manual_seed(2)
    x = torch.randn(500, 4) * torch.tensor([1.0, 2.0, 0.5, 1.0]) + 3
    positive = x[:, 0] - x[:, 1] + 0.5 * torch.randn(500) > 0.2
    weights, bias = logistic(x, positive)
    guess = x.double() @ weights + bias > 0
    assert (guess == positive).float().mean() > 0.9
    scaled, same_bias = logistic(x * 1000, positive)
    torch.testing.assert_close(scaled * 1000, weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_bias, bias, rtol=1e-4, atol=1e-4)


def test_too_few_words_and_wrong_shapes_are_errors() -> None:
    x, labels, _ = hierarchy(0.1, words=30)
    with pytest.raises(SaelabError, match="none of 1 classes has 10 words"):
        absorption(autoencoder(0.0), x, labels, torch.arange(30) < 5)
    with pytest.raises(SaelabError, match="30 activations, 29 labels"):
        absorption(autoencoder(0.0), x, labels[1:], torch.arange(30) < 5)
    x, labels, _ = hierarchy(0.1)
    labels[:5] = 7
    found = absorption(autoencoder(0.0), x, labels, torch.arange(len(x)) % 2 == 0)
    assert found.left_out == 1 and not math.isnan(found.full.value)
