"""Training, evaluation and features on models and corpora of other kinds than the demo's."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import saelab
from saelab.activations import source
from saelab.errors import SaelabError
from saelab.features import shards
from saelab.features.database import open_database
from saelab.features.layout import COLUMNS, FACTS
from saelab.runs import feed, folder, stages
from saelab.runs.calibration import CalibrationRows
from saelab.runs.job import Job, settings_of
from saelab.sae.model import SparseAutoencoder
from tests.tiny import CONTEXT, language_model, model_folder, text

SMALL = {
    "context": CONTEXT,
    "device": "cpu",
    "activations": {"stream": {"buffer_tokens": 2000, "rows_per_forward": 8}},
    "sae": {"n_features": 64, "k": 4},
    "training": {"tokens": 6000, "batch": 200, "lr": 3e-3},
    "eval": {"tokens": 1500, "ce_tokens": 600},
    "features": {"tokens": 1500},
}


def small(tmp_path: Path, kind: str = "gpt2") -> dict:
    """A run on a GPT-2 with a text file, or on a NeoX with Parquet."""
    if kind == "gpt2":
        corpus, site = tmp_path / "book.txt", "blocks.1.hook_resid_post"
        corpus.write_text(text(3000))
    else:
        corpus, site = tmp_path / "rows.parquet", "blocks.1.hook_mlp_out"
        pd.DataFrame({"body": [f"{n}: {text(12)}" for n in range(300)]}).to_parquet(corpus)
    source = {"source": str(corpus), "held_out": 0.2} | ({} if kind == "gpt2" else {"text_column": "body"})
    return SMALL | {"out": str(tmp_path / "run"), "site": site, "model": str(model_folder(kind)), "corpus": source}


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_train_eval_and_features_on_another_model_and_corpus(kind: str, tmp_path: Path) -> None:
    said: list[str] = []
    run = saelab.train(small(tmp_path, kind), say=said.append)
    record = json.loads((run / "train.json").read_text())
    assert record["complete"] and record["tokens"] == 6000
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < lines[0]["fvu"] and lines[-1]["step"] == 29

    result = saelab.evaluate(run, say=said.append)
    written = json.loads((run / "eval.json").read_text())
    assert written["fvu"] == result.fvu < 1 and 0 < result.l0 <= 4 and result.tokens >= 1500
    assert any("fewer than 300,000" in line for line in said)

    manifest = saelab.index(run)
    database = open_database(run / "features")
    assert manifest["n_features"] == database.n_features == 64
    assert database.table["n_active"].sum() == pytest.approx(database.n_tokens * result.l0, rel=0.05)

    names = {folder.SETTINGS, folder.METRICS, folder.TRAINING, folder.CHECKPOINT, folder.EVALUATION, folder.FEATURES}
    names.add(folder.STATE)
    assert {path.name for path in run.iterdir()} == names

    sae = saelab.load(run)
    assert sae.metadata["hook_name"] == small(tmp_path, kind)["site"]
    lm = Job(settings_of(run / "config.yaml")).lm
    rows = Job(settings_of(run / "config.yaml")).held_out(1500)
    assert saelab.fidelity(sae, lm, rows, ce_tokens=600).fvu == pytest.approx(result.fvu, rel=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sae.allocation=mutual_choice", "sae.selection=bfloat16"],
        ["sae.allocation={name: feature_choice, capacity: uniform}", "sae.aux=aux_zipf"],
        ["sae.affinity.beta=2", "sae.affinity.name=gradient", "sae.multi_topk=true"],
    ],
    ids=lambda overrides: overrides[0].split("=")[1].strip("{"),
)
def test_other_ways_of_training_end_in_a_checkpoint_that_needs_no_batch(tmp_path: Path, overrides: list[str]) -> None:
    said: list[str] = []
    run = saelab.train(small(tmp_path), overrides, say=said.append)
    sae = saelab.load(run)
    facts = sae.metadata["saelab"]
    assert (sae.threshold is None) == ("gradient" in overrides[-2])
    assert facts["beta"] == sae.beta == (2.0 if sae.threshold is None else 0.0)
    if sae.threshold is not None:
        assert facts["calibration_tokens"] > 0 and any("little held-out text" in line for line in said)
    result = saelab.evaluate(run)
    assert result.fvu < 1 and result.l0 == pytest.approx(4, rel=0.15)
    x = torch.randn(40, 32) * 20
    assert torch.equal(sae.encode(x)[:1].features, sae.encode(x[:1]).features)


def test_the_saved_weights_apply_to_unscaled_activations(tmp_path: Path) -> None:
    run = saelab.train(small(tmp_path))
    sae = saelab.load(run)
    job = Job(settings_of(run / "config.yaml"))
    scale = json.loads((run / "train.json").read_text())["input_scale"]
    assert scale != pytest.approx(1.0, abs=0.05)
    rows = job.held_out(1500)
    x = job.lm.activations(rows, [job.settings.site])[job.settings.site][job.lm.ordinary(rows)]
    assert x.square().sum(1).mean().sqrt() * scale == pytest.approx(32**0.5, rel=0.1)
    fvu = ((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()).item()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert fvu == pytest.approx(last["fvu"], abs=0.15)


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    config = small(tmp_path)
    one, two, other = (
        saelab.train(config, [f"out={tmp_path / name}", f"seed={seed}"])
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    weights = [(run / "sae" / "sae_weights.safetensors").read_bytes() for run in (one, two, other)]
    assert weights[0] == weights[1] != weights[2]


def test_an_existing_run_is_replaced_only_with_force_and_another_folder_never(tmp_path: Path) -> None:
    config = small(tmp_path)
    run = saelab.train(config)
    before = (run / "sae" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(SaelabError, match=r"exists; choose another with out=FOLDER, or give --force"):
        saelab.train(config, ["seed=1"])
    assert (run / "sae" / "sae_weights.safetensors").read_bytes() == before
    saelab.train(config, ["seed=1"], force=True)
    assert (run / "sae" / "sae_weights.safetensors").read_bytes() != before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(SaelabError, match="is not a run folder"):
        saelab.train(config, [f"out={mine}"], force=True)
    (mine / "config.yaml").write_text("a: 1")  # a common name: it does not make a run folder
    with pytest.raises(SaelabError, match="is not a run folder"):
        saelab.train(config, [f"out={mine}"], force=True)
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(SaelabError, match="is not a run folder"):
        saelab.train(config, [f"out={tmp_path / 'link'}"], force=True)
    assert (mine / "thesis.txt").read_text() == "precious"


def test_a_mistake_leaves_no_files(tmp_path: Path) -> None:
    config = small(tmp_path)
    for override, message in [
        ("site=blocks.1.hook_residpost", "Nearest: .*blocks.1.hook_resid_post"),
        ("context=65", "takes at most 64 tokens"),
        (f"corpus={tmp_path / 'nowhere.txt'}", "nowhere.txt"),
        (f"model={tmp_path / 'nowhere'}", "there is no folder"),
        ("device=cuda:99", "device"),
        ("device=mps", "is not auto, cpu, cuda or cuda:N"),
        ("training.batch=1", "at least 2 are needed"),
        ("sae.aux.coefficient=.nan", "aux.coefficient: nan"),
        ("site=embed.hook_in", "holds token ids"),
        (f"out={tmp_path / 'book.txt' / 'run'}", "cannot be made"),
    ]:
        with pytest.raises(SaelabError, match=message):
            saelab.train(config, [override])
        assert not (tmp_path / "run").exists()
    with pytest.raises(SaelabError, match="not a run folder"):
        saelab.evaluate(tmp_path / "run")
    with pytest.raises(SaelabError, match="not a run folder"):
        saelab.index(tmp_path / "run")


def test_run_reuses_what_is_valid_and_redoes_what_is_not(tmp_path: Path) -> None:
    config, said = small(tmp_path), []
    stages.run(config, say=said.append)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    said.clear()
    stages.run(config, say=said.append)
    assert [line for line in said if "up to date" in line] and len([line for line in said if "up to date" in line]) == 3
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    said.clear()
    stages.run(config, ["features.tokens=1400"], say=said.append)
    assert len([line for line in said if "up to date" in line]) == 2
    with pytest.raises(SaelabError, match="--force"):  # trained with other settings: must not be replaced
        stages.run(config, ["sae.k=5"])
    said.clear()
    stages.run(config, ["sae.k=5"], force=True, say=said.append)
    assert not [line for line in said if "up to date" in line]
    assert saelab.load(tmp_path / "run").k == 5
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    (tmp_path / "run" / "train.json").write_text(json.dumps(record | {"complete": False}))  # as after Ctrl-C
    stages.run(config, ["sae.k=5"])
    assert json.loads((tmp_path / "run" / "train.json").read_text())["complete"]


def results(run: Path) -> dict[str, bytes]:
    files = [run / "eval.json", *sorted(path for path in (run / "features").rglob("*") if path.is_file())]
    assert len(files) == 2 + len(FACTS) + len(COLUMNS)  # eval.json, the manifest and the arrays
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["features.tokens=700"],
        ["eval.tokens=1010", "eval.ce_tokens=5000", "features.rows_per_forward=4", "eval.rows_per_forward=4"],
        ["features.rows_per_forward=32"],
    ],
)
def test_results_of_a_shared_pass_equal_those_of_separate_passes(tmp_path: Path, overrides: list[str]) -> None:
    run = saelab.run(small(tmp_path), overrides)
    together = results(run)
    (run / "eval.json").unlink()
    shutil.rmtree(run / "features")
    saelab.evaluate(run)
    assert not (run / "features").exists()
    saelab.index(run)
    assert results(run) == together


def test_run_encodes_the_held_out_text_once_and_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = small(tmp_path), []
    run = saelab.train(config)
    encode, tokens = SparseAutoencoder.encode, []

    def counted(self: SparseAutoencoder, x: torch.Tensor, *args, **kwargs):
        tokens.append(len(x))
        return encode(self, x, *args, **kwargs)

    monkeypatch.setattr(SparseAutoencoder, "encode", counted)
    saelab.run(config)
    n = json.loads((run / "eval.json").read_text())["tokens"]
    assert sum(tokens) == n == json.loads((run / "features" / "manifest.json").read_text())["n_tokens"]
    for file, present in (("eval.json", "features"), ("features/manifest.json", "evaluation")):
        before = results(run)
        (run / file).unlink()
        tokens.clear(), said.clear()
        saelab.run(config, say=said.append)
        assert sum(tokens) == n and results(run) == before
        assert [line for line in said if "up to date" in line] == [
            f"training: {run} is up to date",
            f"{present}: up to date",
        ]
    tokens.clear()
    saelab.run(config)
    assert not tokens


def test_an_index_that_was_stopped_continues_and_evaluation_still_sees_all_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = small(tmp_path) | {"features": {"tokens": 1500, "rows_per_forward": 8}}, []
    config["eval"] = config["eval"] | {"rows_per_forward": 8}
    whole = results(saelab.run(config, [f"out={tmp_path / 'whole'}"]))
    monkeypatch.setattr(shards, "SHARD_PLACES", 16 * CONTEXT)
    run = saelab.train(config)
    encode, tokens, most = SparseAutoencoder.encode, [], [5]

    def stopped(self: SparseAutoencoder, x: torch.Tensor, *args, **kwargs):
        if len(tokens) == most[0]:
            raise KeyboardInterrupt
        tokens.append(len(x))
        return encode(self, x, *args, **kwargs)

    monkeypatch.setattr(SparseAutoencoder, "encode", stopped)
    for _ in range(2):  # blocks 0 to 4, then 4 to 5: shards of two blocks are kept
        with pytest.raises(KeyboardInterrupt):
            saelab.index(run, say=said.append)
        tokens.clear()
        most[0] = 2
    most[0] = 10**9
    saelab.run(config, say=said.append)
    assert [line.split(" of ")[0] for line in said if "encoded already" in line] == [
        "features: 32",
        "features: 48",
    ]
    assert sum(tokens) == json.loads(whole["eval.json"])["tokens"]  # once for both, and for evaluation from the start
    assert results(run) == whole
    tokens.clear()
    saelab.index(run)
    assert sum(tokens) == json.loads(whole["manifest.json"])["n_tokens"]  # a finished database leaves no shards


def test_the_entries_of_the_database_are_those_of_the_evaluation(tmp_path: Path) -> None:
    run = saelab.run(small(tmp_path), ["sae.allocation=mutual_choice"])
    evaluation, facts = json.loads((run / "eval.json").read_text()), open_database(run / "features").facts
    entries = sum(len(facts.activations(feature).places) for feature in range(facts.n_features))
    assert facts.n_tokens == evaluation["tokens"] and entries == round(evaluation["l0"] * facts.n_tokens)
    job, sae = Job(settings_of(run / "config.yaml")), saelab.load(run)
    rows, site = job.held_out(1500), job.settings.site
    keep = job.lm.ordinary(rows)
    z = torch.zeros(*rows.shape, sae.n_features)
    z[keep] = sae.encode(job.lm.activations(rows, [site])[site][keep]).to_dense()
    assert (facts.rows == rows.numpy()).all()
    found = torch.zeros_like(z)
    for row in range(len(rows)):
        for position in range(CONTEXT):
            features, values = facts.at(row, position)
            found[row, position, torch.from_numpy(features.copy()).long()] = torch.from_numpy(values)
    assert ((found > 0) == (z > 0)).double().mean() > 0.9999  # rows that share a forward pass change the last bits
    both = (found > 0) & (z > 0)
    bound = 2**-10 * z + 2**-24 * torch.from_numpy(facts.maxima.copy())
    assert bool(((found - z).abs() <= bound)[both].all())


def test_ctrl_c_finishes_the_step_and_saves_a_valid_checkpoint(tmp_path: Path) -> None:
    config = small(tmp_path) | {"training": {"tokens": 50_000_000, "batch": 200}}
    metrics = tmp_path / "run" / "metrics.jsonl"

    def interrupt_after_the_first_line() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt_after_the_first_line, daemon=True).start()
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        saelab.train(config, say=said.append)
    run = tmp_path / "run"
    assert signal.getsignal(signal.SIGINT) is before
    record = json.loads((run / "train.json").read_text())
    assert not record["complete"] and record["tokens"] % 200 == 0 and 0 < record["tokens"] < 50_000_000
    assert any(line.startswith("stopped after") for line in said)
    sae = saelab.load(run)
    assert torch.isfinite(sae(torch.randn(5, 32))).all()
    assert sae.metadata["saelab"]["tokens"] == record["tokens"]


def test_bad_activations_in_the_middle_keep_the_weights_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SAMPLE_TOKENS", 1000)
    read = source.read_passes

    def broken(*arguments, first_row: int, **options):
        if first_row == 160:  # the rows before give two groups of 2,000 tokens, and not three
            raise SaelabError("blocks.1.hook_resid_post: NaN at row 160")
        return read(*arguments, first_row=first_row, **options)

    monkeypatch.setattr(source, "read_passes", broken)
    with pytest.raises(SaelabError, match="NaN at row 160"):
        saelab.train(small(tmp_path))
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert not record["complete"] and record["tokens"] == 4000
    assert torch.isfinite(saelab.load(tmp_path / "run").W_dec).all()


def test_a_full_disk_while_a_checkpoint_is_written_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_write = os.write

    def full(handle: int, content: memoryview) -> int:
        if "sae_weights" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really_write(handle, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SaelabError, match=r"sae.*: the disk is full: .* bytes, and [\d,]+ are free; make room"):
        saelab.train(small(tmp_path))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "state",
        "train.json",
    }
    assert not json.loads((tmp_path / "run" / "train.json").read_text())["complete"]


def test_reduced_precision_models_train_and_evaluate(tmp_path: Path) -> None:
    run = saelab.train(small(tmp_path), ["model.dtype=bfloat16"])
    result = saelab.evaluate(run)
    assert saelab.load(run).W_dec.dtype == torch.float32 and result.fvu < 1


def test_rows_of_special_tokens_only_end_with_a_message(tmp_path: Path) -> None:
    rows = [[n >> bit & 1 for bit in range(4)] for n in range(16)]
    path = tmp_path / "special.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    config = small(tmp_path) | {"model": str(model_folder("llama")), "corpus": str(path), "context": 4}
    with pytest.raises(SaelabError, match="special tokens only"):
        saelab.train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("affinity", ["activation", "gradient"])
def test_rows_too_short_for_a_loss_are_refused_before_anything_is_trained(affinity: str, tmp_path: Path) -> None:
    config = small(tmp_path) | {"context": 2}
    overrides = [f"sae.affinity={affinity}"]
    with pytest.raises(SaelabError, match="context: 2 leaves room for one token after BOS"):
        saelab.run(config, overrides)
    assert not (tmp_path / "run").exists()
    if affinity == "gradient":
        for stage in (saelab.train, lambda *job: saelab.cache(job[0], tmp_path / "cache", job[1])):
            with pytest.raises(SaelabError, match="context: 2 leaves room"):
                stage(config, overrides)
        assert not (tmp_path / "run").exists() and not (tmp_path / "cache" / "unfinished").exists()


def test_thresholds_need_an_ordinary_token() -> None:
    lm = language_model("llama")
    sae = SparseAutoencoder(32, 16, 2)
    rows = torch.tensor([[0, 1, 0, 1]] * 3)
    with pytest.raises(SaelabError, match="calibration: the rows hold no ordinary token"):
        saelab.calibrate(sae, lm, CalibrationRows(rows, rows), "blocks.1.hook_resid_post", torch.tensor(0.1))


def test_a_site_that_is_always_0_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    silent = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(model_folder("gpt2"))
    for parameter in model.transformer.h[0].mlp.c_proj.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(silent)
    AutoTokenizer.from_pretrained(model_folder("gpt2")).save_pretrained(silent)
    site = "blocks.0.mlp.hook_out"
    with pytest.raises(SaelabError, match=f"{site}: the first .* activations are all 0; choose another site"):
        saelab.train(small(tmp_path) | {"model": {"name": str(silent), "self_check": False}, "site": site})
    assert not (tmp_path / "run").exists()
