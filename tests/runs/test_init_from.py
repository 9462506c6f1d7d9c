"""Trainings that start with a checkpoint: from its weights, the same when resumed, with its content in their inputs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab.errors import SaelabError
from saelab.runs import folder, stages
from saelab.runs.job import Job, settings_of
from tests.runs.test_stages import small
from tests.sae.interop.peers import distance, numbers, saelens, weights


def config(where: Path, checkpoint: Path | None, **sae: Any) -> dict[str, Any]:
    """A training of a few steps."""
    found = small(where)
    sae = {"n_features": 40, "k": 4, "unit_norm": False, "init_from": checkpoint and str(checkpoint)} | sae
    return found | {"sae": sae, "training": {"tokens": 1000, "batch": 200, "lr": 1e-3}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saelens(tmp_path / "theirs", weights(32), architecture="topk", k=4)


def test_training_starts_with_the_weights(tmp_path: Path, checkpoint: Path) -> None:
    found = saelab.load(checkpoint)
    run = saelab.train(config(tmp_path, checkpoint) | {"training": {"tokens": 200, "batch": 200, "lr": 1e-30}})
    x = numbers(50, 32, seed=1)
    assert distance(saelab.load(run)(x), found(x)) < 1e-5


def test_the_inputs_of_a_training_have_the_content_of_the_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    def inputs(where: Path | None) -> str:
        return Job(settings_of(config(tmp_path, where))).training_inputs()

    first, copied = inputs(checkpoint), shutil.copytree(checkpoint, tmp_path / "copied")
    assert inputs(copied) == first != inputs(None)
    other = saelens(tmp_path / "other", weights(32) | {"b_dec": torch.ones(32)}, architecture="topk", k=4)
    assert inputs(other) not in (first, inputs(None))


def test_a_stopped_training_goes_on_without_the_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    settings = config(tmp_path, checkpoint)
    settings["training"] |= {"checkpoint": {"tokens": 400}}
    whole, parts = (settings | {"out": str(tmp_path / name)} for name in ("whole", "parts"))
    saelab.train(whole)
    calls = iter(range(10_000))

    def stopped(items: Any, label: str, *_: Any, **__: Any) -> Any:
        for item in items:
            if label == "training" and next(calls) == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        saelab.train(parts, track=stopped)
    shutil.rmtree(checkpoint)
    run = saelab.resume(tmp_path / "parts")
    found, expected = (load_file(folder.weights(path)) for path in (run, tmp_path / "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_is_up_to_date_when_its_checkpoint_is_gone(tmp_path: Path, checkpoint: Path) -> None:
    run = saelab.train(config(tmp_path, checkpoint))
    before = folder.weights(run).read_bytes()
    shutil.rmtree(checkpoint)
    said: list[str] = []
    stages.run(config(tmp_path, checkpoint), say=said.append)
    assert f"training: {run} is up to date" in said
    assert folder.weights(run).read_bytes() == before


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(SaelabError, match=r"n_features is 64; set sae.n_features=40"):
        saelab.train(config(tmp_path, checkpoint, n_features=64))
    with pytest.raises(SaelabError, match="nothing: no checkpoint here"):
        saelab.train(config(tmp_path, tmp_path / "nothing"))
    norms = saelens(tmp_path / "norms", weights(32), architecture="topk", k=4, normalize_activations="layer_norm")
    with pytest.raises(SaelabError, match=r"set activations.inputs=layer_norm"):
        saelab.train(config(tmp_path, norms))
    with pytest.raises(SaelabError, match="a crosscoder starts with random weights"):
        saelab.train(config(tmp_path, checkpoint, unit_norm=True) | {"more_sites": ["blocks.0.hook_resid_post"]})
    said: list[str] = []
    with pytest.raises(SaelabError, match=r"sae\.unit_norm=false"):
        saelab.train(config(tmp_path, checkpoint, unit_norm=True, k=5), say=said.append)
    assert f"note: {checkpoint}: k is 5 here and 4 in the checkpoint" in said
    assert not (tmp_path / "run").exists()


def test_controls_begin_with_random_weights(tmp_path: Path, checkpoint: Path) -> None:
    run = saelab.train(config(tmp_path, checkpoint))
    saelab.index(run)
    (control,) = saelab.controls(run, kinds=["untrained"])
    assert settings_of(control / "config.yaml").sae.init_from is None
    x = numbers(50, 32, seed=1)
    assert distance(saelab.load(control)(x), saelab.load(checkpoint)(x)) > 0.1


def test_a_sweep_over_checkpoints(tmp_path: Path, checkpoint: Path) -> None:
    settings = config(tmp_path, None) | {"sweep": {"sae.init_from": [str(checkpoint), str(tmp_path / "nothing")]}}
    with pytest.raises(SaelabError, match="nothing: no checkpoint here"):
        saelab.sweep(settings | {"out": str(tmp_path / "sweep")})
