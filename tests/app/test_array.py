"""The pages of a run whose activations come from an array: rows and labels in place of text, and no language model."""

import json
import re
import shutil
from pathlib import Path

import pytest

import saelab
from saelab.features.database import open_database
from tests.app.shown import html
from tests.app.test_feature_pages import lines, listed
from tests.runs.test_array import HELD_OUT, ROWS, config_of

FIRST = ROWS - HELD_OUT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `run`."""
    made = tmp_path_factory.mktemp("array")
    config = config_of(made)
    config["activations"]["array"]["labels"] = str(made / "labels.txt")
    saelab.run(config, ["training.tokens=1000"])
    return made


def test_the_run_has_no_losses_and_names_its_array(explorer, folder) -> None:
    app = explorer(folder, page="run", run="run")
    shown = [caption.value for caption in app.caption]
    assert not app.error and any("of the array points.npy" in text for text in shown)
    assert any(text == f"Evaluated on {HELD_OUT} held-out tokens in inference mode." for text in shown)
    assert "delta CE" not in [metric.label for metric in app.metric]
    assert "KL" not in html(app)
    app = explorer(folder, page="run", run="run", view="allocation")
    assert not app.error
    assert "demo" not in html(explorer(folder, page="runs"))


def test_the_list_and_a_feature_show_labels_with_the_rows_of_the_array(explorer, folder) -> None:
    database = open_database(folder / "run" / "features")
    app = explorer(folder, page="features", run="run")
    feature = listed(app)[0]
    assert not app.error
    app = explorer(folder, page="feature", run="run", feature=str(feature))
    assert not app.error and all("language model" not in box.placeholder for box in app.text_input)
    assert "Explanation and scores" not in [each.value for each in app.subheader]
    best, shown = database.examples(feature, n=1)[0], lines(app)
    row = FIRST + best.row
    assert shown[0]["row"] == row and shown[0]["texts"] == [f"{best.tokens[0]} · row {row}"]
    assert len({line["row"] for line in shown}) == len(shown) and not any("alike" in line for line in shown)
    first = database.feature(feature).first
    page = html(app)
    assert first is not None and f"row {FIRST + first[0]:,}<" in page and "token ids" not in page


def test_a_row_of_the_array_has_its_features(explorer, folder) -> None:
    app = explorer(folder, page="prompt", run="run", row=str(FIRST + 7))
    assert not app.error and not app.text_area
    assert app.number_input[0].label == f"Row, {FIRST} to {ROWS - 1:,}" and app.number_input[0].value == FIRST + 7
    database = open_database(folder / "run" / "features")
    found = set(map(int, re.findall(r"feature\?[^\"]*feature=(\d+)", html(app))))
    assert found == set(database.at(7, 0).features.tolist())


@pytest.mark.parametrize("page", ["explanations", "audit", "steer", "dead", "attention", "dark_matter"])
def test_pages_that_need_text_say_that_there_is_none(explorer, folder, page: str) -> None:
    app = explorer(folder, page=page, run="run")
    assert not app.error and "come from an array" in app.info[0].value


@pytest.mark.parametrize("page", ["map", "compare"])
def test_the_other_pages_work(explorer, folder, page: str) -> None:
    assert not explorer(folder, page=page, run="run").exception


def test_without_a_database_no_text_is_asked_for(explorer, folder, tmp_path: Path) -> None:
    bare = shutil.copytree(folder / "run", tmp_path / "bare")
    shutil.rmtree(bare / "features")
    app = explorer(bare, page="prompt", run="bare")
    assert not app.error and not app.text_area and "saelab index" in app.info[0].value


def test_the_list_offers_only_what_an_array_has(explorer, folder) -> None:
    app = explorer(folder, page="features", run="run")
    assert "promotes" not in app.text_input[0].placeholder
    assert all("explained" not in caption.value for caption in app.caption)
    (rows,) = (json.loads(each.proto.bytes) for each in app.get("bidi_component") if "rows" in each.proto.id)
    assert ["tokens", "active on"] in [column[:2] for column in rows["columns"]]
