"""What a step, the initialisation and calibration are said to need bounds the tensors that are alive in them."""

import math

import pytest
import torch

from saelab.memory import peak_bytes
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.allocation.rules import FeatureChoice, TokenChoice
from saelab.sae.initial import initialise
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.needs import calibration_bytes, initialisation_bytes, step_needs
from saelab.sae.new import new_autoencoder
from saelab.sae.settings import (
    AffinitySettings,
    AllocationSettings,
    AuxSettings,
    EncoderSettings,
    SaeSettings,
    SparsitySettings,
)
from saelab.sae.thresholds import CALIBRATION_TOKENS, calibrate

D_IN = 32
THRESHOLD = AllocationSettings("threshold")
RELU = SaeSettings(512, 8, allocation=THRESHOLD, sparsity=SparsitySettings("l1"))
JUMPRELU = SaeSettings(
    512, 8, allocation=THRESHOLD, encoder=EncoderSettings("jumprelu"), sparsity=SparsitySettings("l0")
)


def step(settings: SaeSettings, batch: int) -> dict[str, int]:
    return {need.what: need.bytes for need in step_needs(settings, D_IN, batch, "memory")}


@pytest.mark.parametrize("selection", ["float32", "bfloat16"])
@pytest.mark.parametrize("allocation", ["token_choice", "feature_choice"])
@pytest.mark.parametrize("affinity", ["activation", "gradient"])
def test_pre_activations_are_the_scratch_memory_of_a_step(selection: str, allocation: str, affinity: str) -> None:
    n_features, batch = 6144, 4096  # several tiles
    settings = SaeSettings(
        n_features,
        1,
        selection=selection,
        allocation=AllocationSettings(allocation),
        affinity=AffinitySettings(affinity),
    )
    found = step(settings, batch)
    sae = SparseAutoencoder(D_IN, n_features, 1)
    x = torch.randn(batch, D_IN)
    initialise(sae, x[:64])
    rule = TokenChoice(1)
    if allocation == "feature_choice":
        rule = FeatureChoice(torch.ones(n_features, dtype=torch.long), n_features)
    gradients = torch.randn_like(x) if affinity == "gradient" else None
    sae.beta = 1.0
    sae.training_pass(Batch(x, gradients=gradients), rule, bf16=selection == "bfloat16")
    assert found["pre-activations"] == sae._scratch.bytes
    if allocation == "token_choice":
        assert found["pre-activations"] < 4 * n_features * batch * (1 if affinity == "activation" else 2)


def test_the_largest_k_counts_while_k_falls() -> None:
    def entries(settings: SaeSettings) -> int:
        return step(settings, 256)["training step"]

    assert entries(SaeSettings(512, 8, k_start=32)) == entries(SaeSettings(512, 32)) > entries(SaeSettings(512, 8))


def test_without_a_budget_every_entry_counts_and_the_plan_says_so() -> None:
    needs = step_needs(RELU, D_IN, 256, "memory")
    (found,) = (need for need in needs if need.what == "training step")
    assert found.bytes > 50 * 256 * 512 and "there is no budget" in found.how
    (found,) = (need for need in step_needs(SaeSettings(512, 8), D_IN, 256, "memory") if need.what == "training step")
    assert found.bytes < 50 * 256 * 512 and "budget" not in found.how


@pytest.mark.parametrize(
    "settings",
    [
        RELU,
        JUMPRELU,
        SaeSettings(2048, 8),
        SaeSettings(512, 8, b_dec_init="geometric_median"),
        SaeSettings(512, 200, allocation=AllocationSettings("mutual_choice")),
    ],
    ids=["relu", "jumprelu", "topk", "median", "dense"],
)
def test_what_the_initialisation_needs_is_bounded(settings: SaeSettings) -> None:
    """By no more than three times what is there."""
    x = torch.randn(20_000, D_IN)
    made = peak_bytes(lambda: new_autoencoder(settings, x, seed=0))
    parameters = 4 * (2 * settings.n_features * D_IN + settings.n_features + D_IN)
    bound = initialisation_bytes(settings, D_IN, len(x), "memory")
    assert made - parameters <= bound <= 3 * made


@pytest.mark.parametrize("allocation", ["mutual_choice", "feature_choice"])
def test_what_calibration_needs_is_bounded(allocation: str) -> None:
    """By no more than twice the tensors alive at once."""
    n_features, k = 128, 16
    settings = SaeSettings(n_features, k, allocation=AllocationSettings(allocation))
    sae = SparseAutoencoder(D_IN, n_features, k)
    initialise(sae, torch.randn(256, D_IN))
    density = torch.tensor(k / n_features, dtype=torch.float64)
    densities = density if allocation == "mutual_choice" else density.expand(n_features)
    batches = (torch.randn(2000, D_IN) for _ in range(math.ceil(CALIBRATION_TOKENS / 2000)))
    held = peak_bytes(lambda: calibrate(sae.pre_activations, batches, densities, CALIBRATION_TOKENS))
    assert held <= calibration_bytes(settings, CALIBRATION_TOKENS, "memory") <= 2 * held


def test_what_needs_no_calibration_takes_none() -> None:
    assert calibration_bytes(RELU, CALIBRATION_TOKENS, "memory") == 0
    assert calibration_bytes(SaeSettings(512, 8, aux=AuxSettings("none")), CALIBRATION_TOKENS, "memory") == 0
    assert not allocation_of(RELU).calibrated
