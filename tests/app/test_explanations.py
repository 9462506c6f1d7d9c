"""Explanations and scores in the explorer: on a feature's page, in the list, on cards, in the audit; the buttons."""

import json
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from saelab.autointerp import lexical, single
from saelab.autointerp.contexts import contexts
from saelab.autointerp.embedders import of_database
from saelab.autointerp.lexical import LexicalJudge
from saelab.autointerp.overview import overview
from saelab.autointerp.records import Explanation
from saelab.autointerp.scoring import Judges
from saelab.autointerp.settings import ContextSettings
from saelab.autointerp.store import EXPLANATIONS, explanations, writing
from saelab.cli_autointerp import explorer_options
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.files import locked
from tests.app.conftest import serving
from tests.app.shown import check_inert, html, message, unescaped
from tests.app.synthetic_run import SCRIPT, write_run
from tests.app.test_feature_pages import listed, sent

HOSTILE = f"{SCRIPT} <img src=x onerror='window.pwned=7'> **b** [a](http://example.invalid)"
LONG = "long " * 80
NO_MODEL = "lexical, from statistics of tokens; no language model"
WINDOWS = ContextSettings(window=4, explain=6, quantiles=2, positives=10, negatives=10)
"""Short ones: the made-up features are silent in no long one."""
FEATURES = (3, 4, 5)
"""Those with explanations by lexical, and scores; 3 also has a hostile one by hand, after it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    run = write_run(tmp_path_factory.mktemp("explained") / "run")
    place = place_of(run)
    judges = Judges(LexicalJudge(), of_database(place.database), "TF-IDF")
    with writing(place.folder, place.inputs) as writer:
        for feature in FEATURES:
            writer.explanation(lexical.explain(contexts(place.database, feature, WINDOWS)), WINDOWS)
    known = overview(place.folder, place.inputs, 40)
    for each in list(explanations(place.folder, place.inputs)):
        single.score(place, each, known, judges)
    single.write_by_hand(place, 3, HOSTILE, f"Eve{SCRIPT}")
    with writing(place.folder, place.inputs) as writer:
        writer.explanation(Explanation(6, LONG, "default", "gpt at host"), ContextSettings())
        writer.explanation(Explanation(8, "", "default", "gpt at host", answer=f"sorry {SCRIPT}"), ContextSettings())
    return run


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy, to write into."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def place_of(run: Path) -> single.Place:
    return single.Place(open_database(run / "features"), run / "autointerp")


def button(app: AppTest, label: str):
    (found,) = [each for each in app.button if unescaped(each.label) == label]
    return found


def test_a_feature_shows_its_explanation_who_made_it_and_each_score_beside_its_control(explorer, made) -> None:
    app = explorer(made, page="feature", feature="4")
    page = html(app)
    place = place_of(made)
    known = overview(place.folder, place.inputs, 40)
    text = known.explanation(4).text
    assert text.replace('"', "&quot;") in page and NO_MODEL in page
    for label in ("detection by lexical", "fuzzing by lexical", "embedding by TF-IDF", "predicate by exact"):
        own, control = (line[4] for line in known.columns[label])
        row = page[page.index(f"<tr><td>{label.partition(' ')[0]}") :]
        row = row[: row.index("</tr>")]
        assert f"{own:.2f}<small>" in row and f"{control:.2f}<small>" in row, label
        assert row.count("audit?run=run&amp;feature=4&amp;score=") == 2
    assert "lexical (no language model)" in page and "chance 0.2" in page and " to " in page
    check_inert(app)


def test_hostile_and_long_texts_and_unreadable_answers_are_text(explorer, made) -> None:
    for feature, shown in (("3", "&lt;script&gt;"), ("8", "sorry &lt;script&gt;")):
        app = explorer(made, page="feature", feature=feature)
        check_inert(app)
        assert shown in html(app)
    app = explorer(made, page="features")
    check_inert(app)
    (data,) = sent(app, "rows")
    texts = {row["id"]: row.get("explained", "") for row in data["rows"]}
    assert texts[3] == HOSTILE and texts[4].startswith("lexical: ") and texts[8] == texts[9] == ""
    assert texts[6].endswith("…") and len(texts[6]) < 250


def test_the_list_searches_explanations_and_sorts_by_scores(explorer, made) -> None:
    place = place_of(made)
    known = overview(place.folder, place.inputs, 40)
    assert listed(explorer(made, page="features", q="explanation:LONG  long")) == [6]
    assert listed(explorer(made, page="features", q="explanation:")) == [3, 4, 5, 6]
    label = "predicate by exact"
    values = {f: known.columns[label][0][f] for f in (4, 5)}
    app = explorer(made, page="features", sort=label, scores=f"{label}|fuzzing by lexical|no such")
    assert listed(app)[:2] == sorted(values, key=values.__getitem__, reverse=True)
    (data,) = sent(app, "rows")
    assert [key for key, *_ in data["columns"] if key.startswith("number:")] == [
        f"number:{label}",
        "number:fuzzing by lexical",
    ]
    first = data["rows"][0]
    assert first[f"number:{label}"][0] == f"{values[first['id']]:.2f}" and data["sort"] == f"number:{label}"
    rising = listed(explorer(made, page="features", sort=label, order="asc"))
    assert rising[:2] == listed(app)[1::-1], "features without a score come last"
    assert len(listed(explorer(made, page="features", sort="no such"))) == 39


def test_cards_have_the_explanations_of_the_features_on_them(explorer, made) -> None:
    app = explorer(made, page="feature", feature="1")
    data = sent(app, "tokens")[0]
    assert set(data["explained"]) == set(data["names"]) & {"3", "4", "5", "6"} != set()
    if "3" in data["explained"]:
        assert data["explained"]["3"] == HOSTILE


def test_an_audit_shows_each_window_with_its_marks_and_what_the_judge_said(explorer, made) -> None:
    place = place_of(made)
    known = overview(place.folder, place.inputs, 40)
    for name in ("fuzzing", "intruder", "embedding", "predicate"):
        index = [each.score for each in known.measures].index(name)
        (line,) = known.scores[(known.scores["measure"] == index) & (known.scores["feature"] == 4)][:1]
        key = f"{int(line['key']):016x}"
        app = explorer(made, page="audit", feature="4", score=key)
        (data,) = sent(app, "tokens")
        shown = data["lines"]
        assert len(shown) == len(json.loads(line_of(place, int(line["offset"])))["judged"]) > 0, name
        assert any("marks" in each for each in shown) == (name in ("fuzzing", "intruder", "predicate"))
        wrong = explorer(made, page="audit", feature="4", score=key, mistakes="1")
        mistakes = sum(len(each["lines"]) for each in sent(wrong, "tokens"))
        assert mistakes < len(shown) and not wrong.exception
    assert "the judge says 1" in html(app)
    assert explorer(made, page="audit", feature="9").info, "no scores"


def line_of(place: single.Place, offset: int) -> str:
    return (place.folder / "scores.jsonl").read_bytes()[offset:].partition(b"\n")[0].decode()


def test_the_page_of_explanations_has_the_table_of_controls_and_a_chart(explorer, made, runs) -> None:
    app = explorer(made, page="explanations")
    page = html(app)
    assert (
        "shuffled" in page and "pairs: " in page and any("is no language model" in each.value for each in app.caption)
    )
    (chart,) = app.get("plotly_chart")
    traces = json.loads(chart.proto.spec)["data"]
    assert {trace["name"] for trace in traces} == {"lexical", "control: lexical"}
    assert "saelab explain" in explorer(runs / "whole", page="explanations").info[0].value


def test_a_button_explains_and_scores_and_one_stores_what_a_person_writes(explorer, run) -> None:
    app = explorer(run, page="feature", feature="9")
    button(app, "Explain now, offline").click().run()
    assert not app.exception and not app.error and NO_MODEL in html(app)
    button(app, "Score now, offline").click().run()
    assert not app.exception and not app.error and "<tr><td>detection" in html(app)
    app.text_area[0].set_value(HOSTILE)
    (author,) = [each for each in app.text_input if each.label == "Your name"]
    author.set_value("Ann")
    button(app, "Save").click().run()
    assert not app.exception and not app.error and "by hand, Ann" in html(app)
    check_inert(app)
    place = place_of(run)
    kinds = [each.explanation.kind for each in explanations(place.folder, place.inputs, 9)]
    assert kinds == ["lexical", "shuffled lexical", "manual"]


def test_a_locked_folder_and_damaged_lines_leave_the_page_standing(explorer, run) -> None:
    app = explorer(run, page="feature", feature="9")
    with locked(run / "autointerp"):
        button(app, "Explain now, offline").click().run()
    assert "another process is writing" in message(app) and sent(app, "tokens")
    with (run / "autointerp" / EXPLANATIONS).open("a") as file:
        file.write("{}\n")
    for page in ("features", "audit", "feature"):
        app = explorer(run, page=page, feature="4")
        assert "damaged. Remove that line" in message(app), page
    assert "Explain now, offline" not in [each.label for each in app.button]


def test_a_language_model_is_asked_if_the_explorer_has_one(explorer, run, monkeypatch) -> None:
    monkeypatch.setenv("SAELAB_LLM_KEY", "sk-very-secret-key")
    options = explorer_options("http://127.0.0.1:9/v1", "gpt", "0.1,0.4", 10, None)
    app = explorer(*options, run, page="feature", feature="9")
    labels = [unescaped(each.label) for each in app.button]
    assert "Ask gpt at 127.0.0.1" in labels and "Explain now, offline" in labels
    (found,) = [each for each in app.button if unescaped(each.label) == "Ask gpt at 127.0.0.1"]
    assert "1 requests" in unescaped(found.help) and "in money" in unescaped(found.help)
    found.click().run()
    assert "the cap of 10 tokens leaves no room" in message(app), "nothing is asked past the budget"
    assert "sk-very-secret-key" not in repr(app.main) + html(app)
    bad = explorer("--nonsense=1", run, page="features")
    assert "no option" in unescaped(bad.error[0].value)


def test_the_command_refuses_half_of_the_options() -> None:
    assert explorer_options(None, None, None, None, None) == []
    for llm, model, name in (("http://x", None, "--model"), (None, "m", "--llm")):
        with pytest.raises(SaelabError, match=f"{name}: is missing"):
            explorer_options(llm, model, None, None, None)
    with pytest.raises(SaelabError, match="--price: 'x'"):
        explorer_options("http://x", "m", "x", None, None)


@pytest.mark.slow
def test_explaining_writing_and_auditing_in_a_browser(browser, main_script, run, tmp_path) -> None:
    with serving(main_script, run, tmp_path / "log.txt") as address:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(60_000)
        page.goto(f"{address}/feature?feature=9")
        page.get_by_role("button", name="Explain now, offline").click()
        page.locator(".sl-explanation", has_text=NO_MODEL).first.wait_for()
        page.get_by_role("button", name="Score now, offline").click()
        page.locator(".sl-scores", has_text="detection").first.wait_for()
        page.locator(".line .token.peak").first.wait_for()
        assert page.locator(".line").first.bounding_box()["y"] < 500
        page.get_by_role("button", name="Write one").click()
        page.get_by_role("textbox", name="Explanation").fill(HOSTILE)
        page.get_by_role("textbox", name="Your name").fill("Ann")
        page.get_by_role("button", name="Save").click()
        page.locator(".sl-explanation", has_text="by hand, Ann").first.wait_for()
        page.goto(f"{address}/features?q=explanation:script")
        page.locator(".explained", has_text=SCRIPT).first.wait_for()
        page.goto(f"{address}/features?q=explanation:")
        page.get_by_role("button", name="detection", exact=True).click()
        page.wait_for_url("**sort=detection**")
        page.goto(f"{address}/feature?feature=9")
        page.get_by_text("1 other").click()
        page.locator(".sl-scores", has_text="detection").get_by_role("link", name="audit").first.click()
        page.wait_for_url("**audit?**score=*")
        page.locator(".heading", has_text="the judge says").first.wait_for()
        assert page.evaluate("window.pwned === undefined")
        assert page.locator("img[src='x'], .stMain script").count() == 0
        page.close()
