"""The charts, made from numbers of `saelab.features`; Streamlit's theme colours them."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

COLOUR = "rgba(226, 130, 30, 0.85)"
CONFIG = {"displayModeBar": False, "displaylogo": False}


def draw(figure: go.Figure, key: str, alt: str) -> None:
    st.plotly_chart(figure, key=key, config=CONFIG, alt=alt)


def bars(x: np.ndarray, counts: np.ndarray, width: float, title_x: str, title_y: str, log_y: bool = False) -> go.Figure:
    """A bar chart of counts in bins of equal width, whose middles are `x`."""
    figure = go.Figure(
        go.Bar(
            x=x,
            y=counts,
            width=width,
            marker_color=COLOUR,
            marker_line_width=0,
            hovertemplate="%{x:.3g}: %{y:,}<extra></extra>",
        )
    )
    figure.update_xaxes(title=title_x, range=[x[0] - width / 2, x[-1] + width / 2] if len(x) else None)
    figure.update_yaxes(title=title_y, type="log" if log_y else "linear", rangemode="tozero")
    if log_y:
        # dtick=1 shows whole powers of ten only.
        figure.update_yaxes(dtick=1, range=[-0.3, float(np.log10(max(1, counts.max(initial=1)))) + 0.1])
    return _compact(figure, 210)


def curve(metrics: pd.DataFrame, x: str, y: str, title: str) -> go.Figure:
    """A line chart of one column of the training metrics against another."""
    figure = go.Figure(go.Scatter(x=metrics[x], y=metrics[y], mode="lines", line={"color": COLOUR, "width": 1.6}))
    figure.update_traces(hovertemplate="%{x:,}: %{y:.4g}<extra></extra>")
    figure.update_layout(title={"text": title, "font": {"size": 14}, "x": 0})
    figure.update_xaxes(title=x, exponentformat="SI")
    figure.update_yaxes(exponentformat="e")
    values = metrics[y].dropna().to_numpy(float)
    if len(values) and values.min() > 0 and values.max() > 30 * values.min():
        figure.update_yaxes(type="log")
    return _compact(figure, 210, top=34)


def _compact(figure: go.Figure, height: int, top: int = 8) -> go.Figure:
    return figure.update_layout(height=height, margin={"l": 8, "r": 8, "t": top, "b": 8}, bargap=0, showlegend=False)
