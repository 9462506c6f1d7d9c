"""Dead, under-used and dense features: densities by rank with the fitted curve, reasons, and the training."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import streamlit as st
from explorer import charts, state
from explorer.components.histogram import draw_histogram
from explorer.components.rows import Column, Row, draw_rows
from explorer.listing import Listing, feature_address

from saelab.features.densities import rank_frequency
from saelab.runs import folder

# The fields of the result that the page reads.
FIELDS = (
    "settings",
    "tokens",
    "n_features",
    "dead",
    "dead_on_half",
    "under_used",
    "dense",
    "density_of_dense",
    "curve",
    "reasons",
    "density",
    "expected",
    "is_under_used",
    "dead_features",
    "reason",
    "lacking",
    "twin",
    "twin_cosine",
    "silent_for",
)
REASONS = {
    "duplicate": "its decoder row has a cosine of at least {duplicate:g} with that of a living feature",
    "crowded": "it exceeds the bar on some token, but other features win there",
    "bias": "with the living features' median bias it would exceed the bar",
    "mean": "its encoder row is anti-aligned with the mean activation; if it were as usual, it would exceed the bar",
    "norm": "its encoder row is short; with the usual length it would exceed the bar",
    "several": "with the usual bias, alignment and length together it would exceed the bar",
    "direction": "not even so would it exceed the bar: no token lies far enough along its encoder row",
}
ALL = "all"
KINDS = {"dead": "Dead", "under": "Under-used", "dense": "Dense"}
UNDER, NEVER, CURVE = "rgb(76, 126, 210)", "rgb(205, 70, 96)", "rgb(128, 128, 128)"  # seen in both themes
AT_ONCE = 50


def with_ends(interval: dict[str, float | None], form: str) -> str:
    """A figure and its interval, each in the format `form`: "736 (720 to 752)"."""
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    ends = "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"
    return f"{value:{form}}{ends}"


def draw_figures(found: dict[str, Any]) -> None:
    shown = {
        "Dead": f"{found['dead']:,} ({100 * found['dead'] / found['n_features']:.2g}%)",
        "Under-used": with_ends(found["under_used"], ",.0f"),
        "Dense": with_ends(found["dense"], ",.0f"),
        "Exponent": with_ends(found["curve"]["exponent"], ".3g"),
    }
    with st.container(horizontal=True, gap="medium"):
        for label, value in shown.items():
            st.metric(label, value, width="content")
    st.caption(
        f"Of {found['n_features']:,} features on {found['tokens']:,} held-out tokens. Dead: active on none of them "
        f"({found['dead_on_half']:,.4g} on half of the text). Under-used: active, with a density below "
        f"{found['settings']['share']:g} of the curve's at its rank. Dense: with a density above "
        f"{found['density_of_dense']:g}. In parentheses: 95% intervals over rows of text."
    )


def draw_ranks(found: dict[str, Any]) -> None:
    """Density by rank, with the curve; the dead features at half of the smallest density that can be measured."""
    density, few = found["density"], found["is_under_used"]
    ranks, densities = rank_frequency(density)
    order = np.argsort(-density, kind="stable")
    used_enough = ~few[order][ranks - 1]
    figure = charts.ranks(ranks, np.where(used_enough, densities, np.nan), "rank of the feature", "density")
    figure.update_traces(name="used")
    hover = "rank %{x:,}: %{y:.2e}<extra></extra>"
    marks: dict[str, Any] = {"mode": "markers", "hovertemplate": hover}
    figure.add_trace(
        go.Scatter(
            x=ranks,
            y=np.where(used_enough, np.nan, densities),
            name="under-used",
            marker={"color": UNDER, "size": 4},
            **marks,
        )
    )
    dead = np.unique(np.linspace(len(density) - found["dead"] + 1, len(density), 100).round()) if found["dead"] else []
    figure.add_trace(
        go.Scatter(
            x=dead,
            y=np.full(len(dead), 0.5 / found["tokens"]),
            name="dead",
            marker={"color": NEVER, "size": 6, "symbol": "x-thin", "line": {"color": NEVER, "width": 1.5}},
            mode="markers",
            hovertemplate="rank %{x:,}: never active<extra></extra>",
        )
    )
    shown = np.unique(np.geomspace(1, len(density), 200).round().astype(int))
    line = {"color": CURVE, "width": 1.5, "dash": "dash"}
    curve = found["expected"][shown - 1]
    figure.add_trace(go.Scatter(x=shown, y=curve, name="curve", mode="lines", line=line, hovertemplate=hover))
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(height=360, showlegend=True, legend=legend, margin_t=60)
    charts.draw(figure, "ranks", "Density of the features by rank, log-log, with the fitted curve")
    curve = found["curve"]
    tail = "" if curve["tail"] is None else f" The rarest 15% lie a factor of {10 ** -curve['tail']:.3g} below it."
    st.caption(
        f"Curve: density in proportion to (rank + {curve['shift']['value']:.3g})^-{curve['exponent']['value']:.3g}, "
        f"fitted to the first 85% of the ranks; R² of log density there {curve['r2'] or 0:.4f}.{tail}"
    )


def draw_training(found: dict[str, Any]) -> None:
    """The number of dead features over the training, and how long those that are dead now were silent at its end."""
    metrics = state.read(folder.metrics)
    left, right = st.columns(2, gap="large")
    with left:
        if "dead" in metrics and "tokens" in metrics:
            figure = charts.curve(metrics, "tokens", "dead", "Dead features in training")
            charts.draw(figure, "dead-curve", "Number of dead features over the training")
        else:
            st.info("No training metrics were logged.")
    with right:
        if found["silent_for"] is None:
            st.info("The run has no state of its training, so ages are not known.")
        elif found["dead"]:
            ages = found["silent_for"][found["dead_features"]].astype(float)
            counts, edges = np.histogram(ages, 40, (0, max(1.0, ages.max())))
            draw_histogram(counts, edges, key="ages", title="Tokens since a dead feature was active", noun="features")


def chosen(found: dict[str, Any], kind: str) -> list[Row]:
    """The features of a kind, as rows that say why they are in the list."""
    density = found["density"]
    if kind != "dead":
        of_kind = found["is_under_used"] if kind == "under" else density > found["density_of_dense"]
        features = np.flatnonzero(of_kind)
        features = features[np.argsort(density[features] * (1 if kind == "under" else -1), kind="stable")]
        return [Row(feature) for feature in features.tolist()]
    names = list(REASONS)
    present = [ALL, *(name for name in names if found["reasons"].get(name))]
    reason = st.segmented_control(
        "Reason",
        present,
        **state.bound("reason", ALL, present, clears=["dead_page"]),
        format_func=lambda name: f"{name} {found['dead'] if name == ALL else found['reasons'][name]:,}",
        required=True,
    )
    if reason in REASONS:
        st.caption(f"{reason}: {REASONS[reason].format(**found['settings'])}.")
    st.caption(
        "The bar is what a pre-activation must exceed to be active: the threshold, or with k places per token the mean "
        "over tokens of the smallest activation. Lacks: bar less highest pre-activation on the text."
    )
    rows = []
    columns = (found[name].tolist() for name in ("dead_features", "reason", "lacking", "twin", "twin_cosine"))
    for feature, code, lacking, twin, cosine in zip(*columns, strict=True):
        if reason in (ALL, names[code]):
            why = (
                f"of {twin}, {cosine:.2f}"
                if names[code] == "duplicate"
                else ""
                if lacking < 0
                else f"lacks {lacking:.3g}"
            )
            rows.append(Row(feature, score=names[code], note=why))
    return rows


def draw_list(found: dict[str, Any]) -> None:
    kind = st.segmented_control(
        "Features",
        list(KINDS),
        **state.bound("kind", "dead", list(KINDS), clears=["dead_page"]),
        format_func=KINDS.__getitem__,
        required=True,
        label_visibility="collapsed",
    )
    rows = chosen(found, kind)
    if not state.current_run().has_features:
        st.info(f"No features yet. `saelab index {state.code(str(state.current_run().path))}` makes them for the list.")
        return
    database = state.database()
    if any(row.feature >= database.n_features for row in rows):
        raise state.outdated("dead")
    if not rows:
        st.caption("No feature.")
        return
    page = min(state.value("dead_page", 1, limits=(1, 1e9)), -(-len(rows) // AT_ONCE))
    first = (page - 1) * AT_ONCE
    columns = [Column("id", "feature"), Column("tokens", "promotes")]
    if kind == "dead":
        columns.insert(1, Column("score", "reason"))
    else:
        columns[1:1] = [Column("density", "density"), Column("maximum", "max")]
    with st.container(width=800):
        draw_rows(
            database,
            rows[first : first + AT_ONCE],
            columns,
            key=f"{kind}_rows",
            link=feature_address(Listing()),
            first=first,
            total=len(rows),
            size=AT_ONCE if len(rows) > AT_ONCE else 0,
            on_turned=lambda step: state.change(dead_page=page + int(step)),
        )


def page() -> None:
    st.header("Dead features", anchor=False)
    found = state.analysis("dead", FIELDS)
    if found is None:
        st.info(f"Not analysed yet. `saelab analyse {state.code(str(state.current_run().path))} dead` does it.")
        return
    if found["dead_features"].max(initial=0) >= found["n_features"]:
        raise state.outdated("dead")
    draw_figures(found)
    draw_ranks(found)
    st.subheader("Training", anchor=False)
    with state.errors_shown():
        draw_training(found)
    st.subheader("Features", anchor=False)
    with state.errors_shown():
        draw_list(found)


page()
