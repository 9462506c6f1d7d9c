"""The page of dark matter draws the stored results: figures, widths, the texts with the largest error, one token."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from saelab.analysis.parts import MAPS, PARTS
from saelab.features.database import open_database
from saelab.runs import folder
from tests.app.shown import check_inert, message
from tests.app.synthetic_run import CONTEXT, NEVER_ACTIVE, SITE, write_run
from tests.app.test_run import charts, component

ROWS = 10
WORST = 3 * CONTEXT + 20
"""The place with the largest error; row 3 is of hostile tokens."""


def near(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def write_result(run: Path, n_features: int = 40, fvu: float = 0.2) -> None:
    """A made-up result on the odd rows below `ROWS`, and on row 1000, which is not in the database."""
    rows = [*range(1, ROWS, 2), 1000]
    token = np.concatenate([np.arange(1, CONTEXT) + row * CONTEXT for row in rows])
    numbers = np.random.default_rng(0)
    error = numbers.random(len(token)).astype(np.float32) + 1
    error[token == WORST] = 8
    error[-1] = 9  # in the row that is not in the database
    arrays = {
        "decomposition.token": token,
        "decomposition.error_norm": error,
        "decomposition.linear_norm": error * 0.5,
        "decomposition.nonlinear_norm": error[::-1].copy(),
        "decomposition.deviation": np.full(len(token), 10, np.float32),
    }
    of_map = {"ridge": 0.0, "ridge_of_norm": 0.0, "r2_pooled": near(0.5)}
    of_map |= {"r2": near(0.48), "r2_of_norm": near(0.91), "fvu_nonlinear": near(fvu / 2)}
    tests = ("on_x", "on_x_with_intercept", "on_itself", "on_itself_with_intercept")
    decomposition = {
        "tokens": len(token),
        "context": CONTEXT,
        "fvu": near(fvu),
        "fvu_linear": near(fvu / 2),
        "maps": dict.fromkeys(MAPS, of_map),
        "norm_tests": {part: {name: near(0.7) for name in tests} for part in PARTS},
        "shrinkage": near(1.05),
        **{name.partition(".")[2]: {"$array": name} for name in arrays},
    }
    cost = {"recovered_by_linear": near(0.61)}
    record = {"inputs": "0", "settings": {}, "site": SITE, "n_features": n_features}
    path = run / folder.ANALYSES / "dark_matter"
    path.mkdir(parents=True, exist_ok=True)
    (path / folder.FIGURES).write_text(json.dumps(record | {"decomposition": decomposition, "cost": cost}))
    save_file(arrays, path / folder.ARRAYS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = write_run(tmp_path / "runs" / "whole")
    write_result(path)
    return path


def test_figures_texts_and_the_worst_token_are_those_of_the_result(explorer, run):
    app = explorer(run, page="dark_matter")
    check_inert(app)
    figures = {metric.label: metric.value for metric in app.metric}
    assert figures["FVU"] == "0.200" and figures["FVU, nonlinear"] == "0.100" and figures["R² of the error"] == "0.480"
    assert figures["CE recovered by linear"] == "0.610"
    assert figures["Left out"] == "64.0%" and figures["Linear part"] == "16.0%"  # 8 of a deviation of 10
    drawn = component(app, "dark_tokens")
    assert len(drawn["lines"]) == 5, "one token per row of the database that was scored"
    first = drawn["lines"][0]
    assert (first["row"], first["start"] + first["peak"]) == (3, 20) and drawn["strongest"] == 8
    assert drawn["link"] == "feature?run=whole&feature=" and drawn["what"] == "norm of the error"
    assert any(first["others"]), "the features that are active on its tokens"
    (link,) = [each.proto for each in app.get("page_link") if "This row" in each.proto.label]
    assert "row=3" in link.query_string and "token=20" in link.query_string
    assert sum(component(app, "measure_histogram")["counts"]) == 6 * (CONTEXT - 1)


def test_the_link_chooses_measure_and_token_and_falls_back_on_the_worst(explorer, run):
    place = 5 * CONTEXT + 7
    app = explorer(run, page="dark_matter", measure="share", place=str(place))
    assert component(app, "dark_tokens")["what"] == "share left out"
    assert any("position 7 of row 5" in each.value for each in app.markdown)
    for bad in ("2", "-5", "99999999", "<script>"):  # 2 is in a row that is not scored
        app = explorer(run, page="dark_matter", place=bad, measure="<b>")
        assert any("position 20 of row 3" in each.value for each in app.markdown)


def test_features_and_rows_link_to_it_and_a_feature_narrows_it_down(explorer, run):
    def links(app) -> list[str]:
        return [each.proto.query_string for each in app.get("page_link") if "left out" in each.proto.label]

    (of_feature,) = links(explorer(run, page="feature", feature="1"))
    assert "feature=1" in of_feature
    (of_token,) = links(explorer(run, page="prompt", **{"from": "held-out", "row": "3", "token": "20"}))
    assert f"place={WORST}" in of_token
    active = {int(place) for place in open_database(folder.features(run)).facts.activations(1).places}
    drawn = component(explorer(run, page="dark_matter", feature="1"), "dark_tokens")["lines"]
    assert drawn and all(line["row"] * CONTEXT + line["start"] + line["peak"] in active for line in drawn)
    app = explorer(run, page="dark_matter", feature=str(NEVER_ACTIVE))
    assert any("active on none of the scored" in info.value for info in app.info)
    (run / folder.ANALYSES / "dark_matter" / folder.FIGURES).unlink()
    assert not links(explorer(run, page="feature", feature="1"))


def test_runs_at_the_site_are_compared_over_their_widths(explorer, run):
    app = explorer(run, page="dark_matter")
    assert any("would be compared" in caption.value for caption in app.caption) and not charts(app)
    write_result(write_run(run.parent / "wide", n_features=80), 80, 0.1)
    elsewhere = write_run(run.parent / "elsewhere", site="blocks.1.hook_resid_post")
    write_result(elsewhere)
    result = elsewhere / folder.ANALYSES / "dark_matter" / folder.FIGURES
    result.write_text(result.read_text().replace(SITE, "blocks.1.hook_resid_post"))
    write_run(run.parent / "bare", features=False)
    app = explorer(run.parent, page="dark_matter", run="whole")
    (chart,) = charts(app)
    traces = {trace["name"]: trace for trace in chart["data"]}
    assert traces["FVU"]["x"] == [40, 80] and traces["FVU"]["text"] == ["whole", "wide"]
    assert traces["nonlinear"]["y"] == [0.1, 0.05]


def test_a_run_without_the_analysis_or_without_features_says_what_to_do(explorer, runs, tmp_path):
    app = explorer(runs, page="dark_matter", run="whole")
    assert f"`saelab analyse {runs / 'whole'} dark_matter`" in app.info[0].value
    bare = write_run(tmp_path / "bare", features=False)
    write_result(bare)
    app = explorer(bare, page="dark_matter")
    assert any("saelab index" in info.value for info in app.info) and not app.exception


@pytest.mark.parametrize("damage", ["missing field", "missing arrays", "another context"])
def test_a_damaged_result_is_an_error_that_names_it(explorer, run, damage):
    path = run / folder.ANALYSES / "dark_matter"
    record = json.loads((path / folder.FIGURES).read_text())
    if damage == "missing field":
        del record["decomposition"]["maps"]
    elif damage == "another context":
        record["decomposition"]["context"] = 7
    else:
        (path / folder.ARRAYS).unlink()
    (path / folder.FIGURES).write_text(json.dumps(record))
    assert "dark_matter --force" in message(explorer(run, page="dark_matter"))
