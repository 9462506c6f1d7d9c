"""The gradient and cosine affinities: formulas and limits; no parameter learns through them."""

import pytest
import torch

from saelab.codes import Codes
from saelab.errors import SettingError
from saelab.sae.affinity import alignment, cosine, score
from saelab.sae.allocation.rules import FeatureChoice, GroupMax, MutualChoice, Rule, TokenChoice
from saelab.sae.checkpoint import load, save_sae
from saelab.sae.initial import initialise
from saelab.sae.losses import batch_fvu
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.new import new_autoencoder
from saelab.sae.settings import AffinitySettings, AllocationSettings, EncoderSettings, SaeSettings, SparsitySettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

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


@pytest.fixture
def uneven(case: tuple) -> tuple[SparseAutoencoder, torch.Tensor]:
    """An autoencoder whose encoder rows have lengths from 0.3 to 3, so that they decide which entries win."""
    sae, x, _ = case
    sae.W_enc.data.mul_(torch.logspace(-0.5, 0.5, F)[torch.randperm(F), None])
    sae.b_enc.data.normal_(std=0.1)
    return sae, x


def dense_score(sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    return (sae.pre_activations(x) / sae.W_enc.norm(dim=1) ** sae.power).detach()


RULES: list[Rule] = [
    TokenChoice(K),
    GroupMax(K, F),
    MutualChoice(K),
    FeatureChoice(torch.full((F,), N * K // F), N * K // F * F),
]


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_cosine_selects_by_the_formula_and_values_stay_pre_activations(uneven, rule, power, bf16) -> None:
    sae, x = uneven
    plain = sae.training_pass(Batch(x), rule)[0].codes.to_dense() > 0
    sae.power = power
    codes = sae.training_pass(Batch(x), rule, bf16=bf16)[0].codes
    mask = rule.mask(dense_score(sae, x))
    torch.testing.assert_close(codes.to_dense(), (sae.pre_activations(x) * mask).detach(), rtol=1e-4, atol=1e-5)
    if not isinstance(rule, FeatureChoice):  # a feature's tokens compete with each other only
        assert not torch.equal(mask, plain)


def test_within_a_token_it_is_the_order_of_cosines(uneven) -> None:
    sae, x = uneven
    sae.b_enc.data.zero_()
    sae.power = 1.0
    cosines = torch.nn.functional.cosine_similarity((x - sae.b_dec)[:, None], sae.W_enc[None], dim=2)
    assert torch.equal(sae.encode(x).to_dense() > 0, TokenChoice(K).mask(cosines.detach()))


def test_nothing_learns_through_the_lengths(uneven) -> None:
    sae, x = uneven
    sae.power = 1.0
    found, _ = sae.training_pass(Batch(x), TokenChoice(K))
    batch_fvu(x, found.reconstruction).backward()
    got = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
    mask = TokenChoice(K).mask(dense_score(sae, x))
    sae.zero_grad()
    z = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * mask
    batch_fvu(x, z @ sae.W_dec + sae.b_dec).backward()
    for ours, dense in zip(got, sae.parameters(), strict=True):
        torch.testing.assert_close(ours, dense.grad)


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_a_checkpoint_is_an_ordinary_one_that_computes_the_same(uneven, tmp_path, threshold) -> None:
    sae, x = uneven
    sae.power = 0.5
    if threshold is not None:
        sae.threshold = torch.tensor([threshold])  # of scores
    active, reconstruction = sae.encode(x).to_dense() > 0, sae(x)
    scores = dense_score(sae, x)
    save_sae(sae, tmp_path)
    read = load(tmp_path)
    assert read.power == 0
    torch.testing.assert_close(read(x), reconstruction)
    torch.testing.assert_close(read.encode(x).to_dense(), scores * active)


def test_a_trained_autoencoder_has_taken_it_in(case) -> None:
    _, x, _ = case
    settings = SaeSettings(F, K, affinity=AffinitySettings("cosine"))
    trainer = Trainer(new_autoencoder(settings, x, seed=0), TrainingSettings(10 * N, N, lr=0.01), settings)
    assert trainer.sae.power == 1
    for _ in range(10):
        trainer.step(Batch(x))
    before = trainer.sae(x)
    trainer.release()
    trainer.release()
    assert trainer.sae.power == 0
    torch.testing.assert_close(trainer.sae(x), before)
    torch.testing.assert_close(trainer.sae.W_enc.norm(dim=1), torch.ones(F))


def test_power_0_is_plain_activation_and_what_contradicts_cosine_is_refused() -> None:
    assert cosine(torch.randn(3, 2), 0.0) is None
    affinity = AffinitySettings("cosine")
    with pytest.raises(SettingError, match="affinity: cosine goes with a budget"):
        SaeSettings(affinity=affinity, allocation=AllocationSettings("threshold"), sparsity=SparsitySettings("l1"))
    with pytest.raises(SettingError, match="affinity: cosine divides by lengths"):
        SaeSettings(affinity=affinity, encoder=EncoderSettings("tied"))
    with pytest.raises(SettingError, match="power: 2 is not between 0 and 1"):
        AffinitySettings("cosine", power=2)
