import json
import re
import subprocess
import sys
import tomllib

import pytest
from streamlit.testing.v1 import AppTest

from saelab.features import database
from tests.app.synthetic_run import write_run


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


# links and runs


@pytest.mark.parametrize("bad", ["nope", "", "../whole", "/etc", "![x](http://example.invalid/x.png)", "<script>"])
def test_a_link_to_no_run_is_one_clear_message_that_names_the_runs(explorer, runs, bad):
    app = explorer(runs, run=bad, feature="1")
    shown = message(app)
    assert repr(bad) in shown and "bare, whole" in shown
    assert "](" not in app.error[0].value and "http://" not in app.error[0].value
    app.selectbox(key="run_picker").set_value("whole").run()
    assert not app.error and app.header[0].value == "whole" and app.query_params["run"] == "whole"


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
