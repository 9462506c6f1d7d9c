"""A foreign checkpoint becomes a run on which every stage works: figures equal the dense formula on its own weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

import saelab
from saelab.cli import app
from saelab.encoded import encoded
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.lm.attention import direct_lens
from saelab.lm.load import load_language_model
from saelab.lm.settings import ModelSettings
from saelab.runs import folder
from saelab.runs.job import Job, settings_of
from saelab.sae.checkpoint import save_sae
from saelab.sae.model import SparseAutoencoder
from tests.sae.interop.peers import NAMES, REAL, saelens, weights
from tests.tiny import CONTEXT, model_folder, text

SITE = "blocks.1.hook_resid_post"
MLP = {"site": "blocks.1.mlp.hook_in", "target": "blocks.1.hook_mlp_out"}
NORMALISATIONS = ("layer_norm", "constant_norm_rescale")
SMALL = (
    "device=cpu",
    f"context={CONTEXT}",
    "corpus.held_out=0.2",
    "eval.tokens=600",
    "eval.ce_tokens=300",
    "features.tokens=600",
)
FAST = ("layer_norm", "saelens_jumprelu", "sparsify_skip_transcoder")


@pytest.fixture(scope="module")
def model() -> str:
    """A model of the width of the fixtures."""
    return str(model_folder("gpt2", 16))


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(text(600))
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint by its name: one of a peer, or one that normalises each token."""
    root = tmp_path_factory.mktemp("checkpoints")

    def found(name: str) -> Path:
        if name not in NORMALISATIONS:
            return REAL / name
        options: dict[str, Any] = {"architecture": "topk", "k": 5, "normalize_activations": name}
        return saelens(root / name, weights(16), **options)

    return found


@pytest.fixture
def adopted(model: str, book: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "saelens_jumprelu", *overrides: str, **options: Any) -> Path:
        options = {"model": model, "site": SITE, "corpus": book, "out": tmp_path / "run"} | options
        return saelab.adopt(checkpoints(name), overrides=[*SMALL, *overrides], **options)

    return make


def job_of(run: Path) -> Job:
    return Job(settings_of(run / "config.yaml"))


@pytest.mark.parametrize(
    "name",
    [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in (*NAMES, *NORMALISATIONS) if n not in FAST)],
)
def test_figures_and_features_are_those_of_the_dense_formula(
    name: str, adopted: Callable[..., Path], checkpoints: Callable[[str], Path]
) -> None:
    run = adopted(name, **(MLP if "transcoder" in name else {}))
    theirs, ours, job = saelab.load(checkpoints(name)), saelab.load(run), job_of(run)
    rows, sites = job.held_out(600), job.settings.sites
    (block,) = encoded(theirs, job.lm, rows, sites, len(rows))
    x, y, dense = block.x, block.output, block.codes.to_dense()
    recon = theirs.decode(block.codes, x)
    torch.testing.assert_close(ours.encode(x).to_dense(), dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), recon, rtol=1e-5, atol=1e-4)

    result = saelab.evaluate(run)
    error, deviation = (y - recon).double().square().sum(), (y - y.mean(0)).double().square().sum()
    assert result.fvu == pytest.approx(float(error / deviation), rel=1e-4)
    assert result.l0 == pytest.approx(float((dense > 0).sum(1).double().mean()))
    assert result.ce_spliced == pytest.approx(spliced_loss(job, rows, recon, result.ce_tokens), rel=1e-4)
    assert json.loads((run / "eval.json").read_text()).get("trained_tokens") is None

    saelab.index(run)
    database = open_database(run / "features")
    np.testing.assert_allclose(database.table["density"], (dense > 0).double().mean(0), atol=1e-9)
    np.testing.assert_allclose(database.arrays["by_feature.maxima"], dense.amax(0), rtol=1e-4, atol=1e-5)
    logits = direct_logits(theirs, sites.outputs[0])
    np.testing.assert_allclose(database.table["logit_range"][:, 1], logits.amax(1), rtol=1e-3, atol=1e-4)


def spliced_loss(job: Job, rows: torch.Tensor, recon: torch.Tensor, tokens: int) -> float:
    """CE of the first `tokens` scored tokens with `recon` in place of what it reconstructs."""
    lm = job.lm
    logits = lm.spliced_logits(rows, job.settings.sites.outputs[0], lambda _: recon)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:].long(), reduction="none").double()
    return float(losses[lm.scored(rows)[:, :-1]][:tokens].mean())


def direct_logits(sae: SparseAutoencoder, site: str) -> torch.Tensor:
    """What each feature's decoder row does to the logits, ``[n_features, vocabulary]``."""
    lm = load_language_model(ModelSettings(str(model_folder("gpt2", 16))), "cpu")
    lens = direct_lens(lm, site)
    assert lens is not None
    return lens.at_head(sae.W_dec) @ lens.unembedding.T


def test_a_transcoder_needs_a_target(adopted: Callable[..., Path], tmp_path: Path, book: str, model: str) -> None:
    with pytest.raises(SaelabError, match=r"needs .*; give --target, the site whose activations"):
        adopted("saelens_transcoder")
    with pytest.raises(SaelabError, match=r"target: blocks.1.mlp.hook_post .* is 64 wide, .* gives 16"):
        adopted("saelens_transcoder", target="blocks.1.mlp.hook_post")
    with pytest.raises(SaelabError, match=r"target: is blocks.1.hook_mlp_out, .* which has none"):
        adopted("saelens_topk", **MLP)
    shutil.copytree(REAL / "sparsify_skip_transcoder", tmp_path / "layers.1.mlp")  # as sparsify names its hookpoints
    run = saelab.adopt(tmp_path / "layers.1.mlp", model=model, corpus=book, out=tmp_path / "run", overrides=SMALL)
    assert settings_of(run / "config.yaml").sites == saelab.Sites(MLP["site"], MLP["target"])


def test_what_is_missing_is_asked_for_in_one_message(tmp_path: Path, book: str, model: str) -> None:
    plain = saelens(tmp_path / "plain", weights(16))
    with pytest.raises(SaelabError, match=r"plain: .* a run needs; give --model, .*; --site, .*; --corpus, "):
        saelab.adopt(plain)
    with pytest.raises(SaelabError, match=r"\(its model is gpt2, its site is blocks.8.*\); give --corpus, "):
        saelab.adopt(REAL / "saelens_topk")
    with pytest.raises(SaelabError, match=r"needs; give --site, [^;]*$"):
        saelab.adopt(plain, corpus=book, overrides=[f"model.name={model}"])
    assert not Path("runs/plain").exists()
    gone = str(tmp_path / "gone")
    named = saelens(tmp_path / "named", weights(16), metadata={"sae_lens_version": "6.54.12", "dataset_path": gone})
    with pytest.raises(SaelabError, match=r"corpus: .*gone.* The checkpoint names this corpus; give another by --corp"):
        saelab.adopt(named, model=model, site=SITE, out=tmp_path / "run", overrides=SMALL)
    with pytest.raises(SaelabError, match=r"gone\.( Nearest: .*)?$"):
        saelab.adopt(named, model=model, site=SITE, corpus=gone, out=tmp_path / "run", overrides=SMALL)


def test_the_checkpoint_says_what_is_not_given(tmp_path: Path, book: str, model: str) -> None:
    said: list[str] = []
    metadata = {
        "sae_lens_version": "6.54.12",
        "model_name": model,
        "hook_name": SITE,
        "context_size": CONTEXT,
        "prepend_bos": False,
        "dataset_path": book,
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }
    run = saelab.adopt(saelens(tmp_path / "it", weights(16), metadata=metadata), out=tmp_path / "run", say=said.append)
    settings = settings_of(run / "config.yaml")
    assert (settings.model.name, settings.site, settings.context) == (model, SITE, CONTEXT)
    assert settings.corpus.source == book
    notes = [message for message in said if message.startswith("note: ")]
    assert notes[0] == "note: by its metadata, rows did not begin with BOS in training; here they began with BOS"
    assert "(center_writing_weights)" in notes[1] and len(notes) == 2


def test_what_it_was_trained_on_is_said_if_it_differs(adopted: Callable[..., Path], model: str) -> None:
    said: list[str] = []
    run = adopted("dictionary_learning_topk", say=said.append)
    trained = "note: by its metadata, the checkpoint was trained with"
    assert f"{trained} model gpt2; here: {model}" in said
    assert f"{trained} site blocks.8.hook_resid_post; here: {SITE}" in said
    origin = folder.adopted(run)
    assert origin is not None and origin["trainer"] == "dictionary_learning"
    assert origin["trained_on"] == {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_post"}


def test_a_site_of_another_width_and_a_head_are_refused(tmp_path: Path, adopted: Callable[..., Path]) -> None:
    with pytest.raises(SaelabError, match=r"mlp.hook_post of .* is 64 wide, and the autoencoder in .* takes 16"):
        adopted(site="blocks.1.mlp.hook_post")
    with pytest.raises(SaelabError, match=r"no site 'blocks.9.hook_resid_post'. Nearest: blocks"):
        adopted(site="blocks.9.hook_resid_post")
    with pytest.raises(SaelabError, match=r"sae.k: is not for a checkpoint that is trained .* takes out, site"):
        adopted("saelens_topk", "sae.k=3")
    with pytest.raises(SaelabError, match=r"contxt: is not for .* Nearest: context"):
        adopted("saelens_topk", "contxt=3")
    assert not (tmp_path / "run").exists()
    metadata = {"sae_lens_version": "6.54.12", "hook_head_index": 3}
    one = saelens(tmp_path / "one", weights(16), metadata=metadata)
    with pytest.raises(SaelabError, match="was trained on head 3 of a site"):
        saelab.adopt(one, model="demo", site=SITE, corpus="demo")


def test_a_run_is_replaced_whole_and_only_with_force(
    adopted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = adopted()
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SaelabError, match="exists; choose another"):
        adopted("saelens_topk")
    with pytest.raises(SaelabError, match="the checkpoint lies in it; choose another"):
        saelab.adopt(run / "sae", model="demo", site=SITE, corpus="demo", out=run, force=True)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("saelab.runs.save.save_sae", fail)
        with pytest.raises(SaelabError, match="the disk is full"):
            adopted("saelens_topk", force=True)
        with pytest.raises(SaelabError, match="the disk is full"):
            adopted("saelens_topk", out=tmp_path / "new")
    assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()
    assert adopted("saelens_topk", force=True) == run
    assert saelab.load(run).k == saelab.load(REAL / "saelens_topk").k


def test_its_training_cannot_go_on(adopted: Callable[..., Path]) -> None:
    run = adopted()
    with pytest.raises(SaelabError, match=r"was adopted from .*saelens_jumprelu, so .* `sae.init_from="):
        saelab.resume(run)
    with pytest.raises(SaelabError, match="was adopted from"):
        saelab.run(run / "config.yaml")
    assert folder.unfinished(run) is None and folder.has_checkpoint(run)


def test_only_controls_without_a_training_are_made_of_it(adopted: Callable[..., Path]) -> None:
    run = adopted()
    saelab.index(run)
    with pytest.raises(SaelabError, match=r"reseed: there is none of .* name other --kinds \(directions, neurons\)"):
        saelab.controls(run, kinds=["reseed"])
    assert [path.name for path in saelab.controls(run)] == ["directions", "neurons"]


def test_an_adopted_run_is_adopted_like_any_checkpoint(adopted: Callable[..., Path], tmp_path: Path) -> None:
    first = adopted("saelens_gated")
    moved = shutil.copytree(first / "sae", tmp_path / "published")
    second = adopted(out=tmp_path / "second")
    third = saelab.adopt(moved, out=tmp_path / "third")
    origin = folder.adopted(third)
    assert origin is not None and origin["trainer"] == "saelab" and origin["from"] == str(moved)
    ours, theirs = (load_file(folder.weights(run)) for run in (third, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert settings_of(second / "config.yaml").site == settings_of(third / "config.yaml").site


def test_a_crosscoder_names_its_sites_itself(tmp_path: Path, book: str, model: str) -> None:
    sites, widths, scales = [SITE, "blocks.2.mlp.hook_post"], (16, 64), [2.0, 0.5]
    torch.manual_seed(0)
    sae = SparseAutoencoder(80, 24, 4)
    sae.site_widths = widths
    sae.metadata = {"hook_name": SITE, "hook_names": sites, "saelab": {"input_scale": scales}}
    for parameter in sae.parameters():
        parameter.data.normal_()
    save_sae(sae, tmp_path / "given")
    run = saelab.adopt(tmp_path / "given", model=model, corpus=book, out=tmp_path / "run", overrides=SMALL)
    job = job_of(run)
    assert job.settings.sites.inputs == tuple(sites)
    rows = job.held_out(600)
    found = job.lm.activations(rows, sites)
    parts = [found[site][job.lm.ordinary(rows)] for site in sites]
    reconstructions = saelab.load(run)(torch.cat(parts, 1)).split(widths, 1)
    errors, deviations = 0.0, 0.0
    for x, xhat, scale in zip(parts, reconstructions, scales, strict=True):
        errors += scale**2 * (x - xhat).double().square().sum().item()
        deviations += scale**2 * (x - x.mean(0)).double().square().sum().item()
    assert saelab.evaluate(run).fvu == pytest.approx(errors / deviations, rel=1e-4)
    assert saelab.site_norms(saelab.load(run)).sites == tuple(sites)
    with pytest.raises(SaelabError, match="has 2 sites, not 1"):
        saelab.adopt(tmp_path / "given", model=model, site="blocks.0.hook_resid_post", corpus=book, overrides=SMALL)


def test_a_crosscoder_of_two_models_names_both(tmp_path: Path, book: str, model: str) -> None:
    sites, second = [SITE, "blocks.2.hook_resid_post@second"], shutil.copytree(model, tmp_path / "second")
    sae = SparseAutoencoder(32, 24, 4)
    sae.site_widths = (16, 16)
    sae.metadata = {"model_name": model, "second_model_name": str(second), "hook_name": SITE, "hook_names": sites}
    save_sae(sae, tmp_path / "given")
    run = saelab.adopt(tmp_path / "given", corpus=book, out=tmp_path / "run", overrides=SMALL)
    settings = settings_of(run / "config.yaml")
    assert settings.second_model is not None and settings.second_model.name == str(second)
    assert settings.sites.inputs == tuple(sites)
    run = saelab.adopt(
        tmp_path / "given", corpus=book, out=tmp_path / "other", overrides=[*SMALL, f"second_model={model}"]
    )
    settings = settings_of(run / "config.yaml")
    assert settings.second_model is not None and settings.second_model.name == model


def test_the_command(checkpoints: Callable[[str], Path], model: str, book: str, tmp_path: Path) -> None:
    given = ["--model", model, "--site", SITE, "--corpus", book, "--out", str(tmp_path / "run"), *SMALL]
    found = CliRunner().invoke(app, ["adopt", str(checkpoints("saelens_standard")), *given])
    assert found.exit_code == 0 and found.stdout == f"{tmp_path / 'run'}\n"
    assert f"adopted from: {REAL / 'saelens_standard'} (SAELens)" in repr(saelab.load(tmp_path / "run"))
