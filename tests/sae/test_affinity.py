"""The gradient affinity: its formula and limits; no parameter learns through it."""

import pytest
import torch

from saelab.codes import Codes
from saelab.sae.affinity import alignment, score
from saelab.sae.allocation.rules import MutualChoice, Rule, TokenChoice
from saelab.sae.initial import initialise
from saelab.sae.losses import batch_fvu
from saelab.sae.model import Batch, SparseAutoencoder

D, F, K, N = 8, 40, 4, 60


@pytest.fixture
def case() -> tuple[SparseAutoencoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, K)
    x = torch.randn(N, D)
    initialise(sae, x)
    return sae, x, torch.randn(N, D)


def selected(sae: SparseAutoencoder, x: torch.Tensor, rule: Rule, g: torch.Tensor, beta: float, bf16=False) -> Codes:
    sae.beta = beta
    return sae.training_pass(Batch(x, gradients=g), rule, bf16=bf16)[0].codes


@pytest.mark.parametrize("beta", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("bf16", [False, True])
def test_training_selects_by_the_formula(case: tuple, beta: float, bf16: bool) -> None:
    sae, x, g = case
    z = sae.pre_activations(x).relu()
    aligned = (g / g.square().mean().sqrt()) @ sae.W_dec.T
    scores = z * (1 + beta * aligned.abs()) if beta < 1e6 else z * aligned.abs()  # the limit
    rules: list[Rule] = [TokenChoice(K), MutualChoice(K)]
    for rule in rules:
        codes = selected(sae, x, rule, g, beta, bf16)
        mask = rule.mask(scores.detach())
        torch.testing.assert_close(codes.to_dense(), (z * mask).detach(), rtol=1e-4, atol=1e-5)


def test_the_sign_and_the_scale_of_the_gradient_do_not_matter(case: tuple) -> None:
    sae, x, g = case
    codes = [selected(sae, x, TokenChoice(K), s * g, 1.0) for s in (1.0, -1.0, 1e-4)]
    assert all(torch.equal(codes[0].features, other.features) for other in codes[1:])


def test_nothing_learns_through_the_score(case: tuple) -> None:
    """The gradients are those of plain TopK with the same entries: the score only chooses the entries."""
    sae, x, g = case
    g.requires_grad_(True)
    sae.beta = 2.0
    found, _ = sae.training_pass(Batch(x, gradients=g), TokenChoice(K))
    batch_fvu(x, found.reconstruction).backward()
    assert g.grad is None
    mask = found.codes.to_dense() > 0
    got = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
    sae.zero_grad()
    z = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu() * mask
    error = x - (z @ sae.W_dec + sae.b_dec)
    (error.square().sum() / (x - x.mean(0)).square().sum()).backward()
    for ours, dense in zip(got, sae.parameters(), strict=True):
        torch.testing.assert_close(ours, dense.grad)


def test_evaluation_selects_by_activation_and_the_oracle_by_gradient(case: tuple) -> None:
    sae, x, g = case
    plain = sae.encode(x)
    sae.beta = 5.0
    assert torch.equal(sae.encode(x).features, plain.features)
    oracle = sae.encode(x, gradients=g)
    trained = selected(sae, x, TokenChoice(K), g, 5.0)
    torch.testing.assert_close(oracle.to_dense(), trained.to_dense().detach())
    assert not torch.equal(oracle.to_dense(), plain.to_dense())
    sae.threshold = torch.tensor([0.5])
    scores = score(sae.pre_activations(x), (g / g.square().mean().sqrt()) @ sae.W_dec.T, 5.0)
    expected = torch.where(scores > 0.5, sae.pre_activations(x), 0.0)
    torch.testing.assert_close(sae.encode(x, gradients=g).to_dense(), expected.detach())


def test_no_gradient_at_all_is_plain_activation() -> None:
    assert alignment(torch.randn(3, 2), 0.0) is None
    nothing = alignment(torch.zeros(3, 2), 1.0)
    assert nothing is not None and not nothing.gradients.any()
