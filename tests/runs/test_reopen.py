"""Evaluation and features of a run that is there: what may be set, and whether model and text are those of training."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saelab
from saelab.errors import SaelabError
from saelab.runs import folder
from saelab.runs.config import load_config
from tests.runs.test_stages import small
from tests.tiny import model_folder, text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, `run`, of a model and a text in the same folder that it named by relative paths."""
    here = tmp_path_factory.mktemp("reopen")
    config = small(here) | {"out": "run", "model": "model"}
    config["corpus"] |= {"source": "book.txt"}
    shutil.copytree(model_folder("gpt2"), here / "model")
    before = Path.cwd()
    os.chdir(here)
    try:
        saelab.train(config)
        saelab.evaluate("run")
    finally:
        os.chdir(before)
    return here


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in whose run the paths are those of the copy; tests stand elsewhere."""
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    settings = copy / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace(str(trained), str(copy)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return copy


def figures(run: Path, name: str = "eval.json") -> dict:
    return json.loads((run / name).read_text())


def test_a_run_folder_names_its_files_by_absolute_paths(trained: Path) -> None:
    settings = load_config(trained / "run" / "config.yaml")
    assert settings.out == str(trained / "run")
    assert (settings.model.name, settings.corpus.source) == (str(trained / "model"), str(trained / "book.txt"))
    metadata = saelab.load(trained / "run").metadata
    assert (metadata["model_name"], metadata["dataset_path"]) == (str(trained / "model"), str(trained / "book.txt"))
    assert metadata["saelab"]["corpus"]["source"] == "files"


def test_a_run_is_measured_the_same_from_every_folder(here: Path) -> None:
    """Even where other things have the names that its config gave."""
    run, elsewhere = here / "run", Path.cwd()
    (elsewhere / "book.txt").write_text(text(900))
    shutil.copytree(model_folder("llama"), elsewhere / "model")
    expected = (run / "eval.json").read_bytes()
    (run / "eval.json").unlink()
    saelab.evaluate(run)
    assert (run / "eval.json").read_bytes() == expected
    saelab.resume(run, ["training.tokens=6200"])
    assert load_config(run / "config.yaml").corpus.source == str(here / "book.txt")


def test_a_run_of_an_earlier_version_with_relative_paths_is_read_from_where_it_was_trained(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = here / "run", []
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace(f"{here}/", ""))
    config = json.loads((run / "sae" / "cfg.json").read_text())
    config["metadata"]["saelab"].pop("corpus")
    (run / "sae" / "cfg.json").write_text(json.dumps(config))
    before = figures(run)
    monkeypatch.chdir(here)
    saelab.evaluate("run", say=said.append)
    assert figures(run) == before
    assert any("does not record its corpus" in line for line in said)
    saelab.resume("run", ["training.tokens=6200"])


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        (
            "eval",
            "sae.k=2",
            r"sae.k is 2, in training 4; `saelab eval` takes only eval.\*, device, model.\*, corpus.\*",
        ),
        ("eval", "sae.affinity=gradient", r"sae.affinity.name is gradient"),
        ("eval", "training.tokens=9000", r"training.tokens is 9000, in training 6000"),
        ("eval", "out=other", r"out is other"),
        ("eval", "seed=1", r"seed is 1"),
        ("eval", "activations.special_tokens=true", r"activations.special_tokens is True"),
        ("eval", "activations.cache=DIR", r"activations.cache.path"),
        ("eval", "cache.lanes=2", r"cache.lanes is 2"),
        ("eval", "features.tokens=7", r"features.tokens is 7"),
        ("eval", "corpus.held_out=0.5", r"corpus.held_out is 0.5, in training 0.2; .* would count as held out"),
        ("eval", "site=blocks.1.hook_mlp_post", r"mlp.*|no site 'blocks.1.hook_mlp_post'"),
        (
            "index",
            "eval.tokens=7",
            r"eval.tokens is 7, in training 1500; `saelab index` takes only features.\*, device",
        ),
        ("index", "site=blocks.0.hook_resid_post", r"site is blocks.0.hook_resid_post, in training blocks.1"),
        ("index", "context=16", r"context is 16, in training 32"),
        ("index", "model.dtype=bf16", r"model.dtype is bfloat16, in training float32; `saelab eval` takes"),
        ("index", "corpus=other.txt", r"corpus.source is .*other.txt, in training .*book.txt; `saelab eval` takes"),
    ],
)
def test_a_setting_that_a_stage_does_not_take_is_refused(stage: str, override: str, message: str, here: Path) -> None:
    Path("other.txt").write_text(text(1000))
    before = figures(here / "run")
    with pytest.raises(SaelabError, match=message):
        {"eval": saelab.evaluate, "index": saelab.index}[stage](here / "run", [override])
    assert figures(here / "run") == before and folder.evaluations(here / "run") == [here / "run" / "eval.json"]
    assert not (here / "run" / "features").exists()


def test_another_text_site_or_model_goes_into_a_file_of_its_own(here: Path) -> None:
    run = here / "run"
    before = figures(run)
    Path("code.txt").write_text("\n\n".join(f"def f{n}(x):\n    return x + {n}" for n in range(3000)))
    for overrides in (
        ["corpus=code.txt"],
        ["site=blocks.0.hook_resid_post"],
        ["context=16"],
        ["model.dtype=bf16"],
        ["corpus.min_tokens=3"],
        [f"model={model_folder('llama')}"],
    ):
        said: list[str] = []
        result = saelab.evaluate(run, overrides, say=said.append)
        (path,) = [path for path in folder.evaluations(run) if path.name != "eval.json"]
        found = figures(run, path.name)
        name = overrides[0].split("=")[0]
        name = {"corpus": "corpus.source", "model": "model.name"}.get(name, name)
        assert list(found["differs"]) == [name] and found["fvu"] == result.fvu
        assert found["inputs"] != before["inputs"]
        assert any(str(path) in line and f"{name} is " in line for line in said)
        saelab.evaluate(run, overrides)
        assert figures(run, path.name) == found
        path.unlink()
    assert figures(run) == before


def test_a_new_checkpoint_removes_those_files_too(here: Path) -> None:
    saelab.evaluate(here / "run", ["context=16"])
    assert len(folder.evaluations(here / "run")) == 2
    saelab.resume(here / "run", ["training.tokens=6200"])
    assert folder.evaluations(here / "run") == [here / "run" / "eval.json"] and not (here / "run/eval.json").exists()


@pytest.mark.parametrize("stage", ["eval", "index"])
def test_a_model_or_text_that_changed_in_place_is_an_error_before_anything_is_encoded(
    stage: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, measure = here / "run", {"eval": saelab.evaluate, "index": saelab.index}[stage]
    shutil.copytree(here / "model", "old_model")
    shutil.copy(here / "book.txt", "old.txt")
    (here / "book.txt").write_text(text(2999))
    monkeypatch.setattr(saelab.SparseAutoencoder, "encode", None)
    with pytest.raises(SaelabError, match=r"the corpus .*book.txt is not what it was in training: its corpus.text '"):
        measure(run)
    shutil.copy("old.txt", here / "book.txt")
    weights = torch.randn(10)
    tensors = load_file(here / "model" / "model.safetensors")
    tensors["transformer.ln_f.bias"][:10] += weights
    save_file(tensors, here / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        SaelabError, match=r"the model .*model is not what it was in training: its weights '.*model=PATH"
    ):
        measure(run)
    monkeypatch.undo()
    monkeypatch.chdir(here.parent / "elsewhere")
    measure(run, ["model=old_model", "corpus=old.txt"])  # the same, in another place
    assert folder.evaluations(run) == [run / "eval.json"]


def test_a_site_of_another_width_is_an_error_before_anything_is_encoded(here: Path) -> None:
    with pytest.raises(SaelabError, match=r"blocks.1.mlp.hook_post of .* is 128 wide, and the autoencoder .* takes 32"):
        saelab.evaluate(here / "run", ["site=blocks.1.mlp.hook_post"])


def test_an_unfinished_run_is_said_to_be_one(here: Path) -> None:
    run, said = here / "run", []
    record = folder.training_record(run)
    assert folder.unfinished(run) is None and record["planned_tokens"] == 6000
    assert figures(run)["training_complete"] is True and figures(run)["trained_tokens"] == 6000
    (run / "train.json").write_text(json.dumps(record | {"complete": False, "tokens": 4000}))
    for stage in (saelab.evaluate, saelab.index):
        stage(run, say=said.append)
        note = f"note: this run's training stopped after 4,000 of 6,000 tokens; `saelab train --resume {run}` goes on"
        assert said[0].startswith(note)
        said.clear()
    assert figures(run)["training_complete"] is False and figures(run)["trained_tokens"] == 4000
    (run / "train.json").write_text(json.dumps(record)[:20])
    saelab.evaluate(run, say=said.append)
    assert said[0].startswith(f"note: {run / 'train.json'} is missing or damaged, so whether the training was complete")
    (run / "train.json").write_text(json.dumps(record | {"complete": False}))
    shutil.rmtree(run / "sae")
    with pytest.raises(
        SaelabError, match=r"no.* checkpoint yet; wait for it, or, .* with `saelab train --resume .*run`"
    ):
        saelab.evaluate(run)


def test_demo_and_hub_names_are_not_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo` is always the embedded one; a name of the Hub is one as long as there is no such folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "gpt2").write_text("a file, not a model")
    settings = saelab.settings_of({"out": "run", "site": "s", "model": "demo", "corpus": "demo"})
    assert (settings.model.name, settings.corpus.source) == ("demo", "demo")
    config = {"out": "run", "site": "s", "model": "gpt2", "corpus": "someone/texts", "activations": {"cache": "c"}}
    settings = saelab.settings_of(config, ["model=gpt2"])
    assert (settings.model.name, settings.corpus.source) == ("gpt2", "someone/texts")
    assert settings.activations.cache is not None and settings.activations.cache.path == str(tmp_path / "c")
    (tmp_path / "someone" / "texts").mkdir(parents=True)
    settings = saelab.settings_of(config, ["model=./demo"])
    assert (settings.model.name, settings.corpus.source) == (str(tmp_path / "demo"), str(tmp_path / "someone/texts"))
