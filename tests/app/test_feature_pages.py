"""What the Features and the Feature page decide in Python: the list, what is sent to the components, the link."""

import json
import os
import re

import numpy as np
import pytest

from saelab.features.database import open_database
from saelab.features.marks import number
from saelab.features.token_facts import percentiles, strongest_others
from tests.app.shown import check_inert, html, message, unescaped
from tests.app.synthetic_run import HOSTILE, NEVER_ACTIVE, OTHER, SCRIPT, write_features, write_run
from tests.app.wide import BASE, write_wide
from tests.features.dense import write_database


@pytest.fixture(scope="session")
def database(runs):
    return open_database(runs / "whole" / "features")


def sent(app, name):
    """The data of the page's components of this name."""
    found = [element.proto for element in app.get("bidi_component")]
    return [json.loads(proto.bytes) for proto in found if proto.component_name == f"saelab_{name}"]


def listed(app):
    (data,) = sent(app, "rows")
    return [row["id"] for row in data["rows"]]


def lines(app):
    data = sent(app, "tokens")[0]
    return [line | {"texts": [data["texts"][token] for token in line["tokens"]]} for line in data["lines"]]


# the list


def test_the_list_shows_active_features_and_on_request_those_that_never_are(explorer, runs):
    app = explorer(runs, page="features", run="whole")
    active = [index for index in range(40) if index != NEVER_ACTIVE]
    assert listed(app) == active and app.caption[-1].value.startswith("39 of 40 features")
    assert listed(explorer(runs, page="features", run="whole", show="never")) == [NEVER_ACTIVE]
    assert listed(explorer(runs, page="features", run="whole", show="all")) == list(range(40))
    assert listed(explorer(runs, page="features", run="whole", q=f"id:3,{NEVER_ACTIVE}")) == [3, NEVER_ACTIVE]


def test_a_row_has_the_numbers_of_the_database_and_its_strongest_activation(explorer, runs, database):
    (data,) = sent(explorer(runs, page="features", run="whole"), "rows")
    for row in data["rows"][:10]:
        feature = database.feature(row["id"])
        assert float(row["density"].rstrip("%")) == pytest.approx(100 * feature.density, rel=0.01)
        assert row["n"] == f"{feature.n_active:,}" and row["maximum"] == number(feature.maximum)
        assert [len(tokens) for tokens in row["tokens"]] == [5, 5]
        top = database.examples(row["id"])[0]
        hit, last = row["lit"]
        first = top.position - hit
        expected = np.zeros(len(row["text"]))
        for i in range(len(expected)):
            found = database.at(top.row, first + i)
            expected[i] = found.values[found.features == row["id"]].sum() / feature.maximum
        assert row["shares"] == np.ceil(100 * expected).tolist() and row["shares"][hit] == 100
        assert hit == last
        assert len(row["bars"]) == 50 and [bar == "a" for bar in row["bars"]] == (feature.histogram == 0).tolist()


def test_the_link_filters_and_sorts_on_the_server(explorer, runs, database):
    link = {"density": "0.05,0.15", "maximum": "30,60", "sort": "maximum", "order": "asc"}
    expected = database.table.page(
        {"density": (0.05, 0.15), "maximum": (30, 60)}, sort="maximum", descending=False
    ).features.tolist()
    app = explorer(runs, page="features", run="whole", **link)
    assert listed(app) == expected != []
    (data,) = sent(app, "rows")
    assert data["sort"] == "maximum" and not data["descending"]
    assert data["link"].startswith("feature?run=whole&sort=maximum&order=asc&density=0.05%2C0.15")
    density, maximum = sent(app, "histogram")
    assert sum(density["counts"]) == sum(maximum["counts"]) == 39
    low, high = maximum["chosen"]
    assert maximum["edges"][low] <= 30 * 1.01 and maximum["edges"][high + 1] >= 60 * 0.99
    nothing = explorer(runs, page="features", run="whole", density="0.9,1")
    assert nothing.info and not sent(nothing, "rows")
    for bad in ({"density": "x"}, {"sort": "histogram"}, {"density": "2,1"}, {"show": SCRIPT}):
        assert len(listed(explorer(runs, page="features", run="whole", **bad))) == 39


def test_a_page_of_the_list_is_200_rows_and_few_bytes_whatever_the_number_of_features(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False)
    write_wide(run / "features", 16)
    app = explorer(run, page="features", sort="density")
    (data,) = sent(app, "rows")
    assert len(data["rows"]) == 200 and data["total"] == (BASE - 1) * 16
    table = open_database(run / "features").table
    for page, first in (("3", 400), ("1000", 20 * 200), ("x", 0), ("9" * 30, 0)):
        app.query_params["page"] = page
        app.run()
        assert listed(app) == table.page({"n_active": (1, np.inf)}, sort="density", first=first).features.tolist()
    assert sum(len(element.proto.SerializeToString()) for element in app.get("bidi_component")) < 200 << 10
    for examples in ("top", "intervals", "near misses"):
        app = explorer(run, page="feature", feature="300", sort="density", examples=examples)
        assert any(f" of {(BASE - 1) * 16:,}" in link.proto.label for link in app.get("page_link"))
        assert sum(len(element.proto.SerializeToString()) for element in app.get("bidi_component")) < 200 << 10


def test_a_search_shows_the_best_first_each_with_its_match_lit(explorer, runs, database):
    for query in ("return self", "日本語", "é", "👩‍👩‍👧", "/ret\\w+/", "token:def", "␣if"):
        app = explorer(runs, page="features", run="whole", q=query)
        (data,) = sent(app, "rows")
        found = database.search(query.replace("␣", " "))
        assert [row["id"] for row in data["rows"]] == found.features.tolist() != [], query
        assert [row["score"] for row in data["rows"]] == [f"{100 * share:.3g}%" for share in found.shares]
        for row in data["rows"]:
            first, last = row["lit"]
            assert max(row["shares"][first : last + 1]) > 0, "active on the match"
        lit = "".join(re.sub("[\\x01\\x02]", "", text) for text in row["text"][first : last + 1])
        plain = {"␣if": " if", "token:def": " def", "/ret\\w+/": "return"}.get(query, query)
        assert plain in lit
    (data,) = sent(explorer(runs, page="features", run="whole", q="promotes:numpy"), "rows")
    assert [float(row["score"]) for row in data["rows"]] == sorted(float(row["score"]) for row in data["rows"])[::-1]
    rare = sent(explorer(runs, page="features", run="whole", q="promotes:import", show="never"), "rows")
    assert [row.get("text") for data in rare for row in data["rows"]] == [None]
    sorted_rows = listed(explorer(runs, page="features", run="whole", q="return self", sort="density"))
    assert sorted(sorted_rows) == sorted(database.search("return self").features.tolist()) != sorted_rows
    assert "regular expression" in message(explorer(runs, page="features", run="whole", q="/(/"))


# one feature


def test_examples_are_those_of_the_database_with_what_else_is_active(explorer, runs, database):
    app = explorer(runs, page="feature", run="whole", feature="3")
    assert app.markdown[0].value == "### Feature 3"
    found = {(line["row"], line["start"]): line for line in lines(app)}
    active = database.facts.activations(3)
    for example in database.examples(3):
        line = found[example.row, example.start]
        assert line["ids"] == example.token_ids.tolist() and line["peak"] == example.index
        assert np.allclose(line["activations"], example.activations, rtol=6e-3)
        shares = percentiles(active, example.activations)
        assert np.allclose(line["percentiles"], np.where(example.activations > 0, shares, 0), atol=0.11)
        others = strongest_others(database.facts, example.row, example.start, len(example.tokens), 3)
        assert [pairs[::2] for pairs in line["others"]] == [each.features.tolist() for each in others]


def test_percentiles_and_the_others_equal_plain_counts(database):
    active = database.facts.activations(5)
    asked = np.array([0, active.values.max(), active.values.min(), np.median(active.values), 0.1], np.float32)
    expected = [100 * (active.values <= value).mean() for value in asked]
    assert np.allclose(percentiles(active, asked), expected)
    at = database.at(3, 9)
    order = np.argsort(-at.values, kind="stable")
    for besides in (None, int(at.features[order[0]])):
        (found,) = strongest_others(database.facts, 3, 9, 1, besides, most=4)
        assert found.features.tolist() == [f for f in at.features[order].tolist() if f != besides][:4]
        assert found.values.tolist() == sorted(found.values.tolist(), reverse=True)


def test_a_window_of_activations_equals_a_cut_of_all(database):
    places, values = database.facts.activations(2)
    for first, stop in ((0, 5), (100, 400), (0, database.facts.rows.size), (7, 7)):
        inside = (places >= first) & (places < stop)
        found = database.facts.between(2, first, stop)
        assert found.places.tolist() == places[inside].tolist() and found.values.tolist() == values[inside].tolist()


def test_intervals_random_near_misses_and_a_range(explorer, runs, database):
    def shown(**link):
        return lines(explorer(runs, page="feature", run="whole", feature="3", **link))

    intervals = shown(examples="intervals")
    headings = [line["heading"] for line in intervals if "heading" in line]
    assert len(headings) == len(database.intervals(3)) == 10 and headings[0].endswith("% of its activations")
    drawn = {(example.row, example.position) for example in database.examples(3, "random")}
    assert {(line["row"], line["start"] + line["peak"]) for line in shown(examples="random")} == drawn
    near = lines(explorer(runs, page="feature", run="whole", feature="39", examples="near misses"))
    assert [line["heading"] for line in near if "heading" in line] == [
        "Not active on the same token",
        "Not active in similar text",
    ]
    assert all(line["activations"][line["peak"]] == 0 and line["side"] == "0" for line in near)

    app = explorer(runs, page="feature", run="whole", feature="3", examples="range", range="2,4")
    maximum, values = float(database.facts.maxima[3]), database.facts.activations(3).values
    bins = np.minimum((values / maximum * 50).astype(int), 49)
    n = int(((bins >= 2) & (bins <= 4)).sum())
    assert f"{n:,} activations from {number(maximum * 2 / 50)} to" in html(app)
    peaks = [line["activations"][line["peak"]] for line in lines(app)]
    assert peaks and all(maximum * 2 / 50 * 0.995 <= peak <= maximum * 5 / 50 * 1.005 for peak in peaks)
    assert sent(app, "histogram")[0]["chosen"] == [2, 4]


def test_a_few_huge_activations_stretch_neither_shading_nor_histogram(explorer, tmp_path):
    """As attention sinks have them: 4,000 where all others are below 10."""
    run = write_run(tmp_path / "run", features=False)
    rng = np.random.default_rng(0)
    tokens, z = rng.integers(1, 9, (30, 16)), rng.uniform(1, 9, (30, 16, 2)).astype(np.float32)
    z[5, 1, 0] = 4000
    write_database(run / "features", z, tokens, [f" w{i}".encode() for i in range(9)])
    feature = open_database(run / "features").feature(0)
    usual = float(number(feature.usual_maximum))
    app = explorer(run, page="feature", feature="0", beside="0")
    (bars, _), shown = sent(app, "histogram"), sent(app, "tokens")
    assert bars["title"] == "Activations, logarithmic" and bars["edges"][-1] == 4000
    assert bars["counts"] == feature.bars.counts.tolist()
    assert [(each["strongest"], each["above"]) for each in shown] == [(usual, True)] * 2
    app = explorer(run, page="feature", feature="0", examples="range", range="45,49")
    assert [line["side"] for line in lines(app)] == ["4,000"] and not sent(app, "histogram")[1]["chosen"]
    (row, other) = sent(explorer(run, page="features", q="id:0,1"), "rows")[0]["rows"]
    assert row["shares"].count(100) == 1 and sorted(row["shares"])[-2] > 50 and max(other["shares"]) == 100
    assert sent(explorer(run, page="feature", feature="1"), "tokens")[0]["above"] is False


def test_repeated_examples_are_folded_into_the_first(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False)
    tokens = np.tile(np.arange(1, 17), (4, 1))
    tokens[3] = 17
    z = np.zeros((4, 16, 2), np.float32)
    z[:, 9, 0] = [1, 3, 2, 2.5]
    write_database(run / "features", z, tokens, [f" w{i}".encode() for i in range(18)])
    found = lines(explorer(run, page="feature", feature="0"))
    assert [(line["side"], line.get("more"), line.get("alike")) for line in found] == [
        ("3.00", 2, None),
        ("2.00", None, True),
        ("1.00", None, True),
        ("2.50", None, None),
    ]


def test_previous_next_random_and_jump_follow_the_list(explorer, runs, database, monkeypatch):
    order = database.table.page({"n_active": (1, np.inf)}, sort="density").features.tolist()
    app = explorer(runs, page="feature", run="whole", feature=str(order[0]), sort="density")
    button = {each.label: each for each in app.button}
    assert button["Previous"].disabled and not button["Next"].disabled
    assert [link.proto.label for link in app.get("page_link")].count("1 of 39") == 1
    button["Next"].click().run()
    assert app.query_params["feature"] == str(order[1]) and app.query_params["sort"] == "density"
    drawn_from: list[list[int]] = []
    monkeypatch.setattr("random.choice", lambda options: drawn_from.append(list(options)) or options[20])
    next(each for each in app.button if each.label == "Random").click().run()
    assert drawn_from == [[order[0], *order[2:]]]
    app.number_input(key="jump_to").set_value(NEVER_ACTIVE).run()
    assert "not among the 39" in [link.proto.label for link in app.get("page_link")]
    next(each for each in app.button if each.label == "Next").click().run()
    assert app.query_params["feature"] == str(NEVER_ACTIVE + 1)


def test_a_star_stays_for_the_session_and_its_list_is_a_link(explorer, runs):
    app = explorer(runs, page="feature", run="whole", feature="5")
    app.button(key="star").click().run()
    app.query_params["feature"] = "9"
    app.run()
    app.button(key="star").click().run()
    (link,) = [each.proto for each in app.get("page_link") if each.proto.label == "2 starred"]
    assert "id%3A5%2C9" in link.query_string
    app.button(key="star").click().run()
    assert "1 starred" in [each.proto.label for each in app.get("page_link")]


def test_another_feature_is_shown_beside(explorer, runs, database):
    app = explorer(runs, page="feature", run="whole", feature="3", beside="8")
    assert "**Feature 8**" in [text.value for text in app.markdown]
    assert len(sent(app, "tokens")[1]["lines"]) == 5
    next(each for each in app.button if each.label == "Close").click().run()
    assert "beside" not in app.query_params and not app.markdown  # only this fragment was run


def test_numbers_and_neighbours(explorer, runs, database):
    feature = database.feature(3)
    app = explorer(runs, page="feature", run="whole", feature="3", neighbours="coactive")
    assert unescaped(app.caption[1].value) == "blocks.2.hook_resid_post of the model demo, 40 features"
    page = html(app)
    for text in (f"{feature.n_active:,} of {feature.n_tokens:,} tokens", f"{feature.token_entropy:.2f} bits"):
        assert text in page
    bars, logits = sent(app, "histogram")
    assert bars["counts"] == feature.histogram.tolist() and bars["brush"]
    assert logits["counts"] == feature.logit_histogram.tolist() and not logits["brush"]
    assert any(database.lens in unescaped(caption.value) for caption in app.caption)
    (rows,) = sent(app, "rows")
    assert [(row["id"], row["score"], row["note"]) for row in rows["rows"]] == [
        (other.feature, f"{other.value:.2f}", f"Jaccard {other.jaccard:.2f}")
        for other in feature.neighbours["coactive"]
    ]


def test_a_never_active_feature_says_so_and_on_how_many_tokens(explorer, runs, database):
    app = explorer(runs, page="feature", run="whole", feature=str(NEVER_ACTIVE))
    assert f"Never active on the {database.n_tokens:,}" in app.warning[0].value
    assert not sent(app, "tokens") and len(sent(app, "histogram")) == 1
    assert len(sent(app, "rows")[0]["rows"]) == 10


def test_a_site_without_a_logit_lens(explorer, tmp_path):
    run = write_run(tmp_path / "run", features=False)
    z = np.ones((2, 8, 3), np.float32)
    write_database(run / "features", z, np.ones((2, 8), int), [b"a", b"b"], lens=False, site="blocks.0.mlp.hook_post")
    app = explorer(run, page="feature", feature="1")
    assert any("None: blocks.0.mlp.hook_post is neither" in unescaped(each.value) for each in app.caption)
    assert not explorer(run, page="features").error


def test_hostile_text_is_only_ever_data(explorer, runs):
    app = explorer(runs, page="feature", run="whole", feature="0")
    check_inert(app)
    shown = {text for line in lines(app) for text in line["texts"]}
    assert SCRIPT in shown
    for element in app.get("bidi_component"):
        assert not [token for token in HOSTILE if len(token) > 9 and token.strip() in element.proto.js_content]
    check_inert(explorer(runs, page="features", run="whole"))
    check_inert(explorer(runs, page="feature", run=OTHER, feature="0", examples="range", range="0,49"))


def test_text_in_many_bytes_stays_whole(explorer, runs):
    app = explorer(runs, page="feature", run="whole", feature="1", examples="random")
    text = "".join(text for line in lines(app) for text in line["texts"])
    for piece in ("本語", "👩‍👩‍👧", "שלום", "\\xe6"):
        assert piece in text


def test_the_page_without_a_feature_in_its_link_shows_the_last_one(explorer, runs):
    app = explorer(runs, page="feature", run="whole", feature="5")
    app.switch_page("views/features.py").run()
    app.query_params.clear()
    app.switch_page("views/feature.py").run()
    assert app.markdown[0].value == "### Feature 5"
    assert explorer(runs, page="feature", run="whole").markdown[0].value == "### Feature 0"


@pytest.mark.parametrize("bad", ["abc", "40", "-1", "3.5", "", "9" * 18, "²", "[x](http://example.invalid)"])
def test_a_link_to_no_feature_is_one_clear_message(explorer, runs, bad):
    shown = message(explorer(runs, page="feature", run="whole", feature=bad))
    assert f"feature={bad}" in shown and "0 to 39" in shown


@pytest.mark.parametrize("page", ["features", "feature"])
def test_a_run_without_features_names_the_command_that_makes_them(explorer, runs, page):
    assert f"`saelab index {runs / 'bare'}`" in message(explorer(runs, page=page, run="bare"))


def test_a_database_that_changes_is_read_again(explorer, tmp_path):
    run = write_run(tmp_path / "run")
    app = explorer(run, page="feature", feature="2")
    before = sent(app, "histogram")[0]["counts"]
    for path in (run / "features").iterdir():
        path.unlink()
    (run / "features").rmdir()
    write_features(run, 40, 9, model="demo", site="blocks.2.hook_resid_post")
    app.run()
    after = sent(app, "histogram")[0]["counts"]
    assert after == open_database(run / "features").feature(2).histogram.tolist() != before
    path = run / "features" / "by_feature.values.npy"
    os.truncate(path, path.stat().st_size - 1)
    app.run()
    assert f"{path} cannot be read" in message(app)
