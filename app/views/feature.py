"""One feature: its activity, the tokens it promotes, the contexts on which it is most active, and its neighbours."""

import random

import numpy as np
import pandas as pd
import streamlit as st
from explorer import charts, html, state

from saelab.features import database
from saelab.features.database import Feature, Summary

NEIGHBOUR_TOKENS = 4


def draw_header(index: int, n_features: int, active: np.ndarray) -> None:
    """The index, and buttons that lead to other features."""
    st.session_state["jump_to"] = index  # a link or a button may have changed the feature since a number was typed
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.header(f"Feature {index}", anchor=False, width="stretch")
        st.button(
            "Previous", icon=":material/chevron_left:", on_click=state.go_to, args=(index - 1,), disabled=index == 0
        )
        st.button(
            "Next",
            icon=":material/chevron_right:",
            on_click=state.go_to,
            args=(index + 1,),
            disabled=index == n_features - 1,
        )
        st.button(
            "Random",
            icon=":material/casino:",
            on_click=lambda: state.go_to(int(random.choice(active))),
            disabled=len(active) == 0,
            help="show a random feature that is active on some token",
        )
        st.number_input(
            "Jump to",
            0,
            n_features - 1,
            key="jump_to",
            width=150,
            label_visibility="collapsed",
            on_change=lambda: state.go_to(st.session_state["jump_to"]),
            help="jump to a feature",
        )


def draw_activity(feature: Feature, whole: Summary) -> None:
    figures, histogram = st.columns([2, 3], gap="large")
    with figures:
        density, active = st.columns(2)
        share = f"share of the {whole.n_tokens:,} held-out tokens on which the feature is active"
        density.metric("Density", f"{100 * feature.density:.4f}%", help=share)
        active.metric("Active on", f"{feature.n_active:,} tokens", help=f"of {whole.n_tokens:,} held-out tokens")
        mean, largest = st.columns(2)
        mean.metric("Mean activation", html.number(feature.mean_activation), help="over the tokens it is active on")
        largest.metric("Max activation", html.number(feature.max_activation))
    with histogram:
        counts, middles = np.array(feature.histogram), feature.bin_centres
        width = feature.max_activation / max(1, len(counts))
        figure = charts.bars(middles, counts, width, "activation, when active", "tokens", log_y=True)
        charts.draw(figure, "activations", "Histogram of the feature's non-zero activations")


def draw_logits(feature: Feature, site: str) -> None:
    st.subheader("Logit lens", anchor=False, help="the feature's decoder direction times the unembedding")
    if not feature.top_logits:
        st.caption(f"No logit lens: {state.plain(site)} is neither the residual stream nor added to it.")
        return
    up, down = st.columns(2)
    with up:
        st.caption("promotes")
        st.html(html.logits_html(feature.top_logits))
    with down:
        st.caption("suppresses")
        st.html(html.logits_html(feature.bottom_logits))


def draw_neighbours(feature: Feature, table: pd.DataFrame) -> None:
    st.subheader("Neighbours", anchor=False, help="the features with the most similar decoder directions (cosine)")
    tokens = table["top_logit_tokens"] if feature.top_logits else table["peak_tokens"]
    known = dict(zip(table["feature"], tokens, strict=True))
    with st.container(gap=None, key="neighbours"):
        for index, cosine in feature.neighbours:
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                st.page_link(
                    state.FEATURE, label=f"**{index}** · {cosine:.2f}", query_params=state.link_to(index), width=110
                )
                st.html(html.tokens_html(known.get(index, [])[:NEIGHBOUR_TOKENS]), width="stretch")


def draw_contexts(feature: Feature) -> None:
    found = state.read(database.contexts, feature.index)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader(f"Top {len(found)} contexts", anchor=False, width="stretch")
        breaks = st.toggle("Line breaks", key="line_breaks", help="keep the line breaks and indents of the text")
    st.html(html.scale_html(feature.max_activation) + html.contexts_html(found, feature.max_activation, breaks=breaks))


def page() -> None:
    table = state.read(database.feature_table)
    whole = state.read(database.summary)
    active = table["feature"].to_numpy()[table["n_active"].to_numpy() > 0]
    index = state.current_feature(len(table), otherwise=int(active[0]) if len(active) else 0)
    feature = state.read(database.feature, index)
    draw_header(index, len(table), active)
    st.caption(state.plain(f"{whole.site} of the model {whole.model}, {len(table):,} features"))
    if feature.never_active:
        st.warning(
            f"Never active on the {whole.n_tokens:,} held-out tokens, so it has no activations and no contexts.",
            icon=":material/bedtime:",
        )
    else:
        draw_activity(feature, whole)
    left, right = st.columns([3, 2], gap="large")
    with left:
        draw_logits(feature, whole.site)
    with right:
        draw_neighbours(feature, table)
    if not feature.never_active:
        draw_contexts(feature)


page()
