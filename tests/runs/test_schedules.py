"""A run with averaged weights and copies in bfloat16, and what settings at their defaults leave as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab.runs import job as jobs
from saelab.runs.job import Job, settings_of
from tests.runs.test_stages import small

CHANGED = {
    "sae.k_start": 9,
    "sae.k_steps": 0.3,
    "training.schedule": "cosine",
    "training.accumulate": 2,
    "training.precision": "bfloat16",
    "training.ema": 0.9,
}


def test_the_checkpoint_and_its_thresholds_are_those_of_the_averaged_weights(tmp_path: Path) -> None:
    options = [f"{name}={value}" for name, value in CHANGED.items()]
    run = saelab.train(small(tmp_path), [*options, "sae.allocation=mutual_choice"])
    (*_, last) = sorted(run.glob("state/*/state.safetensors"))
    state, sae = load_file(last), saelab.load(run)
    average, weights = state["trainer/ema/W_dec"], state["trainer/sae/W_dec"]
    unit = average / torch.linalg.vector_norm(average, dim=1, keepdim=True)
    torch.testing.assert_close(sae.W_dec.detach(), unit)
    torch.testing.assert_close(sae.W_enc.detach(), state["trainer/ema/W_enc"])
    assert not torch.allclose(sae.W_dec, weights, atol=1e-4)
    assert saelab.evaluate(run).l0 == pytest.approx(4, rel=0.1)


def test_settings_at_their_defaults_do_not_count_for_the_inputs_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So runs of versions without these settings keep their hashes."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(jobs, "_hash", lambda parts: seen.append(parts) or str(len(seen)))
    config = small(tmp_path)
    Job(settings_of(config)).training_inputs()
    for name, value in CHANGED.items():
        Job(settings_of(config, [f"{name}={value}"])).training_inputs()
        section, _, last = name.partition(".")
        assert last not in seen[0][section] and seen[-1][section] == seen[0][section] | {last: value}
    for section, last, value in (("sae", "prefixes", [16]), ("activations", "inputs", "centre")):
        Job(settings_of(config, [f"{section}.{last}={value}"])).training_inputs()
        assert last not in seen[0][section] and list(seen[-1][section][last]) == list(value)
    assert not {"p", "slope"} & set(seen[0]["sae"]["sparsity"])
    Job(settings_of(config, ["sae.sparsity={name: none, p: 0.25}"])).training_inputs()
    assert seen[-1]["sae"]["sparsity"] == seen[0]["sae"]["sparsity"] | {"p": 0.25}
