"""The explanations of a run: its scores beside their controls, and scores against the density of the features."""

from html import escape
from textwrap import wrap

import numpy as np
import plotly.graph_objects as go
import streamlit as st
from explorer import charts, explanations, state
from explorer.components.leave import leave_for

from saelab.autointerp.measured import measured
from saelab.autointerp.overview import Overview, Points, Source
from saelab.autointerp.scoring import CHANCE
from saelab.autointerp.summary import Line, ScoreTable, summarised
from saelab.features.database import Database

MOST_SUMMARISED = 100_000
"""Scores that are summarised here; of more, `saelab score` prints the table."""
MOST_POINTS = 6_000
MOST_NAMED = 1_500
"""Points of a source that are sent, and those that are sent with their explanation."""
COLOURS = ("rgb(208, 112, 20)", "rgb(48, 128, 200)", "rgb(30, 145, 100)", "rgb(170, 90, 180)")
CONTROL_COLOUR = "rgb(128, 128, 128)"
"""All have at least 3:1 against the backgrounds of both themes."""
NO_MODEL = (
    "lexical is no language model: it counts tokens and words. Scores with it show that the pipeline works, and not "
    "what a language model would make of the features."
)


@st.cache_resource(max_entries=4, show_spinner="Summarising the scores ...")
def _summary(_database: Database, version: tuple) -> ScoreTable:
    place = explanations.place_of(_database)
    return summarised(measured("", place.folder, _database))


def draw_summary(database: Database, known: Overview) -> None:
    """The table that `saelab score` prints."""
    st.subheader("Scores and their controls", anchor=False)
    if len(known.scores) > MOST_SUMMARISED:
        path = state.code(str(state.current_run().path))
        st.info(f"{len(known.scores):,} scores are too many to summarise here; `saelab score {path}` prints the table.")
        return
    found = _summary(database, (str(database.folder), explanations.version(database)))
    head = "".join(f"<th>{title}</th>" for title in _HEADS)
    rows = "".join(map(summary_row, found.lines))
    st.html(
        f'<div class="sl-wide"><table class="sl-facts sl-scores sl-summary"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    if any(line.lexical for line in found.lines):
        st.caption(NO_MODEL)


_HEADS = ("score", "explanations", "features", "mean, 95%", "above its control, 95%")


def summary_row(line: Line) -> str:
    """A row of the table, as HTML."""
    explained = explanations.who(Source(line.kind, line.explainer, "")) if line.kind else "none needed"
    without = f"{line.without:,} without value" * bool(line.without)
    unread = f"{line.unread:,} answers could not be read" * bool(line.unread)
    differences = "".join(
        f"<div>{escape(each.control)}: {escape(interval(each.value))}"
        f"<small>{each.pairs:,} pairs: {escape(each.verdict)}</small></div>"
        for each in line.differences
    )
    cells = (
        f"{escape(line.score)}<small>{escape(line.unit)} · judge: {escape(explanations.judge(line.judge))}</small>",
        escape(explained),
        f"{line.n:,}<small>{escape(', '.join(filter(None, (without, unread))))}</small>",
        f"{escape(interval(line.mean))}<small>{escape(line.warning)}</small>",
        differences,
    )
    titled = zip(_HEADS, cells, strict=True)  # on a phone a cell shows its own title
    return "<tr>" + "".join(f'<td data-title="{title}">{cell}</td>' for title, cell in titled) + "</tr>"


def interval(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return (
        f"{mean:.3f} ({low:.3f} to {high:.3f})" if np.isfinite(low) else f"{mean:.3f}" if np.isfinite(mean) else "none"
    )


def draw_chart(database: Database, known: Overview) -> None:
    """Scores against density, a point for each score; a click opens the feature."""
    st.subheader("Scores by density", anchor=False)
    labels = [measure.label for measure in known.measures]
    label = st.selectbox("Score", labels, **state.bound("measure", labels[0], labels), width=320)
    groups = known.points(label)
    figure = chart(database, known, label, groups)
    selection = charts.draw_selectable(figure, "by_density", f"{label} against density", "pan")
    if selection["points"]:
        leave_for(state.FEATURE, state.link(feature=int(selection["points"][0]["customdata"])))
    sampled = any(len(each.features) > MOST_POINTS for each in groups)
    some = f" Of a colour with more than {MOST_POINTS:,} points, as many are drawn, at random." * sampled
    st.caption(
        "A point is a feature's score; grey ones are controls, explanations that were written for another feature. The "
        f"line is what a judge reaches who knows nothing. Click on a point to open its feature.{some}"
    )


def chart(database: Database, known: Overview, label: str, groups: list[Points]) -> go.Figure:
    unit = next(measure.unit for measure in known.measures if measure.label == label)
    figure, density = go.Figure(), database.table["density"]
    groups = sorted(groups, key=lambda each: not (each.source and each.source.control))  # controls lie below
    colours = iter(COLOURS * (1 + len(groups) // len(COLOURS)))
    for each in groups:
        control = bool(each.source and each.source.control)
        drawn = np.arange(len(each.features))
        if len(drawn) > MOST_POINTS:
            drawn = np.sort(np.random.default_rng(0).choice(len(drawn), MOST_POINTS, replace=False))
        features, values = each.features[drawn], each.values[drawn]
        figure.add_scattergl(
            x=density[features],
            y=values.round(4),
            name=charts.inert("no explanation needed" if each.source is None else name(each.source)),
            mode="markers",
            customdata=features.astype(np.int32),
            text=hovers(known, features, control),
            marker={
                "size": 5,
                "color": CONTROL_COLOUR if control else next(colours),
                "opacity": 0.55 if control else 0.8,
            },
            hovertemplate="feature %{customdata}, %{y:.3g}, density %{x:.2e}<br>%{text}<extra></extra>",
        )
    if unit in CHANCE:
        figure.add_hline(CHANCE[unit], line_dash="dot", line_width=1, line_color=CONTROL_COLOUR)
    figure.update_xaxes(title="density", type="log", dtick=1, exponentformat="power")
    figure.update_yaxes(title=charts.inert(unit))
    charts.compact(figure, 420, top=36)
    return figure.update_layout(showlegend=True, legend={"orientation": "h", "x": 0, "y": -0.18, "yanchor": "top"})


def name(source: Source) -> str:
    made = source.model if source.kind == "default" else " ".join(filter(None, (source.kind, source.author)))
    return "control: " + made.removeprefix("shuffled ") if source.control else made


def hovers(known: Overview, features: np.ndarray, control: bool) -> list[str]:
    """The features' latest explanations, cut and in lines that a phone shows."""
    texts = []
    for feature in features[:MOST_NAMED].tolist():
        found = known.explanation(feature)
        text = explanations.short(found)[:120] if found and not control else ""
        texts.append("<br>".join(charts.inert(line) for line in wrap(text, 40)))
    return texts + [""] * (len(features) - len(texts))


def page() -> None:
    database = state.database()
    st.header("Explanations", anchor=False)
    explanations.draw_problem(database)
    known, path = explanations.known(database), state.code(str(state.current_run().path))
    if not known.explanations and not len(known.scores):
        st.info(
            f"None yet. `saelab explain {path}` explains 200 features, offline or with `--llm` by a language model; "
            f"`saelab score {path}` scores them. The page of a feature explains it at once."
        )
        return
    st.caption(
        f"{len(known.latest):,} of {database.n_features:,} features are explained. Open a feature for its "
        "explanations, and an audit for the judged examples of a score."
    )
    query = state.link(q="explanation:")
    st.page_link(state.FEATURES, label="List and search them", icon=":material/table_rows:", query_params=query)
    if len(known.scores):
        with state.errors_shown():
            draw_chart(database, known)
        with state.errors_shown():
            draw_summary(database, known)


page()
