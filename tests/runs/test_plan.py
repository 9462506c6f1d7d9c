"""What a plan says is what the tensors, the files and, for a whole run, the process come to."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from saelab.activations.cache.layout import activations_file, files_of
from saelab.activations.cache.reader import open_cache
from saelab.activations.shuffle import Group, cut_group, group_tokens
from saelab.activations.stream import ActivationBatch
from saelab.errors import SaelabError
from saelab.lm.load import outlined_language_model
from saelab.lm.model import LanguageModel
from saelab.memory import held_by
from saelab.runs import plan
from saelab.runs.cache import cache
from saelab.runs.config import RunSettings, settings_from
from saelab.runs.feed import shuffled_together
from saelab.runs.plan import Need, Plan, plan_cache, plan_training
from saelab.sae.allocation.rules import FeatureChoice, TokenChoice
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.settings import SaeSettings
from saelab.sae.thresholds import calibrate
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer
from tests.tiny import CONTEXT, KINDS, language_model, model_folder, random_rows, text

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


def test_an_autoencoder_its_gradients_and_its_optimiser_are_what_a_step_leaves(tmp_path: Path) -> None:
    found = needs(plan_training(settings(tmp_path)))
    sae = SparseAutoencoder(32, 128, 4)
    x = torch.randn(256, 32)
    sae.initialise(x)
    trainer = Trainer(sae, TrainingSettings(tokens=256, batch=256), SaeSettings(128, 4))
    trainer.step(Batch(x))
    parameters = list(sae.parameters())
    assert found["autoencoder"] == found["checkpoint"] == nbytes(parameters)
    assert found["its gradients"] == nbytes(p.grad for p in parameters)
    moments = [moment[name] for moment in trainer.optimiser.state_dict().values() for name in ("exp_avg", "exp_avg_sq")]
    assert found["optimiser"] == nbytes(moments)


@pytest.mark.parametrize("selection", ["float32", "bfloat16"])
@pytest.mark.parametrize("allocation", ["token_choice", "feature_choice"])
@pytest.mark.parametrize("affinity", ["activation", "gradient"])
def test_pre_activations_are_the_scratch_memory_of_a_step(
    tmp_path: Path, selection: str, allocation: str, affinity: str
) -> None:
    n_features, batch = 6144, 4096  # several tiles
    sae_settings = {
        "n_features": n_features,
        "k": 1,
        "selection": selection,
        "allocation": allocation,
        "affinity": affinity,
    }
    found = needs(plan_training(settings(tmp_path, sae=sae_settings, training={"tokens": 8192, "batch": batch})))
    sae = SparseAutoencoder(32, n_features, 1)
    x = torch.randn(batch, 32)
    sae.initialise(x[:64])
    rule = TokenChoice(1)
    if allocation == "feature_choice":
        rule = FeatureChoice(torch.ones(n_features, dtype=torch.long), n_features)
    gradients = torch.randn_like(x) if affinity == "gradient" else None
    sae.beta = 1.0
    sae.training_pass(Batch(x, gradients=gradients), rule, bf16=selection == "bfloat16")
    assert found["pre-activations"] == sae._scratch.bytes
    if allocation == "token_choice":
        assert found["pre-activations"] < 4 * n_features * batch * (1 if affinity == "activation" else 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_pass_counted_without_numbers_holds_what_the_real_one_holds(kind: str, gradients: bool) -> None:
    sites = [SITE, "blocks.0.hook_mlp_out"]

    def held(lm: LanguageModel, rows: torch.Tensor) -> int:
        return held_by(lambda: lm.activations_and_gradients(rows, sites) if gradients else lm.activations(rows, sites))

    real = language_model(kind)
    measured = held(real, random_rows(real, 6))
    with outlined_language_model(settings(Path(), model=str(model_folder(kind))).model) as lm:
        counted = held(lm, torch.zeros(6, CONTEXT, dtype=torch.long))
    assert counted == measured > 2 * 4 * 6 * CONTEXT * 32


def test_gradients_cost_a_backward_pass_and_sites_their_activations(tmp_path: Path) -> None:
    def need(**write: Any) -> int:
        return needs(plan_cache(settings(tmp_path, cache=write), tmp_path / "cache", 4096))["pass of the model"]

    assert need(gradients=True) > 2 * need()
    assert need(sites=[SITE, "blocks.0.hook_resid_post"]) > need()
    assert need(rows_per_forward=64) == pytest.approx(2 * need(rows_per_forward=32), rel=0.02)


@pytest.mark.parametrize("affinity", ["activation", "gradient"])
def test_a_stream_needs_its_buffer_or_its_sample_and_an_order(tmp_path: Path, affinity: str) -> None:
    sae = {"n_features": 128, "k": 4, "affinity": affinity}

    def planned(buffer: int) -> dict[str, int]:
        return needs(plan_training(settings(tmp_path, sae=sae, activations={"stream": {"buffer_tokens": buffer}})))

    def held(tokens: int) -> int:
        ids, x = torch.zeros(3, dtype=torch.long), torch.zeros(3, 32)
        group = Group(tokens)
        group.add(ActivationBatch(x, ids, ids, ids, x if affinity == "gradient" else None))
        assert group._memory
        return nbytes(group._memory.fields)

    group = 19 * 256
    assert planned(5000)["shuffle buffer"] == held(group)
    assert planned(5000)["order of the buffer"] == sum(index.nbytes for index in cut_group(group, 256, 0, 0))
    assert planned(1000)["shuffle buffer"] == held(4096) > held(group_tokens(1000, 256))  # all tokens are sampled


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
    together = shuffled_together(trained, trained.activations.cache)
    with open_cache(folder).batches(SITE, 256, seed=0, buffer_tokens=together) as read:
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
    assert mutual["thresholds"] > 4 * plan.CALIBRATION_TOKENS * 8


@pytest.mark.parametrize("allocation", ["mutual_choice", "feature_choice"])
def test_thresholds_take_what_the_step_left_and_the_need_beside_it(tmp_path: Path, allocation: str) -> None:
    """The tensors alive at once while thresholds are set are bounded by the plan, which is at most twice as much."""
    n_features, k = 128, 16
    sae_settings = {"n_features": n_features, "k": k, "allocation": allocation}
    found = needs(plan_training(settings(tmp_path, sae=sae_settings)))
    step_left = sum(found[what] for what in ("its gradients", "optimiser", "pre-activations", "training step"))
    sae = SparseAutoencoder(32, n_features, k)
    sae.initialise(torch.randn(256, 32))
    density = torch.tensor(k / n_features, dtype=torch.float64)
    densities = density if allocation == "mutual_choice" else density.expand(n_features)
    batches = (torch.randn(2000, 32) for _ in range(plan.CALIBRATION_TOKENS // 2000))
    held = held_by(lambda: calibrate(sae.pre_activations, batches, densities, plan.CALIBRATION_TOKENS))
    assert found["thresholds"] > 0
    assert held <= found["thresholds"] + step_left <= 2 * held


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


def test_a_plan_names_what_the_model_has_not(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=r"Nearest: .*blocks\.1\.hook_resid_post"):
        plan_training(settings(tmp_path, site="blocks.1.hook_residpost"))
    with pytest.raises(SaelabError, match=r"Nearest: .*blocks\.1\.hook_resid_post"):
        plan_cache(settings(tmp_path, cache={"sites": ["blocks.1.hook_residpost"]}), tmp_path, 100)
    with pytest.raises(SaelabError, match="takes at most 64 tokens"):
        plan_training(settings(tmp_path, context=65))
    with pytest.raises(SaelabError, match="nowhere"):
        plan_training(settings(tmp_path, activations={"cache": str(tmp_path / "nowhere")}))


CHILD = """
import json, sys
from pathlib import Path
from saelab.runs import stages as run
from saelab.runs.cache import cache
from saelab.runs.job import settings_of
from saelab.runs.plan import plan_cache, plan_training

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

what, config, *overrides = sys.argv[1:]
settings = settings_of(config, overrides)
out = Path(settings.out)
plan = plan_training(settings) if what == "train" else plan_cache(settings, out, settings.training.tokens)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
run.train(settings) if what == "train" else cache(settings, out)
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
    ],
)
def test_a_plan_bounds_what_the_process_grows_by_and_is_at_most_twice_that(
    tmp_path: Path, what: str, config: str, overrides: list[str]
) -> None:
    command = [what, config, "device=cpu", "training.tokens=20480", f"out={tmp_path / 'out'}", *overrides]
    done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, check=True)
    growth, planned = json.loads(done.stdout.splitlines()[-1])
    assert growth <= planned <= 2 * growth
