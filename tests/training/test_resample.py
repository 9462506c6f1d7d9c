"""Resampling: where the weights of dead features go, what stays, and that it brings features back."""

import dataclasses

import pytest
import torch

from saelab.errors import SaelabError, SettingError
from saelab.ranks import ALONE, Ranks
from saelab.sae.initial import initialise
from saelab.sae.model import Batch
from saelab.sae.new import bare_autoencoder
from saelab.sae.settings import AllocationSettings, AuxSettings, EncoderSettings, SaeSettings, SparsitySettings
from saelab.training import trainer
from saelab.training.resample import resample
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer, train
from tests.threads import run_threads
from tests.training import test_ranks
from tests.training.test_trainer import SETTINGS, D, planted, sample

NO_AUX = AuxSettings("none")


def stepped(settings: SaeSettings) -> tuple[Trainer, Batch]:
    """A trainer after two steps, with Adam's moments, and another batch."""
    torch.manual_seed(0)
    sae = bare_autoencoder(settings, D)
    initialise(sae, sample())
    made, (*first, batch) = Trainer(sae, SETTINGS, settings), planted(3, 256)
    for each in first:
        made.step(each)
    return made, batch


@pytest.mark.parametrize("encoder", ["linear", "jumprelu"])
def test_dead_features_begin_anew_at_tokens_with_a_large_loss_and_the_others_stay(encoder: str) -> None:
    settings = SaeSettings(40, 3, aux=NO_AUX)
    if encoder == "jumprelu":
        threshold, sparsity = AllocationSettings("threshold"), SparsitySettings("l0")
        settings = dataclasses.replace(
            settings, encoder=EncoderSettings("jumprelu"), allocation=threshold, sparsity=sparsity
        )
    made, batch = stepped(settings)
    sae, dead = made.sae, torch.arange(40) % 4 == 0
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    losses = torch.zeros(256)
    losses[[5, 9]] = torch.tensor([1.0, 3.0])
    resample(sae, made.optimiser, batch, losses, dead, 0.5, seed=0)

    directions = torch.nn.functional.normalize(batch.x - sae.b_dec, dim=1).detach()
    length = 0.5 * before["W_enc"][~dead].norm(dim=1).mean()
    nearest = (sae.W_dec[dead] @ directions.T).argmax(1)
    assert set(nearest.tolist()) <= {5, 9} and (nearest == 9).sum() >= (nearest == 5).sum()  # 9 to 1
    torch.testing.assert_close(sae.W_dec[dead], directions[nearest])
    torch.testing.assert_close(sae.W_enc[dead], directions[nearest] * length)
    assert (sae.b_enc[dead] == 0).all()
    if sae.log_threshold is not None:
        assert (sae.log_threshold[dead] == before["log_threshold"][~dead].median()).all()
    moments = made.optimiser.state_dict()
    for name, parameter in sae.named_parameters():
        rows = slice(None) if name == "b_dec" else ~dead
        assert torch.equal(parameter[rows], before[name][rows])
        if name != "b_dec":
            assert (moments[name]["exp_avg_sq"][dead] == 0).all() and (moments[name]["exp_avg"][dead] == 0).all()
        assert (moments[name]["exp_avg_sq"][rows] != 0).any()


def test_it_draws_by_the_square_of_the_loss_and_the_same_for_a_seed() -> None:
    made, batch = stepped(SaeSettings(2000, 3, aux=NO_AUX))
    sae, dead, losses = made.sae, torch.arange(2000) > 0, torch.zeros(256)
    losses[:2] = torch.tensor([1.0, 2.0])
    resample(sae, made.optimiser, batch, losses, dead, 0.5, seed=1)
    first = sae.W_dec[1:].detach().clone()
    directions = torch.nn.functional.normalize(batch.x - sae.b_dec, dim=1)
    assert ((first @ directions.T).argmax(1) == 1).float().mean() == pytest.approx(0.8, abs=0.04)
    resample(sae, made.optimiser, batch, losses, dead, 0.5, seed=1)
    assert torch.equal(sae.W_dec[1:], first)


def test_nothing_happens_without_dead_or_living_features_or_losses() -> None:
    made, batch = stepped(SaeSettings(40, 3, aux=NO_AUX))
    before, some = made.sae.W_dec.detach().clone(), torch.arange(40) < 20
    for dead, losses in ((some & ~some, torch.ones(256)), (some | ~some, torch.ones(256)), (some, torch.zeros(256))):
        resample(made.sae, made.optimiser, batch, losses, dead, 0.5, seed=0)
        assert torch.equal(made.sae.W_dec, before)


def back(every: int | None, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[int, torch.Tensor]:
    """How many of 20 features that died are active after a training with resampling, and the decoder."""
    settings, died = SaeSettings(64, 3, aux=NO_AUX), torch.arange(64) < 20
    if monkeypatch is not None:  # the paper's share, with a budget
        monkeypatch.setattr(trainer, "resample", lambda *args, **names: resample(*args[:-1], 0.2, **names))
    torch.manual_seed(0)
    sae = bare_autoencoder(settings, D)
    initialise(sae, sample())
    with torch.no_grad():
        sae.b_enc[died] = -50.0
    train(sae, planted(150, 256), dataclasses.replace(SETTINGS, resample=every), settings)
    return int((sae.encode(sample()).firing_counts()[died] > 0).sum()), sae.W_dec.detach()


def test_features_that_died_come_back_but_with_a_budget_not_with_the_papers_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert back(20 * 256)[0] >= 18
    assert back(20 * 256, monkeypatch)[0] == 0


def test_off_means_off_and_nothing_is_resampled_after_the_last_step() -> None:
    (none, without), (late, at_the_end) = back(None), back(SETTINGS.tokens)
    assert none == late == 0 and torch.equal(without, at_the_end)


def test_processes_that_share_a_training_resample_what_one_process_does() -> None:
    settings = dataclasses.replace(test_ranks.METHODS["token choice"], aux=NO_AUX)
    training = dataclasses.replace(test_ranks.TRAINING, resample=4 * test_ranks.BATCH)

    def weights(ranks: Ranks, training: TrainingSettings) -> dict[str, torch.Tensor]:
        made = test_ranks.trainer_for(settings, ranks, training)
        for batch in test_ranks.batches():
            made.step(batch)
        return test_ranks.all_weights(made)

    expected = weights(ALONE, training)
    assert not torch.allclose(expected["W_dec"], weights(ALONE, test_ranks.TRAINING)["W_dec"], atol=0.1)
    for data, features in test_ranks.LAYOUTS:
        for found in run_threads(lambda ranks: weights(ranks, training), data=data, features=features):
            test_ranks.assert_equal(found, expected, f"{data} x {features}")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingError, match="resample: 0 is not a positive number"):
        TrainingSettings(resample=0)
    frozen = SaeSettings(40, 3, freeze="decoder")
    with pytest.raises(SaelabError, match=r"set sae\.freeze=none"):
        Trainer(bare_autoencoder(frozen, D), dataclasses.replace(SETTINGS, resample=100), frozen)
