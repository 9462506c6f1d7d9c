"""The Prompt and Steer pages, and the test box, on a run whose model is in memory."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from streamlit.testing.v1 import AppTest

from saelab.analysis.result import stored
from saelab.analysis.settings import SteeringSettings
from saelab.analysis.short_text import changes
from saelab.analysis.steering_effects import steering_effects
from saelab.analysis.steering_report import SteeringEffects
from saelab.features.database import Feature, open_database
from saelab.features.token_bytes import token_bytes
from saelab.runs import folder
from saelab.runs.effects import effects_of
from saelab.runs.live import Live, open_live, text_at
from tests.app.conftest import APP, serving
from tests.app.shown import check_inert, html, message, unescaped
from tests.app.synthetic_run import OTHER
from tests.features.dense import write_database
from tests.tiny import random_rows

TEXT = "The quick brown fox jumps"


@pytest.fixture(scope="module")
def live(trained_run: Path) -> Live:
    return open_live(trained_run)


@pytest.fixture(scope="module")
def tiny_runs(trained_run: Path, live: Live, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of one autoencoder: `bare`, `whole` with a database, and `moved`, whose model is missing."""
    folder = tmp_path_factory.mktemp("tiny_runs")
    rows = random_rows(live.lm, 24, 16).numpy()
    texts = [live.encode(row.tolist()) for row in rows]
    z = np.stack([np.stack([text.of(f) for f in range(64)], 1) for text in texts])
    for name in ("bare", "whole", "moved"):
        shutil.copytree(trained_run, folder / name)
    for name in ("whole", "moved"):
        vocabulary = token_bytes(live.lm.tokenizer, live.lm.embeddings)
        write_database(folder / name / "features", z, rows, vocabulary, special=tuple(live.lm.special_ids.tolist()))
    settings = folder / "moved" / "config.yaml"
    settings.write_text(re.sub(r"(?m)^( *name:) /.*$", r"\1 /nowhere/model", settings.read_text()))
    return folder


@pytest.fixture
def at(explorer, tiny_runs: Path):
    """Opens a page of a run of `tiny_runs`."""

    def open_page(page: str, run: str = "whole", **link: str) -> AppTest:
        return explorer(tiny_runs, page=page, run=run, **link)

    return open_page


def listed(app: AppTest, table: int = 0) -> list[tuple[int, dict[str, str]]]:
    """The features in a table of the page, each with its columns."""
    tables = re.findall(r'<table class="sl-features">.*?</table>', html(app))
    titles = re.findall(r"<th[^>]*>(.*?)</th>", tables[table])[2:]
    found = []
    for row in re.findall(r"<tr><td>(.*?)</tr>", tables[table]):
        (feature,) = re.findall(r'<a href="feature\?[^"]*feature=(\d+)"', row)
        found.append((int(feature), dict(zip(titles, re.findall(r"<td>(.*?)</td>", row), strict=True))))
    return found


def components(app: AppTest) -> dict[str, dict]:
    """The data of the page's components, by key."""
    found = [element.proto for element in app.get("bidi_component")]
    return {proto.id.split("-", 2)[2]: json.loads(proto.bytes) for proto in found if proto.bytes}


def captions(app: AppTest) -> str:
    return " | ".join(unescaped(caption.value) for caption in app.caption)


def test_a_typed_text_lists_the_features_of_the_chosen_token_in_three_orders(at, live, tiny_runs) -> None:
    text, database = live.read(TEXT), open_database(tiny_runs / "whole" / "features")
    features, values = text.at(3)
    app = at("prompt", text=TEXT, token="3")
    rows = listed(app)
    assert [feature for feature, _ in rows] == features[np.argsort(-values, kind="stable")].tolist()
    assert f"{len(text)} tokens" in captions(app)
    assert text.norms is not None and text.errors is not None
    assert f"error {100 * text.errors[3] / text.norms[3]:.0f}% of it" in captions(app)
    density = database.table["density"][features]
    quantile = {
        f: 100 * (database.facts.activations(f).values <= v).mean() for f, v in zip(features, values, strict=True)
    }
    effects = live.logit_effects(text, 3, int(text.token_ids[4]))
    for feature, columns in rows:
        i = features.tolist().index(feature)
        assert float(columns["activation"].replace(",", "")) == pytest.approx(values[i], rel=5e-3)
        assert columns["quantile"] == f"{quantile[feature]:.1f}%"
        assert columns["density"] == f"{100 * density[i]:.3g}%" and columns["logit"] == f"{effects[i]:+.2f}"

    by_quantile = [feature for feature, _ in listed(at("prompt", text=TEXT, token="3", sort="quantile"))]
    assert by_quantile == sorted(features.tolist(), key=lambda f: -quantile[f])
    weighted = [feature for feature, _ in listed(at("prompt", text=TEXT, token="3", sort="density-weighted"))]
    assert weighted == features[np.argsort(values * np.log10(density.clip(1e-9, 1)), kind="stable")].tolist()
    cut = at("prompt", text=TEXT, token="3", cut="0.1")
    assert {feature for feature, _ in listed(cut)} == set(features[density <= 0.1].tolist())
    assert (density > 0.1).any() and f"{(density > 0.1).sum()} features that are denser than 10%" in captions(cut)
    other = live.token_ids(" dog", bos=False)[0]
    aimed = listed(at("prompt", text=TEXT, token="3", target=" dog"))
    assert aimed[0][1]["logit"] == f"{live.logit_effects(text, 3, other)[features.tolist().index(aimed[0][0])]:+.2f}"


def test_tokens_are_shaded_by_error_l0_a_feature_or_similarity(at, live) -> None:
    text = live.read(TEXT)
    assert text.norms is not None and text.errors is not None

    def shades(**link: str) -> tuple[np.ndarray, dict]:
        (line,) = components(at("prompt", text=TEXT, **link))["prompt_tokens"]["lines"]
        return np.array(line["activations"]), line

    np.testing.assert_allclose(shades()[0][1:], (text.errors / text.norms.clip(1e-9))[1:], rtol=5e-3)
    assert shades(shade="L0")[0].tolist() == text.l0.tolist()
    np.testing.assert_allclose(shades(shade="similarity", token="2")[0], text.similarity()[2], rtol=5e-3, atol=1e-6)
    feature = int(text.at(2)[0][0])
    values, line = shades(shade="feature", of=str(feature), token="2")
    np.testing.assert_allclose(values, text.of(feature), rtol=5e-3)
    assert line["peak"] == 2 and len(line["percentiles"]) == len(text)
    assert feature not in line["others"][2][::2] and set(line["others"][2][::2]) <= set(text.at(2)[0].tolist())


def test_widgets_write_the_link_and_another_text_forgets_the_token(at, live) -> None:
    app = at("prompt", text=TEXT, token="3")
    app.toggle(key="bos").set_value(False).run()
    assert app.query_params["bos"] == "0" and f"{len(live.read(TEXT)) - 1} tokens" in captions(app)
    app.toggle(key="locks").set_value(True).run()
    assert app.query_params["lock"] == "3" and len(re.findall("<table", html(app))) == 1
    app.query_params["token"] = "2"
    app.run()
    assert len(re.findall("<table", html(app))) == 2
    app.text_area(key="text").set_value("A sparse autoencoder").run()
    assert app.query_params["text"] == "A sparse autoencoder"
    assert not {"token", "lock"} & set(app.query_params) and not app.toggle(key="locks").value
    assert not app.exception and not app.error


def test_an_edit_shows_the_features_that_it_changes(at, live) -> None:
    edited = TEXT.replace("fox", "dog")
    app = at("prompt", text=TEXT, compare="1", edit=edited)
    found = changes(live.read(TEXT), live.read(edited))
    rows = listed(app, 1)
    assert [feature for feature, _ in rows] == found.features[:40].tolist()
    assert float(rows[0][1]["before"]) == pytest.approx(found.before[0], rel=5e-3)
    assert float(rows[0][1]["after"]) == pytest.approx(found.after[0], rel=5e-3)
    assert f"{(found.before == 0).sum()} features appeared, {(found.after == 0).sum()} vanished" in captions(app)
    assert "0 features appeared, 0 vanished, 0 changed" in captions(at("prompt", text=TEXT, compare="1"))


def test_the_matrix_of_similarities_has_a_label_for_each_token(at, live) -> None:
    page = html(at("prompt", text=TEXT, matrix="1"))
    assert 'class="sl-picture" role="img"' in page
    (labels,) = re.findall(r'<div class="sl-labels">(.*?)</div></div>', page)
    assert len(re.findall("<div>", labels)) == len(live.read(TEXT))


def test_held_out_text_needs_no_model_and_a_typed_one_says_that_it_does(at, tiny_runs, monkeypatch) -> None:
    app = at("prompt", "moved", text=TEXT)
    assert message(app).startswith("This needs the run's language model and autoencoder, which cannot be loaded.")
    assert "/nowhere/model" in message(app) and "Held-out text needs no language model." in captions(app)
    assert app.button(key="load_again").label == "Load the model again"
    monkeypatch.setattr("explorer.live._opened", lambda *_: pytest.fail("it loads the model"))
    row = text_at(open_database(tiny_runs / "moved" / "features"), 5)
    app = at("prompt", "moved", **{"from": "held-out", "row": "5", "token": "7"})
    assert not app.error and not app.exception
    assert {feature for feature, _ in listed(app)} == set(row.at(7)[0].tolist())
    assert "logit" not in listed(app)[0][1] and "quantile" in listed(app)[0][1]
    shown = components(app)["prompt_tokens"]
    assert shown["what"] == "activation", "L0 is the same on every token of a TopK autoencoder"
    strongest = int(row.features[row.values.argmax()])
    scale = open_database(tiny_runs / "moved" / "features").feature(strongest).usual_maximum
    assert shown["strongest"] == pytest.approx(scale, rel=5e-3)
    for page in ("prompt", "steer", "feature"):  # nothing is asked yet
        assert not at(page, "moved").error


def test_a_list_of_features_has_an_end(at, live, monkeypatch) -> None:
    text = live.read(TEXT)
    features, values = text.at(3)
    monkeypatch.setattr("explorer.live.read", lambda *_: text)
    offsets = np.where(np.arange(len(text) + 1) > 3, 250, 0)
    dense = replace(text, offsets=offsets, features=np.arange(250) % 64, values=np.ones(250))
    app = at("prompt", text=TEXT, token="3")
    assert len(listed(app)) == len(features) == len(values)
    monkeypatch.setattr("explorer.live.read", lambda *_: dense)
    app = at("prompt", text=TEXT, token="3")
    assert len(listed(app)) == 200 and "The first 200 of 250" in captions(app)


def test_without_a_database_a_text_is_still_read(at, live) -> None:
    app = at("prompt", "bare", text=TEXT)
    assert not app.error
    features, values = live.read(TEXT).at(len(live.read(TEXT)) - 1)
    rows = listed(app)
    assert [feature for feature, _ in rows] == features[np.argsort(-values, kind="stable")].tolist()
    assert set(rows[0][1]) == {"activation", "logit"}


def test_a_text_that_is_too_long_is_one_sentence(at) -> None:
    assert message(at("prompt", text="fox " * 70)).endswith("takes at most 64; shorten it.")
    assert message(at("prompt", text="x" * 2001)) == "The text has 2,001 characters, more than 2,000; shorten it."


@pytest.mark.parametrize(
    "link",
    [
        {"token": "999"},
        {"lock": "-3"},
        {"row": "9999", "from": "held-out"},
        {"shade": "x", "sort": "<b>"},
        {"shade": "feature", "of": "64"},
    ],
)
def test_a_link_that_makes_no_sense_shows_the_page(at, link) -> None:
    app = at("prompt", text=TEXT, **link)
    assert not app.exception and not app.error and listed(app)


def test_text_that_looks_like_html_stays_text(at) -> None:
    hostile = "<script> **b** <img src=x> $x$"  # the tiny model takes 64 tokens
    app = at("prompt", text=hostile, matrix="1", compare="1", token="2", lock="4")
    assert not app.exception and not app.error
    check_inert(app)
    app = at("steer", text=hostile, steer="1:add:1", n="2")
    app.button(key="generate").click().run()
    assert not app.exception and not app.error
    check_inert(app)


def test_hostile_held_out_text_stays_text_and_a_model_that_does_not_fit_is_said(explorer, runs) -> None:
    link = {"from": "held-out", "row": "0", "matrix": "1", "token": "12", "lock": "5", "cut": "0.1"}
    app = explorer(runs, page="prompt", run="whole", **link)
    assert not app.exception and not app.error and len(re.findall("<table", html(app))) == 2
    check_inert(app)
    app = explorer(runs, page="prompt", run=OTHER, text="x")
    assert "cannot be loaded" in message(app)
    check_inert(app)


# steering


def test_nothing_is_generated_before_the_button_is_pressed(at, monkeypatch) -> None:
    app = at("steer", text=TEXT, steer="3:clamp:2,5:ablate:1", n="4")
    assert "Clean" not in str([m.value for m in app.markdown]) and not app.error
    app.button(key="generate").click().run()
    assert not app.exception and not app.error
    assert [m.value for m in app.markdown] == ["**Clean**", "**Steered**"]
    assert "Mean KL(clean || steered) of the predictions of the new tokens: 0.000 nats" not in captions(app)
    assert "settings have changed" not in captions(app)
    app.number_input(key="n").set_value(5).run()
    assert "settings have changed" in captions(app) and app.query_params["n"] == "5"


def test_a_strength_of_1_is_the_features_maximum_and_0_changes_nothing(at, live, tiny_runs, monkeypatch) -> None:
    asked = []
    original = Live.steer
    monkeypatch.setattr(Live, "steer", lambda self, ids, i, **o: asked.append(i) or original(self, ids, i, **o))
    maxima = open_database(tiny_runs / "whole" / "features").facts.maxima
    feature = int(maxima.argmax())
    app = at("steer", text=TEXT, steer=f"{feature}:add:1.5", n="2")
    app.button(key="generate").click().run()
    assert asked[0][0].value == pytest.approx(1.5 * maxima[feature])
    app.number_input(key="strength_0").set_value(0.0).run()
    app.button(key="generate").click().run()
    assert "of the predictions of the new tokens: 0.000 nats" in captions(app)
    bare = at("steer", "bare", text=TEXT, steer=f"{feature}:add:1.5", n="2")
    bare.button(key="generate").click().run()
    assert asked[2][0].value == 1.5 and not bare.error


def test_a_strength_is_in_units_of_the_usual_maximum(at, monkeypatch) -> None:
    asked = []
    original = Live.steer
    monkeypatch.setattr(Live, "steer", lambda self, ids, i, **o: asked.append(i) or original(self, ids, i, **o))
    app = at("steer", text=TEXT, steer="3:add:1.5", n="2")
    assert app.number_input(key="strength_0").label.startswith("Strength × its maximum, ")
    monkeypatch.setattr(Feature, "usual_maximum", 0.125)
    app.button(key="generate").click().run()
    assert app.number_input(key="strength_0").label == "Strength × its usual maximum, 0.125"
    assert asked[0][0].value == 1.5 * 0.125


def test_the_features_to_steer_are_in_the_link(at) -> None:
    app = at("steer", text=TEXT)
    assert app.button(key="generate").disabled
    app.button(key="add").click().run()
    app.button(key="add").click().run()
    assert app.query_params["steer"] == "0:add:1,1:add:1"
    app.selectbox(key="mode_1").set_value("ablate").run()
    app.number_input(key="feature_0").set_value(9).run()
    app.number_input(key="strength_0").set_value(-2.5).run()
    assert app.query_params["steer"] == "9:add:-2.5,1:ablate:1"
    app.button(key="remove_0").click().run()
    assert app.query_params["steer"] == "1:ablate:1" and app.number_input(key="feature_0").value == 1
    assert not app.exception


@pytest.mark.parametrize(
    ("link", "text"),
    [
        ({"steer": "64:add:1"}, "there is no feature 64: features are 0 to 63"),
        ({"steer": "1:add:1,1:ablate:1"}, "feature 1 is named twice"),
        ({"text": "fox " * 70}, "takes at most 64"),
        ({"text": "", "bos": "0"}, "The text has no token"),
        ({"n": "62"}, "use a shorter prompt or fewer new tokens"),
    ],
)
def test_what_cannot_be_steered_is_one_sentence(at, link, text) -> None:
    app = at("steer", **{"text": TEXT, "steer": "1:add:1"} | link)
    assert not app.error
    app.button(key="generate").click().run()
    assert text in message(app)


@pytest.mark.parametrize("steer", ["1:set:3", "x", "1:add:1e999", "1:add:--", ",,,", "1:add:nan"])
def test_a_link_with_no_steering_in_it_shows_the_page(at, steer) -> None:
    app = at("steer", steer=steer)
    assert not app.exception and not app.error


# effects of steering


@pytest.fixture
def analysed(tiny_runs: Path, live: Live, tmp_path: Path) -> tuple[Path, SteeringEffects]:
    """A folder with the run `whole` and its effects of steering, on the text of its database."""
    run = Path(shutil.copytree(tiny_runs / "whole", tmp_path / "runs" / "whole"))
    settings = SteeringSettings(contexts=3, features=5, targets=4)
    result = steering_effects(live.sae, live.lm, random_rows(live.lm, 24, 16), live.site, settings)
    figures, arrays = stored(result)
    path = run / folder.ANALYSES / "steering"
    path.mkdir(parents=True)
    (path / folder.FIGURES).write_text(json.dumps({"inputs": "0", "settings": {}} | figures))
    save_file({name: array.copy() for name, array in arrays.items()}, path / folder.ARRAYS)
    return run.parent, result


def test_stored_effects_are_shown_at_the_tokens_that_were_steered(explorer, analysed) -> None:
    runs, result = analysed
    i, feature = 2, int(result.features[2])
    app = explorer(runs, page="steer", steer=f"{feature}:add:1")
    check_inert(app)
    figures = {metric.label: metric.value for metric in app.metric}
    assert figures["Steering score"] == f"{result.score[i, 0]:.2f}"
    assert figures["Of a random direction"] == f"{result.score[i, 1]:.2f}"
    for at, kind in (("own", 0), ("random", 1)):
        app = explorer(runs, page="steer", steer=f"{feature}:add:1", at=at)
        lines = components(app)["effect_tokens"]["lines"]
        shown = {(line["row"], line["start"] + line["peak"]) for line in lines}
        assert shown == set(zip(result.row[i, kind].tolist(), result.position[i, kind].tolist(), strict=True))
        rows = random_rows(open_live(runs / "whole").lm, 24, 16).numpy()
        assert all(line["ids"][line["peak"]] == rows[line["row"], line["start"] + line["peak"]] for line in lines)
    (table,) = re.findall(r'<table class="sl-facts sl-effects">.*?</table>', html(app))
    cells = re.findall(r'<td class="sl-value">(.*?)</td>', table)
    assert (
        len(cells) == 6 * 4
        and cells[0] == f"{result.kl[i, 0, 0, 0]:.3g}"
        and cells[1] == f"{result.kl[i, 0, 0, 1]:.3g}"
    )
    assert cells[2].startswith(f"{result.kl[:, 0, 0, 0].mean():.3g} (") and " to " in cells[2]
    app.segmented_control(key="effect").set_value("next_token").run()
    assert f">{result.next_token[i, 1, 2, 0]:.3g}<" in html(app) and app.query_params["effect"] == "next_token"


def test_a_point_of_the_chart_is_a_feature_and_the_chosen_one_is_marked(explorer, analysed) -> None:
    runs, result = analysed
    app = explorer(runs, page="steer", of=str(result.features[1]))
    (chart,) = [json.loads(each.proto.spec) for each in app.get("plotly_chart")]
    points = {trace["name"]: trace for trace in chart["data"]}
    assert points["feature"]["customdata"] == result.features.tolist()
    assert points["feature"]["y"] == pytest.approx(result.logits[:, 0, 2, 0].tolist())
    assert points["chosen"]["x"] == pytest.approx([result.share[1]])
    assert f"**Feature {result.features[1]}**" in [each.value for each in app.markdown]
    best = result.features[result.score[:, 0].argmax()]
    assert f"**Feature {best}**" in [each.value for each in explorer(runs, page="steer").markdown]


def test_a_feature_that_is_not_stored_is_measured_when_asked_for(explorer, at, analysed, tiny_runs) -> None:
    runs, result = analysed
    database = open_database(runs / "whole" / "features")
    active = np.flatnonzero(database.table["n_active"] > 30)
    feature = int(next(f for f in active if f not in result.features))
    app = explorer(runs, page="steer", steer=f"{feature}:add:1")
    assert f"Feature {feature} is not among the 5 features" in captions(app) and "effect_tokens" not in components(app)
    app.button(key="measure").click().run()
    assert not app.exception and not app.error
    expected = effects_of(open_live(runs / "whole"), database, feature)
    assert {m.label: m.value for m in app.metric}["Steering score"] == f"{expected.score[0, 0]:.2f}"
    shown = {(line["row"], line["start"] + line["peak"]) for line in components(app)["effect_tokens"]["lines"]}
    assert shown == set(zip(expected.row[0, 0].tolist(), expected.position[0, 0].tolist(), strict=True))
    app = at("steer", steer=f"{feature}:add:1")
    assert "saelab analyse" in app.info[0].value and app.button(key="measure")
    assert "their strongest" not in captions(at("steer", "bare", steer=f"{feature}:add:1"))
    assert "strongest tokens are not known" in captions(at("steer", "bare", steer=f"{feature}:add:1"))


def test_a_result_of_another_text_is_outdated(explorer, analysed) -> None:
    runs, result = analysed
    path = runs / "whole" / folder.ANALYSES / "steering"
    arrays = load_file(path / folder.ARRAYS)
    database = open_database(runs / "whole" / "features")
    feature = int(result.features[0])
    inactive = np.setdiff1d(np.arange(24 * 16), database.facts.activations(feature).places)[0]
    arrays["row"][0, 0, 0], arrays["position"][0, 0, 0] = divmod(inactive, 16)
    save_file(arrays, path / folder.ARRAYS)
    shown = message(explorer(runs, page="steer", of=str(feature)))
    assert "steering: is not what this version of saelab reads" in shown
    (path / folder.FIGURES).write_text("{}")
    assert "steering: is not what this version" in message(explorer(runs, page="steer", of=str(feature)))


# the test box, and what a server needs


def test_pages_of_typed_text_import_no_torch() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(APP)!r})
import explorer.live, explorer.effects, explorer.feature_list, explorer.heatmap, saelab.analysis.settings
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_the_test_box_of_a_feature_shows_its_activations_on_the_typed_text(at, live) -> None:
    text = live.read(TEXT)
    feature = int(text.features[text.values.argmax()])
    app = at("feature", feature=str(feature))
    assert "test_tokens" not in components(app)
    app.text_input(key="text").set_value(TEXT).run()
    assert not app.exception and not app.error and app.query_params["text"] == TEXT
    (line,) = components(app)["test_tokens"]["lines"]
    np.testing.assert_allclose(line["activations"], text.of(feature), rtol=5e-3)
    assert "All features of this text" in [link.proto.label for link in app.get("page_link")]


def test_typing_shows_tokens_and_a_click_chooses_one(browser, main_script, tiny_runs, tmp_path) -> None:
    with serving(main_script, tiny_runs, tmp_path / "log.txt") as address:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(60_000)
        page.goto(f"{address}/prompt?run=whole")
        page.get_by_role("textbox", name="Prompt").fill(TEXT)
        page.keyboard.press("Control+Enter")
        page.get_by_text("brown", exact=False).locator("visible=true").last.wait_for()
        page.locator(".token", has_text="brown").click()
        page.wait_for_url("**token=*")
        token = int(re.findall(r"token=(\d+)", page.url)[0])
        page.get_by_text(f"Token {token}", exact=False).first.wait_for()
        assert "brown" in page.locator(".stMarkdown", has_text=f"Token {token}").inner_text()
        link = page.locator(".sl-features a").first
        assert "run=whole" in unescape(link.get_attribute("href"))
        page.reload()
        page.locator(".sl-features a").first.wait_for()
        assert f"token={token}" in page.url
        page.close()
