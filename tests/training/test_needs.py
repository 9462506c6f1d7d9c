"""What training needs by its statement is what its steps leave, bounds what a step takes, and is what a state takes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saelab.memory import peak_bytes
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.checkpoint import load, save_sae
from saelab.sae.init_from import start_from
from saelab.sae.input_map import input_map
from saelab.sae.layout import WEIGHTS
from saelab.sae.model import Batch
from saelab.sae.new import Widths, new_autoencoder
from saelab.sae.settings import (
    AffinitySettings,
    AllocationSettings,
    AuxSettings,
    EncoderSettings,
    SaeSettings,
    SparsitySettings,
)
from saelab.training import usage
from saelab.training.needs import STATE_TEXT, training_needs
from saelab.training.settings import CheckpointSettings, TrainingSettings
from saelab.training.state import TENSORS, VALUES, save_state
from saelab.training.trainer import Trainer

D_IN, N, K, BATCH, STEPS, KEEP = 32, 512, 8, 512, 6, 3
THRESHOLD = AllocationSettings("threshold")
RELU = SaeSettings(N, K, allocation=THRESHOLD, sparsity=SparsitySettings("l1"))
JUMPRELU = SaeSettings(
    N, K, allocation=THRESHOLD, encoder=EncoderSettings("jumprelu"), sparsity=SparsitySettings("l0"), freeze="encoder"
)
METHODS = {
    "topk": SaeSettings(N, K),
    "mutual": SaeSettings(
        N, K, allocation=AllocationSettings("mutual_choice"), aux=AuxSettings("aux_zipf"), selection="bfloat16"
    ),
    "feature": SaeSettings(N, K, allocation=AllocationSettings("feature_choice", refresh=2), multi_topk=True),
    "gradient": SaeSettings(N, K, affinity=AffinitySettings("gradient"), freeze="decoder"),
    "relu": RELU,
    "jumprelu": JUMPRELU,
    "gated": SaeSettings(N, K, EncoderSettings("gated"), allocation=THRESHOLD, sparsity=SparsitySettings("l1")),
    "tied": SaeSettings(N, K, EncoderSettings("tied"), allocation=AllocationSettings("group_max")),
    "prefixes": SaeSettings(N, 64, prefixes=(0.1, 0.25, 0.5), aux=AuxSettings("aux_zipf")),
}
PLAIN = TrainingSettings(STEPS * BATCH, BATCH, checkpoint=CheckpointSettings(keep=KEEP))
SCHEDULED = dataclasses.replace(PLAIN, accumulate=4, precision="bfloat16", ema=0.9)
EVERY_TRAINING = pytest.mark.parametrize("training", [PLAIN, SCHEDULED], ids=["plain", "scheduled"])
EVERY_METHOD = pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)


def needs(settings: SaeSettings, training: TrainingSettings = PLAIN, resumed: bool = False) -> dict[str, int]:
    found = training_needs(
        [(settings, Widths(D_IN))], training, "memory", sample_tokens=4096, calibration_tokens=10_000, resumed=resumed
    )
    return {need.what: need.bytes for need in found}


def new_trainer(settings: SaeSettings, training: TrainingSettings = PLAIN) -> Trainer:
    sae = new_autoencoder(settings, torch.randn(4096, D_IN), seed=0)
    return Trainer(sae, training, settings)


def random_batch() -> Batch:
    return Batch(torch.randn(BATCH, D_IN), gradients=torch.randn(BATCH, D_IN))


OF_A_STEP = ("tables in bfloat16", "table, cast back", "pre-activations", "selection", "training step")


@pytest.fixture
def quick_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are ranked for aux_zipf after two steps."""
    monkeypatch.setattr(usage, "REFRESH", 2)


@EVERY_METHOD
@EVERY_TRAINING
def test_weights_gradients_and_moments_are_what_a_step_leaves(
    settings: SaeSettings, training: TrainingSettings
) -> None:
    trainer, found = new_trainer(settings, training), needs(settings, training)
    trainer.step(random_batch())
    parameters = list(trainer.sae.parameters())
    assert found["autoencoder"] == sum(p.nbytes for p in parameters)
    assert found["its gradients"] == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = trainer.optimiser.state_dict().values()
    assert found["optimiser"] == sum(of[name].nbytes for of in moments for name in ("exp_avg", "exp_avg_sq"))
    assert (found["its gradients"] < found["autoencoder"]) == (settings.freeze != "none")
    average = trainer.state_dict().get("ema", {})
    assert found.get("averaged weights", 0) == sum(weights.nbytes for weights in average.values())
    buffers = found["pre-activations"] + found.get("tables in bfloat16", 0)
    assert buffers == trainer.sae._scratch.bytes


@EVERY_METHOD
@EVERY_TRAINING
@pytest.mark.usefixtures("quick_ranks")
def test_a_state_on_the_disk_is_what_save_state_writes(
    settings: SaeSettings, training: TrainingSettings, tmp_path: Path
) -> None:
    """One state more than is kept; tensors to the byte, and the rest within its limit."""
    trainer = new_trainer(settings, training)
    for _ in range(STEPS):
        trainer.step(random_batch())
    save_state(tmp_path, {"trainer": trainer.state_dict(), "rng": torch.get_rng_state()})
    tensors = sum(tensor.nbytes for tensor in load_file(tmp_path / TENSORS).values())
    state = needs(settings, training)["states"] / (KEEP + 1)
    assert state == tensors + STATE_TEXT
    assert (tmp_path / TENSORS).stat().st_size + (tmp_path / VALUES).stat().st_size < tensors + STATE_TEXT / 4
    statistics = [*trainer.usage.state_dict().values(), *trainer.allocation.state_dict().values()]
    held = sum(each.nbytes for each in statistics if isinstance(each, torch.Tensor))
    assert needs(settings)["statistics of features"] == held


@pytest.mark.parametrize(
    ("settings", "all_active"),
    [*((settings, False) for settings in METHODS.values()), (RELU, True), (JUMPRELU, True)],
    ids=[*METHODS, "relu, all active", "jumprelu, all active"],
)
@EVERY_TRAINING
def test_the_tensors_of_the_first_step_are_bounded(
    settings: SaeSettings, all_active: bool, training: TrainingSettings
) -> None:
    """Without a budget, even if every feature is active on every token; for a ReLU's start within a factor of 3."""
    trainer, found = new_trainer(settings, training), needs(settings, training)
    if all_active:
        with torch.no_grad():
            trainer.sae.b_enc += 1e3
    batch = random_batch()
    held = (
        peak_bytes(lambda: trainer.step(batch)) + 2 * batch.x.nbytes
    )  # with x, and the activations it was scaled from
    bound = sum(found.get(what, 0) for what in OF_A_STEP)
    assert held - found["optimiser"] <= bound
    if settings is RELU or (settings is JUMPRELU and all_active):
        assert bound <= 3 * held


@EVERY_METHOD
@EVERY_TRAINING
def test_after_the_last_step_only_weights_and_buffers_are_left(
    settings: SaeSettings, training: TrainingSettings
) -> None:
    """What calibration may use is free then."""
    trainer = new_trainer(settings, training)
    trainer.step(random_batch())
    trainer.release()
    assert all(parameter.grad is None for parameter in trainer.sae.parameters())
    assert not any(trainer.optimiser.state_dict().values()) and not trainer.state_dict().get("ema")


@EVERY_METHOD
def test_the_checkpoint_is_what_save_sae_writes(settings: SaeSettings, tmp_path: Path) -> None:
    sae = new_trainer(settings).sae
    sae.b_enc.data -= 1  # no threshold of a gate is 0
    if allocation_of(settings).calibrated:
        sae.threshold = torch.ones(N)
    save_sae(sae, tmp_path)
    assert needs(settings)["checkpoint"] == sum(each.nbytes for each in load_file(tmp_path / WEIGHTS).values())


def test_a_resumed_training_reads_a_state_and_initialises_nothing() -> None:
    fresh, resumed = needs(RELU), needs(RELU, resumed=True)
    assert "state, while it is read" not in fresh and "initialisation" not in resumed
    assert resumed["state, while it is read"] == fresh["autoencoder"]


@pytest.mark.parametrize("inputs", ["scale", "whiten"])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_a_checkpoint_to_start_from_is_counted(inputs: str, unit_norm: bool, tmp_path: Path) -> None:
    found = new_autoencoder(RELU, torch.randn(4096, D_IN), seed=0)
    found.W_dec.data.mul_(2)
    save_sae(found, tmp_path)
    settings = dataclasses.replace(RELU, init_from=str(tmp_path), unit_norm=unit_norm)
    x = torch.randn(4096, D_IN)
    read = input_map(inputs, x)
    sample = read(x)
    counted = needs(settings)
    made = peak_bytes(lambda: start_from(load(tmp_path), settings, sample, read))
    assert "checkpoint to start from" not in needs(RELU) | needs(settings, resumed=True)
    assert (
        0.4 * counted["checkpoint to start from"] < made < counted["checkpoint to start from"] + counted["autoencoder"]
    )
