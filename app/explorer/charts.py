"""The charts, made from numbers of saelab; Streamlit's theme colours them."""

from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

COLOUR = "rgb(208, 112, 20)"
"""At least 3:1 against the backgrounds of both themes."""
CONFIG = {"displayModeBar": False, "displaylogo": False}
MOST_POINTS = 300
"""Points of a training curve; more are averaged in groups."""


def draw(figure: go.Figure, key: str, alt: str) -> None:
    st.plotly_chart(figure, key=key, config=CONFIG, alt=alt)


def draw_selectable(
    figure: go.Figure, key: str, alt: str, drag: str = "select", on_selected: Callable[[Any], None] | None = None
) -> Any:
    """Draw a chart of points that can be selected; returns the selection, and calls `on_selected` with a new one.

    `drag` is what dragging does: "select" draws a box around points, "lasso" a line, and with "pan" it moves the chart,
    and a click selects a point. The selection is a dictionary: `points`, each with its `customdata`, and the corners of
    each `box` and `lasso`.
    """
    figure.update_layout(dragmode=drag)
    config = CONFIG if drag == "select" else CONFIG | {"displayModeBar": True, "scrollZoom": True}

    def selected() -> None:
        if on_selected is not None:
            on_selected(st.session_state[key]["selection"])

    return st.plotly_chart(figure, key=key, config=config, alt=alt, on_select=selected)["selection"]


def inert(text: str, longest: int = 40) -> str:
    """Text for a label: Plotly takes labels for HTML, in which it knows no escaped quotes. Long text is cut."""
    return escape(text if len(text) <= longest else text[:longest] + "…", quote=False)


def bars(
    x: np.ndarray, counts: np.ndarray, width: float, title_x: str, title_y: str, hover: str = "%{x:.3g}: %{y:,}"
) -> go.Figure:
    """A bar chart of counts in bins of equal width, whose middles are `x`."""
    figure = go.Figure(
        go.Bar(
            x=x,
            y=counts,
            width=width,
            marker_color=COLOUR,
            marker_line_width=0,
            hovertemplate=f"{hover}<extra></extra>",
        )
    )
    figure.update_xaxes(title=title_x, range=[x[0] - width / 2, x[-1] + width / 2] if len(x) else None)
    figure.update_yaxes(title=title_y, rangemode="tozero")
    return compact(figure, 230)


def ranks(x: np.ndarray, y: np.ndarray, title_x: str, title_y: str) -> go.Figure:
    """A log-log plot of values by rank."""
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=y,
            mode="lines+markers",
            marker={"color": COLOUR, "size": 4},
            line={"color": COLOUR, "width": 1},
            hovertemplate="rank %{x:,}: %{y:.2e}<extra></extra>",
        )
    )
    figure.update_xaxes(title=title_x, type="log", dtick=1, exponentformat="SI")
    figure.update_yaxes(title=title_y, type="log", dtick=1, exponentformat="power")
    return compact(figure, 230)


def curve(metrics: pd.DataFrame, x: str, y: str, title: str) -> go.Figure:
    """A line chart of one column of the training metrics against another."""
    known = metrics[y].notna()
    values = np.asarray(metrics[y][known], float)
    points = _grouped(np.asarray(metrics[x][known], float)), _grouped(values)
    figure = go.Figure(go.Scatter(x=points[0], y=points[1], mode="lines", line={"color": COLOUR, "width": 1.6}))
    figure.update_traces(hovertemplate="%{x:,.0f}: %{y:.4g}<extra></extra>")
    figure.update_layout(title={"text": title, "font": {"size": 14}, "x": 0})
    figure.update_xaxes(title=x, exponentformat="SI", nticks=5)
    figure.update_yaxes(exponentformat="SI", nticks=5)
    if y != "lr" and len(values) and values.min() > 0 and values.max() > 30 * values.min():
        figure.update_yaxes(type="log", exponentformat="power", nticks=None, dtick=1)
    return compact(figure, 210, top=34)


def compact(figure: go.Figure, height: int, top: int = 8) -> go.Figure:
    return figure.update_layout(height=height, margin={"l": 8, "r": 8, "t": top, "b": 8}, bargap=0, showlegend=False)


def _grouped(values: np.ndarray) -> np.ndarray:
    """At most `MOST_POINTS` values: means of consecutive ones."""
    group = -(-len(values) // MOST_POINTS)
    if group <= 1:
        return values
    starts = np.arange(0, len(values), group)
    return np.add.reduceat(values, starts) / np.diff(starts, append=len(values))
