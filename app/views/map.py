"""The features in the plane of the first two principal components of their decoder rows."""

from textwrap import wrap
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import streamlit as st
from explorer import charts, explanations, state
from explorer.components.leave import leave_for
from explorer.listing import version

from saelab.features.database import Database
from saelab.features.marks import number, visible
from saelab.features.table import SORTABLE

MOST_POINTS = 6_000  # points that are sent; more features than these are also an image of their density
MOST_NAMED = 1_500  # points that are sent with their tokens
MOST_OPENED = 500  # features that a selection opens: they are in the address
IMAGE = 96
DRAGS = {"pan": "moves the map, clicking opens", "lasso": "selects features"}
SPAN = 32_000  # coordinates are sent as whole numbers from -SPAN to SPAN
SCALE = [[0, "rgb(104, 122, 196)"], [0.5, "rgb(196, 104, 128)"], [1, "rgb(238, 150, 40)"]]  # seen in both themes
LOGARITHMIC = ("density", "n_active", "mass", "maximum", "mean", "mean_square")


class Plane(NamedTuple):
    """The positions of all features, and which are drawn as points."""

    x: np.ndarray
    """``[n_features]`` int16"""
    y: np.ndarray
    drawn: np.ndarray
    """``[n]`` int64, features, rising"""


@st.cache_resource(max_entries=4, show_spinner=False)
def plane(_database: Database, version: tuple) -> Plane:
    """The map in whole numbers. Its points are all features, or a random sample of them, the same every time."""
    positions = np.asarray(_database.table["decoder_map"], np.float32)
    largest = np.nanmax(np.abs(positions), initial=1e-9)
    x, y = np.nan_to_num(positions / largest * SPAN).round().astype(np.int16).T
    drawn = np.arange(len(positions))
    if len(drawn) > MOST_POINTS:
        drawn = np.sort(np.random.default_rng(0).choice(len(drawn), MOST_POINTS, replace=False))
    return Plane(x, y, drawn)


def colours(database: Database, column: str, features: np.ndarray) -> tuple[np.ndarray, dict]:
    """Shades of the features from 0 to 255 by a column, and the scale that explains them."""
    values = np.asarray(database.table[column][features], np.float64)
    logarithmic = column in LOGARITHMIC and (values > 0).any()
    if logarithmic:
        values = np.log10(np.maximum(values, values[values > 0].min()))
    low, high = np.quantile(values, [0.01, 0.99])  # without the outliers, which would leave one colour to the rest
    shades = (255 * (np.clip(values, low, high) - low) / ((high - low) or 1.0)).astype(np.uint8)
    ticks = [0, 64, 128, 191, 255]
    shown = [low + (high - low) * tick / 255 for tick in ticks]
    texts = [number(float(10**value if logarithmic else value)) for value in shown]
    texts[0], texts[-1] = f"≤ {texts[0]}", f"≥ {texts[-1]}"
    scale = {"tickvals": ticks, "ticktext": texts, "orientation": "h", "thickness": 10, "outlinewidth": 0}
    return shades, scale | {"y": -0.08, "len": 0.7, "title": {"text": column, "side": "bottom"}}


def names(database: Database, features: np.ndarray) -> list[str]:
    """For the densest features the tokens with most of their activation, and their explanation; "" for the others."""
    n_active, top = database.table["n_active"][features], database.table["top_tokens"]
    named = set(features[np.argsort(-n_active, kind="stable")[:MOST_NAMED]].tolist())
    explained, texts = explanations.texts(database, named), []
    for feature in features.tolist():
        tokens = [token for token in top[feature].tolist()[:3] if token >= 0] if feature in named else []
        text = " ".join(charts.inert(visible(database.vocabulary.text(token)[:20]), 12) for token in tokens)
        texts.append("<br>".join([text, *map(charts.inert, wrap(explained.get(feature, "")[:120], 40))]))
    return texts


def figure(database: Database, found: Plane, column: str) -> go.Figure:
    drawn = found.drawn
    shades, scale = colours(database, column, drawn)
    plotted = go.Figure()
    if len(drawn) < len(found.x):
        counts, edges, _ = np.histogram2d(found.y, found.x, IMAGE, ((-SPAN, SPAN), (-SPAN, SPAN)))
        shade = (255 * np.log1p(counts) / np.log1p(counts.max())).astype(np.uint8)
        plotted.add_heatmap(
            z=shade,
            x=edges[[0, 1]].mean() + np.arange(IMAGE) * (edges[1] - edges[0]),
            y=edges[[0, 1]].mean() + np.arange(IMAGE) * (edges[1] - edges[0]),
            colorscale=[[0, "rgba(128,128,128,0)"], [1, "rgba(128,128,128,0.55)"]],
            showscale=False,
            hoverinfo="skip",
        )
    plotted.add_scattergl(
        x=found.x[drawn],
        y=found.y[drawn],
        mode="markers",
        customdata=drawn.astype(np.int32),
        text=names(database, drawn),
        marker={"size": 5, "color": shades, "colorscale": SCALE, "cmin": 0, "cmax": 255, "colorbar": scale},
        hovertemplate="feature %{customdata}<br>%{text}<extra></extra>",
    )
    plotted.update_xaxes(visible=False, range=spread(found.x))
    plotted.update_yaxes(visible=False, range=spread(found.y), scaleanchor="x")
    return charts.compact(plotted, 560).update_layout(margin={"t": 36})


def spread(values: np.ndarray) -> list[float]:
    """From the smallest to the largest value, and a little more."""
    low, high = float(values.min()), float(values.max())
    return [low - 0.03 * (high - low), high + 0.03 * (high - low)]


def inside(found: Plane, selection: dict) -> np.ndarray:
    """All features within the boxes and lassos of a selection, drawn as points or not, ``[n]`` int64."""
    chosen = np.zeros(len(found.x), bool)
    for box in selection["box"]:
        (x_low, x_high), (y_low, y_high) = sorted(box["x"]), sorted(box["y"])
        chosen |= (found.x >= x_low) & (found.x <= x_high) & (found.y >= y_low) & (found.y <= y_high)
    for lasso in selection["lasso"]:
        chosen |= within(np.array(lasso["x"], float), np.array(lasso["y"], float), found.x, found.y)
    return np.flatnonzero(chosen)


def within(corners_x: np.ndarray, corners_y: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a polygon: a line to the left of such a point crosses an odd number of its edges."""
    odd = np.zeros(len(x), bool)
    for i in range(len(corners_x)):
        x0, y0, x1, y1 = corners_x[i - 1], corners_y[i - 1], corners_x[i], corners_y[i]
        if y0 != y1:
            odd ^= ((y0 <= y) != (y1 <= y)) & (x > x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return odd


def draw_selected(database: Database, features: np.ndarray) -> None:
    """A link to the selected features; the densest ones, if there are too many for an address."""
    opened = features
    if len(features) > MOST_OPENED:
        opened = np.sort(features[np.argsort(-database.table["n_active"][features], kind="stable")[:MOST_OPENED]])
    which = "them" if len(opened) == len(features) else f"the {MOST_OPENED} densest"
    st.page_link(
        state.FEATURES,
        label=f"{len(features):,} features are selected: open {which} as a list",
        icon=":material/table_rows:",
        query_params=state.link(q=f"id:{ranges(opened)}"),
    )


def ranges(features: np.ndarray) -> str:
    """Rising features as a query names them: "3,7-12"."""
    parts = np.split(features, np.flatnonzero(np.diff(features) > 1) + 1)
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def page() -> None:
    database = state.database()
    st.header("Map", anchor=False)
    columns = [name for name in SORTABLE if name != "feature"]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        column = st.selectbox("Colour", columns, **state.bound("colour", "density", columns), width=220)
        drag = st.segmented_control(
            "Dragging",
            list(DRAGS),
            **state.bound("drag", "pan", list(DRAGS)),
            format_func=lambda drag: DRAGS[drag],
            required=True,
        )
    found = plane(database, version(database))
    selection = charts.draw_selectable(figure(database, found, column), "map", "Map of the features", drag)
    if selection["box"] or selection["lasso"]:
        draw_selected(database, inside(found, selection))
    elif selection["points"]:
        leave_for(state.FEATURE, state.link(feature=int(selection["points"][0]["customdata"])))
    drawn = f"all {len(found.x):,} features"
    if len(found.drawn) < len(found.x):
        drawn = f"{len(found.drawn):,} of {len(found.x):,} features, drawn at random; the grey shade counts all of them"
    st.caption(
        f"First two principal components of the decoder rows, each of length 1. Points: {drawn}. Click on a point to "
        "open its feature, or drag a line around all features that you want as a list. Never active features have the "
        "lowest colour."
    )


page()
