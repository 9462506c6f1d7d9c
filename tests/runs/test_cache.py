"""The stage that writes a cache from a model and a text, and training on this cache."""

import json
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab.activations.cache.reader import open_cache
from saelab.activations.stream import ActivationBatch, read_activations, run_model
from saelab.errors import SaelabError
from saelab.runs.cache import cache, verify
from saelab.runs.job import Job, settings_of
from saelab.sae.initial import initialise
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.training.trainer import train
from tests.activations.cache.made import contents
from tests.activations.shuffled import shuffled
from tests.runs.test_stages import small
from tests.tiny import CONTEXT

SITES = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]
WRITE = {"sites": SITES, "rows_per_forward": 4, "shard_tokens": 20 * CONTEXT, "dtype": "float32"}


def config(tmp_path: Path, **write) -> dict:
    return small(tmp_path) | {"cache": WRITE | write}


def batches_in_order(folder: Path, site: str, gradients: bool = False) -> ActivationBatch:
    """The whole cache, in the order written."""
    blocks = list(open_cache(folder).in_order(site, gradients=gradients))
    fields = ("values", "tokens", "rows", "positions", *(("gradients",) if gradients else ()))
    return ActivationBatch(*(torch.cat([getattr(block, name) for block in blocks]) for name in fields))


@pytest.mark.parametrize("gradients", [False, True])
def test_the_cache_equals_the_activations_of_the_model(gradients: bool, tmp_path: Path) -> None:
    settings = config(tmp_path, gradients=gradients)
    folder = cache(settings, tmp_path / "cache", tokens=2000)
    job = Job(settings_of(settings))
    opened = open_cache(folder)
    assert opened.tokens >= 2000 and list(opened.sites) == SITES
    rows = list(islice(job.corpus.train_rows(seed=0), sum(shard["rows"] for shard in opened.manifest.shards)))
    assert len(rows) % 4 == 0
    for site in SITES:
        live = list(read_activations(job.lm, rows, site, 4, gradients=gradients))
        stored = batches_in_order(folder, site, gradients)
        assert torch.equal(stored.values, torch.cat([batch.values for batch in live]))
        for name in ("tokens", "rows", "positions"):
            assert torch.equal(getattr(stored, name), torch.cat([getattr(batch, name) for batch in live]))
        if gradients:
            assert torch.equal(stored.gradients, torch.cat([batch.gradients for batch in live]))


def test_special_tokens_are_stored_if_requested(tmp_path: Path) -> None:
    settings = config(tmp_path)
    plain = batches_in_order(cache(settings, tmp_path / "plain", tokens=500), SITES[0])
    special = set(Job(settings_of(settings)).lm.special_ids.tolist())
    assert not special.intersection(plain.tokens.tolist())
    asked = settings | {"activations": settings["activations"] | {"special_tokens": True}}
    everything = batches_in_order(cache(asked, tmp_path / "all", tokens=500), SITES[0])
    assert special.intersection(everything.tokens.tolist())
    assert len(everything) % CONTEXT == 0 and everything.positions.bincount().unique().numel() == 1


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_training_is_the_same_from_the_model_and_from_a_cache(beta: float, tmp_path: Path) -> None:
    """Fed the same rows in the same order, in float32, both give the same weights, bit by bit."""
    affinity = {"name": "gradient", "beta": beta} if beta else "activation"
    settings = config(tmp_path, gradients=beta > 0)
    settings["sae"] = {"n_features": 64, "k": 4, "affinity": affinity}
    job = Job(settings_of(settings))
    opened = open_cache(cache(settings, tmp_path / "cache", tokens=6000))
    site, s = job.settings.site, job.settings
    rows = islice(job.corpus.train_rows(seed=0), sum(shard["rows"] for shard in opened.manifest.shards))
    weights = []
    for read in (
        read_activations(job.lm, rows, site, 4, gradients=beta > 0),
        opened.in_order(site, gradients=beta > 0),
    ):
        torch.manual_seed(0)
        first = next(read)
        sae = SparseAutoencoder(first.values.shape[1], 64, 4)
        initialise(sae, opened_sample(opened, site))
        batches = shuffled(chain([first], read), s.training.batch, 2000, seed=0)
        fed = (Batch(batch.values, gradients=batch.gradients) for batch in batches)
        trained = train(sae, fed, s.training, s.sae)
        assert trained.steps == 30
        weights.append([parameter.detach().clone() for parameter in sae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def opened_sample(opened, site: str) -> torch.Tensor:
    return torch.cat([block.values for block in opened.in_order(site)])[:500]


@pytest.mark.parametrize("allocation", ["token_choice", "mutual_choice"])
def test_a_run_on_a_cache_from_its_beginning_to_its_evaluation(allocation: str, tmp_path: Path) -> None:
    settings = config(tmp_path, dtype="bf16")
    cache(settings, tmp_path / "cache", tokens=3000)
    said: list[str] = []
    overrides = [f"activations.cache={tmp_path / 'cache'}", f"sae.allocation={allocation}"]
    run = saelab.train(settings, overrides, say=said.append)
    record = json.loads((run / "train.json").read_text())
    assert record["complete"] and 0.9 * 6000 <= record["tokens"] <= 6000
    assert any("6,000 tokens are trained on and the cache holds" in line for line in said)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 29 and lines[-1]["fvu"] < lines[0]["fvu"]
    assert saelab.evaluate(run).fvu < 1
    live = saelab.train(settings, ["out=" + str(tmp_path / "live"), f"sae.allocation={allocation}"])
    assert saelab.evaluate(run).fvu == pytest.approx(saelab.evaluate(live).fvu, rel=0.15)


def test_the_inputs_of_a_run_depend_on_the_caches_content_and_not_on_its_folder(tmp_path: Path) -> None:
    settings = config(tmp_path)
    cache(settings, tmp_path / "a", tokens=500)
    (tmp_path / "a").rename(tmp_path / "b")
    cache(settings, tmp_path / "a", tokens=500)
    cache(settings, tmp_path / "c", tokens=1000)
    inputs = [Job(settings_of(settings, [f"activations.cache={tmp_path / name}"])).training_inputs() for name in "abc"]
    assert inputs[0] == inputs[1] != inputs[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("context=16", "its context 32, not 16"),
        ("model.dtype=bf16", "its model_dtype 'float32', not 'bfloat16'"),
        ("corpus.held_out=0.3", "its corpus.held_out 0.2, not 0.3"),
        ("activations.special_tokens=true", "its special_tokens False, not True"),
        ("site=blocks.2.hook_resid_post", "holds blocks.1.hook_resid_post, blocks.0.attn.hook_z, not 'blocks.2"),
        ("sae.affinity=gradient", "holds no gradients"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_the_difference_is_named(
    change: str, message: str, tmp_path: Path
) -> None:
    settings = config(tmp_path)
    cache(settings, tmp_path / "cache", tokens=500)
    with pytest.raises(SaelabError) as caught:
        saelab.train(settings, [f"activations.cache={tmp_path / 'cache'}", change])
    assert message in str(caught.value) and str(tmp_path / "cache") in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_model_is_named_by_its_weights(tmp_path: Path) -> None:
    settings = config(tmp_path)
    cache(settings, tmp_path / "cache", tokens=500)
    other = small(tmp_path, "gpt_neox") | {"site": SITES[0], "corpus": settings["corpus"]}
    with pytest.raises(SaelabError, match="its weights '"):
        saelab.train(other, [f"activations.cache={tmp_path / 'cache'}"])


def test_writing_again_verifies_and_one_more_token_is_another_cache(tmp_path: Path) -> None:
    settings = config(tmp_path)
    folder = cache(settings, tmp_path / "cache", tokens=1500)
    before = contents(folder)
    assert verify(folder).tokens >= 1500
    cache(settings, folder, tokens=1500)
    assert contents(folder) == before
    with pytest.raises(SaelabError, match="its tokens 1500, not 1501"):
        cache(settings, folder, tokens=1501)

    shard = next(path for path in before if path.startswith(SITES[1]))
    (folder / shard).write_bytes(before[shard][:-1] + bytes([before[shard][-1] ^ 1]))
    with pytest.raises(SaelabError, match=shard):
        verify(folder)
    said: list[str] = []
    cache(settings, folder, tokens=1500, say=said.append)
    assert contents(folder) == before and any(shard in line for line in said)


def test_the_name_of_a_model_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    renamed = settings | {"model": "~/renamed"}
    (tmp_path / "renamed").symlink_to(settings["model"])
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = cache(renamed, tmp_path / "cache", tokens=500)
    before = contents(folder)
    assert open_cache(folder).identity["model"] == "renamed"
    shard = next(path for path in before if path.startswith(SITES[0]))
    (folder / shard).unlink()
    cache(settings, folder, tokens=500)
    assert contents(folder) == before


def test_settings_that_gave_no_token_may_be_changed(tmp_path: Path) -> None:
    settings = config(tmp_path, lanes=2)
    with pytest.raises(SaelabError, match="the text holds no token to store"):
        cache(settings, tmp_path / "cache", ["corpus.min_tokens=1000000", "corpus.held_out=0.5"], tokens=500)
    cache(settings, tmp_path / "cache", tokens=500)
    assert contents(tmp_path / "cache") == contents(cache(settings, tmp_path / "other", tokens=500))


def test_variables_of_other_launchers_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    monkeypatch.setenv("RANK", "1")
    assert open_cache(cache(config(tmp_path), tmp_path / "cache", tokens=500)).tokens >= 500


def test_smaller_batches_than_requested_are_reported(tmp_path: Path) -> None:
    settings = config(tmp_path)
    n = open_cache(cache(settings, tmp_path / "cache", tokens=500)).tokens
    said: list[str] = []
    overrides = [f"activations.cache={tmp_path / 'cache'}", f"training.batch={n - 1}", f"training.tokens={4 * n}"]
    run = saelab.train(settings, overrides, say=said.append)
    assert any(f"cut into batches of {n / 2:,.0f}, not {n - 1:,}" in line for line in said)
    assert json.loads((run / "train.json").read_text())["tokens"] == pytest.approx(2 * n, abs=2 * n / 10)
    said.clear()
    saelab.train(settings, [*overrides, f"training.batch={n // 4 + 1}"], force=True, say=said.append)
    assert not any("cut into batches" in line for line in said), said


def test_a_cache_in_the_run_folder_is_not_deleted_with_it(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = saelab.train(settings)
    folder = cache(settings, run / "cache", tokens=500)
    before = contents(run)
    with pytest.raises(SaelabError, match=r"would be replaced, and activations\.cache .* lies in it"):
        saelab.train(settings, [f"activations.cache={folder}"], force=True)
    assert contents(run) == before


def test_a_text_with_too_few_tokens_is_reported(tmp_path: Path) -> None:
    messages: list[str] = []
    settings = config(tmp_path)
    folder = cache(settings, tmp_path / "cache", tokens=10**6, say=messages.append)
    rows = sum(1 for _ in Job(settings_of(settings)).corpus.train_rows(seed=0))
    assert sum(shard["rows"] for shard in open_cache(folder).manifest.shards) == rows
    assert any("the text ended before the requested 1,000,000 tokens" in line for line in messages)


def test_lanes_are_the_same_by_one_process_and_share_out_all_text(tmp_path: Path) -> None:
    whole = config(tmp_path)
    n = open_cache(cache(whole, tmp_path / "one", tokens=10**6)).tokens
    shared = config(tmp_path, lanes=3)
    opened = open_cache(cache(shared, tmp_path / "three", tokens=10**6))
    assert abs(opened.tokens - n) < 3 * CONTEXT
    assert {shard["name"][:2] for shard in opened.manifest.shards} == {"00", "01", "02"}


def test_several_sites_share_one_pass_and_one_file_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr("saelab.runs.cache.run_model", lambda *a, **k: passes.append(1) or run_model(*a, **k))
    folder = cache(config(tmp_path), tmp_path / "cache", tokens=1000)
    manifest = open_cache(folder).manifest
    assert len(passes) == sum(shard["rows"] for shard in manifest.shards) // 4
    assert sorted(path.name for path in folder.iterdir()) == sorted(["manifest.json", "tokens", *SITES])
    name = manifest.shards[0]["name"]
    lengths = {len(next(iter(load_file(folder / f / f"{name}.safetensors").values()))) for f in ["tokens", *SITES]}
    assert lengths == {manifest.shards[0]["tokens"]}


def test_the_order_on_disk_is_that_of_the_seed(tmp_path: Path) -> None:
    settings = config(tmp_path)
    first = batches_in_order(cache(settings, tmp_path / "0", tokens=500), SITES[0]).tokens
    other = batches_in_order(cache(settings, tmp_path / "1", ["seed=1"], tokens=500), SITES[0]).tokens
    assert not np.array_equal(first[:400], other[:400])
