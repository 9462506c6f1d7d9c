"""What each of several processes needs by the plan is what it has, and bounds what its steps take."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saelab.memory import peak_bytes
from saelab.ranks import Ranks, layout
from saelab.sae.model import Batch
from saelab.sae.new import Widths, bare_autoencoder
from saelab.sae.settings import AffinitySettings, AllocationSettings, AuxSettings, SaeSettings, SparsitySettings
from saelab.training.needs import STATE_TEXT, training_needs
from saelab.training.settings import CheckpointSettings, TrainingSettings
from saelab.training.state import TENSORS, save_state
from saelab.training.trainer import Trainer
from tests.threads import run_threads

D_IN, N, K, BATCH = 32, 513, 8, 1026
NONE = AuxSettings("none")
METHODS = {
    "topk": SaeSettings(N, K),
    "many candidates": SaeSettings(N, 60, aux=NONE),
    "mutual": SaeSettings(N, 40, allocation=AllocationSettings("mutual_choice"), aux=NONE, selection="bfloat16"),
    "feature": SaeSettings(N, 40, allocation=AllocationSettings("feature_choice", after=0.0, capacity="uniform")),
    "multi": SaeSettings(N, K, multi_topk=True, affinity=AffinitySettings("gradient"), freeze="decoder"),
    "relu": SaeSettings(N, K, allocation=AllocationSettings("threshold"), sparsity=SparsitySettings("l1"), aux=NONE),
}
TRAINING = TrainingSettings(6 * BATCH, BATCH, checkpoint=CheckpointSettings(keep=1))


def needs(settings: SaeSettings, data: int, features: int) -> dict[str, int]:
    """The needs of the process with the largest parts."""
    sizes = {"sample_tokens": 4096, "calibration_tokens": 10_000, "ranks": layout(data, features)}
    return {need.what: need.bytes for need in training_needs([(settings, Widths(D_IN))], TRAINING, "memory", **sizes)}


def trainer_of(settings: SaeSettings, ranks: Ranks) -> Trainer:
    sae = bare_autoencoder(settings, D_IN, ranks=ranks)
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(N, D_IN, generator=generator), dim=1)
    for table in (sae.W_enc, sae.W_dec):
        table.data.copy_(rows[sae.part])
    return Trainer(sae, TRAINING, settings)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.randn(BATCH, D_IN, generator=generator), gradients=torch.ones(BATCH, D_IN))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("data", "features"), [(2, 2), (1, 4), (4, 1)])
def test_memory_of_a_process(method: str, data: int, features: int) -> None:
    """Weights and moments to the byte, of the largest process; a step takes no more than it needs by the plan."""
    settings, found = METHODS[method], needs(METHODS[method], data, features)

    def run(ranks: Ranks) -> dict[str, int]:
        trainer = trainer_of(settings, ranks)
        trainer.usage.dead_after = 0  # the auxiliary loss targets all features
        now = batch()
        step = peak_bytes(lambda: trainer.step(now)) + 2 * now.x.nbytes  # with the activations that x was scaled from
        moments = trainer.optimiser.state_dict().values()
        parameters = list(trainer.sae.parameters())
        return {
            "autoencoder": sum(p.nbytes for p in parameters),
            "its gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimiser": sum(of[name].nbytes for of in moments for name in ("exp_avg", "exp_avg_sq")),
            "step": step,
        }

    processes = run_threads(run, data=data, features=features)
    for what in ("autoencoder", "its gradients", "optimiser"):
        assert found[what] == max(each[what] for each in processes)
    parts = ("pre-activations", "selection", "training step", "entries of all processes")
    bound = sum(found.get(what, 0) for what in parts)
    for each in processes:
        assert bound / 3 <= each["step"] - each["optimiser"] <= bound


def test_the_files_are_those_of_one_process_and_the_first_process_has_the_whole_autoencoder(tmp_path: Path) -> None:
    settings = METHODS["topk"]
    found, alone = needs(settings, 1, 3), needs(settings, 1, 1)
    assert found["states"] == alone["states"]
    assert found["checkpoint"] == alone["checkpoint"]
    assert "whole autoencoder" not in alone

    def save(ranks: Ranks) -> None:
        trainer = trainer_of(settings, ranks)
        trainer.step(batch())
        save_state(tmp_path, {"trainer": trainer.state_dict(), "rng": torch.get_rng_state()}, ranks)

    run_threads(save, features=3)
    tensors = sum(tensor.nbytes for tensor in load_file(tmp_path / TENSORS).values())
    assert found["states"] == 2 * (tensors + STATE_TEXT)
