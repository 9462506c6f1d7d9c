"""The comparison of normalisations: what each does to a selection, and that a study has a line per method."""

import argparse
import dataclasses
from pathlib import Path

import gradient as script
import pytest
import torch
from planted_truth import Sample, cosine_similarity, draw, learn, plant

import saelab
from saelab import Batch, SaeSettings, SparseAutoencoder, TrainingSettings
from saelab.errors import SaelabError
from saelab.sae.allocation.rules import TokenChoice
from saelab.sae.initial import initialise

D, F, K, N = 16, 40, 4, 60
SMALL = script.Small(every=4, magnitude=0.5, effect=3.0)


def selected(sae: SparseAutoencoder, x: torch.Tensor, g: torch.Tensor, beta: float) -> torch.Tensor:
    sae.beta = beta
    return sae.training_pass(Batch(x, gradients=g), TokenChoice(K))[0].codes.to_dense() > 0


@pytest.fixture
def case() -> tuple[SparseAutoencoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, K)
    x = torch.randn(N, D)
    initialise(sae, x)
    return sae, x, torch.randn(N, D) * torch.rand(N, 1).pow(3)  # tokens differ in the length of g


def test_per_token_gradients_select_by_the_formula(case: tuple) -> None:
    sae, x, g = case
    aligned = (g / g.square().mean(1, keepdim=True).sqrt()) @ sae.W_dec.T
    expected = TokenChoice(K).mask((sae.pre_activations(x).relu() * (1 + 0.7 * aligned.abs())).detach())
    assert torch.equal(selected(sae, x, script.GRADIENTS["token"](g), 0.7), expected)


def test_per_token_selection_depends_on_no_tokens_scale_and_on_no_sign(case: tuple) -> None:
    sae, x, g = case
    changed = g.clone()
    changed[3] *= 1000
    token, batch = (
        lambda g, name=name: selected(sae, x, script.GRADIENTS[name](g), 1.0) for name in ("token", "batch")
    )
    assert torch.equal(token(changed), token(g)) and torch.equal(token(-g), token(g))
    assert not torch.equal(batch(changed), batch(g))  # one token of large gradient takes the others' weight
    plain = [selected(sae, x, script.GRADIENTS[name](g), 0.0) for name in script.GRADIENTS]
    assert all(torch.equal(each, plain[0]) for each in plain)


def test_no_gradient_stays_none_and_the_control_has_the_gradients_of_others() -> None:
    g = torch.randn(200, 3)
    g[5] = 0
    assert not script.GRADIENTS["token"](g)[5].any() and script.GRADIENTS["token"](g).isfinite().all()
    shuffled = script.GRADIENTS["shuffled"](g)
    assert (shuffled == g).all(1).double().mean() < 0.1
    assert torch.equal(shuffled.sort(0).values, g.sort(0).values)


def test_small_features_are_orthogonal_and_the_effective_ones_move_the_logits() -> None:
    planted = plant(64, 32, 3, exponent=0.7, shift=5.0, noise=0.1, seed=1, small=SMALL)
    small = planted.magnitudes < 1
    assert int(small.sum()) == 8 and int(planted.effective.sum()) == 4 and not (planted.effective & ~small).any()
    cosines = cosine_similarity(planted.directions, planted.directions)
    torch.testing.assert_close(cosines[small], torch.eye(32)[small], atol=1e-5, rtol=0)
    logits = planted.scale * planted.magnitudes[:, None] * planted.directions @ planted.readout
    assert logits[planted.effective].std(1).mean() == pytest.approx(3, rel=0.2)
    assert logits[~planted.effective].std(1).mean() < 1
    data = draw(planted, 60_000, 2)
    assert data.x.square().sum(1).mean() == pytest.approx(64, rel=0.05)
    # magnitudes: along its own axis an active small feature is half of the others' 1
    along = data.x @ planted.directions[small].T / planted.scale
    assert along[along > 0.2].mean() == pytest.approx(0.5, rel=0.1)


def test_the_more_weight_the_gradient_has_the_more_entries_it_replaces(case: tuple) -> None:
    sae, x, g = case
    lines = [line.split("|")[2:-1] for line in script.replaced(sae, x, g, [0.1, 1.0]).splitlines()[2:]]
    shares = [[float(cell) for cell in line] for line in lines]
    assert len(shares) == 7 and not any(shares[0])
    for weak, strong in (shares[1:3], shares[3:5], shares[5:7]):
        assert 0 < weak[0] < strong[0] < 100
    lengths = g.norm(dim=1)
    groups = torch.bucketize(lengths, torch.quantile(lengths, torch.tensor(script.QUANTILES)))
    means = sum(shares[2][1 + group] * int((groups == group).sum()) for group in range(7)) / len(x)
    assert means == pytest.approx(shares[2][0], abs=0.1)


def test_the_readout_is_surer_of_tokens_whose_effective_feature_is_active() -> None:
    planted = plant(64, 64, 3, exponent=0.7, shift=5.0, noise=0.02, seed=1, small=SMALL)
    data = draw(planted, 20_000, 2)
    active, inactive = script.strength(planted, data)
    twice = dataclasses.replace(data, gradients=2 * data.gradients)
    assert script.strength(planted, twice) == pytest.approx((active, inactive))
    assert 0 < active < inactive


def test_a_dictionary_has_found_its_own_directions() -> None:
    planted = plant(D, F, K, exponent=0.7, shift=5.0, noise=0.1, seed=1, small=SMALL)
    sae = SparseAutoencoder(D, F, K)
    sae.W_dec.data.copy_(planted.directions)
    sae.W_dec.data[3] = -sae.W_dec.data[3]
    assert script.found(planted, sae).logical_not().nonzero().tolist() == [[3]]


def test_a_study_compares_every_method_with_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PLANTED_HELD_OUT", 2000)
    args = argparse.Namespace(every=8, magnitude=0.5, effect=3.0, noise=0.02, tokens=1024, k=4, lr=5e-3)
    args.betas, args.only = [0.3], None
    seeds = [script.planted_seed(args, seed=0)] * 2
    assert list(seeds[0]) == ["TopK", "batch, beta 0.3", "token, beta 0.3", "shuffled, beta 0.3"]
    assert len({figures["fvu"] for figures in seeds[0].values()}) == 4
    lines = script.summary(seeds, script.PLANTED, "effective").splitlines()
    assert len(lines) == 6 and lines[2].startswith("| TopK ") and "+0.000 ± 0.000" in lines[2]


def test_topk_is_beta_zero() -> None:
    planted = plant(D, F, K, exponent=0.7, shift=5.0, noise=0.1, seed=1, small=SMALL)
    data: Sample = draw(planted, 2000, 2)
    training = TrainingSettings(2000, 200, 5e-3)
    rows = []
    for normalise, beta in script.methods((0.5,)).values():
        changed = dataclasses.replace(data, gradients=script.GRADIENTS[normalise](data.gradients))
        rows.append((beta, learn(script.settings_of(F, K, beta), training, changed, 0)[0].W_dec))
    plain = learn(SaeSettings(F, K), training, data, 0)[0].W_dec
    assert [bool(torch.equal(W_dec, plain)) for _, W_dec in rows] == [beta == 0 for beta, _ in rows]


@pytest.mark.slow
def test_the_demo_model_is_trained_from_a_cache_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "CE_TOKENS", 256)
    cache = saelab.cache("quickstart", tmp_path / "cache", ["cache.gradients=true"], tokens=4096)
    args = argparse.Namespace(tokens=4096, batch=512, lr=2e-3, n_features=64, k=8, betas=[0.3], only=["batch", "token"])
    figures = script.demo_seed(args, script.Demo(cache, args.tokens, held_out=1000), seed=0)
    assert list(figures) == ["TopK", "batch, beta 0.3", "token, beta 0.3"]
    assert all(line["l0"] <= 8 and 0 < line["fvu"] < 1.5 for line in figures.values())
    assert len({line["fvu"] for line in figures.values()}) == 3
    with pytest.raises(SaelabError, match=r"has only [\d,]+ tokens; 100,000 are needed"):
        script.read(cache, 100_000)
