"""The Run page."""

import json
import os
import time

import numpy as np

from saelab.features.database import open_database
from tests.app.shown import check_inert, html, unescaped
from tests.app.synthetic_run import NEVER_ACTIVE, SCRIPT, write_features, write_run


def component(app, key: str) -> dict:
    """The data of the component of this key."""
    (found,) = [each.proto for each in app.get("bidi_component") if key in each.proto.id]
    return json.loads(found.bytes)


def charts(app) -> list[dict]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def test_the_overview_shows_the_evaluation_the_training_and_the_settings(explorer, runs):
    app = explorer(runs, page="run", run="whole")
    check_inert(app)
    assert app.header[0].value == "whole"
    figures = {metric.label: metric.value for metric in app.metric}
    assert figures == {"FVU": "0.1634", "delta CE, nats": "0.2011", "L0": "31.87", "Never active": "1 (2.5%)"}
    page = html(app)
    for text in ("nats per token", "Loss recovered, zero ablation", "something_new", "0.965", "undefined"):
        assert text in page
    for text in ("0.1634", "31.87", "0.2011", "300,032"):  # said once
        assert text not in page
    assert any("300,032 held-out tokens" in caption.value for caption in app.caption)
    assert "hook_resid_post" in app.code[0].value
    assert not app.error and not app.warning


def test_only_curves_that_say_something_are_drawn(explorer, runs):
    app = explorer(runs, page="run", run="whole")
    titles = [chart["layout"]["title"]["text"] for chart in charts(app) if "title" in chart["layout"]]
    assert len(titles) == 5 and "Learning rate" not in titles
    (constant,) = [caption.value for caption in app.caption if caption.value.startswith("Constant")]
    assert "L0, active features per token 32, Learning rate 0.001" in constant


def test_a_whole_figure_has_no_decimals_and_an_interval_is_shown_beside_its_figure(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False)
    found = {"l0": 32.0, "fvu": 0.15, "fvu_interval": [0.14, 0.161], "kl": 0.2, "kl_interval": [0.1, 0.3]}
    (run / "eval.json").write_text(json.dumps(found))
    app = explorer(run, page="run")
    assert [metric.value for metric in app.metric] == ["0.15 (0.14 to 0.161)", "32"]
    assert "0.2 (0.1 to 0.3)" in html(app) and "kl_interval" not in html(app)


def test_figures_without_sinks_are_shown_if_there_are_any(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False)
    path = run / "eval.json"
    found = json.loads(path.read_text())
    sinks = {"sinks": 40, "sink_variance": 0.97, "fvu_without_sinks": 0.7756, "delta_ce_without_sinks": 1.5}
    for number, shown in ((40, True), (0, False)):
        path.write_text(json.dumps(found | sinks | {"sinks": number}))
        app = explorer(run, page="run")
        assert ("Attention sinks" in html(app)) == shown
        assert ("FVU without sinks" in [metric.label for metric in app.metric]) == shown


def test_a_crosscoder_has_figures_of_each_site(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False)
    path = run / "eval.json"
    each = {"fvu": 0.5, "delta_ce": 0.125, "loss_recovered_zero": 0.9, "loss_recovered_mean": 0.8}
    each["ce_clean"] = 2.5
    sites = [{"site": "blocks.1.`a`", **each}, {"site": "blocks.2.<b>", **each, "delta_ce": None, "ce_clean": 2.625}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sites": sites}))
    app = explorer(run, page="run")
    shown = html(app)
    assert not app.exception and "delta CE at blocks.1.`a`" in shown and "0.125" in shown and "undefined" in shown
    assert "FVU at blocks.2.&lt;b&gt;" in shown and "loss_recovered_zero" not in shown
    assert "CE, clean, of blocks.2.&lt;b&gt;" in shown and "2.625" in shown and "CE, clean, of blocks.1" not in shown
    assert any("spliced in" in each.value for each in app.caption)
    for damaged in (5, [1, {"site": "a"}], {"site": "a"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sites": damaged}))
        app = explorer(run, page="run")
        assert not app.exception and not app.error and "FVU at" not in html(app)


def test_pages_of_two_models_name_both(explorer, tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "features" / "manifest.json"
    second = {"more_sites": ["blocks.2.hook_resid_post@second"], "second_model": "<b>`tuned`"}
    path.write_text(json.dumps(json.loads(path.read_text()) | second))
    for page in ("run", "feature"):
        app = explorer(run, page=page)
        assert not app.exception
        where = unescaped(next(each.value for each in app.caption if "features" in each.value))
        assert "hook_resid_post@second" in where and "(@second: <b>`tuned`)" in where


def test_a_training_is_followed_while_its_files_change(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False, evaluation=False)
    record = {"complete": False, "tokens": 10_000, "planned_tokens": 400_000}
    (run / "train.json").write_text(json.dumps(record))
    app = explorer(run, page="run")
    (training,) = [info.value for info in app.info if "follows" in info.value]
    assert training.startswith("Training: 184,320 of 400,000 tokens.") and not app.warning
    assert app.get("plotly_chart")
    before = time.time() - 1000
    for name in ("train.json", "metrics.jsonl"):
        os.utime(run / name, (before, before))
    app = app.run()
    (warning,) = app.warning
    assert warning.value.startswith(
        "This run's training stopped after 10,000 of 400,000 tokens. `saelab train --resume "
    )
    assert not [info for info in app.info if "follows" in info.value]
    (run / "train.json").write_text(json.dumps(record | {"complete": True}))
    assert not app.run().warning


def test_a_run_that_was_only_trained_names_the_next_commands(explorer, runs):
    app = explorer(runs, page="run", run="bare")
    texts = [element.value for element in app.info]
    assert any(f"`saelab eval {runs / 'bare'}`" in text for text in texts)
    assert any(f"`saelab index {runs / 'bare'}`" in text for text in texts)


def test_densities_count_every_feature_and_lead_to_a_range_that_holds_them(explorer, runs):
    app = explorer(runs, page="run", run="whole")
    density = open_database(runs / "whole" / "features").table["density"]
    bars = component(app, "densities")
    assert sum(bars["counts"]) == (density > 0).sum() == 39
    ranks = next(chart["data"][0] for chart in charts(app) if chart["layout"]["xaxis"].get("type") == "log")
    assert len(ranks["customdata"]) in (39, 2)  # numbers, or their bytes
    app.session_state["opening"] = (float(density[3]), float(density[3]))
    app.run()
    low, high = component(app, "leave")["address"].split("density=")[1].split("%2C")
    assert float(low) == float(high) and abs(float(low) / density[3] - 1) < 1e-11


def test_dead_and_under_used_features_are_lists(explorer, runs):
    app = explorer(runs, page="run", run="whole", view="dead", below="0.001")
    check_inert(app)
    assert "1 of 40 features are never active" in app.subheader[0].value
    assert [row["id"] for row in component(app, "dead_rows")["rows"]] == [NEVER_ACTIVE]
    assert component(app, "dead_rows")["link"] == "feature?run=whole&feature="
    assert "On none of 4,032 held-out tokens" in app.caption[2].value and "few tokens" in app.caption[2].value
    assert "0 features are active" in app.subheader[1].value


def test_active_features_per_token_are_those_of_the_text(explorer, runs):
    app = explorer(runs, page="run", run="whole", view="allocation")
    check_inert(app)
    active = np.diff(open_database(runs / "whole" / "features").arrays["by_token.offsets"]).reshape(-1, 64)[:, 1:]
    assert f"{active.mean():.2f} on average (L0), from {active.min()} to {active.max()}" in app.caption[2].value
    assert f'<td class="sl-value">{active.max()}</td>' in html(app)
    assert "&lt;script&gt;" in html(app) and "w" * 41 not in html(app)


def test_a_run_that_changes_is_read_again(explorer, tmp_path):
    run = write_run(tmp_path / "run")
    app = explorer(run, page="run")
    for path in (run / "features").iterdir():
        path.unlink()
    (run / "features").rmdir()
    write_features(run, 30, 1)
    (run / "eval.json").write_text(json.dumps({"fvu": 0.9876}))
    app.run()
    assert "30 features" in app.caption[1].value and app.metric[0].value == "0.9876"


def test_an_adopted_run_shows_where_it_comes_from_in_place_of_a_training(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False)
    (run / "metrics.jsonl").unlink()
    origin = {"from": f"/saes/{SCRIPT}`", "trainer": SCRIPT, "sha256": "0123abcd"}
    origin["trained_on"] = {"model_name": SCRIPT, "hook_name": "blocks.1.hook_resid_pre", "folded": ["fold_ln"]}
    (run / "train.json").write_text(json.dumps({"inputs": "adopted", "complete": True, "tokens": 0, "adopted": origin}))
    app = explorer(run, page="run")
    check_inert(app)
    assert "Origin" in [each.value for each in app.subheader]
    assert "Training" not in [each.value for each in app.subheader]
    for text in ("/saes/", "0123abcd", "blocks.1.hook_resid_pre", "Trained on the model"):
        assert text in html(app)
    assert not app.error and not any("metrics" in each.value for each in app.info)
    (run / "train.json").write_text(json.dumps({"complete": True, "tokens": 0, "adopted": {"trained_on": 3}}))
    app = explorer(run, page="run")
    assert "Origin" in [each.value for each in app.subheader] and not app.error
    assert "adopted" in html(explorer(run, page="runs"))
