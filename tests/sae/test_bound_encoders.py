"""Encoders whose rows are bound to those of the decoder: tied (one table) and aligned (products of 1)."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saelab.errors import SettingError
from saelab.sae.allocation.rules import TokenChoice
from saelab.sae.checkpoint import load, save_sae
from saelab.sae.fold import fold
from saelab.sae.initial import initialise
from saelab.sae.losses import batch_fvu
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.new import bare_autoencoder, new_autoencoder
from saelab.sae.settings import AllocationSettings, EncoderSettings, SaeSettings, SparsitySettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

D, F, BATCH = 8, 30, 64
TIED = SaeSettings(F, 4, encoder=EncoderSettings("tied"))
ALIGNED = SaeSettings(F, 4, encoder=EncoderSettings("aligned"))


def batches(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, D, generator=generator) + 0.5 for _ in range(n)]


def trained(settings: SaeSettings, **options: object) -> tuple[SparseAutoencoder, list[dict]]:
    sae = new_autoencoder(settings, batches(1)[0], seed=0)
    trainer = Trainer(sae, TrainingSettings(150 * BATCH, BATCH, lr=3e-3, log_every=1, **options), settings)  # type: ignore[arg-type]
    metrics = [found for x in batches(150) if (found := trainer.step(Batch(x))) is not None]
    trainer.release()
    return sae, metrics


def products(sae: SparseAutoencoder) -> Tensor:
    return (sae.W_enc * sae.W_dec).sum(1)


def test_a_tied_autoencoder_has_one_table_with_the_gradients_of_the_dense_formula() -> None:
    sae = bare_autoencoder(TIED, D).double()
    x = batches(1)[0].double()
    torch.manual_seed(0)
    initialise(sae, x)
    W, b_enc, b_dec = (each.detach().clone().requires_grad_() for each in (sae.W_dec, sae.b_enc, sae.b_dec))
    forward, _ = sae.training_pass(Batch(x), TokenChoice(4))
    batch_fvu(x, forward.reconstruction).backward()
    z = (x - b_dec) @ W.T + b_enc
    batch_fvu(x, (z * TokenChoice(4).mask(z.detach())) @ W + b_dec).backward()
    assert [name for name, _ in sae.named_parameters()] == ["W_enc", "b_enc", "b_dec"] and sae.tied
    for ours, theirs in ((sae.W_enc, W), (sae.b_enc, b_enc), (sae.b_dec, b_dec)):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("settings", [TIED, ALIGNED], ids=["tied", "aligned"])
@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"precision": "bfloat16", "resample": 20 * BATCH}], ids=str)
def test_the_rows_stay_bound_in_training_which_learns(settings: SaeSettings, options: dict) -> None:
    sae, metrics = trained(settings, **options)
    torch.testing.assert_close(products(sae), torch.ones(F))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    assert sae.tied == (settings is TIED) == torch.equal(sae.W_enc, sae.W_dec)
    assert metrics[-1]["fvu"] < 0.5 * metrics[0]["fvu"]


@pytest.mark.parametrize("name", ["tied", "aligned"])
def test_they_go_without_a_budget_and_with_free_lengths(name: str) -> None:
    settings = SaeSettings(
        F,
        4,
        encoder=EncoderSettings(name),
        allocation=AllocationSettings("threshold"),
        sparsity=SparsitySettings("l1", 0.03),
        unit_norm=False,
    )
    sae, metrics = trained(settings)
    lengths = sae.W_dec.detach().norm(dim=1)
    assert not torch.allclose(lengths, torch.ones(F), atol=1e-3)
    torch.testing.assert_close(products(sae), lengths.square() if name == "tied" else torch.ones(F))
    assert metrics[-1]["fvu"] < metrics[0]["fvu"]


@pytest.mark.parametrize("settings", [TIED, ALIGNED], ids=["tied", "aligned"])
def test_copies_folds_and_checkpoints_compute_the_same(settings: SaeSettings, tmp_path: Path) -> None:
    sae, _ = trained(settings)
    x = batches(1)[0]
    assert copy.deepcopy(sae).tied == sae.tied
    folded = fold(sae, 2.0)
    torch.testing.assert_close(folded(x / 2), sae(x) / 2)
    save_sae(folded, tmp_path)
    torch.testing.assert_close(load(tmp_path)(x / 2), sae(x) / 2)


def test_an_encoder_row_that_points_away_begins_again_along_its_decoder_row() -> None:
    sae, _ = trained(ALIGNED)
    sae.W_dec.data.mul_(2)
    kept = sae.W_enc[1:].clone()
    sae.W_enc.data[0].neg_()
    sae.align_encoder()
    torch.testing.assert_close(products(sae), torch.ones(F))
    torch.testing.assert_close(sae.W_enc[0], sae.W_dec[0] / 4)
    torch.testing.assert_close(sae.W_enc[1:], kept / 2)


def test_a_transcoder_is_refused() -> None:
    x = batches(1)[0]
    for settings in (TIED, ALIGNED):
        with pytest.raises(SettingError, match=r"encoder: (tied|aligned): .*transcoder"):
            new_autoencoder(settings, x, seed=0, target=x[:, :4])
