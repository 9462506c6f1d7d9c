"""L0 of runs against a figure of their reconstruction, as a chart. The link says which figure."""

from collections.abc import Mapping

import streamlit as st

from explorer import charts, state
from saelab.analysis.pareto import FIGURES, plot_pareto
from saelab.runs.summary import RunSummary


def choose_figure() -> str:
    """A widget that chooses the figure; returns its name."""
    return st.selectbox(
        "L0 against",
        list(FIGURES),
        **state.bound("axis", "fvu", list(FIGURES)),
        format_func=lambda name: FIGURES[name][0],
        width=260,
    )


def draw_pareto(
    runs: Mapping[str, RunSummary],
    figure: str,
    key: str,
    series: Mapping[str, str],
    marks: Mapping[str, str] | None = None,
) -> int:
    """Draw the runs that have the figure, if they are two or more; returns how many are drawn.

    Runs of one of the `series`, which has a label for each run, share a colour and a line through those that no other
    of them beats. `marks` are texts for the points of some runs.
    """
    known = {name: run for name, run in runs.items() if None not in (run.l0, getattr(run, figure))}
    if len(known) < 2:
        return 0
    lines = [
        {"run": charts.inert(name), "series": charts.inert(series[name]), "l0": run.l0, figure: getattr(run, figure)}
        for name, run in known.items()
    ]
    plotted = plot_pareto(lines, [figure], "series")
    marked = {name: text for name, text in (marks or {}).items() if name in known}
    if marked:
        plotted.add_scatter(
            x=[known[name].l0 for name in marked],
            y=[getattr(known[name], figure) for name in marked],
            text=list(marked.values()),
            mode="markers+text",
            textposition="top center",
            marker={"color": "rgba(0, 0, 0, 0)", "size": 15, "line": {"color": charts.COLOUR, "width": 2}},
            hoverinfo="skip",
            showlegend=False,
        )
    charts.compact(plotted, 330, top=24)
    many = len({line["series"] for line in lines}) > 1
    plotted.update_layout(showlegend=many, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    charts.draw(plotted, key, f"{FIGURES[figure][0]} against L0 of {len(known)} runs")
    return len(known)
