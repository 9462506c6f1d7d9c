"""Several processes, and the README's own code."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.tiny import model_folder, text

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
CLI = [sys.executable, "-m", "saelab.cli"]


def output(command: list[str], cwd: Path) -> str:
    """What `command` prints; it must succeed."""
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(*arguments: str, cwd: Path) -> str:
    return output([*CLI, *arguments], cwd)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_train_eval_and_features_as_commands(kind: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text(2000))
    (tmp_path / "mine.yaml").write_text(f"""
out: runs/mine
model: {model_folder(kind)}
corpus: book.txt
site: blocks.1.hook_resid_post
context: 32
sae: {{n_features: 64, k: 4}}
training: {{tokens: 4e3, batch: 200, lr: 3e-3}}
eval: {{tokens: 1e3, ce_tokens: 500}}
features: {{tokens: 1e3}}
""")
    check("train", "mine.yaml", cwd=tmp_path)
    assert "FVU" in check("eval", "runs/mine", cwd=tmp_path)
    assert "64 features" in check("features", "runs/mine", "features.tokens=900", cwd=tmp_path)
    assert (tmp_path / "runs" / "mine" / "features" / "manifest.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_a_checkpoint_that_evaluates(number: int, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text(5000))
    overrides = [
        f"model={model_folder('gpt2')}",
        "corpus=book.txt",
        "site=blocks.1.hook_resid_post",
        "context=32",
        "out=run",
        "sae.n_features=64",
        "sae.k=4",
        "training.tokens=1e9",
        "training.batch=200",
        "activations.stream.buffer_tokens=2000",
        "eval.tokens=1000",
        "eval.ce_tokens=500",
    ]
    process = subprocess.Popen(
        [*CLI, "train", "quickstart", *overrides], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "finishing the step" in errors and "stopped after" in errors and "Traceback" not in errors
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert not record["complete"] and record["tokens"] > 0
    assert "FVU" in check("eval", "run", cwd=tmp_path)


def test_the_readmes_code_runs_as_it_stands(tmp_path: Path) -> None:
    script, notebook = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    small = [
        "sae.n_features=256",
        "training.tokens=20000",
        "eval.tokens=4000",
        "eval.ce_tokens=2000",
        "features.tokens=4000",
    ]
    check("demo", "--no-app", *small, cwd=tmp_path)
    script = script.replace("500_000", "20_000")  # nothing else is changed
    for code in (script, notebook):
        assert output([sys.executable, "-c", code], tmp_path)


def test_the_demo_model_is_trained_resumed_and_written_as_a_hugging_face_folder(tmp_path: Path) -> None:
    from saelab.lm.load import load_language_model
    from saelab.lm.settings import ModelSettings

    library, out = tmp_path / "library", tmp_path / "model"
    for package in ("json", "email", "unittest"):
        source = Path(sysconfig.get_path("stdlib")) / package
        shutil.copytree(source, library / package, ignore=shutil.ignore_patterns("__pycache__", "test*"))
    script = [
        sys.executable,
        str(ROOT / "scripts" / "train_demo_lm.py"),
        "--corpus",
        str(library),
        "--rows",
        "4",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(out),
        "--warmup",
        "2",
        "--device",
        "cpu",
    ]
    output([*script, "--tokens", "4096"], tmp_path)
    assert "resumed at step 4" in output([*script, "--tokens", "8192"], tmp_path)
    measured = json.loads((out / "measured.json").read_text())
    assert measured["training_tokens"] == 8192 and 0 < measured["sample_loss"] < 10
    lm = load_language_model(ModelSettings(str(out)), "cpu")
    assert lm.width("blocks.2.hook_resid_post") == 256 and lm.tokenizer.bos_token_id == 0


def test_the_demo_model_is_fine_tuned_for_a_crosscoder_of_two_models(tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "tune_demo_lm.py")
    said = output([sys.executable, script, "--out", "runs/tuned_lm", "--steps", "2"], tmp_path)
    assert "before: loss on held-out topics" in said and "after 2 steps" in said
    small = ["training.tokens=4096", "sae.n_features=64", "sae.k=4", "eval.tokens=2000"]
    small += ["activations.stream.buffer_tokens=4096", "activations.stream.rows_per_forward=8"]
    check("train", "two_models", *small, cwd=tmp_path)
    tokens = "analysis.model_diff.tokens=5000"
    assert "median relative norm" in check("analyse", "runs/two_models", "model_diff", tokens, cwd=tmp_path)
