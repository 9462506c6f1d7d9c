"""What every page shares: the link, the run that it names, and what bad input gets."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
from streamlit.testing.v1 import AppTest

from saelab.errors import SaelabError
from tests.app.shown import check_inert, html, message, unescaped
from tests.app.synthetic_run import OTHER, write_run

PAGES = ["runs", "run", "features", "feature", "explanations", "audit", "prompt", "steer", "compare", "map", "dead"]
PAGES += ["attention", "dark_matter"]


# the link


def script(tmp_path, body: str) -> AppTest:
    path = tmp_path / "page.py"
    path.write_text(f"import streamlit as st\nfrom explorer import state\n{body}")
    return AppTest.from_file(str(path))


def test_a_widget_and_its_parameter_follow_each_other(tmp_path):
    app = script(
        tmp_path,
        "st.text_input('text', **state.bound('q', '', clears=['page']))\n"
        "st.toggle('on', **state.bound('on', False))\n"
        "st.selectbox('one', ['a', 'b'], **state.bound('one', 'a', ['a', 'b']))\n"
        "st.slider('range', 0.0, 1.0, **state.bound('range', (0.0, 1.0), limits=(0, 1)))\n"
        "st.number_input('n', 1, 9, **state.bound('n', 1, limits=(1, 9)))\n",
    )
    app.query_params.update(q="x y", on="1", one="b", range="0.25,0.5", n="4", page="3", other="kept")
    app.run()
    assert not app.exception
    values = lambda: (app.text_input[0].value, app.toggle[0].value, app.selectbox[0].value, app.number_input[0].value)  # noqa: E731
    assert values() == ("x y", True, "b", 4) and app.slider[0].value == (0.25, 0.5)
    app.text_input[0].set_value("").run()
    assert app.query_params == {"on": "1", "one": "b", "range": "0.25,0.5", "n": "4", "other": "kept"}
    app.toggle[0].set_value(False).run()
    app.selectbox[0].set_value("a").run()
    app.slider[0].set_value((0.1, 0.2)).run()
    app.number_input[0].set_value(9).run()
    assert app.query_params == {"range": "0.1,0.2", "n": "9", "other": "kept"}
    app.query_params.clear()  # as Back does
    app.run()
    assert values() == ("", False, "a", 1) and app.slider[0].value == (0.0, 1.0)


BAD = [
    (1, None, (1, 9), "0"),
    (1, None, (1, 9), "10"),
    (1, None, None, "1.5"),
    (1, None, None, "²"),
    (1, None, None, "9" * 400),
    (False, None, None, "true"),
    (0.5, None, None, "nan"),
    (0.5, [0.5, 0.7], None, "0.6"),
    ((0.0, 1.0), None, None, "1,0"),
    ((0.0, 1.0), None, None, "1"),
    ((0.0, 1.0), None, None, "nan,nan"),
    ((0.0, 1.0), None, (0, 1), "0,2"),
    ("a", ["a", "b"], None, "<script>"),
]


def test_what_is_not_a_value_is_the_default(tmp_path):
    lines = [f"state.value('x{i}', {case[0]!r}, {case[1]!r}, {case[2]!r})" for i, case in enumerate(BAD)]
    app = script(tmp_path, f"st.text(repr([{', '.join(lines)}]))")
    app.query_params.update({f"x{i}": case[3] for i, case in enumerate(BAD)})
    app.run()
    assert not app.exception and app.text[0].value == repr([case[0] for case in BAD])


def test_a_page_keeps_the_parameters_that_it_does_not_know(explorer, runs):
    app = explorer(runs, page="run", run="whole", view="dead", unknown="1")
    assert app.query_params == {"run": "whole", "view": "dead", "unknown": "1"}


# runs


def test_every_page_names_the_run_in_its_links(explorer, runs):
    for page in ("runs", "compare", "map"):
        app = explorer(runs, page=page, run="bare")
        links = [link.proto for link in app.sidebar.get("page_link")]
        assert [link.query_string for link in links] == ["run=bare"] * len(PAGES)
        if page != "runs":
            crumbs = [link.proto for link in app.main.get("page_link")[:2]]
            assert [(link.label, link.query_string) for link in crumbs] == [("Runs", "run=bare"), ("bare", "run=bare")]


@pytest.mark.parametrize("bad", ["nope", "", "../whole", "/etc", "![x](http://example.invalid/x.png)", "<script>"])
def test_a_link_to_no_run_is_one_clear_message_that_names_the_runs(explorer, runs, bad):
    app = explorer(runs, page="run", run=bad, feature="1")
    shown = message(app)
    assert repr(bad) in shown and "bare, whole" in shown
    assert "](" not in app.error[0].value and "http://" not in app.error[0].value
    app.selectbox(key="run_picker").set_value("whole").run()
    assert not app.error and app.header[0].value == "whole" and app.query_params == {"run": "whole"}


def test_the_runs_are_shown_even_if_the_link_names_none_of_them(explorer, runs):
    app = explorer(runs, page="runs", run="nope")
    assert "nope" in message(app) and len(app.checkbox) == 3


def test_without_a_run_in_the_link_the_last_one_with_features_is_shown(explorer, runs):
    app = explorer(runs, page="run")
    assert app.header[0].value == "whole" and app.query_params == {"run": "whole"}
    app.selectbox(key="run_picker").set_value("bare").run()
    assert app.header[0].value == "bare" and app.query_params == {"run": "bare"}
    app.query_params.clear()
    app.switch_page("views/run.py").run()
    assert app.header[0].value == "bare"


def test_no_runs_at_all(explorer, tmp_path, monkeypatch):
    for page in ("runs", "feature"):
        assert "saelab train" in message(explorer(tmp_path, page=page))
    assert str(tmp_path / "missing") in message(explorer(tmp_path / "missing", page="run"))
    monkeypatch.chdir(tmp_path)
    assert "no folder runs" in message(explorer(page="run"))


def test_a_missing_folder_is_reported_and_other_runs_are_shown(explorer, runs, tmp_path):
    app = explorer(runs, tmp_path / "missing", page="run", run="whole")
    assert str(tmp_path / "missing") in message(app) and app.header[0].value == "whole"


def test_runs_of_the_same_name_are_told_apart(explorer, tmp_path):
    first, second = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", n_features=30)
    app = explorer(first, second, first, page="run")
    assert app.selectbox(key="run_picker").options == ["run", str(second)]
    app.selectbox(key="run_picker").set_value(str(second)).run()
    assert "30 features" in app.caption[1].value


def test_folders_are_walked_once_and_again_for_an_unknown_run(explorer, tmp_path, monkeypatch):
    write_run(tmp_path / "first", features=False)
    app = explorer(tmp_path, page="run", run="first")
    walked = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: walked.append(str(path)) or scandir(path))
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: walked.append(str(path)) or listdir(path))
    app.run()
    assert str(tmp_path) not in walked
    write_run(tmp_path / "second", features=False)
    app.query_params["run"] = "second"
    app.run()
    assert not app.error and app.header[0].value == "second" and str(tmp_path) in walked
    write_run(tmp_path / "third", features=False)
    assert explorer(tmp_path, page="compare", run="second", other="third").selectbox(key="other").value == "third"


# damaged, unfinished and foreign files


@pytest.mark.parametrize("page", ["features", "feature", "map"])
def test_a_run_without_features_names_the_command_that_makes_them(explorer, runs, page):
    assert f"`saelab index {runs / 'bare'}`" in message(explorer(runs, page=page, run="bare"))


def test_a_database_of_a_newer_version_is_one_sentence_on_every_page(explorer, tmp_path):
    run = write_run(tmp_path / "run")
    path = run / "features" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))
    for page in ("run", "features", "feature", "map"):
        shown = message(explorer(run, page=page))
        assert "version 3" in shown and f"`saelab index {run}" in shown
    app = explorer(run, page="run")
    assert app.metric[0].value == "0.1634"  # what needs no database is there
    assert not explorer(run, page="runs").error


def test_a_database_of_version_1_is_none(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False)
    (run / "features").mkdir()
    (run / "features" / "summary.json").write_text("{}")
    assert f"saelab index {run}" in message(explorer(run, page="features"))
    assert "made by an earlier saelab" in message(explorer(run, page="run"))


def test_a_damaged_file_is_one_message_that_names_it(explorer, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "eval.json").write_text("[1, 2]")
    (run / "metrics.jsonl").write_text('no JSON\n{"step": 1}\n')
    app = explorer(run, page="run")
    assert ["eval.json" in error.value for error in app.error] == [True, False]
    assert "metrics.jsonl" in unescaped(app.error[1].value) and app.code
    shown = unescaped(explorer(run, page="runs").warning[0].value)
    assert "eval.json" in shown and "metrics.jsonl" in shown
    path = write_run(tmp_path / "other") / "features" / "table.n_active.npy"
    path.write_bytes(path.read_bytes()[:100])
    for page in ("run", "features", "feature", "map"):
        assert str(path) in message(explorer(tmp_path / "other", page=page))


def test_an_error_of_a_part_that_is_drawn_by_itself_is_a_sentence(tmp_path, monkeypatch):
    def damaged(*_):
        raise SaelabError("a file is damaged")

    monkeypatch.setattr("explorer.state.database", damaged)
    monkeypatch.setattr("explorer.live.read", damaged)
    app = script(
        tmp_path,
        "from explorer import beside, examples, live, numbers\n"
        "for part in (beside.draw_beside, examples.draw_examples, live.draw_test_box, numbers.draw_neighbours):\n"
        "    part(0)\n",
    )
    app.query_params["text"] = "typed"
    app.run()
    assert not app.exception and [error.value for error in app.error] == ["a file is damaged"] * 4


def test_half_a_run_is_shown_as_far_as_it_is(explorer, tmp_path):
    run = tmp_path / "half"
    run.mkdir()
    (run / "train.json").write_text("{")
    app = explorer(tmp_path, page="runs")
    assert "config.yaml" in unescaped(app.warning[0].value) and not app.error
    app = explorer(tmp_path, page="run")
    assert "config.yaml" in message(app) and app.header[0].value == "half"


# what is loaded, sent and served


def test_hostile_names_and_models_are_text_on_every_page(explorer, runs):
    for page in ("runs", "run", "compare", "map"):
        app = explorer(runs, page=page, run=OTHER, other="whole")
        check_inert(app)
        labels = [element.value for element in [*app.header, *app.caption, *app.info]]
        labels += [link.proto.label for link in app.get("page_link")]
        assert not [label for label in labels if OTHER in label]
        assert "<img" not in html(app)


def test_no_page_loads_torch_or_a_language_model_library(main_script, runs):
    heavy = ["torch", "transformers", "transformer_lens", "datasets"]
    code = (
        "import sys\nfrom streamlit.testing.v1 import AppTest\n"
        f"sys.argv = ['main.py', {str(runs)!r}]\n"
        f"app = AppTest.from_file({str(main_script)!r}, default_timeout=60).run()\n"
        f"for page in {PAGES!r}:\n"
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
    assert config["runner"]["magicEnabled"] is False  # it shows bare strings


def test_no_folder_is_named_pages(main_script):
    """With one, a new Streamlit server runs the page that a link names without main.py: no run, no styles."""
    assert not (main_script.parent / "pages").exists()
