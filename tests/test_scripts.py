"""The scripts to copy: they import public names only, and what they leave is a run like that of `saelab run`."""

import ast
import hashlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import saelab
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.runs import folder
from tests.runs.test_stages import small

ROOT = Path(__file__).parents[1]
CHILD = """
import json, runpy, saelab, sys
script, config = sys.argv[1], json.loads(sys.argv[2])
runpy.run_path(script)["main"](*([saelab.settings_of(config)] if script.endswith("train.py") else [config, "cache"]))
"""
METHODS = {
    "mutual": {"allocation": "mutual_choice"},
    "jumprelu": {"allocation": "threshold", "encoder": "jumprelu", "sparsity": {"name": "l0", "target_l0": 4}},
}
SLOW_METHODS = {
    "token": {},
    "feature": {"allocation": {"name": "feature_choice", "refresh": 7}},
    "gradient": {"affinity": "gradient"},
}


def call(script: str, config: dict, cwd: Path) -> str:
    """What `main` of a script prints in a process of its own, on `config` in place of the script's settings."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOT / "scripts" / script), json.dumps(config)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sha256(run: Path) -> str:
    return hashlib.sha256(folder.weights(run).read_bytes()).hexdigest()


@pytest.mark.parametrize("method", [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_METHODS)])
def test_train_py_leaves_the_run_that_saelab_run_leaves(method: str, tmp_path: Path) -> None:
    config = small(tmp_path)
    config["sae"] = config["sae"] | (METHODS | SLOW_METHODS)[method]
    config["training"] = {"tokens": 40_000, "batch": 500, "lr": 3e-3}  # more than the sample, which is read whole then
    printed = call("train.py", config, tmp_path)
    run = Path(config["out"])

    (found,) = folder.find_runs(run)
    assert found.has_eval and found.has_features
    evaluation, database = folder.evaluation(run), open_database(folder.features(run))
    assert evaluation is not None and evaluation["fvu"] < 1 and "delta_ce" in printed
    assert database.n_features == len(database.table["mass"]) == 64
    assert len(folder.metrics(run)) == 9 and "sae:" in folder.settings_text(run)
    assert folder.training_record(run)["complete"] and folder.training_record(run)["tokens"] == 40_000

    sae = saelab.load(run)
    budget_per_token = method in ("token", "gradient")
    assert (sae.threshold is None) == budget_per_token
    assert ("calibration_tokens" in sae.metadata["saelab"]) == (method in ("mutual", "feature"))

    ours = saelab.train(config, [f"out={tmp_path / 'ours'}"])
    same = saelab.load(ours)
    assert sha256(ours) == sha256(run)
    assert same.metadata["saelab"].pop("inputs") and sae.metadata["saelab"].pop("inputs") is None
    assert [same.metadata["saelab"].pop(name) for name in ("left_out", "largest_norm")] == [0, None]
    assert same.metadata["saelab"].pop("first_activations")["sink_share"] == 0  # the script does not look for sinks
    assert same.metadata == sae.metadata
    assert saelab.evaluate(ours).to_dict() == saelab.evaluate(run).to_dict()


def test_a_run_of_a_script_is_not_taken_for_one_of_saelab_run(tmp_path: Path) -> None:
    config = small(tmp_path)
    main = runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"]
    main(saelab.settings_of(config))
    with pytest.raises(SaelabError, match=r"run exists; choose another"):
        saelab.run(config)
    with pytest.raises(SaelabError, match=r"has no state to go on from; `saelab train .*config.yaml --force` trains"):
        saelab.resume(config["out"])
    main(saelab.settings_of(config))  # the script itself replaces it


@pytest.mark.slow
def test_cache_py_trains_at_both_sites_and_goes_on(tmp_path: Path) -> None:
    config = small(tmp_path)
    config |= {"cache": {"sites": [f"blocks.{layer}.hook_resid_post" for layer in (1, 2)], "rows_per_forward": 8}}
    assert "up to date" not in call("cache.py", config, tmp_path)
    runs = folder.find_runs(tmp_path / "runs")
    assert [run.name for run in runs] == [f"script_cache/blocks.{layer}.hook_resid_post" for layer in (1, 2)]
    assert all(run.has_eval and run.has_features for run in runs)
    assert saelab.load(runs[1].path).metadata["hook_name"] == "blocks.2.hook_resid_post"
    assert call("cache.py", config, tmp_path).count("training: runs") == 2


@pytest.mark.parametrize("script", ["train.py", "cache.py"])
def test_a_script_to_copy_imports_public_names_only(script: str) -> None:
    tree = ast.parse((ROOT / "scripts" / script).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all("saelab." not in name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("saelab"):
            assert node.module == "saelab" and {name.name for name in node.names} <= set(saelab.__all__)
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")
            if isinstance(node.value, ast.Name) and node.value.id == "saelab":
                assert node.attr in saelab.__all__
