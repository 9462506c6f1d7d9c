"""Training on planted data: the error falls, dead features revive, the same seed gives the same weights."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saelab.errors import SaelabError, SettingError
from saelab.sae.initial import initialise
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.settings import AffinitySettings, AllocationSettings, AuxSettings, SaeSettings
from saelab.training.optim import remove_parallel_gradient
from saelab.training.settings import MAX_DEAD_AFTER, TrainingSettings
from saelab.training.trainer import learning_rate, train

D, TRUE = 16, 40


def planted(batches: int, batch: int, seed: int = 0) -> Iterator[Batch]:
    """Sums of 3 of 40 fixed directions with positive strengths, and a little noise."""
    generator = torch.Generator().manual_seed(123)
    directions = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=generator), dim=1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        chosen = torch.rand(batch, TRUE, generator=generator).topk(3).indices
        strength = torch.rand(batch, 3, 1, generator=generator) + 0.5
        yield Batch((directions[chosen] * strength).sum(1) + 0.01 * torch.randn(batch, D, generator=generator))


def sample() -> Tensor:
    return next(planted(1, 1000)).x


def run(settings: TrainingSettings, sae_settings: SaeSettings, seed: int = 0) -> tuple[SparseAutoencoder, list[dict]]:
    torch.manual_seed(seed)
    sae = SparseAutoencoder(D, sae_settings.n_features, sae_settings.k)
    initialise(sae, sample())
    metrics: list[dict] = []
    train(sae, planted(settings.steps, settings.batch, seed), settings, sae_settings, log=metrics.append)
    return sae, metrics


SETTINGS = TrainingSettings(tokens=150 * 256, batch=256, lr=3e-3)


def test_the_error_falls_and_decoder_rows_stay_of_unit_length() -> None:
    sae, metrics = run(SETTINGS, SaeSettings(n_features=64, k=3))
    assert metrics[-1]["fvu"] < 0.6 * metrics[0]["fvu"]
    assert metrics[-1]["tokens"] == SETTINGS.tokens and metrics[-1]["step"] == SETTINGS.steps - 1
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    short = dataclasses.replace(SETTINGS, tokens=20 * 256)
    settings = SaeSettings(n_features=64, k=3)
    one, two, other = (run(short, settings, seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.W_dec, other.W_dec)


@pytest.mark.parametrize("seed", [0, 1])
def test_aux_k_revives_features_without_other_gradients(seed: int) -> None:
    """Features that start too weak to be selected get no gradient from the reconstruction; aux_k gives them one."""
    left = {}
    for aux in ("none", "aux_k"):
        torch.manual_seed(seed)
        sae = SparseAutoencoder(D, 64, 3)
        initialise(sae, sample())
        sae.W_enc.data[20:] *= 0.01
        metrics: list[dict] = []
        train(
            sae,
            planted(SETTINGS.steps, 256, seed),
            SETTINGS,
            SaeSettings(64, 3, aux=AuxSettings(aux)),
            log=metrics.append,
        )
        left[aux] = metrics[-1]["dead"]
    assert left["none"] == 44
    assert left["aux_k"] < 22


def test_lifting_lets_aux_k_reach_features_whose_pre_activations_are_all_negative() -> None:
    reached = {}
    for lift in (False, True):
        torch.manual_seed(0)
        sae = SparseAutoencoder(D, 64, 3)
        initialise(sae, sample())
        sae.b_enc.data[40:] = -50
        metrics: list[dict] = []
        settings = SaeSettings(64, 3, aux=AuxSettings("aux_k", lift=lift))
        train(sae, planted(SETTINGS.steps, 256), SETTINGS, settings, log=metrics.append)
        reached[lift] = metrics[-1]["dead"]
    assert reached[False] >= 24 > reached[True]


@pytest.mark.parametrize("affinity", ["activation", "gradient"])
@pytest.mark.parametrize("allocation", ["token_choice", "mutual_choice", "feature_choice"])
@pytest.mark.parametrize("aux", ["none", "aux_k", "aux_zipf"])
@pytest.mark.parametrize("selection", ["float32", "bfloat16"])
def test_every_affinity_allocation_and_auxiliary_loss_trains(
    affinity: str, allocation: str, aux: str, selection: str
) -> None:
    torch.manual_seed(0)
    settings = SaeSettings(
        64,
        3,
        affinity=AffinitySettings(affinity),
        allocation=AllocationSettings(allocation, refresh=20),
        aux=AuxSettings(aux),
        selection=selection,
        multi_topk=aux == "none",
    )
    sae = SparseAutoencoder(D, 64, 3)
    initialise(sae, sample())
    readout = torch.randn(D)  # the gradient of a fixed readout's square
    metrics: list[dict] = []
    batches = (Batch(x, gradients=(x @ readout)[:, None] * readout) for x, *_ in planted(SETTINGS.steps, 256))
    trained = train(sae, batches, SETTINGS, settings, log=metrics.append)
    assert metrics[-1]["fvu"] < 0.7 * metrics[0]["fvu"]
    assert metrics[-1]["l0"] == pytest.approx(3, rel=0.1)
    assert (trained.densities is None) == (allocation == "token_choice")
    assert all(p.grad is None for p in sae.parameters())


def test_beta_zero_is_topk_to_the_bit() -> None:
    short = dataclasses.replace(SETTINGS, tokens=20 * 256)
    plain, _ = run(short, SaeSettings(64, 3))
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, 64, 3)
    initialise(sae, sample())
    batches = (Batch(x, gradients=torch.randn_like(x)) for x, *_ in planted(20, 256))
    train(sae, batches, short, SaeSettings(64, 3, affinity=AffinitySettings("gradient", 0.0)))
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), plain.parameters(), strict=True))


def test_the_gradient_affinity_without_gradients_is_an_error() -> None:
    sae = SparseAutoencoder(D, 64, 3)
    with pytest.raises(SaelabError, match="needs batches with gradients"):
        train(sae, planted(2, 256), SETTINGS, SaeSettings(64, 3, affinity=AffinitySettings("gradient")))


def test_a_request_to_stop_ends_training_after_the_current_step() -> None:
    sae = SparseAutoencoder(D, 32, 3)
    initialise(sae, sample())
    calls = iter([False, False, True])
    settings = TrainingSettings(tokens=50 * 64, batch=64)
    trained = train(sae, planted(50, 64), settings, SaeSettings(32, 3), should_stop=lambda: next(calls))
    assert trained.tokens == 3 * 64


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    sae = SparseAutoencoder(D, 32, 3)
    initialise(sae, sample())
    with pytest.raises(SaelabError, match="not finite at step 0"):
        train(sae, iter([Batch(torch.ones(64, D))]), TrainingSettings(tokens=64, batch=64), SaeSettings(32, 3))
    assert all(torch.isfinite(p).all() for p in sae.parameters())


def test_the_rate_rises_stays_and_falls() -> None:
    settings = TrainingSettings(tokens=100 * 10, batch=10, lr=1.0, warmup=0.1, decay=0.5)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == 1.0
    assert rates[99] == pytest.approx(1 / 50) and rates[50:] == sorted(rates[50:], reverse=True)
    assert learning_rate(0, dataclasses.replace(settings, warmup=0.0, decay=0.0)) == 1.0


def test_only_the_parallel_part_of_the_gradient_is_removed() -> None:
    sae = SparseAutoencoder(D, 8, 2)
    initialise(sae, torch.randn(100, D))
    gradient = torch.randn(8, D)
    sae.W_dec.grad = gradient.clone()
    remove_parallel_gradient(sae)
    left = sae.W_dec.grad
    torch.testing.assert_close((left * sae.W_dec).sum(1), torch.zeros(8), atol=1e-6, rtol=0)
    taken = gradient - left
    torch.testing.assert_close(taken, (taken * sae.W_dec).sum(1, keepdim=True) * sae.W_dec, atol=1e-6, rtol=0)


def test_dead_means_a_tenth_of_the_run_and_at_most_ten_million_tokens() -> None:
    assert TrainingSettings(tokens=1_000_000).dead_after == 100_000
    assert TrainingSettings(tokens=10**9).dead_after == MAX_DEAD_AFTER


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tokens": 0}, "tokens: 0"),
        ({"lr": -1}, "lr: -1"),
        ({"warmup": 2}, "warmup: 2"),
        ({"tokens": 10, "batch": 20}, "batch: 20"),
    ],
)
def test_impossible_settings_name_their_field(setting: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TrainingSettings(**setting)
