"""The Runs page."""

import json
import re
from html import escape

import pytest

from saelab.runs.summary import summarise
from tests.app.shown import check_inert, html, unescaped
from tests.app.synthetic_run import OTHER, SCRIPT, write_run, write_sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder of a sweep and a run."""
    folder = tmp_path_factory.mktemp("swept")
    write_sweep(folder / "grid")
    write_run(folder / "plain", features=False)
    return folder


def rows(app) -> list[list[str]]:
    """The cells of the table of a sweep, as HTML."""
    (table,) = re.findall("<tbody>.*?</tbody>", html(app))
    return [re.findall("<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", table)]


def drawn(app) -> list[dict]:
    (chart,) = app.get("plotly_chart")
    return json.loads(chart.proto.spec)["data"]


def names(app) -> list[str]:
    """The names on the cards, in order."""
    return [unescaped(link.proto.label).strip("*") for link in app.main.get("page_link")]


def test_a_card_has_the_figures_of_its_run(explorer, runs):
    app = explorer(runs, page="runs", run="whole")
    check_inert(app)
    assert app.header[0].value == "3 runs" and names(app)[0] == "whole"
    whole, bare = (next(card for card in html(app).split("sl-note")[1:] if text in card) for text in ("0.163", "–"))
    for text in (
        "demo · blocks.2.hook_resid_post",
        "0.163",
        "0.201",
        "31.9",
        "1 (2.5%)",
        "dead on 300,032 tokens",
        ">40<",
    ):
        assert text in whole
    assert "FVU over training, from 1.00 to 0.0110" in whole and "clip-path: polygon(" in whole
    assert bare.count("<b>–</b>") == 4 and "FVU over training" in bare


def test_runs_are_sorted_by_the_order_in_the_link(explorer, tmp_path):
    for name, fvu in (("a", 0.3), ("b", 0.1), ("c", None)):
        run = write_run(tmp_path / name, features=False)
        (run / "eval.json").write_text(json.dumps({"fvu": fvu}))
    app = explorer(tmp_path, page="runs", sort="FVU")
    assert names(app) == ["b", "a", "c"]
    app.selectbox(key="sort").set_value("name").run()
    assert names(app) == ["a", "b", "c"] and app.query_params["sort"] == "name"


def test_a_hundred_runs_are_a_page_and_more_are_two(explorer, tmp_path):
    for i in range(101):
        path = tmp_path / f"run{i:03}"
        path.mkdir()
        (path / "train.json").write_text(json.dumps({"complete": True}))
        (path / "config.yaml").write_text("model: {name: demo}")
    app = explorer(tmp_path, page="runs", sort="name")
    assert names(app) == [f"run{i:03}" for i in range(100)]
    app.number_input(key="page").set_value(2).run()
    assert names(app) == ["run100"] and app.query_params["page"] == "2"


def test_the_second_ticked_run_makes_a_pair(explorer, runs):
    app = explorer(runs, page="runs", run="bare")
    app.checkbox(key="tick-whole").check().run()
    assert app.query_params["tick"] == "whole" and "compare it with whole" in app.info[0].value
    app.checkbox(key="tick-whole").uncheck().run()
    assert "tick" not in app.query_params and not app.info
    app.checkbox(key="tick-whole").check().run()
    app.checkbox(key=f"tick-{OTHER}").check().run()
    assert "tick" not in app.query_params and not app.exception
    (leaving,) = app.get("bidi_component")
    assert json.loads(leaving.proto.bytes) == {
        "address": "compare?run=whole&other=%3Cimg+src%3Dx+onerror%3D%27window.pwned%3D4%27%3E+%24x%24+%2A%2Ab%2A%2A"
    }


def test_an_unfinished_and_a_damaged_run_say_so_on_their_cards(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False)
    (run / "train.json").write_text(json.dumps({"complete": False, "tokens": 10, "planned_tokens": 20}))
    (run / "eval.json").write_text("[")
    app = explorer(tmp_path, page="runs")
    assert "This run's training stopped after 10 of 20 tokens." in unescaped(app.caption[0].value)
    assert "eval.json" in unescaped(app.warning[0].value)
    assert summarise(run).curve and summarise(run).fvu is None


def test_the_runs_of_a_sweep_are_a_table_with_what_varies(explorer, swept):
    app = explorer(swept, page="runs", sort="FVU", run="plain")
    check_inert(app)
    assert app.header[0].value == "4 runs, 1 sweep" and names(app) == ["plain"]
    assert "A sweep of 4 runs, of which 2 failed · demo · blocks.2.hook_resid_post" in html(app)
    assert '<th title="sae.k">k</th><th title="sae.kind">kind</th>' in html(app)
    better, worse, unevaluated, early = rows(app)
    assert worse == [
        '<a href="run?run=grid%2F0" target="_self">0</a>',
        *("8", "a", "8.00", "0.300", "0.500", "0.965", "–", "1"),
        '<a href="runs?sort=FVU&amp;run=plain&amp;tick=grid%2F0" target="_self">compare</a>',
    ]
    assert better[1:5] == ["16", "a", "16.0", "0.200"]
    assert unevaluated[1:] == ["16", "b", f"failed: {escape(SCRIPT)} of 3"] and "grid%2F3" in unevaluated[0]
    assert early == ["2", "8", escape(SCRIPT), f"failed: {escape(SCRIPT)} of 2"]


def test_a_ticked_run_is_compared_with_one_of_a_sweep(explorer, swept):
    app = explorer(swept, page="runs", run="plain", tick="grid/0", sort="FVU")
    assert rows(app)[1][-1] == "ticked"
    assert rows(app)[0][-1] == '<a href="compare?run=grid%2F0&amp;other=grid%2F1" target="_self">compare</a>'
    app.checkbox(key="tick-plain").check().run()
    assert json.loads(app.get("bidi_component")[0].proto.bytes) == {"address": "compare?run=grid%2F0&other=plain"}


def test_the_runs_of_a_sweep_are_drawn_by_their_l0_against_the_figure_in_the_link(explorer, swept):
    app = explorer(swept, page="runs", axis="delta_ce")
    line, points = drawn(app)[:2]
    assert (points["text"], points["x"], points["y"]) == (["grid/0", "grid/1"], [8, 16], [0.5, 1.5])
    assert line["text"] == ["grid/0"], "more features per token and a larger delta CE: it is beaten"
    app.selectbox(key="axis").set_value("fvu").run()
    assert "axis" not in app.query_params
    line, points = drawn(app)[:2]
    assert points["y"] == pytest.approx([0.3, 0.2]) and line["text"] == ["grid/0", "grid/1"]


def test_one_run_of_a_sweep_is_a_card_and_a_damaged_summary_is_said(explorer, swept, tmp_path):
    app = explorer(swept / "grid" / "0", page="runs")
    assert app.header[0].value == "1 run" and names(app) == ["0"]
    app = explorer(swept / "grid", page="runs")
    assert app.header[0].value == "3 runs, 1 sweep" and ">grid</b>" in html(app)
    write_sweep(tmp_path / "grid")
    (tmp_path / "grid" / "sweep.json").write_text('{"runs": [1]}')
    app = explorer(tmp_path, page="runs")
    assert "sweep.json cannot be read as the summary of a sweep" in unescaped(app.error[0].value)
    assert len(names(app)) == 3
