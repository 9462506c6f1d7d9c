import json
import re
import subprocess
import sys
import tomllib

import numpy as np
import pyarrow.parquet as pq
import pytest
from streamlit.testing.v1 import AppTest

from saelab.features import database
from tests.app.synthetic_run import HOSTILE, NEVER_ACTIVE, SCRIPT, write_features, write_run


@pytest.fixture
def explorer(main_script, monkeypatch):
    """Open the explorer as `streamlit run main.py -- ARGUMENTS` and follow a link with these parameters."""

    def open_explorer(*arguments, page="", **link) -> AppTest:
        monkeypatch.setattr(sys, "argv", [str(main_script), *map(str, arguments)])
        app = AppTest.from_file(str(main_script), default_timeout=60)
        app.query_params.update(link)
        app.run()
        if page:
            app.switch_page(f"views/{page}.py").run()
        assert not app.exception
        return app

    return open_explorer


def pages_html(app: AppTest) -> str:
    return "".join(element.proto.body for element in app.get("html"))


def message(app: AppTest) -> str:
    """The only error on the page, without the escapes that keep Markdown out of it."""
    assert len(app.error) == 1 and not app.exception
    return re.sub(r"\\(.)", r"\1", app.error[0].value).replace("\u200b", "")


def table(app: AppTest):
    return app.dataframe[0].value


# the overview


def test_the_overview_shows_the_evaluation_the_training_and_the_settings(explorer, runs):
    app = explorer(runs, run="whole")
    assert app.header[0].value == "whole"
    page = pages_html(app)
    for text in (
        "FVU",
        "0.1634",
        "31.87",
        "nats per token",
        "Loss recovered, zero ablation",
        "300,032",
        "something_new",
    ):
        assert text in page
    assert "undefined" in page  # a loss recovered that is null
    assert len(app.get("plotly_chart")) == 7
    assert "hook_resid_post" in app.code[0].value
    assert not app.error and not app.warning


def test_figures_without_sinks_are_shown_if_there_are_any(explorer, runs):
    assert "without sinks" not in pages_html(explorer(runs, run="whole"))
    path = runs / "whole" / "eval.json"
    before = path.read_text()
    sinks = {"sinks": 40, "sink_variance": 0.97, "fvu_without_sinks": 0.7756, "delta_ce_without_sinks": 1.5}
    try:
        for number, shown in ((40, True), (0, False)):
            path.write_text(json.dumps(json.loads(before) | sinks | {"sinks": number}))
            app = explorer(runs, run="whole")
            page = pages_html(app)
            assert ("FVU without sinks" in page and "0.7756" in page and "Attention sinks" in page) == shown
            assert ("FVU without sinks" in [metric.label for metric in app.metric]) == shown
    finally:
        path.write_text(before)


def test_an_unfinished_training_is_said_to_be_one(explorer, tmp_path):
    run = write_run(tmp_path / "run")
    record = {"complete": False, "tokens": 10_000, "planned_tokens": 20_000}
    (run / "train.json").write_text(json.dumps(record))
    evaluation = json.loads((run / "eval.json").read_text()) | {"training_complete": False, "trained_tokens": 10_000}
    (run / "eval.json").write_text(json.dumps(evaluation))
    app = explorer(run)
    (warning,) = app.warning
    assert warning.value.startswith(
        "This run's training stopped after 10,000 of 20,000 tokens. `saelab train --resume "
    )
    assert "how far the training was" in pages_html(app) and "training_complete" not in pages_html(app)
    (run / "train.json").write_text(json.dumps(record | {"complete": True}))
    assert not app.run().warning


def test_a_run_that_was_only_trained_names_the_next_commands(explorer, runs):
    app = explorer(runs, run="bare")
    texts = [element.value for element in app.info]
    assert any(f"`saelab eval {runs / 'bare'}`" in text for text in texts)
    assert any(f"`saelab index {runs / 'bare'}`" in text for text in texts)
    assert len(app.get("plotly_chart")) == 7


# the table


def test_the_table_counts_never_active_features_and_shows_them_on_request(explorer, runs):
    app = explorer(runs, page="features", run="whole")
    assert NEVER_ACTIVE not in table(app)["feature"].tolist() and len(table(app)) == 39
    assert "39 of 40" in app.caption[0].value and "1 never active on 300,032 tokens (hidden)" in app.caption[0].value
    app.toggle(key="show_never_active").set_value(True).run()
    assert NEVER_ACTIVE in table(app)["feature"].tolist() and len(table(app)) == 40


def test_the_table_searches_tokens_and_context_text(explorer, runs):
    whole = database.feature_table(runs / "whole" / "features")
    app = explorer(runs, page="features", run="whole")
    app.text_input(key="search").set_value("<SCRIPT>").run()
    expected = whole["feature"][database.search_tokens(whole, "<script>") & (whole["n_active"] > 0)]
    assert table(app)["feature"].tolist() == expected.tolist() != []
    app.text_input(key="search").set_value("return self").run()
    assert not app.dataframe and app.info
    app.segmented_control(key="search_in").set_value("context text").run()
    assert (
        table(app)["feature"].tolist()
        == database.search_contexts(runs / "whole" / "features", "return self").tolist()
        != []
    )


def test_the_table_filters_by_density(explorer, runs):
    app = explorer(runs, page="features", run="whole")
    app.slider(key="density_range").set_value((-3.0, -2.0)).run()
    densities = database.feature_table(runs / "whole" / "features")["density"]
    assert len(table(app)) == densities.between(1e-3, 1e-2).sum() > 0
    assert np.allclose(table(app)["density"] / 100, densities[densities.between(1e-3, 1e-2)])


def test_a_click_on_a_row_opens_its_feature_and_filters_persist(explorer, runs):
    app = explorer(runs, page="features", run="whole")
    app.slider(key="density_range").set_value((-3.0, -2.0)).run()
    third = int(table(app)["feature"].iloc[2])
    app.session_state["table"] = {"selection": {"rows": [], "columns": [], "cells": [(2, "feature")]}}
    app.run()
    assert app.header[0].value == f"Feature {third}"
    assert app.query_params == {"run": "whole", "feature": str(third)}
    app.switch_page("views/features.py").run()
    assert app.slider(key="density_range").value == (-3.0, -2.0) and app.header[0].value == "Features"


# one feature


def test_a_link_shows_its_feature(explorer, runs):
    app = explorer(runs, run="whole", feature="3")
    feature = database.feature(runs / "whole" / "features", 3)
    assert app.header[0].value == "Feature 3"
    assert app.metric[0].value == f"{100 * feature.density:.4f}%"
    assert app.metric[1].value == f"{feature.n_active:,} tokens"
    assert pages_html(app).count('class="sl-context"') == 20
    links = [link.proto.label for link in app.get("page_link")]
    assert links == [f"**{index}** · {cosine:.2f}" for index, cosine in feature.neighbours]


def test_hostile_text_is_text_everywhere_on_the_page(explorer, runs):
    app = explorer(runs, run="whole", feature="0")
    page = pages_html(app)
    assert SCRIPT.replace("<", "&lt;").replace(">", "&gt;") in page
    assert "<script" not in page and "<img" not in page
    assert page.count("</style>") == page.count("<style>") == 1, "ours"
    # None of it reaches Markdown, which would render $x$, **bold** or a link.
    markdown = [*app.markdown, *app.caption, *app.header, *app.subheader, *app.warning, *app.info]
    labels = [element.value for element in markdown] + [link.proto.label for link in app.get("page_link")]
    assert not [label for label in labels for token in HOSTILE if len(token) > 2 and token in label]


def test_the_buttons_move_the_link(explorer, runs, monkeypatch):
    app = explorer(runs, run="whole", feature="3")
    app.button[1].click().run()
    assert (app.query_params["feature"], app.header[0].value) == ("4", "Feature 4")
    app.button[0].click().run()
    assert (app.query_params["feature"], app.header[0].value) == ("3", "Feature 3")
    app.number_input(key="jump_to").set_value(39).run()
    assert (app.query_params["feature"], app.header[0].value) == ("39", "Feature 39")
    assert app.button[1].disabled and not app.button[0].disabled
    drawn_from: list[list[int]] = []
    monkeypatch.setattr("random.choice", lambda options: drawn_from.append(list(options)) or options[20])
    app.button[2].click().run()
    assert drawn_from == [[index for index in range(40) if index != NEVER_ACTIVE]]
    assert (app.query_params["feature"], app.header[0].value) == ("21", "Feature 21")


def test_a_never_active_feature_says_so_and_on_how_many_tokens(explorer, runs):
    app = explorer(runs, run="whole", feature=str(NEVER_ACTIVE))
    assert "Never active on the 300,032" in app.warning[0].value
    assert "sl-context" not in pages_html(app).replace(".sl-context", "") and not app.metric
    assert len(app.get("page_link")) == 10


def test_the_page_without_a_feature_in_its_link_shows_the_last_one(explorer, runs):
    app = explorer(runs, run="whole", feature="5")
    app.switch_page("views/overview.py").run()
    assert "feature" not in app.query_params
    app.switch_page("views/feature.py").run()
    assert app.header[0].value == "Feature 5"
    assert explorer(runs, page="feature", run="whole").header[0].value == "Feature 0"


def test_line_breaks_can_be_shown(explorer, runs):
    app = explorer(runs, run="whole", feature="0")
    assert '<span class="sl-mark">↵</span>\n' not in pages_html(app)
    app.toggle(key="line_breaks").set_value(True).run()
    assert '<span class="sl-mark">↵</span>\n' in pages_html(app)


# links and runs


@pytest.mark.parametrize(
    "bad", ["abc", "40", "-1", "3.5", "", "999999999999999999", "²", "[x](http://example.invalid)"]
)
def test_a_link_to_no_feature_is_one_clear_message(explorer, runs, bad):
    shown = message(explorer(runs, run="whole", feature=bad))
    assert f"feature={bad}" in shown and "0 to 39" in shown


@pytest.mark.parametrize("bad", ["nope", "", "../whole", "/etc", "![x](http://example.invalid/x.png)", "<script>"])
def test_a_link_to_no_run_is_one_clear_message_that_names_the_runs(explorer, runs, bad):
    app = explorer(runs, run=bad, feature="1")
    shown = message(app)
    assert repr(bad) in shown and "bare, whole" in shown
    assert "](" not in app.error[0].value and "http://" not in app.error[0].value
    app.selectbox(key="run_picker").set_value("whole").run()
    assert not app.error and app.header[0].value == "whole" and app.query_params["run"] == "whole"


@pytest.mark.parametrize("page", ["features", "feature"])
def test_a_run_without_features_names_the_command_that_makes_them(explorer, runs, page):
    assert f"`saelab index {runs / 'bare'}`" in message(explorer(runs, page=page, run="bare"))


def test_no_runs_at_all(explorer, tmp_path, monkeypatch):
    assert "saelab train" in message(explorer(tmp_path))
    assert str(tmp_path / "missing") in message(explorer(tmp_path / "missing"))
    monkeypatch.chdir(tmp_path)
    assert "no folder runs" in message(explorer())


def test_a_missing_folder_is_reported_and_other_runs_are_shown(explorer, runs, tmp_path):
    app = explorer(runs, tmp_path / "missing", run="whole")
    assert str(tmp_path / "missing") in message(app) and app.header[0].value == "whole"


def test_a_damaged_file_is_one_message_that_names_it(explorer, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "features" / database.FEATURES).write_bytes(b"PAR1 no more")
    assert str(run / "features" / database.FEATURES) in message(explorer(run, page="features"))
    (run / "eval.json").write_text("[1, 2]")
    assert "eval.json" in message(explorer(run))


def test_the_picker_changes_the_run_and_the_link(explorer, runs):
    app = explorer(runs)
    assert app.header[0].value == "whole"  # the one with features
    assert app.selectbox(key="run_picker").options == ["bare", "whole"]
    app.selectbox(key="run_picker").set_value("bare").run()
    assert app.header[0].value == "bare" and app.query_params == {"run": "bare"}
    app.switch_page("views/overview.py").run()
    assert app.header[0].value == "bare"


def test_runs_of_the_same_name_are_told_apart(explorer, tmp_path):
    first, second = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", n_features=30)
    app = explorer(first, second, first)
    assert app.selectbox(key="run_picker").options == ["run", str(second)]
    app.selectbox(key="run_picker").set_value(str(second)).run()
    assert "30 features" in app.caption[0].value


def test_a_run_that_changes_is_read_again(explorer, tmp_path):
    run = write_run(tmp_path / "run")
    app = explorer(run, run="run", feature="2")
    before = app.metric[0].value
    for path in (run / "features").iterdir():
        path.unlink()
    (run / "features").rmdir()
    write_features(run, 40, np.random.default_rng(9))
    app.run()
    assert app.metric[0].value != before
    assert app.metric[1].value == f"{database.feature(run / 'features', 2).n_active:,} tokens"
    (run / "eval.json").write_text(json.dumps({"fvu": 0.9876}))
    app.switch_page("views/overview.py").run()
    assert "0.9876" in pages_html(app)


def test_lists_may_be_empty(explorer, tmp_path):
    """There is no logit lens at sites that are neither the residual stream nor added to it."""
    run = write_run(tmp_path / "run")
    found = pq.read_table(run / "features" / database.FEATURES)
    lines = [
        line | {key: [] for key in ("top_logit_tokens", "top_logits", "bottom_logit_tokens", "bottom_logits")}
        for line in found.to_pylist()
    ]
    pq.write_table(type(found).from_pylist(lines, found.schema), run / "features" / database.FEATURES)
    app = explorer(run, run="run", feature="1")
    assert not app.error and pages_html(app).count('class="sl-context"') == 20
    assert any("No logit lens" in caption.value for caption in app.caption)
    app.switch_page("views/features.py").run()
    assert not app.error and len(table(app)) == 39


# what is loaded, and what is sent


def test_no_page_loads_torch_or_a_language_model_library(main_script, runs):
    heavy = ["torch", "transformers", "transformer_lens", "datasets"]
    code = (
        "import sys\nfrom streamlit.testing.v1 import AppTest\n"
        f"sys.argv = ['main.py', {str(runs)!r}]\n"
        f"app = AppTest.from_file({str(main_script)!r}, default_timeout=60).run()\n"
        "for page in ('overview', 'features', 'feature'):\n"
        "    assert not app.switch_page(f'views/{page}.py').run().exception and not app.error\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_usage_statistics_are_off_and_only_this_machine_is_served(main_script):
    config = tomllib.loads((main_script.parent / ".streamlit" / "config.toml").read_text())
    assert config["browser"]["gatherUsageStats"] is False
    assert config["server"]["address"] == "127.0.0.1"


def test_no_folder_is_named_pages(main_script):
    """With one, a new Streamlit server runs the page that a link names without main.py: no run, no styles."""
    assert not (main_script.parent / "pages").exists()
