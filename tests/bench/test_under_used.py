"""What the comparison of auxiliary losses follows is what dense formulas give; its forms differ only in the loss."""

import argparse

import pytest
import torch
import under_used

from saelab.sae.allocation.rules import TokenChoice
from saelab.sae.allocation.selection import Request
from saelab.sae.initial import initialise
from saelab.sae.model import Batch, SparseAutoencoder

N, D, F, K = 60, 12, 40, 3


@pytest.fixture
def sae() -> SparseAutoencoder:
    torch.manual_seed(0)
    made = SparseAutoencoder(D, F, K)
    initialise(made, torch.randn(N, D))
    return made.requires_grad_(False)


def test_places_are_the_best_tokens_of_each_feature_and_its_ranks_there(sae, monkeypatch):
    monkeypatch.setattr(under_used, "BEST", 5)
    x, features = torch.randn(N, D), torch.tensor([4, 30])
    found, pre = under_used.places(sae, x, features), sae.pre_activations(x)
    values, ranks = [], []
    for feature in features.tolist():
        for token in pre[:, feature].argsort(descending=True)[:5].tolist():
            values.append(pre[token, feature].item())
            ranks.append(pre[token].argsort(descending=True).tolist().index(feature) + 1)
    assert found["pre"] == pytest.approx(sum(values) / 10)
    assert found["rank"] == sorted(ranks)[4]  # torch's median is the lower one
    assert found["won"] == pytest.approx(10 * sum(rank <= K for rank in ranks))


def test_pulls_are_those_of_the_dense_formula(sae):
    x, mask = torch.randn(N, D), torch.arange(F) < 20
    forward, (chosen,) = sae.training_pass(Batch(x), TokenChoice(K), [Request(TokenChoice(6), mask)])
    assert chosen is not None
    found = under_used.pulls(forward, chosen)
    error, z = x - forward.reconstruction, chosen.pattern.to_dense().relu()
    of_error, of_ehat = error @ sae.W_dec.T, z @ sae.W_dec @ sae.W_dec.T
    used = z > 0
    assert found["z"] == pytest.approx(z[used].mean().item(), rel=1e-4)
    assert found["d . e"] == pytest.approx(of_error[used].mean().item(), abs=1e-5)
    assert found["d . ehat of the others"] == pytest.approx((of_ehat - z)[used].mean().item(), abs=1e-5)
    for form, pull in (("alone", of_error - z), ("together", of_error - of_ehat)):
        lowered = 100 * (pull < 0)[used].double().mean().item()
        assert found[f"lowered {form} (%)"] == pytest.approx(lowered, abs=0.5)


def test_every_form_is_trained_on_the_same_batches_and_only_the_loss_differs(monkeypatch):
    monkeypatch.setattr(under_used, "REFRESH", 4)
    monkeypatch.setattr("saelab.training.usage.REFRESH", 4)
    torch.manual_seed(0)
    x = (torch.rand(700, D).square() @ torch.randn(D, D)).float()
    args = argparse.Namespace(n_features=F, k=K, tokens=600, batch=50, lr=5e-3, seeds=[0, 1], only=None, json=None)
    monkeypatch.setattr(under_used, "FOLLOWED", 100)
    found = under_used.study(x, x[-100:], args)
    assert list(found["figures"]) == list(under_used.FORMS)
    assert all(len(lines) == 2 for lines in found["figures"].values())
    firsts = [lines[0] for lines in found["followed"].values()]
    assert firsts[2] == firsts[3] and firsts[0]["features"] > 0  # until the first ranking the forms agree
    assert found["followed"]["together"][-1] != found["followed"]["aux_zipf"][-1]
    assert "together" in under_used.report(found)
