"""Each control of a run is what it says, is read from the run's text and survives a kill; scores find it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import saelab
from saelab.autointerp.choice import NEAR, matched
from saelab.autointerp.settings import ContextSettings
from saelab.autointerp.store import explanations
from saelab.cli import app
from saelab.errors import SaelabError
from saelab.features.database import Database, open_database
from saelab.runs import folder, train
from saelab.runs.autointerp import explain, score
from saelab.runs.controls import controls, neuron_run
from saelab.runs.explained import Opened, table
from tests.faults.tools import stamps
from tests.runs.test_resume import Ask, ask
from tests.runs.test_stages import small
from tests.tiny import model_folder

__all__ = ["ask"]  # a fixture

SHORT = {"tokens": 2000, "batch": 200, "lr": 3e-3}
TRAINED = ("frozen_decoder", "frozen_encoder", "reseed1", "reseed2")
SETTINGS = ContextSettings(window=8, explain=4, quantiles=2, positives=4, negatives=4)


def made(where: Path, **sae: Any) -> Path:
    """A run with a feature database."""
    config = small(where)
    config |= {"training": SHORT, "sae": config["sae"] | sae}
    run = saelab.train(config)
    saelab.index(run)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all its controls; tests do not change it."""
    run = made(tmp_path_factory.mktemp("controls"))
    paths = controls(run)
    assert [path.name for path in paths] == ["untrained", "directions", "neurons", *TRAINED]
    assert sorted(paths) == folder.controls(run)
    return run


def control(run: Path, kind: str) -> Path:
    return run / "controls" / kind


def database(run: Path) -> Database:
    return open_database(run / "features")


def dense(database: Database) -> np.ndarray:
    """The activations of a database, ``[places, n_features]``."""
    a = database.arrays
    found = np.zeros((a["tokens"].size, database.n_features), np.float32)
    places, features = np.repeat(np.arange(len(found)), np.diff(a["by_token.offsets"])), a["by_token.features"]
    found[places, features] = a["by_token.values"] * a["by_feature.maxima"][features]  # shares of the maximum
    return found


def weights(run: Path) -> Mapping[str, torch.Tensor]:
    return load_file(folder.weights(run))


def start_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> saelab.SparseAutoencoder:
    """The autoencoder that the training of a run begins with, for activations as the model gives them."""
    found = []

    def stop(trainings: Any, *_: Any) -> None:
        found.append(trainings[0].inputs.map.folded(trainings[0].trainer.sae))
        raise SaelabError("seen")

    settings = saelab.settings_of(run / "config.yaml")
    monkeypatch.setattr(train, "train_all", stop)
    with pytest.raises(SaelabError, match="seen"):
        saelab.train(settings, [f"out={run.parent / 'seen'}"])
    return found[0]


def test_a_mistake_is_named_and_changes_nothing(run: Path) -> None:
    with pytest.raises(SaelabError, match="kinds: none is named"):
        controls(run, kinds=[])
    with pytest.raises(SaelabError, match="is the run itself"):
        table(run, [run])
    with pytest.raises(SaelabError, match="there is no such folder"):
        explain(run / "nothing")
    with pytest.raises(SaelabError, match="has an autoencoder that was trained; choose another `out`"):
        neuron_run(run / "config.yaml", force=True)
    assert folder.has_checkpoint(run) and folder.training_record(run)["complete"]


def test_of_a_tied_autoencoder_there_is_none_with_a_frozen_part(tmp_path: Path) -> None:
    run = made(tmp_path, encoder={"name": "tied"}, aux={"lift": True})
    said: list[str] = []
    with pytest.raises(SaelabError, match=r"frozen_decoder: there is none of .* name other kinds"):
        controls(run, kinds=["frozen_decoder"])
    paths = controls(run, ["training.tokens=400"], reseeds=1, say=said.append)
    assert [path.name for path in paths] == ["untrained", "directions", "neurons", "reseed1"]
    assert sum("left out: freeze: " in message for message in said) == 2


def test_a_frozen_encoder_is_not_lifted(tmp_path: Path) -> None:
    run = made(tmp_path, aux={"lift": True})
    (path,) = controls(run, kinds=["frozen_encoder"])
    assert not saelab.settings_of(path / "config.yaml").sae.aux.lift


def test_the_untrained_one_of_a_gated_run_has_the_runs_l0(tmp_path: Path) -> None:
    run = made(tmp_path, encoder={"name": "gated"}, allocation={"name": "threshold"}, sparsity={"name": "l1"})
    (path,) = controls(run, kinds=["untrained"])
    own, of_control = (each.arrays.manifest["entries"] / each.n_tokens for each in map(database, (run, path)))
    assert of_control == pytest.approx(own, rel=0.15) and saelab.load(path).threshold is not None


def test_a_control_that_fails_does_not_stop_the_others(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "controls" / "neurons" / "features")
    done = CliRunner().invoke(app, ["explain", str(copied), "--features", "random:4", "--with-controls"])
    assert "neurons: " in done.output and "1 of 7 controls failed: neurons" in str(done.exception)
    explained = [path.name for path in folder.controls(copied) if (path / "autointerp").is_dir()]
    assert sorted(explained) == sorted({"untrained", "directions", *TRAINED})


def test_the_untrained_one_is_the_start_of_the_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, found = start_of(run, monkeypatch), saelab.load(control(run, "untrained"))
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, dict(found.named_parameters())[name]), name
    assert found.threshold is None and found.k == start.k
    assert not torch.equal(found.W_dec, saelab.load(run).W_dec)
    record = folder.training_record(control(run, "untrained"))
    assert record["complete"] and record["tokens"] == 0 and record["control"] == "untrained"


@pytest.mark.slow
@pytest.mark.parametrize(
    "sae",
    [
        {"allocation": "mutual_choice"},
        {"allocation": "threshold", "sparsity": {"name": "l1", "coefficient": 0.1}},
    ],
)
def test_thresholds_of_an_untrained_one_give_the_l0_of_the_run(sae: dict[str, Any], tmp_path: Path) -> None:
    run = made(tmp_path, **sae)
    controls(run, kinds=["untrained"])
    own, untrained = database(run), database(control(run, "untrained"))
    expected = 4 if sae["allocation"] == "mutual_choice" else own.arrays.manifest["entries"] / own.n_tokens
    assert untrained.arrays.manifest["entries"] / untrained.n_tokens == pytest.approx(expected, rel=0.25)


def test_what_is_frozen_keeps_its_start_and_the_rest_is_trained(run: Path) -> None:
    start = weights(control(run, "untrained"))
    decoder, encoder = weights(control(run, "frozen_decoder")), weights(control(run, "frozen_encoder"))
    assert torch.equal(decoder["W_dec"], start["W_dec"]) and not torch.equal(decoder["W_enc"], start["W_enc"])
    assert torch.equal(encoder["W_enc"], start["W_enc"]) and torch.equal(encoder["b_enc"], start["b_enc"])
    assert not torch.equal(encoder["W_dec"], start["W_dec"])


def test_trained_controls_equal_runs_of_their_own(run: Path) -> None:
    settings = saelab.settings_of(run / "config.yaml")
    for kind, sae in (("frozen_decoder", {"freeze": "decoder"}), ("reseed2", {"seed": settings.seed + 2})):
        alone = saelab.train(replace(settings, out=str(run.parent / kind), sae=replace(settings.sae, **sae)))
        for name, expected in weights(alone).items():
            assert torch.equal(weights(control(run, kind))[name], expected), (kind, name)
        record, expected = folder.training_record(control(run, kind)), folder.training_record(alone)
        assert record["inputs"] == expected["inputs"] and record["complete"]


def test_directions_are_random_units_with_the_densities_of_the_run(run: Path) -> None:
    sae, own, found = saelab.load(control(run, "directions")), database(run), database(control(run, "directions"))
    assert torch.equal(sae.W_enc, sae.W_dec) and torch.equal(sae.b_dec, saelab.load(run).b_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    cosines = sae.W_dec @ sae.W_dec.T - torch.eye(64)
    assert cosines.square().mean() == pytest.approx(1 / 32, rel=0.1)  # of independent directions in 32 dimensions
    sizes = dense(found)
    wanted, got = own.table["n_active"], found.table["n_active"]
    np.testing.assert_array_equal((sizes > 0).sum(0), got)
    # equal beginnings of rows have equal pre-activations, which are all above a threshold or none
    assert (np.abs(got - wanted) <= len(own.arrays["tokens"])).all() and (got == wanted).mean() > 0.5
    assert abs(got - wanted).sum() < 0.02 * wanted.sum()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_neurons_are_the_largest_inputs_of_the_mlps_last_matrix(kind: str, tmp_path: Path) -> None:
    config = small(tmp_path) | {"model": str(model_folder(kind)), "site": "blocks.1.hook_resid_post"}
    run = neuron_run(config, ["features.tokens=500"])
    model = AutoModelForCausalLM.from_pretrained(model_folder(kind))
    last = model.transformer.h[1].mlp.c_proj if kind == "gpt2" else model.model.layers[1].mlp.down_proj
    read: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    found = database(run)
    with torch.no_grad():
        model(torch.from_numpy(np.array(found.arrays["tokens"])).long())
    neurons = read[0].flatten(0, 1)
    special = (found.arrays["by_token.offsets"][1:] == found.arrays["by_token.offsets"][:-1]).copy()
    top = neurons.topk(4).indices
    expected = torch.zeros_like(neurons).scatter(1, top, neurons.gather(1, top).relu())
    expected[torch.from_numpy(special)] = 0
    np.testing.assert_allclose(dense(found), expected, rtol=1e-3, atol=1e-5)
    assert 0 < special.sum() < 0.2 * len(special) and found.n_features == neurons.shape[1]
    before = stamps(run)
    assert neuron_run(config, ["features.tokens=500"]) == run and stamps(run) == before  # up to date
    with pytest.raises(SaelabError, match=r"made from something else.*--force"):
        neuron_run(config, ["sae.k=5"])
    with pytest.raises(SaelabError, match="is in no block"):
        neuron_run(config | {"site": "hook_embed"}, [f"out={tmp_path / 'other'}"])


def test_controls_are_read_from_the_text_of_the_run(run: Path) -> None:
    text = Opened(run).text
    for path in folder.controls(run):
        assert Opened(path).text == text and folder.unfinished(path) is None, path
        assert saelab.settings_of(path / "config.yaml").features.tokens == 1500
    sae = saelab.load(control(run, "neurons"))
    assert sae.metadata["hook_name"] == "blocks.1.mlp.hook_post" and sae.k == 4
    before = stamps(run)
    controls(run)
    assert stamps(run) == before  # finished ones are not made again


def test_a_run_is_listed_without_its_controls_and_they_are_in_a_folder_of_their_own(run: Path) -> None:
    assert run in (each.path for each in folder.find_runs(run.parent)) and folder.controlled(run) is None
    assert not any("controls" in each.name for each in folder.find_runs(run.parent))
    listed = folder.find_runs(run / "controls")
    assert [each.path for each in listed] == folder.controls(run)
    assert all(each.has_features and folder.controlled(each.path) == run for each in listed)


@pytest.mark.slow
def test_a_run_loses_its_controls_with_its_weights(tmp_path: Path) -> None:
    run = made(tmp_path)
    controls(run, kinds=["directions"])
    saelab.index(run, ["features.tokens=600"])
    with pytest.raises(SaelabError, match=r"directions: was made from something else.*--force"):
        controls(run, kinds=["directions"])
    controls(run, kinds=["directions"], force=True)
    assert Opened(control(run, "directions")).text == Opened(run).text
    saelab.resume(run, ["training.tokens=2400"])
    assert not (run / "controls").exists()


def test_wrong_requests_are_named(run: Path) -> None:
    with pytest.raises(SaelabError, match=r"there is no 'neuron'.*Nearest: neurons"):
        controls(run, kinds=["neuron"])
    with pytest.raises(SaelabError, match=r"sae\.k.*`saelab controls` takes only training"):
        controls(run, ["sae.k=8"])
    with pytest.raises(SaelabError, match=r"frozen_decoder: was made from something else.*--force"):
        controls(run, ["training.tokens=2200"])


def test_scores_of_controls_are_beside_those_of_the_run(run: Path) -> None:
    runner = CliRunner()
    with pytest.raises(SaelabError, match="has no explanations; explain it first"):
        explain(control(run, "neurons"))
    result = runner.invoke(app, ["explain", str(control(run, "neurons")), "--with-controls"])
    assert "has no controls; `saelab controls" in str(result.exception)
    explain(run, "random:30", settings=SETTINGS)
    for path in folder.controls(run):
        explain(path, settings=SETTINGS)
    own = database(run).table["density"][
        [each.feature for each, _ in explanations(run / "autointerp", Opened(run).inputs)]
    ]
    for path in folder.controls(run):
        opened = Opened(path)
        features = sorted(each.feature for each, _ in explanations(opened.folder, opened.inputs))
        assert features == matched(opened.database.table["density"], own)
    score(run, ["detection"])
    first = table(run).lines[0]
    assert set(first.missing) == {path.name for path in folder.controls(run)} and len(first.differences) == 1
    result = runner.invoke(app, ["score", str(run), "--scores", "detection,predicate", "--with-controls"])
    assert result.exit_code == 0, result.exception
    for line in table(run).lines:
        by_name = {each.control: each for each in line.differences}
        assert by_name.keys() == {"shuffled", *(path.name for path in folder.controls(run))} and not line.missing
        assert by_name["directions"].ratio < 1.02 and all(1 <= d.largest_ratio <= NEAR for d in line.differences)
        assert by_name["reseed1"].reseed and not by_name["frozen_decoder"].reseed
        means = [line.mean.value]
        for name in ("reseed1", "reseed2"):
            alone = next(each for each in table(control(run, name)).lines if each.score == line.score)
            means.append(alone.mean.value)
        assert line.seeds == pytest.approx(means)
    assert "means of 3 seeds" in " ".join(result.output.split())
    result = runner.invoke(
        app, ["score", str(run), "--scores", "detection", "--controls", str(control(run, "neurons"))]
    )
    assert "neurons" in result.output and "directions" not in result.output
    (run / "controls" / "untrained" / "features").rename(run.parent / "away")
    said: list[str] = []
    score(run, ["detection"], say=said.append)
    (run.parent / "away").rename(run / "controls" / "untrained" / "features")
    assert any(message.startswith("no features on the same text: untrained; `saelab controls") for message in said)


def contents(run: Path) -> dict[str, Any]:
    """Weights, record and database of every control, without times."""
    found = {}
    for path in folder.controls(run):
        record = folder.training_record(path)
        record.pop("seconds", None)
        files = json.loads((path / "features" / "manifest.json").read_text())["files"]
        found[path.name] = {"weights": folder.weights(path).read_bytes(), "record": record, "files": files}
    return found


@pytest.mark.slow
def test_killed_controls_go_on(ask: Ask, tmp_path: Path) -> None:
    """Killed in a step of the training, and then while databases are written."""
    copy = made(tmp_path)
    whole = tmp_path / "whole"
    shutil.copytree(copy, whole)
    assert ask("controls", whole)["code"] == 0
    expected = contents(whole)
    assert expected.keys() == {"untrained", "directions", "neurons", *TRAINED}
    assert ask("controls", copy, step=4)["code"] == -9
    assert folder.controls(copy) == []
    assert ask("controls", copy, renames=70)["code"] == -9
    there = stamps(copy / "controls" / "frozen_decoder" / "sae")
    assert ask("controls", copy)["code"] == 0
    assert contents(copy) == expected and there == stamps(copy / "controls" / "frozen_decoder" / "sae")
