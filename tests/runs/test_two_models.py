"""A crosscoder of two models: the same tokens through both, live or from a cache, in every stage."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import saelab
from saelab.activations.cache.reader import open_cache
from saelab.analysis.model_diff import ModelDiff
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.lm.settings import ModelSettings
from saelab.lm.splice import SplicedRuns
from saelab.runs import cache as caching
from saelab.runs.controls import controls
from saelab.runs.job import Job, settings_of
from saelab.runs.live import open_live
from saelab.runs.plan import plan_cache, plan_training
from saelab.runs.push import prepare
from saelab.runs.summary import summarise
from saelab.runs.sweep import sweep
from saelab.sae.side_by_side import factors_of, site_shares
from tests.runs.test_resume import assert_same, config_of
from tests.runs.test_sweep import alone, contents, runs_in
from tests.runs.test_transcoder import assert_resumed_to_the_bit
from tests.tiny import language_model, model_folder, planted_direction, planted_folder

SITE, SECOND = "blocks.1.hook_resid_post", "blocks.1.hook_resid_post@second"
WRITE = {"rows_per_forward": 8, "dtype": "float32", "shard_tokens": 8 * 64}


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """30 steps; all lines logged."""
    return copy.deepcopy(config_of(tmp_path)) | {"second_model": str(planted_folder()), "more_sites": [SECOND]}


def test_all_stages_read_both_models(config: dict[str, Any]) -> None:
    run = saelab.run(config)
    result = saelab.evaluate(run)
    job, sae = Job(settings_of(run / "config.yaml")), saelab.load(run)
    rows, models = job.held_out(1500), (language_model("gpt2"), job.lm.models[1])
    ordinary = models[0].ordinary(rows)
    x = torch.cat([lm.activations(rows, [SITE])[SITE][ordinary] for lm in models], 1)
    factors, xhat = factors_of(sae), sae(x)
    scaled = (x * factors).double()
    error, deviation = (scaled - xhat * factors).square(), (scaled - scaled.mean(0)).square()
    assert result.fvu == pytest.approx((error.sum() / deviation.sum()).item(), rel=1e-4) and result.fvu < 0.9
    few = saelab.fidelity(sae, job.lm, rows[:8], ce_tokens=10_000)
    kept, targets = models[0].scored(rows[:8]), rows[:8].long().roll(-1, 1)
    for i, (lm, found) in enumerate(zip(models, few.sites, strict=True)):
        at = slice(32 * i, 32 * i + 32)
        part = xhat[: int(ordinary[:8].sum()), at]
        clean, spliced = SplicedRuns(lm, SITE)(rows[:8], [lambda _, part=part: part])
        losses = [F.cross_entropy(logits[kept], targets[kept]).item() for logits in (clean, spliced)]
        assert found["ce_clean"] == pytest.approx(losses[0], rel=1e-5)
        assert found["delta_ce"] == pytest.approx(losses[1] - losses[0], abs=1e-4)
        own = result.sites[i]
        assert own["fvu"] == pytest.approx((error[:, at].sum() / deviation[:, at].sum()).item(), rel=1e-4)
    assert few.sites[1]["site"] == SECOND and few.sites[0]["ce_clean"] != few.sites[1]["ce_clean"]
    assert sae.metadata["hook_names"] == [SITE, SECOND]
    assert f"second model: {str(planted_folder())[:20]}" in repr(sae)

    database = open_database(run / "features")
    summary = summarise(run)
    ours, theirs = str(model_folder("gpt2")), str(planted_folder())
    assert database.model == summary.model == f"{ours} (@second: {theirs})"
    assert database.site == summary.site == f"{SITE} + {SECOND}" and database.lens is None
    assert summary.fingerprint == " ".join(lm.fingerprint for lm in models)
    np.testing.assert_array_equal(database.table["n_active"], sae.encode(x).firing_counts().numpy())
    live = open_live(run)
    text = live.encode(rows[0].tolist())
    features, values = text.at(1)
    np.testing.assert_allclose(sae.encode(x[:1]).to_dense()[0, features].detach(), values, rtol=1e-5)
    with pytest.raises(SaelabError, match="a crosscoder's features write to several sites"):
        live.steer(rows[0].tolist(), [])
    card = prepare(run, "user/repo").files["README.md"]
    assert isinstance(card, bytes) and f"with `@second` are of the model `{planted_folder().name}`" in card.decode()


@pytest.mark.slow
def test_a_planted_difference_is_a_feature_of_the_second_model(config: dict[str, Any]) -> None:
    site = "blocks.0.hook_resid_pre"
    config |= {"site": site, "more_sites": [f"{site}@second"], "sae": {"n_features": 16, "k": 2}}
    config["training"] |= {"tokens": 20_000, "lr": 2e-2, "checkpoint": {}}
    run = saelab.train(config)
    sae = saelab.load(run)
    shares = site_shares(sae)[:, 1]
    exclusive, others = shares.argmax(), shares.sort().values[:-1]
    assert shares[exclusive] > 0.7 and others.max() < 0.6
    assert F.cosine_similarity(sae.W_dec[exclusive, 32:], planted_direction(), dim=0) > 0.97
    diff = saelab.analyse(run, "model_diff", ["analysis.model_diff.tokens=2000"])
    assert isinstance(diff, ModelDiff) and diff.models == (str(model_folder("gpt2")), str(planted_folder()))
    np.testing.assert_allclose(diff.relative_norm, shares, atol=1e-6)
    # the planted direction is in no token of the first model; what the feature has there is that its tokens differ
    assert abs(diff.error_ratio[exclusive]) < 0.3 and diff.shared.sum() > 0


@pytest.mark.slow
def test_two_identical_models_have_shared_features_only(config: dict[str, Any]) -> None:
    config |= {"second_model": str(model_folder("gpt2")), "sae": {"n_features": 16, "k": 2}}
    config["training"] |= {"tokens": 20_000, "lr": 2e-2, "checkpoint": {}}
    sae = saelab.load(saelab.train(config))
    assert (site_shares(sae) - 0.5).abs().max() < 0.02
    assert F.cosine_similarity(*sae.W_dec.split(32, 1)).min() > 0.99


def test_an_autoencoder_twice_is_a_crosscoder_of_two_identical_models(config: dict[str, Any]) -> None:
    """Half of the encoder at each model and the decoder at both: the codes, FVU and delta CE of the autoencoder."""
    config |= {"second_model": str(model_folder("gpt2"))}
    job = Job(settings_of(config))
    one, both = saelab.SparseAutoencoder(32, 16, 3), saelab.SparseAutoencoder(64, 16, 3)
    torch.manual_seed(0)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    both.site_widths = (32, 32)
    both.load_state_dict(
        {
            "W_enc": torch.cat([one.W_enc / 2] * 2, 1),
            "b_enc": one.b_enc,
            "W_dec": torch.cat([one.W_dec] * 2, 1),
            "b_dec": torch.cat([one.b_dec] * 2),
        }
    )
    rows = job.held_out(1000)
    ours = saelab.fidelity(both, job.lm, rows, job.settings.sites, ce_tokens=300)
    plain = saelab.fidelity(one, job.lm.models[0], rows, SITE, ce_tokens=300)
    assert torch.equal(ours.counts, plain.counts) and ours.fvu == pytest.approx(plain.fvu, rel=1e-5)
    for each in ours.sites:
        assert each["fvu"] == pytest.approx(plain.fvu, rel=1e-5)
        assert each["ce_clean"] == plain.ce_clean and each["delta_ce"] == pytest.approx(plain.delta_ce, abs=1e-5)
    assert (site_shares(both) == 0.5).all()


@pytest.mark.slow
def test_a_run_that_stopped_is_resumed_to_the_bit(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["training"] |= {"tokens": 2400}
    assert_resumed_to_the_bit(config, tmp_path, monkeypatch)


def test_a_cache_holds_the_activations_of_both_models_bit_for_bit(config: dict[str, Any], tmp_path: Path) -> None:
    folder = saelab.cache(config | {"cache": WRITE}, tmp_path / "cache", tokens=300)
    cache, job = open_cache(folder), Job(settings_of(config))
    assert cache.sites == {SITE: 32, SECOND: 32}
    second = job.lm.models[1]
    assert cache.identity["second_weights"] == second.fingerprint != cache.identity["weights"]
    assert cache.identity["second_model"] == planted_folder().name
    ids = torch.stack([torch.from_numpy(row) for _, row in zip(range(8), job.corpus.train_rows(seed=0), strict=False)])
    kept = second.ordinary(ids)
    for site, lm in ((SITE, job.lm.models[0]), (SECOND, second)):
        stored = load_file(folder / site / "00-00000.safetensors")["activations"][: int(kept.sum())]
        assert torch.equal(stored, lm.activations(ids, [SITE])[SITE][kept])


@pytest.mark.slow
def test_a_cache_of_two_models_is_continued_and_trained_on(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [saelab.cache(config | {"cache": WRITE}, tmp_path / "whole", tokens=1500)]
    passes, run_model = iter(range(5)), caching.run_model

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(passes, None) is None:
            raise SaelabError("stopped")
        return run_model(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(caching, "run_model", fail)
        with pytest.raises(SaelabError, match="stopped"):
            saelab.cache(config | {"cache": WRITE}, tmp_path / "continued", tokens=1500)
    caches.append(saelab.cache(config | {"cache": WRITE}, tmp_path / "continued", tokens=1500))
    files = [
        {path.relative_to(each): path.read_bytes() for path in each.rglob("*.*") if path.is_file()} for each in caches
    ]
    assert files[0] == files[1] and len(files[0]) > 6

    cached = config | {"activations": {"cache": {"path": str(caches[0]), "buffer_tokens": 800}}}
    cached["training"] |= {"tokens": 1000}
    run = saelab.train(cached)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    alone = {name: value for name, value in cached.items() if name not in ("second_model", "more_sites")}
    saelab.train(alone | {"out": str(tmp_path / "alone")})  # an autoencoder of the first model reads the same cache
    third = tmp_path / "third"
    shutil.copytree(model_folder("gpt2"), third)
    with pytest.raises(SaelabError, match=r"made for something else than this run trains on: its second_weights"):
        saelab.train(cached, [f"second_model={third}", "out=other"])
    single = saelab.cache(alone | {"activations": {}, "cache": WRITE}, tmp_path / "single", tokens=500)
    with pytest.raises(SaelabError, match=f"holds {SITE}, not '{SECOND}'"):
        saelab.train(cached, [f"activations.cache.path={single}", "out=other"])


@pytest.mark.slow
def test_another_second_model_is_not_that_of_the_run(config: dict[str, Any], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(planted_folder(), mine)
    config["training"] |= {"tokens": 600}
    run = saelab.train(config | {"second_model": str(mine)})
    assert Job(settings_of(config)).training_inputs() == json.loads((run / "train.json").read_text())["inputs"]
    before = saelab.evaluate(run)
    assert saelab.evaluate(run, [f"second_model={planted_folder()}"]).to_dict() == before.to_dict()
    saelab.evaluate(run, [f"second_model={model_folder('gpt2')}"])
    assert "second_model.name" in json.loads(next(run.glob("eval-*.json")).read_text())["differs"]
    shutil.rmtree(mine)
    shutil.copytree(model_folder("gpt2"), mine)
    with pytest.raises(SaelabError, match=r"the second_model .*mine is not what it was .* with second_model=PATH"):
        saelab.evaluate(run)
    with pytest.raises(SaelabError, match=r"the model .*mine is not what it was in training"):
        open_live(run)


@pytest.mark.slow
def test_a_sweep_equals_runs_alone_and_controls_are_made(config: dict[str, Any], tmp_path: Path) -> None:
    config["training"] |= {"tokens": 1200}
    out = sweep(config | {"out": str(tmp_path / "sweep"), "sweep": {"sae.k": [2, 4]}})
    run = runs_in(out)[1]
    assert_same(contents(run), contents(alone(run)), run.name)
    saelab.index(run)
    made = controls(run, reseeds=1)
    assert [path.name for path in made] == ["untrained", "neurons", "frozen_decoder", "frozen_encoder", "reseed1"]
    neurons = settings_of(made[1] / "config.yaml")
    assert neurons.second_model is None and neurons.site == "blocks.1.mlp.hook_post"


def test_settings_of_two_models(config: dict[str, Any], tmp_path: Path) -> None:
    for overrides, message in (
        (["more_sites=[blocks.2.hook_resid_post]"], r"more_sites: names no site of second_model; write, .*@second"),
        (["second_model=null"], "second_model: is required"),
        ([f"site={SECOND}", f"more_sites=[{SITE}]"], r"site: .* is a site of the second model; name it in more_sites"),
        (["more_sites=[]", f"target={SECOND}"], r"target: .* is a site of the second model"),
        ([f"more_sites=[{SECOND},{SECOND}]"], "@second is given twice"),
    ):
        with pytest.raises(SaelabError, match=message):
            settings_of(config, overrides)
    plain = settings_of({name: value for name, value in config.items() if name not in ("second_model", "more_sites")})
    settings = settings_of(config)
    assert settings.second_model == ModelSettings(str(planted_folder()))
    for plan_of in (plan_training, lambda each: plan_cache(each, tmp_path / "cache", 1000)):
        needs = {need.what: need.bytes for need in plan_of(settings).needs}
        alone = {need.what: need.bytes for need in plan_of(plain).needs}
        assert needs["second model"] == needs["model"] == alone["model"]
