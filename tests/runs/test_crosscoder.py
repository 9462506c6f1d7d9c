"""A run with more sites: read side by side, trained, resumed, evaluated at each site, indexed."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saelab
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.lm.splice import SplicedRuns
from saelab.runs.decoder import site_shares
from saelab.runs.job import Job, settings_of
from saelab.runs.live import open_live
from saelab.runs.plan import plan_training
from saelab.runs.summary import summarise
from saelab.runs.sweep import sweep
from saelab.sae.interop.sae_bench import SaeBenchAutoencoder
from saelab.sae.side_by_side import factors_of
from tests.runs.test_resume import assert_same, config_of
from tests.runs.test_sweep import alone, contents, runs_in
from tests.runs.test_transcoder import assert_resumed_to_the_bit

SITES = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.mlp.hook_post"]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """30 steps; all lines logged. The sites are 32, 32 and 128 wide."""
    return copy.deepcopy(config_of(tmp_path)) | {"site": SITES[0], "more_sites": SITES[1:]}


@pytest.mark.parametrize("inputs", [pytest.param("scale", marks=pytest.mark.slow), "centre"])
def test_a_run_that_stopped_is_resumed_to_the_bit(
    config: dict[str, Any], inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["sae"] |= {"allocation": "mutual_choice"}
    config["training"] |= {"tokens": 2400}
    config["activations"] |= {"inputs": inputs}
    assert_resumed_to_the_bit(config, tmp_path, monkeypatch)


def test_all_stages_of_a_crosscoder(config: dict[str, Any]) -> None:
    run = saelab.run(config)
    job, sae = Job(settings_of(run / "config.yaml")), saelab.load(run)
    rows, lm = job.held_out(1500), job.lm
    assert sae.site_widths == (32, 32, 128) and sae.d_in == 192 and sae.metadata["hook_names"] == SITES
    assert f"further sites: {SITES[1]}, {SITES[2]}" in repr(sae)
    ordinary, found = lm.ordinary(rows), lm.activations(rows, SITES)
    x = torch.cat([found[site][ordinary] for site in SITES], 1)
    factors, columns = factors_of(sae), [slice(0, 32), slice(32, 64), slice(64, 192)]
    shares = saelab.site_norms(sae).shares
    np.testing.assert_allclose(site_shares(run), shares, rtol=1e-5)
    np.testing.assert_allclose(site_shares(run, 3), shares[3:4], rtol=1e-5)
    xhat, scaled = sae(x), (x * factors).double()
    error, deviation = (scaled - xhat * factors).square(), (scaled - scaled.mean(0)).square()
    result = json.loads((run / "eval.json").read_text())
    assert result["fvu"] == pytest.approx((error.sum() / deviation.sum()).item(), rel=1e-4) and result["fvu"] < 1
    assert [each["site"] for each in result["sites"]] == SITES
    for each, at in zip(result["sites"], columns, strict=True):
        fvu = (error[:, at].sum() / deviation[:, at].sum()).item()
        assert each["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert result["delta_ce"] == result["sites"][0]["delta_ce"]

    few = saelab.fidelity(sae, lm, rows[:8], ce_tokens=10_000)
    kept = lm.scored(rows[:8])
    for each, at, site in zip(few.sites, columns, SITES, strict=True):
        part = xhat[: int(ordinary[:8].sum()), at]
        clean, spliced = SplicedRuns(lm, site)(rows[:8], [lambda x, part=part: part.to(x.dtype)])
        losses = [
            torch.nn.functional.cross_entropy(logits[kept], rows[:8].long().roll(-1, 1)[kept]).item()
            for logits in (clean, spliced)
        ]
        assert each["delta_ce"] == pytest.approx(losses[1] - losses[0], abs=1e-4)
    frame = few.to_frame()
    assert f"fvu at {SITES[2]}" in frame.index

    database = open_database(run / "features")
    assert database.site == summarise(run).site == " + ".join(SITES)
    np.testing.assert_array_equal(database.table["n_active"], sae.encode(x).firing_counts().numpy())
    assert json.loads((run / "features" / "manifest.json").read_text())["more_sites"] == SITES[1:]
    norms = saelab.site_norms(sae)
    assert norms.sites == tuple(SITES) and norms.shares.shape == (64, 3)
    live = open_live(run)
    text = live.encode(rows[0].tolist())
    assert text.errors is not None and text.errors[1:].min() > 0 and live.lens is None
    with pytest.raises(SaelabError, match="a crosscoder's features write to several sites"):
        live.steer(rows[0].tolist(), [])
    for name in ("dark_matter", "steering"):
        with pytest.raises(SaelabError, match="crosscoder"):
            saelab.analyse(run, name)
    with pytest.raises(SaelabError, match="a crosscoder reads several"):
        SaeBenchAutoencoder(sae)
    with pytest.raises(SaelabError, match=r"more_sites: the autoencoder in .* has 3 sites, not 2"):
        saelab.evaluate(run, [f"more_sites=[{SITES[1]}]"])


@pytest.mark.slow
def test_a_sweep_of_crosscoders_from_a_cache_equals_runs_alone(config: dict[str, Any], tmp_path: Path) -> None:
    config["training"] |= {"tokens": 1200}
    write = {"rows_per_forward": 8, "dtype": "float32", "shard_tokens": 8 * 64}
    cache = saelab.cache(config | {"cache": write}, tmp_path / "cache", tokens=2000)
    config |= {"activations": {"cache": {"path": str(cache), "buffer_tokens": 800}}}
    out = sweep(config | {"out": str(tmp_path / "sweep"), "sweep": {"sae.k": [2, 4]}})
    for run in runs_in(out)[:1]:
        assert_same(contents(run), contents(alone(run)), run.name)


def test_settings_of_a_crosscoder(config: dict[str, Any]) -> None:
    for overrides, message in (
        ([f"more_sites=[{SITES[0]}]"], f"more_sites: {SITES[0]} is given twice, or is `site` itself"),
        ([f"target={SITES[1]}"], r"target: (is|a crosscoder reconstructs)"),
        (["activations.inputs=whiten"], r"activations\.inputs: whiten goes with one site"),
        (["sae.affinity=gradient"], r"sae\.affinity: gradient"),
    ):
        with pytest.raises(SaelabError, match=message):
            settings_of(config, overrides)
    settings = settings_of(config)
    plain = replace(settings, more_sites=())
    assert Job(settings).training_inputs() != Job(plain).training_inputs()
    needs = [{need.what: need.bytes for need in plan_training(each).needs} for each in (plain, settings)]
    assert needs[1]["autoencoder"] - needs[0]["autoencoder"] == 4 * (160 * 64 * 2 + 160)
