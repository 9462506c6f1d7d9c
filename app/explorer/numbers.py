"""The numbers of a feature: histogram, moments, logit lens, neighbours, neurons; and its files."""

import json

import numpy as np
import streamlit as st

from explorer import state
from explorer.beside import show_beside
from explorer.components.histogram import draw_histogram
from explorer.components.rows import Column, Row, draw_rows
from explorer.examples import RANGE, chosen_bins
from explorer.html import bars_html, facts_html
from explorer.listing import current_listing, feature_address
from saelab.features.database import NEIGHBOURS, Database, Feature
from saelab.features.export import circuit_tracer, html
from saelab.features.layout import LOGIT_BINS
from saelab.features.marks import number
from saelab.runs.decoder import site_shares

KINDS = {"decoder": "decoder", "encoder": "encoder", "coactive": "co-activation"}
SCORES = {"decoder": "cosine", "encoder": "cosine", "coactive": "phi"}


def draw_activations(feature: Feature) -> None:
    def choose(bins: tuple[int, int] | None) -> None:
        state.change(range=bins, examples=RANGE if bins else None)
        st.rerun("examples")

    counts, edges, logarithmic = feature.bars
    draw_histogram(
        counts,
        edges,
        key="activation_bars",
        title="Activations, logarithmic" if logarithmic else "Activations",
        noun="tokens",
        log=True,
        chosen=chosen_bins(),
        on_chosen=choose,
    )


def draw_facts(feature: Feature) -> None:
    first_row = feature.database.first_row

    of_array = feature.database.of_array

    def where(place: tuple[int, int] | None) -> str:
        if place is None:
            return ""
        return f"row {first_row + place[0]:,}" + ("" if of_array else f", token {place[1]}")

    def numbers(*values: float) -> str:
        return ", ".join(map(number, values))

    facts = {
        "density": f"{100 * feature.density:.3g}%, {feature.n_active:,} of {feature.n_tokens:,} tokens",
        "largest, mean when active": numbers(feature.maximum, feature.mean),
        "median, 90%, 99%, active": numbers(*(feature.quantiles[share] for share in (0.5, 0.9, 0.99))),
        "mean square, all tokens": number(feature.mean_square),
        "skew, kurtosis, all tokens": numbers(feature.skew, feature.kurtosis),
        f"entropy over {'labels' if of_array else 'token ids'}": f"{feature.token_entropy:.2f} bits",
        "first active": where(feature.first),
        "last active": where(feature.last),
        "encoder, decoder norm": numbers(feature.encoder_norm, feature.decoder_norm),
    }
    if feature.encoder_decoder_cosine:  # 0 of a transcoder between sites of different widths
        facts["encoder-decoder cosine"] = f"{feature.encoder_decoder_cosine:.3f}"
    st.html(facts_html([(name, value, "", "") for name, value in facts.items()]))


@state.errors_shown()
def draw_sites(database: Database, feature: Feature) -> None:
    """At which sites a feature of a crosscoder is."""
    shares = state.read(site_shares, feature.index)
    help = "share of each site in the length of its decoder row, in the units of training: 1 if it is at one site alone"
    st.subheader("Sites", anchor=False, help=help)
    row = shares[0].tolist() if len(shares) else []
    pairs = zip(database.sites.inputs, row, strict=False)  # none if the weights are others by now
    st.html(facts_html([(site, f"{share:.3f}", "", "") for site, share in pairs]))


def draw_lens(database: Database, feature: Feature) -> None:
    st.subheader("Logit lens", anchor=False)
    if not feature.top_logits:
        why = f"{state.plain(database.site)} is neither the residual stream nor added to it"
        if database.sites.more:
            why = "a row of a crosscoder writes to several sites"
        st.caption(f"None: {why}.")
        return
    up, down = st.columns(2, gap="small")
    up.html(bars_html(feature.top_logits))
    down.html(bars_html(feature.bottom_logits))
    edges = np.linspace(*feature.logit_range, LOGIT_BINS + 1)
    draw_histogram(feature.logit_histogram, edges, key="logit_bars", title="Logits", noun="tokens", log=True)
    st.caption(state.plain(f"The decoder row times the unembedding; {database.lens}."))


@st.fragment(key="neighbours")
@state.errors_shown()
def draw_neighbours(index: int) -> None:
    """Neighbours of the chosen kind."""
    database = state.database()
    feature = database.feature(index)
    st.subheader("Neighbours", anchor=False)
    kind = st.segmented_control(
        "Kind",
        list(NEIGHBOURS),
        format_func=KINDS.__getitem__,
        required=True,
        label_visibility="collapsed",
        **state.bound("neighbours", "decoder", list(NEIGHBOURS)),
    )
    found = feature.neighbours[kind]
    if not found:
        st.caption("No feature is active together with it more often than by chance.")
        return
    jaccard = [f"Jaccard {other.jaccard:.2f}" if other.jaccard is not None else "" for other in found]
    rows = [
        Row(other.feature, score=f"{other.value:.2f}", note=note) for other, note in zip(found, jaccard, strict=True)
    ]
    columns = [
        Column("id", "feature"),
        Column("score", SCORES[kind]),
        Column("tokens", "active on" if database.lens is None else "promotes / active on"),
    ]
    link = feature_address(current_listing())
    draw_rows(
        database,
        rows,
        columns,
        key=f"neighbours_{kind}",
        link=link,
        on_opened=lambda other: show_beside(other, index),
    )


def draw_numbers(database: Database, feature: Feature) -> None:
    if not feature.never_active:
        draw_activations(feature)
        draw_facts(feature)
        st.subheader("Tokens with most of its activation", anchor=False)
        st.html(bars_html([token._replace(value=100 * token.value) for token in feature.top_tokens], "{:.1f}%"))
    if database.sites.more:
        draw_sites(database, feature)
    if not database.of_array:
        draw_lens(database, feature)
    draw_neighbours(feature.index)
    if feature.neurons:
        sites = "the sites side by side" if database.sites.more else "the site"
        help = f"dimensions of {sites} with the largest weights in its decoder row"
        st.subheader("Neurons", anchor=False, help=help)
        lines = [(f"{each.index}", f"{each.weight:+.3f}", f"{100 * each.share:.1f}%", "") for each in feature.neurons]
        st.html(facts_html(lines))
    draw_downloads(database, feature.index)


def draw_downloads(database: Database, index: int) -> None:
    """The feature as a file; it is made when it is asked for."""

    def details() -> str:
        return json.dumps(circuit_tracer.details(database, index))

    def page() -> str:
        return html.page(database, [index])

    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        for label, kind, make, help in (
            ("HTML", "html", page, "a page without scripts, with intervals and near misses"),
            ("JSON", "json", details, "in the format of circuit-tracer's feature details"),
        ):
            st.download_button(
                label,
                make,
                f"feature-{index}.{kind}",
                "application/json" if kind == "json" else "text/html",
                on_click="ignore",
                icon=":material/download:",
                help=help,
            )
