"""Processes that share a training, as threads: whatever the layout, they train what one process trains."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from saelab.ranks import ALONE, Ranks
from saelab.sae.model import BY_FEATURE, Batch, SparseAutoencoder, bare_autoencoder
from saelab.sae.settings import (
    AffinitySettings,
    AllocationSettings,
    AuxSettings,
    EncoderSettings,
    SaeSettings,
    SparsitySettings,
)
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer
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
}
LAYOUTS = [(3, 1), (1, 3), (2, 2)]
"""Processes along the axes of tokens and of features; 3 divides neither number."""


class Trained(NamedTuple):
    weights: dict[str, Tensor]
    metrics: list[dict[str, Any]]
    densities: Tensor
    silent_for: Tensor


def batches(dtype: torch.dtype) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(40, D, generator=generator), dim=1)
    found = []
    for _ in range(STEPS):
        strength = torch.rand(BATCH, 40, generator=generator).pow(8)
        x, g = 3 * strength @ directions, torch.randn(BATCH, D, generator=generator)
        found.append(Batch(x.to(dtype), gradients=g.to(dtype)))
    return found


def first_weights(settings: SaeSettings) -> dict[str, Tensor]:
    """The same for every layout: threads share torch's random numbers."""
    generator = torch.Generator().manual_seed(5)
    W_dec = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=generator), dim=1)
    b_enc = torch.where(torch.arange(FEATURES) % 5 == 0, -3.0, 0.0)  # some are dead, in every part
    weights = {"W_dec": W_dec, "W_enc": 0.8 * W_dec, "b_enc": b_enc, "b_dec": torch.randn(D, generator=generator) / 4}
    return weights | ({"log_threshold": torch.full((FEATURES,), -0.5)} if settings.encoder.name == "jumprelu" else {})


def train(settings: SaeSettings, ranks: Ranks, dtype: torch.dtype) -> tuple[Trained, SparseAutoencoder]:
    sae = bare_autoencoder(settings, D, ranks=ranks).to(dtype)
    for name, value in first_weights(settings).items():
        getattr(sae, name).data.copy_(value[sae.part] if name in BY_FEATURE else value)
    trainer = Trainer(sae, TRAINING, settings)
    metrics = [trainer.step(batch) for batch in batches(dtype)]
    weights = {
        name: torch.cat(ranks.features.gather(value.data)) if name in BY_FEATURE else value.data
        for name, value in sae.named_parameters()
    }
    usage = trainer.usage
    return Trained(weights, [m for m in metrics if m is not None], usage.densities, usage.silent_for), sae


@pytest.mark.parametrize("method", METHODS)
def test_every_layout_trains_what_one_process_trains(method: str) -> None:
    """In float64, so that nothing but the order of sums differs."""
    settings = METHODS[method]
    expected, _ = train(settings, ALONE, torch.float64)
    assert len(expected.metrics) == STEPS and expected.metrics[-1]["fvu"] < expected.metrics[0]["fvu"]
    assert settings.aux.name == "none" or any(metrics.get("share_reached") for metrics in expected.metrics)
    for data, features in LAYOUTS:
        for found, _ in run_threads(lambda ranks: train(settings, ranks, torch.float64), data=data, features=features):
            for name, value in expected.weights.items():
                torch.testing.assert_close(found.weights[name], value, rtol=1e-8, atol=1e-10, msg=f"{data}x{features} {name}")
            torch.testing.assert_close(found.densities, expected.densities)
            assert torch.equal(found.silent_for, expected.silent_for)
            for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-8)
