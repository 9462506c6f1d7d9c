"""Transcoders with and without a skip connection: gradients, what they learn, and what is folded into saved weights."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saelab.errors import SettingError
from saelab.sae.checkpoint import load, save_sae
from saelab.sae.input_map import input_map
from saelab.sae.losses import batch_fvu
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.new import bare_autoencoder, new_autoencoder
from saelab.sae.settings import AllocationSettings, AuxSettings, EncoderSettings, SaeSettings, SparsitySettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

D, OUT, F, BATCH = 8, 5, 48, 128
L1 = SparsitySettings("l1", 0.1)
METHODS = {
    "topk": SaeSettings(F, 4),
    "skip": SaeSettings(F, 4, skip=True),
    "gated": SaeSettings(
        F, 4, EncoderSettings("gated"), allocation=AllocationSettings("threshold"), sparsity=L1, skip=True
    ),
    "jumprelu": SaeSettings(
        F, 4, EncoderSettings("jumprelu"), allocation=AllocationSettings("threshold"), sparsity=SparsitySettings("l0")
    ),
    "multi_topk": SaeSettings(F, 4, multi_topk=True, prefixes=(0.5,), skip=True),
}


def pairs(n: int, seed: int = 0, mean: float = 1.0) -> tuple[Tensor, Tensor]:
    """Activations x ``[n, D]`` with a mean, and a target ``[n, OUT]`` of another size that is not linear in x."""
    made = torch.Generator().manual_seed(7)
    within, across = torch.randn(D, 16, generator=made), torch.randn(16, OUT, generator=made)
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + mean
    return x, 30 * (x @ within).relu() @ across


def trained(settings: SaeSettings, x: Tensor, y: Tensor, steps: int) -> SparseAutoencoder:
    trainer = Trainer(
        new_autoencoder(settings, x, seed=0, target=y), TrainingSettings(steps * BATCH, BATCH, 1e-2), settings
    )
    for step in range(steps):
        at = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
        trainer.step(Batch(x[at], y[at]))
    trainer.release()
    return trainer.sae.requires_grad_(False)


@pytest.mark.parametrize("prefixes", [(), (0.5,)])
def test_gradients_with_a_skip_connection_equal_those_of_the_dense_formula(prefixes: tuple[float, ...]) -> None:
    x, y = pairs(BATCH)
    sae = new_autoencoder(SaeSettings(F, 4, skip=True, prefixes=prefixes), x, seed=0, target=y).double()
    assert sae.W_skip is not None and not sae.W_skip.any() and sae.W_skip.shape == (OUT, D)
    x, y = x.double(), y.double()
    torch.nn.init.normal_(sae.W_skip)
    twin = copy.deepcopy(sae)
    forward, _ = sae.training_pass(Batch(x, y), sae.rule)
    torch.stack([batch_fvu(y, each) for each in forward.reconstructions]).sum().backward()
    z = x @ twin.W_enc.T + twin.b_enc
    codes = z.relu() * twin.rule.mask(z.detach())
    assert twin.W_skip is not None
    for size in twin.prefixes:
        dense = codes[:, :size] @ twin.W_dec[:size] + twin.b_dec + x @ twin.W_skip.T
        ((y - dense).square().sum() / (y - y.mean(0)).square().sum()).backward(retain_graph=True)
    names = [name for name, _ in sae.named_parameters()]
    assert "W_skip" in names
    for name, ours, theirs in zip(names, sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    torch.testing.assert_close(forward.reconstruction, sae.decode(forward.codes, x))


def test_on_a_linear_map_the_skip_connection_solves_it() -> None:
    """Features cost something and it costs nothing, so that none is active in the end."""
    x, _ = pairs(4096, mean=0.0)
    readout = torch.randn(D, OUT, generator=torch.Generator().manual_seed(1)) / D**0.5
    price = {"allocation": AllocationSettings("threshold"), "sparsity": SparsitySettings("l1", 1.0)}
    sae = trained(SaeSettings(F, 4, skip=True, aux=AuxSettings("none"), **price), x, x @ readout, 250)
    assert sae.encode(x).l0().float().mean() < 0.1
    assert sae.W_skip is not None
    torch.testing.assert_close(sae.W_skip, readout.T, atol=0.05, rtol=0.05)
    assert batch_fvu(x @ readout, sae(x)) < 1e-3


def test_a_skip_connection_explains_more_of_a_target_that_is_partly_linear() -> None:
    x, y = pairs(4096)
    y = input_map("scale", y)(y)
    found = [batch_fvu(y, trained(METHODS[name], x, y, 150)(x)).item() for name in ("topk", "skip")]
    assert found[1] < 0.7 * found[0] < 0.7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inputs", ["scale", "centre", "whiten"])
def test_the_saved_transcoder_maps_raw_inputs_to_raw_outputs(inputs: str, method: str, tmp_path: Path) -> None:
    """Codes over the scale of the target, and the reconstruction over it."""
    x, y = pairs(1024, mean=3.0)
    read, written = input_map(inputs, x), input_map("scale", y)
    sae = trained(METHODS[method], read(x), written(y), 8)
    save_sae(read.folded(sae, written.scale), tmp_path)
    saved = load(tmp_path)
    assert (saved.transcodes, saved.centred, saved.d_out) == (True, False, OUT)
    assert (saved.W_skip is not None) == METHODS[method].skip
    codes, expected = sae.encode(read(x)).to_dense(), sae(read(x)) / written.scale
    torch.testing.assert_close(saved.encode(x).to_dense() * written.scale, codes, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(saved(x), expected, atol=1e-3 * y.abs().max().item(), rtol=1e-3)


def test_without_unit_norm_the_decoder_begins_at_zero_and_the_reconstruction_as_the_mean() -> None:
    """FVU is then 1. All features learn, and a decoder that is frozen is none of zeros."""
    x, y = pairs(4096)
    y = input_map("scale", y)(y)
    settings = SaeSettings(F, 4, skip=True, unit_norm=False)
    start = new_autoencoder(settings, x, seed=0, target=y)
    assert not start.W_dec.any() and batch_fvu(y, start(x)).item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(start.W_enc.norm(dim=1), torch.ones(F))
    sae = trained(settings, x, y, 100)
    assert batch_fvu(y, sae(x)) < 0.15 and (sae.W_dec.norm(dim=1) > 0).all()
    frozen = SaeSettings(F, 4, unit_norm=False, freeze="decoder")
    assert new_autoencoder(frozen, x, seed=0, target=y).W_dec.any(dim=1).all()


@pytest.mark.parametrize("skip", [False, True])
def test_jumprelu_begins_with_the_l0_that_its_thresholds_are_fitted_to(skip: bool) -> None:
    """In spaces of many dimensions, where random decoder rows explain next to nothing of the target."""
    made = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2048, 64, generator=made) for _ in range(2))
    settings = replace(METHODS["jumprelu"], n_features=256, sparsity=SparsitySettings("l0", target_l0=16), skip=skip)
    sae = new_autoencoder(settings, x, seed=0, target=y)
    assert sae.encode(x).l0().double().mean() == pytest.approx(16, rel=0.1)
    torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.ones(256))


def test_resampling_and_a_new_trainer_keep_the_skip_connection() -> None:
    x, y = pairs(20 * BATCH)
    settings, training = (
        SaeSettings(F, 4, skip=True),
        TrainingSettings(20 * BATCH, BATCH, resample=4 * BATCH),
    )
    parts = [Batch(*part) for part in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    whole, first = (Trainer(new_autoencoder(settings, x, seed=0, target=y), training, settings) for _ in range(2))
    logs = [whole.step(part) for part in parts]
    for part in parts[:9]:
        first.step(part)
    second = Trainer(bare_autoencoder(settings, D, OUT), training, settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [second.step(part) for part in parts[9:]] == logs[9:]
    for ours, theirs in zip(second.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(SettingError, match=r"^skip: .*goes with a `target` site"):
        bare_autoencoder(SaeSettings(F, 4, skip=True), D)
    with pytest.raises(SettingError, match=r"^encoder: tied: "):
        bare_autoencoder(SaeSettings(F, 4, EncoderSettings("tied")), D, OUT)
