"""Dark matter: what the autoencoder leaves out, over widths and by token: linear in the activation, or not."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from explorer import charts, state
from explorer.components.histogram import draw_histogram
from explorer.components.tokens import Line, draw_tokens, feature_names
from explorer.listing import Listing, feature_address

from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.features.examples import window_start
from saelab.features.marks import number, visible
from saelab.features.token_facts import strongest_others
from saelab.runs import folder
from saelab.runs.folder import RunInfo

NAME = "dark_matter"
# The fields of the result that the page reads.
FIELDS = ("site", "n_features", "decomposition", "cost")
OF_DECOMPOSITION = (
    "tokens",
    "context",
    "fvu",
    "fvu_linear",
    "maps",
    "norm_tests",
    "shrinkage",
    "token",
    "error_norm",
    "linear_norm",
    "nonlinear_norm",
    "deviation",
)
MAIN = "no intercept"
ERROR, NONLINEAR, SHARE = "error", "nonlinear", "share"
MEASURES = {ERROR: "Error norm", NONLINEAR: "Nonlinear norm", SHARE: "Share left out"}
SHADES = {ERROR: "norm of the error", NONLINEAR: "norm of the nonlinear part", SHARE: "share left out"}
LINEAR_COLOUR = "rgb(76, 126, 210)"  # seen in both themes
WINDOW, MOST = 32, 20


def with_ends(interval: dict[str, float | None]) -> str:
    """A figure and its interval: "0.151 (0.148 to 0.154)"."""
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    ends = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
    return "not defined" if value is None else f"{value:.3g}{ends}"


def result(of: RunInfo | None = None) -> dict[str, Any] | None:
    """The stored result of a run, the current one if None; None if there is none. Raises SaelabError as state does."""
    found = state.read(folder.analysis, NAME, of=of)
    if found is not None and not (
        found.keys() >= set(FIELDS) and found["decomposition"].keys() >= set(OF_DECOMPOSITION)
    ):
        raise state.outdated(NAME)
    return found


def draw_figures(found: dict[str, Any]) -> None:
    parts, cost = found["decomposition"], found["cost"]
    main = parts["maps"][MAIN]
    shown = {
        "FVU": parts["fvu"],
        "FVU, linear": parts["fvu_linear"],
        "FVU, nonlinear": main["fvu_nonlinear"],
        "R² of the error": main["r2"],
        "R² of its squared norm": main["r2_of_norm"],
        "CE recovered by linear": cost["recovered_by_linear"],
    }
    with st.container(horizontal=True, gap="medium"):
        for label, interval in shown.items():
            st.metric(
                label, number(interval["value"] or 0.0), help=f"95% interval: {with_ends(interval)}", width="content"
            )
    st.caption(
        f"x = Sae(x) + Linear + Nonlinear on {parts['tokens']:,} held-out tokens, in other rows than those that "
        "the linear map from x to the error was fitted to. FVU is the share of the variance that the autoencoder "
        "leaves out; its linear part is what that map predicts. R²: of the map, without intercept. The best factor for "
        f"Sae(x) is {with_ends(parts['shrinkage'])}: above 1 the autoencoder shrinks, which counts as linear error."
    )


def draw_widths(found: dict[str, Any]) -> None:
    """FVU and its nonlinear part of the runs at this site that are analysed on the same tokens, over the width."""
    lines = []
    for name, run in state.runs().items():
        try:
            other = result(run)
        except SaelabError:  # its own page says what is wrong
            continue
        if other is None or other["site"] != found["site"]:
            continue
        if np.array_equal(other["decomposition"]["token"], found["decomposition"]["token"]):
            lines.append((other["n_features"], name, other["decomposition"]))
    if len(lines) < 2:
        st.caption(
            "Other runs at this site, analysed with the same settings, would be compared here over their widths."
        )
        return
    lines.sort(key=lambda line: line[:2])
    figure = go.Figure()
    for label, colour, of in (
        ("FVU", charts.COLOUR, lambda parts: parts["fvu"]),
        ("nonlinear", LINEAR_COLOUR, lambda parts: parts["maps"][MAIN]["fvu_nonlinear"]),
    ):
        intervals = [of(parts) for _, _, parts in lines]
        values = np.array([each["value"] for each in intervals], float)
        ends = np.array([[each["low"], each["high"]] for each in intervals], float)
        figure.add_trace(
            go.Scatter(
                x=[width for width, _, _ in lines],
                y=values.tolist(),
                error_y={"array": ends[:, 1] - values, "arrayminus": values - ends[:, 0]},
                name=label,
                text=[charts.inert(name) for _, name, _ in lines],
                mode="lines+markers",
                line={"color": colour},
                hovertemplate="%{text}: %{y:.4f}<extra></extra>",
            )
        )
    figure.update_xaxes(title="features", type="log", dtick=np.log10(2))
    figure.update_yaxes(title="share of the variance", rangemode="tozero")
    charts.compact(figure, 280, top=30)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.15, "x": 0})
    charts.draw(figure, "widths", "FVU and its nonlinear part over the number of features")
    st.caption("The linear part is the distance between the two lines. Bars: 95% intervals over rows of text.")


def draw_regressions(found: dict[str, Any]) -> None:
    parts = found["decomposition"]
    maps = {
        name: {
            "ridge": f"{each['ridge']:g}",
            "R² of the error": with_ends(each["r2"]),
            "R² of its squared norm": with_ends(each["r2_of_norm"]),
            "FVU, nonlinear": with_ends(each["fvu_nonlinear"]),
        }
        for name, each in parts["maps"].items()
    }
    tests = {
        name: {
            "on itself": with_ends(each["on_itself"]),
            "with intercept": with_ends(each["on_itself_with_intercept"]),
            "on x, with intercept": with_ends(each["on_x_with_intercept"]),
        }
        for name, each in parts["norm_tests"].items()
    }
    with st.expander("Regressions"):
        st.caption("Linear maps from x to the error:")
        st.table(pd.DataFrame(maps).T)
        st.caption("R² of the squared norm of each part, as a linear function of the part, and of x:")
        st.table(pd.DataFrame(tests).T)


def measured(parts: dict[str, Any], measure: str) -> np.ndarray:
    """The measure on each scored token, ``[tokens]``."""
    if measure == SHARE:
        share = (parts["error_norm"] / np.maximum(parts["deviation"], 1e-30)) ** 2
        return np.minimum(share, 1.0).astype(np.float32)
    return parts[f"{measure}_norm"]


def draw_texts(found: dict[str, Any], database: Database) -> None:
    """The texts on which a measure is largest, one token per row, with the features that are active on each token."""
    parts = found["decomposition"]
    rows, context = database.facts.rows.shape
    if context != parts["context"]:
        raise state.outdated(NAME)
    measure = st.segmented_control(
        "Measure",
        list(MEASURES),
        **state.bound("measure", ERROR, list(MEASURES), clears=["place"]),
        format_func=MEASURES.__getitem__,
        required=True,
        label_visibility="collapsed",
    )
    values, token = measured(parts, str(measure)), parts["token"]
    known = token // context < rows
    feature = state.value("feature", -1, limits=(0, database.n_features - 1))
    if feature >= 0:
        known &= np.isin(token, database.facts.activations(feature).places)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"Where feature {feature} is active", width="content")
            st.button("All tokens", on_click=lambda: state.change(feature=None, place=None))
    counts, edges = np.histogram(values[known] if feature >= 0 else values, 60)
    draw_histogram(counts, edges, key="measure_histogram", title=SHADES[measure], noun="tokens")
    order = np.argsort(-np.where(known, values, -np.inf), kind="stable")[: np.count_nonzero(known)]
    _, first = np.unique(token[order] // context, return_index=True)
    chosen = order[np.sort(first)[:MOST]]
    if not len(chosen):
        st.info(
            f"Feature {feature} is active on none of the scored tokens."
            if feature >= 0
            else "None of the scored rows is in the feature database; make it from more tokens."
        )
        return
    of_place = dict(zip(token.tolist(), values.tolist(), strict=True))
    lines = []
    for index in chosen.tolist():
        row, position = divmod(int(token[index]), context)
        start = window_start(position, min(WINDOW, context), context)
        ids = np.array(database.facts.rows[row, start : start + WINDOW])
        shades = [of_place.get(row * context + start + i, 0.0) for i in range(len(ids))]
        lines.append(
            Line(
                database.vocabulary.window(ids),
                ids,
                np.array(shades, np.float32),
                others=strongest_others(database.facts, row, start, len(ids)),
                start=start,
                row=row,
                peak=position - start,
                side=number(float(values[index])),
            )
        )

    def pinned() -> None:
        at = st.session_state["dark_tokens"].pinned
        if at is not None and 0 <= at[0] < len(lines) and 0 <= at[1] < len(lines[at[0]].token_ids):
            line = lines[at[0]]
            state.change(place=int(line.row or 0) * context + line.start + int(at[1]))

    place = state.value("place", -1, limits=(0, rows * context - 1))
    draw_token(parts, place if place in of_place else int(token[chosen[0]]), database)
    draw_tokens(
        lines,
        key="dark_tokens",
        strongest=float(values[chosen[0]]) or 1.0,
        link=feature_address(Listing()),
        names=feature_names(database),
        what=SHADES[measure],
        on_pinned=pinned,
    )


def draw_token(parts: dict[str, Any], place: int, database: Database) -> None:
    """Is this token in the code or in the error? The shares of its squared deviation from the mean activation."""
    context = parts["context"]
    row, position = divmod(place, context)
    index = int(np.flatnonzero(parts["token"] == place)[0])
    total, error, linear, nonlinear = (
        float(parts[name][index]) ** 2 for name in ("deviation", "error_norm", "linear_norm", "nonlinear_norm")
    )
    text = state.plain(visible(database.vocabulary.text(int(database.facts.rows[row, position])))[:40])
    rank = float((parts["error_norm"] <= parts["error_norm"][index]).mean())
    active = len(database.facts.at(row, position).features)
    with st.container(border=True):
        st.markdown(f"**Token** {text} at position {position} of row {row}: in the code or in the error?")
        with st.container(horizontal=True, gap="medium"):
            st.metric("Left out", f"{error / max(total, 1e-30):.1%}", width="content")
            st.metric("Linear part", f"{linear / max(total, 1e-30):.1%}", width="content")
            st.metric("Nonlinear part", f"{nonlinear / max(total, 1e-30):.1%}", width="content")
            st.metric("Active features", f"{active:,}", width="content")
            st.metric("Error norm, percentile", f"{100 * rank:.1f}", width="content")
        st.caption(
            "Shares of the squared distance between the activation and the mean activation. On a single token the two "
            "parts of the error are not at right angles, so their shares need not sum to what is left out."
        )
        link = {"from": "held-out", "row": row, "token": position}
        st.page_link(
            state.PROMPT,
            label="This row, with the features of each token",
            icon=":material/text_fields:",
            query_params=state.link(**link),
        )


def page() -> None:
    st.header("Dark matter", anchor=False)
    found = result()
    if found is None:
        st.info(f"Not analysed yet. `saelab analyse {state.code(str(state.current_run().path))} {NAME}` does it.")
        return
    draw_figures(found)
    draw_widths(found)
    draw_regressions(found)
    st.subheader("Error by token", anchor=False)
    run = state.current_run()
    if not run.has_features:
        st.info(f"No features yet. `saelab index {state.code(str(run.path))}` makes them for the texts.")
        return
    with state.errors_shown():
        draw_texts(found, state.database())


page()
