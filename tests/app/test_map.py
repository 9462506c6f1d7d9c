"""The Map page."""

import importlib.util
import json
import shutil

import numpy as np
import pytest

from saelab.features.database import open_database
from tests.app.shown import check_inert
from tests.app.synthetic_run import write_features, write_run
from tests.app.wide import BASE, write_wide

WIDE = 2**17


@pytest.fixture(scope="module")
def view(main_script, runs):
    """The module of the page, which draws nothing when it is imported outside of the explorer."""
    spec = importlib.util.spec_from_file_location("map_view", main_script.parent / "views" / "map.py")
    module = importlib.util.module_from_spec(spec)
    source = (main_script.parent / "views" / "map.py").read_text().rsplit("page()", 1)[0]
    exec(compile(source, str(spec.origin), "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A run of 2^17 features."""
    run = write_run(tmp_path_factory.mktemp("wide") / "run", n_features=8, features=False)
    write_wide(run / "features", WIDE // BASE)
    return run


def bytes_sent(app) -> int:
    """Bytes of all elements of the page."""
    return sum(element.proto.ByteSize() for element in app._tree if getattr(element, "proto", None) is not None)


def test_the_map_has_every_feature_with_its_tokens(explorer, runs, view):
    app = explorer(runs, page="map", run="whole")
    check_inert(app)
    (chart,) = app.get("plotly_chart")
    (points,) = json.loads(chart.proto.spec)["data"]
    assert len(points["text"]) == 40 and points["text"][7] == "" and points["type"] == "scattergl"
    assert not [text for text in points["text"] if "<" in text]
    database = open_database(runs / "whole" / "features")
    found = view.plane.__wrapped__(database, ())
    positions = database.table["decoder_map"] / np.abs(database.table["decoder_map"]).max() * view.SPAN
    assert np.abs(np.stack([found.x, found.y], 1) - positions).max() <= 0.5
    assert found.drawn.tolist() == list(range(40))
    assert "all 40 features" in app.caption[1].value


def test_a_database_that_is_replaced_has_its_own_map(explorer, tmp_path):
    run = write_run(tmp_path / "run")
    app = explorer(run, page="map")
    shutil.rmtree(run / "features")
    write_features(run, 20, 5, model="demo", site="blocks.2.hook_resid_post")
    app.run()
    assert not app.exception and "all 20 features" in app.caption[1].value


def test_the_colour_is_a_column(explorer, runs, view):
    app = explorer(runs, page="map", run="whole", colour="skew")
    assert app.selectbox(key="colour").value == "skew" and not app.error
    database = open_database(runs / "whole" / "features")
    for column in app.selectbox(key="colour").options:
        shades, scale = view.colours(database, column, np.arange(40))
        values = np.asarray(database.table[column], float)
        order = np.argsort(values, kind="stable")
        assert (np.diff(shades[order].astype(int)) >= 0).all() and shades.min() == 0
        assert len(scale["ticktext"]) == 5
    assert explorer(runs, page="map", run="whole", colour="top_tokens").selectbox(key="colour").value == "density"


def test_a_selection_holds_all_features_inside_it(view):
    rng = np.random.default_rng(0)
    x, y = rng.integers(-1000, 1000, (2, 5000)).astype(np.int16)
    found = view.Plane(x, y, np.arange(5))
    box = view.inside(found, {"box": [{"x": [500, -200], "y": [0, 300]}], "lasso": []})
    assert box.tolist() == np.flatnonzero((x >= -200) & (x <= 500) & (y >= 0) & (y <= 300)).tolist()
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    lasso = {"x": (400.5 * np.cos(angles)).tolist(), "y": (400.5 * np.sin(angles)).tolist()}
    inside, radius = view.inside(found, {"box": [], "lasso": [lasso]}), np.hypot(x.astype(float), y)
    assert set(np.flatnonzero(radius < 400)) <= set(inside) <= set(np.flatnonzero(radius < 401))
    u = {"x": [0, 900, 900, 600, 600, 300, 300, 0], "y": [0, 0, 900, 900, 300, 300, 900, 900]}  # not convex
    in_u = (x > 0) & (x < 900) & (y > 0) & (y < 900) & ~((x > 300) & (x < 600) & (y > 300))
    assert set(view.inside(found, {"box": [], "lasso": [u]})) ^ set(np.flatnonzero(in_u)) <= set(
        np.flatnonzero(np.isin(x, [0, 300, 600, 900]) | np.isin(y, [0, 300, 900]))
    )


def test_features_in_a_query_are_ranges(view):
    assert view.ranges(np.array([3, 7, 8, 9, 12])) == "3,7-9,12"
    assert view.ranges(np.array([5])) == "5"


@pytest.mark.parametrize("page, shown", [("map", ""), ("run", "overview"), ("run", "dead"), ("run", "allocation")])
def test_a_page_of_many_features_is_at_most_200_kib(explorer, wide, page, shown):
    app = explorer(wide, page=page, view=shown)
    assert not app.error and 2_000 < bytes_sent(app) < 200 * 1024
    if page == "map":
        assert "6,000 of 131,072 features" in app.caption[1].value
        shade, points = json.loads(app.get("plotly_chart")[0].proto.spec)["data"]
        assert len(points["text"]) == 6000 and shade["type"] == "heatmap"
