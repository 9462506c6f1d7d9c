"""The table of a run's features: search and sort it, and click on a row to open a feature."""

import pandas as pd
import streamlit as st
from explorer import charts, state
from explorer.state import IN_CONTEXTS, IN_TOKENS, LOWEST_DENSITY

from saelab.features import database
from saelab.features.marks import typed, visible


def filtered(table: pd.DataFrame, never_active: int) -> pd.DataFrame:
    """Draw the filters; returns the rows that pass them."""
    left, middle, right, last = st.columns([4, 2.2, 3, 2.4], vertical_alignment="bottom", gap="medium")
    text = left.text_input(
        "Search",
        key="search",
        placeholder="def, import numpy, ↵ ...",
        help="Upper and lower case are the same. tokens: searches the tokens that a feature promotes and those at the "
        "peaks of its top contexts. context text: searches all text of its top contexts, across tokens.",
        live=True,
    )
    where = middle.segmented_control(
        "in", [IN_TOKENS, IN_CONTEXTS], key="search_in", required=True, label_visibility="collapsed"
    )
    right.slider("Density, log10", LOWEST_DENSITY, 0.0, step=0.25, format="%.1f", key="density_range")
    low, high = st.session_state["density_range"]
    with_dead = last.toggle(f"Show {never_active:,} never active", key="show_never_active", disabled=never_active == 0)

    keep = pd.Series(True, index=table.index)
    if text.strip():
        if where == IN_CONTEXTS:
            keep &= table["feature"].isin(state.read(database.search_contexts, typed(text)).tolist())
        else:
            keep &= database.search_tokens(table, typed(text))
    active = table["n_active"] > 0
    # The slider's ends mean no limit.
    above = 10**low if low > LOWEST_DENSITY else 0.0
    keep &= (active & table["density"].between(above, 10**high)) | (~active & with_dead)
    return table.loc[keep]


def draw_table(lines: pd.DataFrame) -> None:
    shown = lines.assign(
        density=100 * lines["density"],
        top_logit_tokens=[[visible(token) for token in tokens] for tokens in lines["top_logit_tokens"]],
        peak_tokens=[[visible(token) for token in tokens] for tokens in lines["peak_tokens"]],
    )
    number = st.column_config.NumberColumn
    event = st.dataframe(
        shown,
        key="table",
        height=620,
        hide_index=True,
        lazy=False,  # a table that loads in parts does not support selection
        on_select="rerun",
        selection_mode="single-cell",
        column_config={
            "feature": number("feature", width=90, format="%d"),
            "density": number("density, %", width=100, format="%.4f", help="share of the tokens on which it is active"),
            "n_active": number("active on", width=100, format="localized", help="number of tokens it is active on"),
            "mean_activation": number(
                "mean", width=80, format="%.2f", help="mean activation over the tokens it is active on"
            ),
            "max_activation": number("max", width=80, format="%.2f", help="largest activation"),
            "top_logit_tokens": st.column_config.ListColumn(
                "promotes", width=360, help="tokens whose logits it raises most"
            ),
            "peak_tokens": st.column_config.ListColumn(
                "peaks on", width=360, help="tokens at the peaks of its top contexts"
            ),
        },
    )
    chosen = [row for row, _ in event["selection"]["cells"]]
    if chosen and chosen[0] < len(lines):
        st.switch_page(state.FEATURE, query_params=state.link_to(int(lines["feature"].to_numpy()[chosen[0]])))


def page() -> None:
    table = state.read(database.feature_table)
    whole = state.read(database.summary)
    st.header("Features", anchor=False)
    edges, counts = database.density_histogram(table)
    middles = (edges[:-1] + edges[1:]) / 2
    figure = charts.bars(middles, counts, edges[1] - edges[0], "density, log10 of the fraction of tokens", "features")
    charts.draw(figure, "densities", "Histogram of the features' densities")
    lines = filtered(table, whole.never_active)
    note = f"{len(lines):,} of {len(table):,} features"
    if whole.never_active:
        hidden = "" if st.session_state["show_never_active"] else " (hidden)"
        note += f"; {whole.never_active:,} never active on {whole.n_tokens:,} tokens{hidden}"
    st.caption(note + ". Click on a row to open the feature.")
    if len(lines):
        draw_table(lines)
    else:
        st.info("No feature passes these filters. Change the search, or widen the range of densities.")


page()
