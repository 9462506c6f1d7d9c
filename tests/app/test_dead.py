"""The page of dead features draws the stored result, and each feature of its lists leads to its page."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from saelab.runs import folder
from tests.app.shown import check_inert, message
from tests.app.synthetic_run import NEVER_ACTIVE, write_run
from tests.app.test_run import charts, component

N, TOKENS = 40, 5000


def write_result(run: Path, **changed: object) -> None:
    """A made-up result: features `NEVER_ACTIVE`, 20 and 21 are dead, of which 21 is a duplicate; 3 and 5 under-used."""
    numbers = np.random.default_rng(0)
    density = numbers.random(N) * 0.3 + 1e-3
    density[[3, 5]] = [2e-4, 4e-4]
    density[[NEVER_ACTIVE, 20, 21]] = 0
    few = np.zeros(N, bool)
    few[[3, 5]] = True
    arrays = {
        "density": density,
        "expected": np.sort(density)[::-1] + 1e-3,
        "is_under_used": few,
        "dead_features": np.array([NEVER_ACTIVE, 20, 21]),
        "reason": np.array([2, 1, 0], np.int8),
        "lacking": np.array([12.0, -2.5, 2.0], np.float32),
        "twin": np.array([4, 4, 9]),
        "twin_cosine": np.array([0.1, 0.2, 0.97], np.float32),
        "silent_for": np.arange(N) * 100,
    }
    curve = {"exponent": {"value": 1.02, "low": 0.99, "high": 1.05}, "shift": {"value": 8, "low": 7, "high": 9}}
    result = {
        "inputs": "0" * 32,
        "settings": {"share": 0.5, "duplicate": 0.9},
        "tokens": TOKENS,
        "n_features": N,
        "dead": 3,
        "dead_on_half": 4.25,
        "under_used": {"value": 2, "low": 1, "high": 4},
        "dense": {"value": 30, "low": 29, "high": 31},
        "density_of_dense": 0.1,
        "curve": curve | {"r2": 0.98, "tail": -0.5},
        "reasons": {"duplicate": 1, "crowded": 1, "bias": 1, "mean": 0, "norm": 0, "several": 0, "direction": 0},
        **{name: {"$array": name} for name in arrays},
    }
    path = run / folder.ANALYSES / "dead"
    path.mkdir(parents=True, exist_ok=True)
    (path / folder.FIGURES).write_text(json.dumps(result | changed))
    save_file(arrays, path / folder.ARRAYS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = write_run(tmp_path / "whole")
    write_result(path)
    return path


def test_figures_zones_and_reasons_are_those_of_the_result(explorer, run):
    app = explorer(run, page="dead")
    check_inert(app)
    figures = {metric.label: metric.value for metric in app.metric}
    assert figures["Dead"] == "3 (7.5%)" and figures["Under-used"] == "2 (1 to 4)"
    assert figures["Exponent"] == "1.02 (0.99 to 1.05)"
    assert any("4.25 on half" in caption.value and "5,000 held-out" in caption.value for caption in app.caption)
    zones = {trace.get("name"): trace for trace in charts(app)[0]["data"]}
    assert zones.keys() >= {"used", "under-used", "dead", "curve"}
    rows = component(app, "dead_rows")["rows"]
    assert [(row["id"], row["score"], row["note"]) for row in rows] == [
        (NEVER_ACTIVE, "bias", "lacks 12"),
        (20, "crowded", ""),
        (21, "duplicate", "of 9, 0.97"),
    ]
    assert component(app, "dead_rows")["link"] == "feature?run=whole&feature="
    ages = component(app, "ages")
    assert sum(ages["counts"]) == 3


def test_lists_follow_the_link_by_reason_and_by_kind(explorer, run):
    app = explorer(run, page="dead", reason="duplicate")
    assert [row["id"] for row in component(app, "dead_rows")["rows"]] == [21]
    assert any("cosine of at least 0.9" in caption.value for caption in app.caption)
    app = explorer(run, page="dead", kind="under")
    assert [row["id"] for row in component(app, "under_rows")["rows"]] == [3, 5]
    app = explorer(run, page="dead", kind="dense", reason="<script>")
    assert len(component(app, "dense_rows")["rows"]) > 20


def test_a_run_without_the_analysis_or_without_features_says_what_to_do(explorer, runs, tmp_path):
    app = explorer(runs, page="dead", run="whole")
    assert f"`saelab analyse {runs / 'whole'} dead`" in app.info[0].value
    bare = write_run(tmp_path / "bare", features=False)
    write_result(bare)
    app = explorer(bare, page="dead")
    assert any("saelab index" in info.value for info in app.info) and not app.exception


@pytest.mark.parametrize("damage", ["missing field", "missing arrays", "not json", "a feature that is not there"])
def test_a_damaged_result_is_an_error_that_names_it(explorer, run, damage):
    path = run / folder.ANALYSES / "dead"
    if damage == "missing field":
        record = json.loads((path / folder.FIGURES).read_text())
        del record["curve"]
        (path / folder.FIGURES).write_text(json.dumps(record))
    elif damage == "missing arrays":
        (path / folder.ARRAYS).unlink()
    elif damage == "not json":
        (path / folder.FIGURES).write_text("{")
    else:
        arrays = {"dead_features": np.array([N + 9, 1, 2])}
        found = folder.analysis(run, "dead")
        save_file({k: v for k, v in found.items() if isinstance(v, np.ndarray)} | arrays, path / folder.ARRAYS)
    app = explorer(run, page="dead")
    assert "dead --force" in message(app)
