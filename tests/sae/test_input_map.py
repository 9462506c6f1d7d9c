"""What is done to activations before training is undone exactly in the weights that are saved."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saelab.activations.settings import INPUTS
from saelab.memory import peak_bytes
from saelab.sae.allocation.rules import TokenChoice
from saelab.sae.checkpoint import load, save_sae
from saelab.sae.input_map import FLOOR, input_map
from saelab.sae.losses import batch_fvu
from saelab.sae.model import Batch
from saelab.sae.needs import input_needs
from saelab.sae.new import new_autoencoder
from saelab.sae.normalisation import NORMALISATIONS, normalised
from saelab.sae.settings import AllocationSettings, AuxSettings, EncoderSettings, SaeSettings, SparsitySettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

D, F, BATCH = 8, 48, 128
THRESHOLD = AllocationSettings("threshold")
L1 = SparsitySettings("l1", 0.1)
METHODS = {
    "topk": SaeSettings(F, 4),
    "group_max": SaeSettings(F, 4, allocation=AllocationSettings("group_max")),
    "gated": SaeSettings(F, 4, EncoderSettings("gated"), allocation=THRESHOLD, sparsity=L1),
    "jumprelu": SaeSettings(F, 4, EncoderSettings("jumprelu"), allocation=THRESHOLD, sparsity=SparsitySettings("l0")),
    "tied": SaeSettings(F, 4, EncoderSettings("tied")),
}


def activations(mean: float = 3.0, seed: int = 0) -> Tensor:
    """Correlated, with dimensions of different sizes and a mean."""
    mixing = torch.eye(D) + 0.2 * torch.randn(D, D, generator=torch.Generator().manual_seed(7))
    mixing *= torch.linspace(0.5, 2, D)
    x = torch.randn(2000, D, generator=torch.Generator().manual_seed(seed))
    return x @ mixing + mean


@pytest.mark.parametrize("name", ["scale", "centre", "whiten"])
def test_inputs_have_the_moments_that_their_name_says(name: str) -> None:
    x = activations()
    found = input_map(name, x)(x).double()
    assert found.square().sum(1).mean().item() == pytest.approx(D, rel=1e-5)
    covariance = (found - found.mean(0)).T @ (found - found.mean(0)) / len(x)
    assert (found.mean(0).abs().max() < 1e-5) == (name != "scale")
    assert torch.allclose(covariance, torch.eye(D).double(), atol=1e-4) == (name == "whiten")
    if name == "scale":
        assert torch.equal(input_map(name, x)(x), x * (D / x.square().sum(1).double().mean().item()) ** 0.5)


def test_whitening_is_symmetric_and_does_not_blow_up_what_hardly_varies() -> None:
    x = activations()
    x[:, 0] = 5 + 1e-6 * x[:, 1]
    found = input_map("whiten", x)
    whitening = found.whitening
    assert whitening is not None and found.mean is not None
    torch.testing.assert_close(whitening, whitening.T)
    spread = (x - found.mean).square().mean().sqrt().item()
    assert torch.linalg.eigvalsh(whitening.double()).max().item() == pytest.approx(1 / (FLOOR * spread), rel=1e-3)
    assert found(x).std(0).max() < 2


@pytest.mark.parametrize("x", [torch.zeros(50, D), torch.full((50, D), 3.0)])
def test_what_does_not_vary_is_refused(x: Tensor) -> None:
    for name in ("centre", "whiten"):
        with pytest.raises(ValueError, match="are all equal"):
            input_map(name, x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", INPUTS)
def test_the_saved_autoencoder_takes_activations_as_they_are(name: str, method: str, tmp_path: Path) -> None:
    """Codes over the scale, and the reconstruction mapped back."""
    x, settings = activations(), METHODS[method]
    inputs = input_map(name, x)
    trainer = Trainer(new_autoencoder(settings, inputs(x), seed=0), TrainingSettings(20 * BATCH, BATCH), settings)
    for part in inputs(x).split(BATCH):
        trainer.step(Batch(part))
    trainer.release()
    sae = trainer.sae.requires_grad_(False)
    save_sae(inputs.folded(sae), tmp_path)
    saved = load(tmp_path)
    torch.testing.assert_close(
        saved.encode(x).to_dense() * inputs.scale, sae.encode(inputs(x)).to_dense(), atol=1e-3, rtol=1e-3
    )
    expected = sae(inputs(x)).double() / inputs.scale
    if name in NORMALISATIONS:
        _, gain, shift = normalised(x, name)
        expected = expected * gain + shift
    assert saved.normalisation == inputs.normalisation == (name if name in NORMALISATIONS else None)
    if inputs.inverse is not None:
        expected = expected @ inputs.inverse
    if inputs.mean is not None:
        expected = expected + inputs.mean
    torch.testing.assert_close(saved(x).double(), expected, atol=1e-3, rtol=1e-3)


def test_what_fitting_needs_is_bounded() -> None:
    """By no more than three times what is there."""
    x = torch.randn(4000, 96)
    held = peak_bytes(lambda: input_map("whiten", x)(x)) - x.nbytes  # the result is counted as the sample of the start
    bound = sum(need.bytes for need in input_needs("whiten", 96, len(x), "memory"))
    assert held <= bound <= 3 * held
    assert not input_needs("centre", 96, len(x), "memory")


def test_gradients_keep_their_products_with_what_a_feature_writes() -> None:
    """A decoder row d of x' writes d times the inverse of the whitening to x."""
    x, g, row = activations(), torch.randn(5, D), torch.randn(D)
    inputs = input_map("whiten", x)
    assert inputs.inverse is not None
    found = inputs.gradients(g, x)
    assert found is not None and inputs.gradients(None, x) is None
    torch.testing.assert_close(found @ row, g @ (row @ inputs.inverse.float()), atol=1e-4, rtol=1e-4)
    assert input_map("centre", x).gradients(g, x) is g
    for name in NORMALISATIONS:
        of = x[:5]
        found = input_map(name, x).gradients(g, of)
        assert found is not None
        torch.testing.assert_close(found @ row, (g * normalised(of, name).gain) @ row)


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_a_step_on_normalised_tokens_equals_the_dense_formula(name: str) -> None:
    """In value and gradient: FVU of the normalised tokens, whatever their lengths were."""
    x, settings = activations()[:BATCH], SaeSettings(F, 4, aux=AuxSettings("none"))
    inputs = input_map(name, x)
    sae = new_autoencoder(settings, inputs(x), seed=0)
    found, _ = sae.training_pass(Batch(inputs(x)), TokenChoice(4))
    batch_fvu(found.target, found.reconstruction).backward()
    got = [p.grad.clone() for p in sae.parameters() if p.grad is not None]
    sae.zero_grad()
    y = x - x.mean(1, keepdim=True) if name == "layer_norm" else x
    y = y / (y.std(1, keepdim=True) + 1e-5 if name == "layer_norm" else y.norm(dim=1, keepdim=True) / D**0.5)
    torch.testing.assert_close(inputs(7 * x), y, atol=1e-4, rtol=1e-4)
    z = (y - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    error = y - (z.relu() * TokenChoice(4).mask(z.detach()) @ sae.W_dec + sae.b_dec)
    (error.square().sum() / (y - y.mean(0)).square().sum()).backward()
    for ours, dense in zip(got, sae.parameters(), strict=True):
        torch.testing.assert_close(ours, dense.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("b_dec_init", "inputs"), [("zero", "scale"), ("zero", "centre"), ("mean", "scale")])
def test_a_large_mean_kills_features_unless_it_is_subtracted(b_dec_init: str, inputs: str) -> None:
    """By the input, or by a b_dec that begins as the mean."""
    torch.manual_seed(0)
    shift = 10 * D**0.5 * torch.nn.functional.normalize(torch.randn(D), dim=0)
    x = torch.randn(2000, D) + shift
    mapped, settings = input_map(inputs, x), SaeSettings(F, 4, aux=AuxSettings("none"), b_dec_init=b_dec_init)
    trainer = Trainer(new_autoencoder(settings, mapped(x), seed=0), TrainingSettings(60 * BATCH, BATCH), settings)
    for _ in range(60):
        trainer.step(Batch(mapped(torch.randn(BATCH, D) + shift)))
    dead = (mapped.folded(trainer.sae).encode(x).firing_counts() == 0).float().mean().item()
    assert dead > 0.3 if (b_dec_init, inputs) == ("zero", "scale") else dead < 0.05
