"""What a plan says is what the tensors, the files and, for a whole run, the process come to."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from saelab.activations.cache.layout import activations_file, files_of
from saelab.activations.cache.reader import open_cache
from saelab.errors import SaelabError
from saelab.features.index import Index
from saelab.memory import Need
from saelab.runs import job, plan
from saelab.runs.cache import cache
from saelab.runs.config import RunSettings, settings_from
from saelab.runs.feed import cache_group_tokens
from saelab.runs.job import settings_of
from saelab.runs.plan import Plan, plan_cache, plan_index, plan_training
from saelab.runs.stages import index
from saelab.runs.train import resume, train
from saelab.sae.thresholds import CALIBRATION_TOKENS
from saelab.training.needs import STATE_TEXT
from tests.faults.tools import command
from tests.tiny import CONTEXT, NEEDS_NUMBERS, model_folder, text

SITE = "blocks.1.hook_resid_post"


def settings(out: Path, **sections: Any) -> RunSettings:
    return settings_from(
        {
            "out": str(out / "run"),
            "site": SITE,
            "context": CONTEXT,
            "device": "cpu",
            "model": str(model_folder("gpt2")),
            "sae": {"n_features": 128, "k": 4},
            "training": {"tokens": 4096, "batch": 256},
            **sections,
        }
    )


def needs(found: Plan) -> dict[str, int]:
    assert len({need.what for need in found.needs}) == len(found.needs)
    return {need.what: need.bytes for need in found.needs}


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_gradients_cost_a_backward_pass_and_sites_their_activations(tmp_path: Path) -> None:
    def need(**write: Any) -> int:
        return needs(plan_cache(settings(tmp_path, cache=write), tmp_path / "cache", 4096))["pass of the model"]

    assert need(gradients=True) > 2 * need()
    assert need(sites=[SITE, "blocks.0.hook_resid_post"]) > need()
    assert need(rows_per_forward=64) == pytest.approx(2 * need(rows_per_forward=32), rel=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_cache_takes_the_disk_and_its_reader_the_buffers_that_were_planned(
    tmp_path: Path, dtype: str, gradients: bool
) -> None:
    corpus, folder = tmp_path / "text.txt", tmp_path / "cache"
    corpus.write_text(text(2000))
    write = {"dtype": dtype, "gradients": gradients, "rows_per_forward": 8, "shard_tokens": 1024, "lanes": 2}
    chosen = settings(tmp_path, corpus=str(corpus), cache=write)
    tokens, one_pass = 5000, 8 * CONTEXT
    planned = needs(plan_cache(chosen, folder, tokens))
    cache(chosen, folder, tokens=tokens)
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    each = sum(
        c.token_bytes
        for f in files_of({"sites": {SITE: 32}, "dtype": dtype, "gradients": gradients})
        for c in f.columns
    )
    stored = open_cache(folder).tokens
    assert stored * each < on_disk <= planned["cache"] < (tokens + 2 * one_pass) * each * 1.2
    assert planned["shards"] == 2 * 1024 * each

    trained = settings(
        tmp_path, corpus=str(corpus), activations={"cache": {"path": str(folder), "buffer_tokens": 3000}}
    )
    needed = needs(plan_training(trained))
    assert trained.activations.cache
    group = cache_group_tokens(trained, trained.activations.cache)
    with open_cache(folder).batches(SITE, 256, seed=0, buffer_tokens=group) as read:
        assert needed["shuffle buffers"] == nbytes(tensor for buffer in read._buffers for tensor in buffer)
    assert "pass of the model" not in needed  # nothing but the cache is read


def test_what_an_interrupted_cache_holds_need_not_be_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    whole = needs(plan_cache(settings(tmp_path), folder, 4096))["cache"]
    done = folder / activations_file(SITE, 32, "bfloat16").path("00-00000")
    done.parent.mkdir(parents=True)
    done.write_bytes(bytes(1000))
    assert needs(plan_cache(settings(tmp_path), folder, 4096))["cache"] == whole  # some other folder's files
    (folder / "unfinished").mkdir()
    assert needs(plan_cache(settings(tmp_path), folder, 4096))["cache"] == whole - 1000
    done.write_bytes(bytes(10 * whole))
    assert needs(plan_cache(settings(tmp_path), folder, 4096))["cache"] == 0


def test_low_precision_and_thresholds_show_in_the_plan(tmp_path: Path) -> None:
    narrow, wide = (
        needs(plan_training(settings(tmp_path, model={"name": str(model_folder("gpt2")), "dtype": dtype})))
        for dtype in ("bf16", "fp32")
    )
    assert narrow["model"] * 2 == wide["model"] and narrow["pass of the model"] < wide["pass of the model"]
    assert "thresholds" not in wide
    mutual = needs(plan_training(settings(tmp_path, sae={"n_features": 128, "k": 4, "allocation": "mutual_choice"})))
    assert mutual["thresholds"] > 4 * CALIBRATION_TOKENS * 8


def test_a_plan_that_fits_says_nothing_and_one_that_does_not_says_the_numbers() -> None:
    held = (
        Need("model", 3_000_000, "memory", "some parameters"),
        Need("buffer", 7_000_000_000, "memory", "7 x 10^9"),
        Need("cache", 500, "disk", "500 x 1"),
    )
    Plan(held, {"memory": 7_003_000_000, "disk": 500}).check()
    Plan(held, {}).check()  # what is not known cannot refuse
    with pytest.raises(SaelabError, match=r"^memory: 7\.00 GB \(7,003,000,000 bytes\).*and 6\.00 GB .*buffer 7\.00 GB"):
        Plan(held, {"memory": 6_000_000_000, "disk": 500}).check()
    with pytest.raises(SaelabError, match=r"^disk: 500 bytes .* 499 bytes .*cache\.dtype"):
        Plan(held, {"memory": 10**12, "disk": 499}).check()


def test_the_table_has_every_need_and_what_is_free(tmp_path: Path) -> None:
    found = plan_training(settings(tmp_path))
    assert found.free.keys() == {"memory", "disk"} and all(free > 0 for free in found.free.values())
    found.check()
    console = Console(width=160, record=True, file=(tmp_path / "nowhere").open("w"))
    console.print(found.table("training"))
    shown = console.export_text()
    assert all(need.what in shown for need in found.needs) and "are free" in shown and "training" in shown
    console.print(Plan(found.needs, {}).table("training"))
    assert "is not known" in console.export_text()


def test_processes_share_the_autoencoder_and_the_plan_says_what_they_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, four = (
        plan_training(settings(tmp_path, parallel=parallel)) for parallel in ({}, {"data": 2, "features": 2})
    )
    assert needs(four)["optimiser"] == pytest.approx(needs(alone)["optimiser"] / 2, rel=0.01)
    assert needs(four)["states"] == needs(alone)["states"]
    assert not alone.traffic
    assert {each.what for each in four.traffic} >= {"gradients", "reconstruction", "candidates", "activations"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"out": str(tmp_path / "run"), "model": str(model_folder("gpt2")), "site": SITE}))
    overrides = ["parallel.data=2", "parallel.features=2", f"context={CONTEXT}", "device=cpu"]
    code, shown, _ = command(monkeypatch, capsys, "plan", config, *overrides)
    assert code == 0
    assert "for each of 2 x 2 processes" in shown
    assert all(each.what in shown for each in four.traffic)

    torchrun = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    started = plan_training(settings(tmp_path, parallel={"features": 2}))
    assert started.traffic == four.traffic
    assert started.total("memory") == 2 * four.total("memory")
    assert started.total("disk") == four.total("disk")


def test_a_plan_names_what_the_model_has_not(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=r"Nearest: .*blocks\.1\.hook_resid_post"):
        plan_training(settings(tmp_path, site="blocks.1.hook_residpost"))
    with pytest.raises(SaelabError, match=r"Nearest: .*blocks\.1\.hook_resid_post"):
        plan_cache(settings(tmp_path, cache={"sites": ["blocks.1.hook_residpost"]}), tmp_path, 100)
    with pytest.raises(SaelabError, match="takes at most 64 tokens"):
        plan_training(settings(tmp_path, context=65))
    with pytest.raises(SaelabError, match="nowhere"):
        plan_training(settings(tmp_path, activations={"cache": str(tmp_path / "nowhere")}))


def files_of_folder(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leave_free(monkeypatch: pytest.MonkeyPatch, where: str, free: int) -> None:
    """Let `free` bytes be free in one place, and let no model be loaded."""
    monkeypatch.setattr(plan, {"memory": "free_memory", "disk": "free_on_disk"}[where], lambda *folder: free)

    def load(*arguments: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(job, "load_language_model", load)


REFUSED = [
    ("memory", r"^memory: .* are needed, and 1\.00 MB .* `model\.dtype=bf16`"),
    ("disk", r"^disk: .* are needed, and 1\.00 MB .*states .*; checkpoint .*`training\.checkpoint\.keep`"),
]


@pytest.mark.parametrize(("where", "message"), REFUSED)
def test_training_refuses_what_cannot_fit_before_the_model_is_loaded_and_leaves_nothing(
    where: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(text(2000))
    chosen = settings(tmp_path, corpus=str(tmp_path / "text.txt"), sae={"n_features": 2048, "k": 4})
    leave_free(monkeypatch, where, 10**6)
    with pytest.raises(SaelabError, match=message):
        train(chosen)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(("where", "message"), REFUSED)
def test_neither_a_run_to_be_replaced_nor_one_to_be_resumed_is_touched_if_there_is_no_room(
    where: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(text(2000))
    chosen = settings(tmp_path, corpus=str(tmp_path / "text.txt"), sae={"n_features": 2048, "k": 4})
    run = train(chosen)
    before = files_of_folder(run)
    leave_free(monkeypatch, where, 10**6)
    with pytest.raises(SaelabError, match=message):
        train(chosen, ["seed=1"], force=True)
    with pytest.raises(SaelabError, match=message):
        resume(run, ["training.tokens=8192"])
    assert files_of_folder(run) == before


def test_states_and_checkpoint_of_a_run_take_the_disk_that_was_planned(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text(2000))
    training = {"tokens": 4096, "batch": 256, "checkpoint": {"tokens": 1024, "keep": 2}}
    chosen = settings(tmp_path, corpus=str(tmp_path / "text.txt"), training=training)
    planned = needs(plan_training(chosen))
    run = train(chosen)
    state = planned["states"] / 3
    kept = [files_of_folder(folder) for folder in (run / "state").iterdir()]
    assert len(kept) == 2
    for files in kept:
        tensors = next(path for path in files if path.suffix == ".safetensors")
        assert state == nbytes(load_file(tensors).values()) + STATE_TEXT
        assert state - STATE_TEXT < sum(map(len, files.values())) < state
    assert planned["checkpoint"] == nbytes(load_file(run / "sae" / "sae_weights.safetensors").values())
    present = sum(len(content) for files in kept for content in files.values())
    assert needs(plan_training(chosen, resumed=True))["states"] == planned["states"] - present


@pytest.mark.parametrize("k", [1, 16])
def test_a_feature_database_takes_the_disk_that_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    (tmp_path / "text.txt").write_text(text(8000))
    chosen = settings(
        tmp_path, corpus={"source": str(tmp_path / "text.txt"), "held_out": 0.5}, features={"tokens": 6000}
    )
    chosen = settings_of(chosen, [f"sae.k={k}"])
    planned = needs(plan_index(chosen))
    run = train(chosen)
    written: list[int] = []
    pairs: list[int] = []
    finish, remove = Index.finish, shutil.rmtree

    def measured(self: Index) -> Any:
        self.shards.finish()
        written.append(sum(map(len, files_of_folder(run / "features" / "unfinished").values())))
        return finish(self)

    def removed(path: Path, **named: Any) -> None:
        pairs.append(sum(map(len, files_of_folder(Path(path)).values())))
        remove(path, **named)

    monkeypatch.setattr(Index, "finish", measured)
    monkeypatch.setattr("saelab.features.facts_writer.shutil.rmtree", removed)
    index(run)
    sizes = {path.name.removesuffix(".npy"): path.stat().st_size for path in (run / "features").glob("*.npy")}
    groups: dict[str, int] = {}
    for name, size in sizes.items():
        groups[name.split(".")[0]] = groups.get(name.split(".")[0], 0) + size
    facts = groups["tokens"] + groups["by_feature"] + groups["by_token"]
    assert facts <= planned["facts"] <= 1.2 * facts
    assert groups["table"] == planned["table"]
    assert written[0] <= planned["shards"] <= 1.2 * written[0]
    # how many pairs a text has is not known before, and this one repeats itself
    words = groups["vocabulary"] + groups["by_vocabulary"]
    assert words <= planned["vocabulary"] <= 10 * words
    assert pairs[0] <= planned["sorted pairs"] <= 10 * pairs[0]


def test_a_model_that_is_in_memory_is_not_needed_once_more(tmp_path: Path) -> None:
    fresh, loaded = (needs(plan_training(settings(tmp_path), loaded=loaded)) for loaded in (False, True))
    assert fresh.keys() - loaded.keys() == {"model"}


def test_a_model_that_cannot_be_planned_is_trained_on_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text(2000))
    said: list[str] = []
    chosen = settings(tmp_path, corpus=str(tmp_path / "text.txt"), model=str(model_folder(NEEDS_NUMBERS)))
    assert (train(chosen, say=said.append) / "train.json").is_file()
    assert any("it is not checked whether there is enough memory" in line for line in said)
    said.clear()
    assert (cache(chosen, tmp_path / "cache", tokens=1000, say=said.append) / "manifest.json").is_file()
    assert any("it is not checked whether there is enough memory" in line for line in said)


CHILD = """
import json, sys
from pathlib import Path
from saelab.runs.cache import cache
from saelab.runs.job import settings_of
from saelab.runs.plan import plan_cache, plan_index, plan_training
from saelab.runs.stages import index
from saelab.runs.train import train

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

what, config, *overrides = sys.argv[1:]
settings = settings_of(config, overrides)
out = Path(settings.out)
plan, run = {
    "train": (lambda: plan_training(settings), lambda: train(settings)),
    "cache": (lambda: plan_cache(settings, out, settings.training.tokens), lambda: cache(settings, out)),
    "index": (lambda: plan_index(settings), lambda: index(out, overrides)),
}[what]
plan = plan()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
run()
print(json.dumps([status("VmHWM") - before, plan.total("memory")]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process")
@pytest.mark.parametrize(
    ("what", "config", "overrides"),
    [
        ("train", "quickstart", []),
        ("train", "gradient_topk", []),
        ("train", "mutual_choice", []),
        ("cache", "quickstart", ["training.tokens=300000"]),
        ("cache", "quickstart", ["training.tokens=40000", "cache.gradients=true"]),
        ("index", "quickstart", []),
    ],
)
def test_a_plan_bounds_what_the_process_grows_by_and_is_at_most_twice_that(
    tmp_path: Path, what: str, config: str, overrides: list[str]
) -> None:
    command = [what, config, "device=cpu", "training.tokens=20480", f"out={tmp_path / 'out'}", *overrides]
    if what == "index":
        subprocess.run([sys.executable, "-c", CHILD, "train", *command[1:]], check=True)
    done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=True)
    growth, planned = json.loads(done.stdout.splitlines()[-1])
    assert growth <= planned <= 2 * growth
