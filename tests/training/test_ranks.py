"""Processes that share a training, as threads: whatever the layout, they train what one process trains."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from saelab.ranks import ALONE, Ranks
from saelab.sae.model import BY_FEATURE, Batch, SparseAutoencoder
from saelab.sae.new import bare_autoencoder, new_autoencoder
from saelab.sae.settings import (
    AffinitySettings,
    AllocationSettings,
    AuxSettings,
    EncoderSettings,
    SaeSettings,
    SparsitySettings,
)
from saelab.training import usage
from saelab.training.settings import TrainingSettings
from saelab.training.state import load_state, save_state
from saelab.training.trainer import Trainer
from saelab.training.usage import Usage
from tests.threads import run_threads

D, FEATURES, BATCH, STEPS = 12, 50, 37, 16
# nothing is clipped: Adam takes the factor in float32 only
TRAINING = TrainingSettings(tokens=STEPS * BATCH, batch=BATCH, lr=3e-3, log_every=1, clip=1e6)
METHODS = {
    "token choice": SaeSettings(FEATURES, 4),
    "more than a process has": SaeSettings(FEATURES, 30),
    "mutual choice": SaeSettings(FEATURES, 4, allocation=AllocationSettings("mutual_choice")),
    "feature choice": SaeSettings(FEATURES, 4, allocation=AllocationSettings("feature_choice", after=0.3, refresh=3)),
    "multi_topk": SaeSettings(FEATURES, 3, multi_topk=True),
    "bfloat16": SaeSettings(FEATURES, 4, allocation=AllocationSettings("mutual_choice"), selection="bfloat16"),
    "gradient": SaeSettings(FEATURES, 4, affinity=AffinitySettings("gradient", beta=1.0)),
    "lift": SaeSettings(FEATURES, 4, aux=AuxSettings("aux_zipf", features=7, lift=True)),
    "under-used": SaeSettings(FEATURES, 4, aux=AuxSettings("aux_zipf", features=7)),
    "relu": SaeSettings(
        FEATURES, 4, allocation=AllocationSettings("threshold"), sparsity=SparsitySettings("l1", coefficient=0.01)
    ),
    "jumprelu": SaeSettings(
        FEATURES,
        4,
        encoder=EncoderSettings("jumprelu"),
        allocation=AllocationSettings("threshold"),
        sparsity=SparsitySettings("l0", target_l0=5.0),
    ),
    "frozen decoder": SaeSettings(FEATURES, 4, freeze="decoder"),
    "gated": SaeSettings(
        FEATURES,
        4,
        encoder=EncoderSettings("gated"),
        allocation=AllocationSettings("threshold"),
        sparsity=SparsitySettings("tanh", coefficient=0.01),
    ),
    "lp": SaeSettings(FEATURES, 4, allocation=AllocationSettings("threshold"), sparsity=SparsitySettings("lp", 0.01)),
    "tied": SaeSettings(FEATURES, 4, encoder=EncoderSettings("tied")),
    "aligned": SaeSettings(FEATURES, 4, encoder=EncoderSettings("aligned")),
    "group max": SaeSettings(FEATURES, 5, allocation=AllocationSettings("group_max")),
    "group max, bfloat16": SaeSettings(
        FEATURES, 2, allocation=AllocationSettings("group_max"), selection="bfloat16", prefixes=(0.1,)
    ),
    "prefixes": SaeSettings(
        FEATURES,
        4,
        allocation=AllocationSettings("mutual_choice"),
        aux=AuxSettings("aux_zipf", features=7),
        prefixes=(0.1, 0.5),
    ),
}
LAYOUTS = [(3, 1), (1, 3), (2, 2)]
"""Processes along the axes of tokens and of features; 3 divides neither number."""


class Trained(NamedTuple):
    weights: dict[str, Tensor]
    metrics: list[dict[str, Any]]
    usage: Usage


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(40, D, generator=generator), dim=1)
    found = []
    for _ in range(STEPS):
        strength = torch.rand(BATCH, 40, generator=generator).pow(8)
        x, g = 3 * strength @ directions, torch.randn(BATCH, D, generator=generator)
        found.append(Batch(x.double(), gradients=g.double()))
    return found


def first_weights(settings: SaeSettings) -> dict[str, Tensor]:
    """The same for every layout: threads share torch's random numbers."""
    generator = torch.Generator().manual_seed(5)
    W_dec = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=generator), dim=1)
    b_enc = torch.where(torch.arange(FEATURES) % 5 == 0, -3.0, 0.0)  # some are dead, in every part
    weights = {"W_dec": W_dec, "W_enc": 0.8 * W_dec, "b_enc": b_enc, "b_dec": torch.randn(D, generator=generator) / 4}
    magnitudes = {"r_mag": torch.linspace(-0.2, 0.2, FEATURES), "b_mag": torch.linspace(0.3, -0.3, FEATURES)}
    added = {
        "jumprelu": {"log_threshold": torch.full((FEATURES,), -0.5)},
        "gated": magnitudes,
        "tied": {"W_enc": W_dec},
        "aligned": {"W_enc": W_dec},
    }
    return weights | added.get(settings.encoder.name, {})


def trainer_for(settings: SaeSettings, ranks: Ranks, training: TrainingSettings = TRAINING) -> Trainer:
    sae = bare_autoencoder(settings, D, ranks=ranks).double()
    for name, value in first_weights(settings).items():
        getattr(sae, name).data.copy_(value[sae.part] if name in BY_FEATURE else value)
    return Trainer(sae, training, settings)


def train(settings: SaeSettings, ranks: Ranks) -> Trained:
    trainer = trainer_for(settings, ranks)
    metrics = [trainer.step(batch) for batch in batches()]
    return Trained(all_weights(trainer), [m for m in metrics if m is not None], trainer.usage)


def all_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The weights of all processes."""
    axis = trainer.sae.ranks.features
    return {
        name: torch.cat(axis.gather(value.data)) if name in BY_FEATURE else value.data
        for name, value in trainer.sae.named_parameters()
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=f"{where}: {name}")


@pytest.fixture(autouse=True)
def ranked_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """aux_zipf ranks the features after 4 steps, so that it also targets living ones."""
    monkeypatch.setattr(usage, "REFRESH", 4)


@pytest.mark.parametrize("method", METHODS)
def test_every_layout_trains_what_one_process_trains(method: str) -> None:
    """In float64, so that nothing but the order of sums differs."""
    settings = METHODS[method]
    expected = train(settings, ALONE)
    assert len(expected.metrics) == STEPS and expected.metrics[-1]["fvu"] < expected.metrics[0]["fvu"]
    assert settings.aux.name == "none" or any(metrics.get("share_reached") for metrics in expected.metrics)
    if method == "under-used":
        assert any(metrics.get("targets", 0) > metrics["dead"] for metrics in expected.metrics)
    for data, features in LAYOUTS:
        for found in run_threads(lambda ranks: train(settings, ranks), data=data, features=features):
            assert_equal(found.weights, expected.weights, f"{data} x {features}")
            torch.testing.assert_close(found.usage.densities, expected.usage.densities)
            assert torch.equal(found.usage.silent_for, expected.usage.silent_for)
            for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("method", ["token choice", "mutual choice", "feature choice", "group max", "relu", "jumprelu"])
def test_every_layout_begins_with_the_weights_of_one_process(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(5))  # threads share torch's random numbers
    monkeypatch.setattr("saelab.sae.initial._draw", lambda sae, table: table.copy_(rows[sae.part]))
    sample = torch.cat([batch.x for batch in batches()]).float()

    def begun(ranks: Ranks) -> dict[str, Tensor]:
        return all_weights(
            Trainer(new_autoencoder(METHODS[method], sample, seed=0, ranks=ranks), TRAINING, METHODS[method])
        )

    expected = begun(ALONE)
    for data, features in LAYOUTS:
        for found in run_threads(begun, data=data, features=features):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{data} x {features}: {name}")


@pytest.mark.parametrize("method", ["token choice", "feature choice", "jumprelu"])
def test_parts_of_a_batch_copies_and_averages_are_those_of_one_process(method: str) -> None:
    settings = METHODS[method]
    if settings.allocation.name != "threshold":
        settings = dataclasses.replace(settings, k_start=9, k_steps=0.6)
    training = dataclasses.replace(TRAINING, batch=36, accumulate=3, precision="bfloat16", ema=0.8)

    def averaged(ranks: Ranks) -> tuple[list[float], dict[str, Tensor]]:
        trainer = trainer_for(settings, ranks, training)
        metrics = [trainer.step(batch.part(slice(36))) for batch in batches()]
        trainer.release()
        return [line["fvu"] for line in metrics if line is not None], all_weights(trainer)

    errors, expected = averaged(ALONE)
    for data, features in LAYOUTS:
        for found, weights in run_threads(averaged, data=data, features=features):
            assert found == pytest.approx(errors, rel=1e-8) and len(found) == STEPS
            assert_equal(weights, expected, f"{data} x {features}")


@pytest.mark.parametrize("method", ["mutual choice", "feature choice", "group max", "lift", "jumprelu"])
def test_a_process_may_have_no_token_of_a_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `activations.max_norm`, few may be left."""
    monkeypatch.setattr("tests.training.test_ranks.BATCH", 2)
    expected = train(METHODS[method], ALONE).weights
    for found in run_threads(lambda ranks: train(METHODS[method], ranks), data=3):
        assert_equal(found.weights, expected, "3 x 1")


@pytest.mark.parametrize("method", ["feature choice", "lift", "jumprelu"])
def test_a_training_goes_on_in_another_layout(method: str, tmp_path: Path) -> None:
    settings, half = METHODS[method], STEPS // 2

    def begin(ranks: Ranks) -> None:
        trainer = trainer_for(settings, ranks)
        for batch in batches()[:half]:
            trainer.step(batch)
        save_state(tmp_path, trainer.state_dict(), ranks)

    def go_on(ranks: Ranks) -> tuple[dict[str, Tensor], SparseAutoencoder | None]:
        trainer = trainer_for(settings, ranks)
        trainer.load_state_dict(load_state(tmp_path, own=trainer.own_rows))
        for batch in batches()[half:]:
            trainer.step(batch)
        weights = all_weights(trainer)
        trainer.release()
        return weights, trainer.sae.whole()

    expected = train(settings, ALONE).weights
    run_threads(begin, data=2, features=2)
    (_, whole), *others = found = run_threads(go_on, features=3)
    for weights, _ in found:
        assert_equal(weights, expected, "1 x 3")
    assert whole is not None and all(other is None for _, other in others)
    assert_equal({name: value.data for name, value in whole.named_parameters()}, expected, "the whole")
    assert whole.encode(batches()[0].x).n_features == FEATURES
