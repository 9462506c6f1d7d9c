"""A run with a target: two sites in one pass, from the model or from a cache, through every stage."""

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab.activations.cache.reader import open_cache
from saelab.activations.sites import Sites
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.features.weights import weight_columns
from saelab.lm.attention import direct_lens
from saelab.runs.controls import controls
from saelab.runs.export import export
from saelab.runs.job import Job, settings_of
from saelab.runs.live import open_live
from saelab.runs.plan import plan_cache, plan_evaluation, plan_index, plan_training
from saelab.runs.summary import summarise
from saelab.runs.sweep import sweep
from saelab.training.trainer import Trainer
from tests.faults.tools import command
from tests.runs.test_resume import assert_same, config_of
from tests.runs.test_sweep import alone, contents, runs_in
from tests.tiny import CONTEXT, language_model

SITE, TARGET = "blocks.1.mlp.in.hook_in", "blocks.1.hook_mlp_out"
WIDE = "blocks.1.mlp.hook_post"


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """30 steps; all lines logged."""
    return copy.deepcopy(config_of(tmp_path)) | {"site": SITE, "target": TARGET}


def weights(run: Path) -> bytes:
    return (run / "sae" / "sae_weights.safetensors").read_bytes()


def assert_resumed_to_the_bit(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that fails at its eighth step and is resumed ends with the weights of one that does not stop."""
    whole, step, run = saelab.train(config, [f"out={tmp_path / 'whole'}"]), Trainer.step, tmp_path / "run"

    def fail(self: Trainer, batch: Any) -> Any:
        if self.steps == 7:
            raise SaelabError("stopped")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fail)
        with pytest.raises(SaelabError, match="stopped"):
            saelab.train(config)
    saelab.resume(run)
    assert weights(run) == weights(whole)


def test_a_cache_of_both_sites_trains_as_one_pass_does(config: dict[str, Any], tmp_path: Path) -> None:
    """The cache has both by default. Thresholds are set from the input site."""
    config["sae"] |= {"skip": True, "allocation": "mutual_choice", "n_features": 48}
    config["training"] |= {"tokens": 2000}
    write = {"rows_per_forward": 8, "dtype": "float32", "shard_tokens": 8 * 64}
    cache = saelab.cache(config | {"cache": write}, tmp_path / "cache", tokens=2000)
    assert list(open_cache(cache).sites) == [SITE, TARGET]
    cached = config | {"activations": {"cache": {"path": str(cache), "buffer_tokens": 800}}}
    for each in (config, cached):
        whole = saelab.train(each, [f"out={tmp_path / 'whole'}"], force=True)
        lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["fvu"] < 0.9 * lines[0]["fvu"]
        record = json.loads((whole / "train.json").read_text())
        assert record["target_scale"] > 0 and record["calibration_tokens"] > 0
    with pytest.raises(SaelabError, match=f"no {WIDE}|{WIDE}"):
        saelab.train(cached, [f"target={WIDE}", f"out={tmp_path / 'no'}"])


def test_stopped_after_some_steps_and_resumed_equals_never_stopped(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["sae"] |= {"skip": True}
    config["training"] |= {"tokens": 2400}
    assert_resumed_to_the_bit(config, tmp_path, monkeypatch)


def test_all_stages_of_a_transcoder(config: dict[str, Any], tmp_path: Path) -> None:
    config["sae"] |= {"skip": True}
    run = saelab.run(config)
    job, sae = Job(settings_of(run / "config.yaml")), saelab.load(run)
    rows, lm = job.held_out(1500), job.lm
    assert sae.transcodes and sae.W_skip is not None and sae.W_skip.any() and "-> " not in sae.metadata["hook_name"]
    assert (sae.metadata["hook_name"], sae.metadata["hook_name_out"]) == (SITE, TARGET)
    assert f"target: {TARGET}" in repr(sae)

    ordinary = lm.ordinary(rows)
    found = {site: value[ordinary] for site, value in lm.activations(rows, [SITE, TARGET]).items()}
    x, y = found[SITE], found[TARGET]
    result = json.loads((run / "eval.json").read_text())
    fvu = ((y - sae(x)).double().square().sum() / (y - y.mean(0)).double().square().sum()).item()
    assert result["fvu"] == pytest.approx(fvu, rel=1e-4) and result["site"] == f"{SITE} -> {TARGET}" and fvu < 1
    again = saelab.fidelity(sae, lm, rows, ce_tokens=600)
    assert again.fvu == pytest.approx(result["fvu"], rel=1e-6)

    manifest = json.loads((run / "features" / "manifest.json").read_text())
    assert (manifest["site"], manifest["target"], manifest["d_in"]) == (SITE, TARGET, 32)
    database = open_database(run / "features")
    assert database.site == summarise(run).site == f"{SITE} -> {TARGET}"
    codes = sae.encode(x)
    np.testing.assert_array_equal(database.table["n_active"], codes.firing_counts().numpy())
    lens = direct_lens(lm, TARGET)
    assert lens is not None and direct_lens(lm, SITE) is None
    expected = next(iter(weight_columns(sae, lens)))
    np.testing.assert_array_equal(np.asarray(database.table["top_logit_tokens"].tolist()), expected["top_logit_tokens"])

    live = open_live(run)
    text = live.encode(rows[0].tolist())
    row = slice(0, int(ordinary[0].sum()))
    assert text.errors is not None and text.norms is not None and live.lens is not None
    at = ordinary[0].nonzero().squeeze(1).numpy()
    np.testing.assert_allclose(text.norms[at], y[row].norm(dim=1), rtol=1e-4)
    np.testing.assert_allclose(text.errors[at], (y - sae(x))[row].norm(dim=1), rtol=1e-3, atol=1e-4)

    with pytest.raises(SaelabError, match="transcoder"):
        live.steer(rows[0].tolist(), [])
    for name in ("dark_matter", "steering"):
        with pytest.raises(SaelabError, match="transcoder"):
            saelab.analyse(run, name)
    assert saelab.analyse(run, "dead").figures()
    with pytest.raises(SaelabError, match=r"SAELens has no TopK transcoder with a skip connection"):
        export(run, "saelens", out=tmp_path / "no")
    there = saelab.load(export(run, "sparsify", out=tmp_path / "sparsify"))
    torch.testing.assert_close(there(x), sae(x))


def test_relu_transcoders_are_saved_as_saelens_has_them(config: dict[str, Any], tmp_path: Path) -> None:
    """A target of another width; raw in, raw out."""
    price = {"allocation": "threshold", "sparsity": {"name": "l1", "coefficient": 0.1}}
    for skip, name in ((False, "transcoder"), (True, "skip_transcoder")):
        config["sae"] |= {"skip": skip, **price}
        run = saelab.train(config, [f"target={WIDE}", f"out={tmp_path / name}", "training.tokens=1000"])
        stored = json.loads((run / "sae" / "cfg.json").read_text())
        assert (stored["architecture"], stored["d_in"], stored["d_out"]) == (name, 32, 128)
        peer = saelab.load(export(run, "saelens", out=tmp_path / f"{name}-peer"))
        tensors = load_file(run / "sae" / "sae_weights.safetensors")
        x = torch.randn(5, 32)
        acts = (x @ tensors["W_enc"] + tensors["b_enc"]).relu()
        dense = acts @ tensors["W_dec"] + tensors["b_dec"] + (x @ tensors["W_skip"].T if skip else 0)
        torch.testing.assert_close(peer(x), dense, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_transcoders_and_autoencoders_of_a_sweep_equal_those_trained_alone(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["training"] |= {"tokens": 1200}
    config |= {"out": str(tmp_path / "sweep"), "sweep": {"target": [None, TARGET, WIDE]}}
    runs = runs_in(sweep(config))
    assert len(runs) == 3
    for run in runs[:2]:
        assert_same(contents(run), contents(alone(run)), run.name)


@pytest.mark.slow
def test_controls_of_a_transcoder(config: dict[str, Any]) -> None:
    said: list[str] = []
    run = saelab.run(config, ["training.tokens=400"])
    made = controls(run, kinds=["untrained", "neurons"], say=said.append)
    assert [path.name for path in made] == ["untrained", "neurons"]
    untrained = saelab.load(made[0])
    job = Job(settings_of(run / "config.yaml"))
    rows = job.held_out(600)
    mean = job.lm.activations(rows, [TARGET])[TARGET][job.lm.ordinary(rows)].mean(0)
    assert untrained.transcodes and (untrained.b_dec - mean).norm() < 0.5 * mean.norm()
    assert not saelab.load(made[1]).transcodes
    with pytest.raises(SaelabError, match="directions: there are none"):
        controls(run, kinds=["directions"])


def test_what_a_run_depends_on_changes_with_its_target_only_if_there_is_one(config: dict[str, Any]) -> None:
    settings = settings_of(config)
    plain = replace(settings, target=None)
    found = {Job(each).training_inputs() for each in (settings, plain, replace(settings, target=WIDE))}
    assert len(found) == 3
    without = asdict(plain)
    del without["target"], without["sae"]["skip"]
    assert Job(settings_of(without)).training_inputs() in found


def test_plans_count_both_sites(config: dict[str, Any], tmp_path: Path) -> None:
    settings = settings_of(config)
    plain, wide = replace(settings, target=None), replace(settings, target=WIDE)
    skip = replace(wide, sae=replace(wide.sae, skip=True))
    for plan in (plan_training, plan_evaluation, plan_index, lambda each: plan_cache(each, tmp_path / "c", 1000)):
        totals = [sum(need.bytes for need in plan(each).needs) for each in (plain, wide)]
        assert totals[0] < totals[1]
    needs = [{need.what: need.bytes for need in plan_training(each).needs} for each in (plain, wide, skip)]
    n_features = settings.sae.n_features
    assert [each["autoencoder"] - needs[0]["autoencoder"] for each in needs] == [
        0,
        4 * (128 - 32) * (n_features + 1),
        4 * (128 - 32) * (n_features + 1) + 4 * 32 * 128,
    ]


def test_settings_that_contradict_a_target_are_named(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for overrides, message in (
        ([f"target={SITE}"], "target: is the site itself"),
        (["activations.inputs=layer_norm"], "activations.inputs: layer_norm goes with one site"),
        (["target=null", "sae.skip=true"], "sae.skip: W_skip of an autoencoder would be the identity"),
        (["sae.encoder=tied"], "sae.encoder: tied: encoder and decoder rows of a transcoder"),
        (["sae.affinity=gradient"], "sae.affinity: gradient: its gradients are those at one site"),
        (["target=2026-01-02"], "target: .* has no site '2026-01-02'"),
        (["target=null", "sae.skip=false", "more_sites=[up]"], "more_sites: .* has no site 'up'"),
        (["target=blocks.1.hook_mlp_outt"], "target: .* has no site 'blocks.1.hook_mlp_outt'.*blocks.1.hook_mlp_out"),
    ):
        with pytest.raises(SaelabError, match=message):
            Job(settings_of(config, overrides)).lm  # noqa: B018
    run = saelab.train(config, ["training.tokens=400"])
    with pytest.raises(SaelabError, match=r"target: .* is 128 wide, and the autoencoder in .* gives 32"):
        saelab.evaluate(run, [f"target={WIDE}"])
    code, _, err = command(monkeypatch, capsys, "eval", run, "target=null")
    assert code == 2 and "target: is null, and in" in err


def test_a_perfect_transcoder_leaves_the_model_as_it_is() -> None:
    """CE with the target site replaced by the MLP's own output of the clean input."""

    class Mlp:
        n_features = 1

        def __init__(self) -> None:
            self.inner = saelab.SparseAutoencoder(32, 1, 1)

        def encode(self, x: torch.Tensor) -> saelab.Codes:
            return self.inner.encode(x)

        def decode(self, codes: saelab.Codes, x: torch.Tensor) -> torch.Tensor:
            return lm.model.transformer.h[1].mlp(x)  # type: ignore[index, operator, union-attr]

    lm = language_model("gpt2")
    rows = torch.randint(3, 300, (6, CONTEXT), generator=torch.Generator().manual_seed(0))
    found = saelab.fidelity(Mlp(), lm, rows, Sites("blocks.1.ln2.hook_out", TARGET), ce_tokens=100)
    assert found.fvu < 1e-9 and abs(found.delta_ce) < 1e-5 and found.ce_zero_ablated != found.ce_clean
    zero = saelab.SparseAutoencoder(32, 4, 2, d_out=32)
    none = saelab.fidelity(zero, lm, rows, Sites("blocks.1.ln2.hook_out", TARGET), ce_tokens=100)
    assert none.ce_spliced == pytest.approx(none.ce_zero_ablated, rel=1e-9)
    with pytest.raises(SaelabError, match="a transcoder needs a target"):
        saelab.fidelity(zero, lm, rows, "blocks.1.ln2.hook_out")
