"""The Runs page."""

import json

from saelab.runs.summary import summarise
from tests.app.shown import check_inert, html, unescaped
from tests.app.synthetic_run import OTHER, write_run


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
