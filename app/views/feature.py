"""One feature: where it is active, from the strongest activation to the near miss; then its numbers and its relatives.

Examples, the feature beside it and its neighbours are fragments: what the reader chooses draws one of them again.
"""

import json
import random
from html import escape

import numpy as np
import streamlit as st
from explorer import live, state
from explorer.components.copy_link import draw_copy_link
from explorer.components.histogram import draw_histogram
from explorer.components.rows import Column, Row, draw_rows
from explorer.components.tokens import Line, draw_tokens, lines_of, token_names
from explorer.html import bars_html, facts_html
from explorer.listing import SIZE, Listed, Listing, current_listing, feature_address, listed

from saelab.features.database import NEIGHBOURS, Database, Feature
from saelab.features.export import circuit_tracer
from saelab.features.export import html as page_of
from saelab.features.layout import BINS, LOGIT_BINS
from saelab.features.marks import cut, number, visible

TOP, INTERVALS, RANGE, RANDOM, NEAR = "top", "intervals", "range", "random", "near misses"
LABELS = {TOP: "Top", INTERVALS: "Intervals", RANGE: "Range", RANDOM: "Random", NEAR: "Near misses"}
KINDS = {"decoder": "decoder", "encoder": "encoder", "coactive": "co-activation"}
SCORES = {"decoder": "cosine", "encoder": "cosine", "coactive": "phi"}
WINDOW = 32
SHORTER = 24  # tokens of a window where there are many


# the bar


def go_to(index: int) -> None:
    """Show another feature of the run; for callbacks."""
    state.change(feature=index, beside=None)


def stars() -> set[int]:
    """The features of this run that were given a star in this session."""
    return st.session_state.setdefault("stars", {}).setdefault(str(state.current_run().path), set())


def draw_bar(index: int, listing: Listing, found: Listed) -> None:
    position = found.position(index)
    if position is None:  # a neighbour, for example: its place by index
        before = found.features[found.features < index].max(initial=-1)
        later = found.features[found.features > index]
        after = later.min() if len(later) else -1
    else:
        before = found.features[position - 1] if position else -1
        after = found.features[position + 1] if position + 1 < len(found.features) else -1
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="feature_bar"):
        st.markdown(f"### Feature {index}", width="content")
        total = f"{len(found.features):,}"
        here = f"{position + 1:,} of {total}" if position is not None else f"not among the {total}"
        page = position // SIZE + 1 if position is not None else 1
        back = state.link(**listing.parameters, page=page if page > 1 else None)
        st.page_link(
            state.FEATURES, label=here, icon=":material/table_rows:", query_params=back, help="back to the list"
        )
        step("Previous", "chevron_left", before, "K")
        step("Next", "chevron_right", after, "J")
        others = found.features[found.features != index]
        st.button(
            "Random",
            icon=":material/casino:",
            on_click=lambda: go_to(int(random.choice(others))),
            disabled=len(others) == 0,
            help="a random feature of the list",
        )
        st.session_state["jump_to"] = index  # a link or a button may have changed the feature since a number was typed
        st.number_input(
            "Jump to",
            0,
            state.database().n_features - 1,
            key="jump_to",
            width=130,
            label_visibility="collapsed",
            on_change=lambda: go_to(st.session_state["jump_to"]),
            help="jump to a feature",
        )
        draw_star(index)
        draw_copy_link()


def step(label: str, icon: str, index: int, key: str) -> None:
    st.button(
        label,
        icon=f":material/{icon}:",
        shortcut=key,
        on_click=go_to,
        args=(int(index),),
        disabled=index < 0,
    )


def draw_star(index: int) -> None:
    """A button that stars the feature, and a link to those with a star."""
    chosen = stars()
    starred = index in chosen
    st.button(
        "",
        icon=":material/star:",
        key="star",
        type="primary" if starred else "secondary",
        on_click=chosen.discard if starred else chosen.add,
        args=(index,),
        help="Take the star back" if starred else "Star it for this session; the link to your stars lasts",
    )
    if chosen:
        query = "id:" + ",".join(map(str, sorted(chosen)))
        st.page_link(state.FEATURES, label=f"{len(chosen)} starred", query_params=state.link(q=query))


# examples


@st.fragment(key="examples")
def draw_examples(index: int) -> None:
    """Examples of the chosen kind."""
    database = state.database()
    feature, bins = database.feature(index), chosen_bins()
    options = [kind for kind in LABELS if kind != RANGE or bins]
    kind = st.segmented_control(
        "Examples",
        options,
        format_func=LABELS.__getitem__,
        required=True,
        label_visibility="collapsed",
        **state.bound("examples", TOP, options),
    )
    lines = examples(database, feature, kind, bins)
    if not lines:
        st.info("There are none.")
        return
    draw_tokens(
        lines,
        key=f"tokens_{kind}",
        strongest=feature.maximum,
        link=feature_address(current_listing()),
        names=token_names(database),
        on_opened=lambda other: show_beside(other, index),
    )


def chosen_bins() -> tuple[int, int] | None:
    """The bins of the histogram that the link names."""
    low, high = state.value("range", (-1.0, -1.0), limits=(0, BINS - 1))
    return (int(low), int(high)) if low >= 0 else None


def examples(database: Database, feature: Feature, kind: str, bins: tuple[int, int] | None) -> list[Line]:
    """The lines of examples of a kind, and for a range what is in it, which is drawn."""
    index = feature.index
    if kind == INTERVALS:
        lines = []
        for interval in database.intervals(index, window=SHORTER):
            heading = (
                f"{number(interval.low)} to {number(interval.high)}, {100 * interval.share:.0f}% of its activations"
            )
            lines += lines_of(database, index, interval.examples, heading)
        return lines
    if kind == NEAR:
        near = database.near_misses(index)
        return [
            *lines_of(database, index, near.same_token, "Not active on the same token"),
            *lines_of(database, index, near.similar_text, "Not active in similar text"),
        ]
    if kind == RANGE and bins:
        low, high = edges_of(feature, bins)
        draw_range(database, feature, low, high)
        return lines_of(database, index, database.examples(index, "range", window=WINDOW, low=low, high=high))
    return lines_of(database, index, database.examples(index, "random" if kind == RANDOM else "top", window=WINDOW))


def edges_of(feature: Feature, bins: tuple[int, int]) -> tuple[float, float]:
    """The range of activations of some bins of the histogram; the upper end of the last one is the maximum."""
    low, high = (feature.maximum * edge / BINS for edge in (bins[0], bins[1] + 1))
    return low, high if bins[1] == BINS - 1 else float(np.nextafter(np.float32(high), np.float32(0)))


def draw_range(database: Database, feature: Feature, low: float, high: float) -> None:
    """What the activations of a range have in common."""
    found = database.tokens_in_range(feature.index, low, high, 5)
    text = f"{found.n:,} activations from {number(low)} to {number(high)}"
    if found.n:
        shares = zip(found.tokens.tolist(), found.shares.tolist(), strict=True)
        most = ", ".join(f"{visible(cut(database.vocabulary.text(token)))} {share:.0%}" for token, share in shares)
        text += f"; {found.peak_share:.0%} are on the token of the strongest one. Most are on {most}."
    st.html(f'<div class="sl-note">{escape(text)}</div>')


# the numbers


def draw_activations(feature: Feature) -> None:
    def choose(bins: tuple[int, int] | None) -> None:
        state.change(range=bins, examples=RANGE if bins else None)
        st.rerun("examples")

    edges = np.linspace(0, feature.maximum, BINS + 1)
    draw_histogram(
        feature.histogram,
        edges,
        key="activation_bars",
        title="Activations",
        noun="tokens",
        log=True,
        chosen=chosen_bins(),
        on_chosen=choose,
    )


def draw_facts(feature: Feature) -> None:
    def where(place: tuple[int, int] | None) -> str:
        return f"row {place[0]:,}, token {place[1]}" if place else ""

    def numbers(*values: float) -> str:
        return ", ".join(map(number, values))

    facts = {
        "density": f"{100 * feature.density:.3g}%, {feature.n_active:,} of {feature.n_tokens:,} tokens",
        "largest, mean when active": numbers(feature.maximum, feature.mean),
        "median, 90%, 99% when active": numbers(*(feature.quantiles[share] for share in (0.5, 0.9, 0.99))),
        "mean square, all tokens": number(feature.mean_square),
        "skew, kurtosis, all tokens": numbers(feature.skew, feature.kurtosis),
        "entropy over token ids": f"{feature.token_entropy:.2f} bits",
        "first active": where(feature.first),
        "last active": where(feature.last),
        "encoder, decoder norm": numbers(feature.encoder_norm, feature.decoder_norm),
        "cosine of encoder and decoder": f"{feature.encoder_decoder_cosine:.3f}",
    }
    st.html(facts_html([(name, value, "", "") for name, value in facts.items()]))


def draw_lens(database: Database, feature: Feature) -> None:
    st.subheader("Logit lens", anchor=False)
    if not feature.top_logits:
        st.caption(f"None: {state.plain(database.site)} is neither the residual stream nor added to it.")
        return
    up, down = st.columns(2, gap="small")
    up.html(bars_html(feature.top_logits))
    down.html(bars_html(feature.bottom_logits))
    edges = np.linspace(*feature.logit_range, LOGIT_BINS + 1)
    draw_histogram(feature.logit_histogram, edges, key="logit_bars", title="Logits", noun="tokens", log=True)
    st.caption(state.plain(f"The decoder row times the unembedding; {database.lens}."))


@st.fragment(key="neighbours")
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
    columns = [Column("id", "feature"), Column("score", SCORES[kind]), Column("tokens", "promotes / active on")]
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
    draw_lens(database, feature)
    draw_neighbours(feature.index)
    if feature.neurons:
        st.subheader("Neurons", anchor=False, help="dimensions of the site with the largest weights in its decoder row")
        lines = [(f"{each.index}", f"{each.weight:+.3f}", f"{100 * each.share:.1f}%", "") for each in feature.neurons]
        st.html(facts_html(lines))
    draw_downloads(database, feature.index)


def draw_downloads(database: Database, index: int) -> None:
    """The feature as a file; it is made when it is asked for."""

    def details() -> str:
        return json.dumps(circuit_tracer.details(database, index))

    def page() -> str:
        return page_of.page(database, [index])

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


# another feature beside it


@st.fragment(key="beside")
def draw_beside(index: int) -> None:
    """The feature that the reader has opened from a token or from the neighbours."""
    database = state.database()
    beside = state.value("beside", -1, limits=(0, database.n_features - 1))
    if beside < 0:
        return
    other = database.feature(beside)
    with st.container(border=True, key="beside"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**Feature {beside}**", width="stretch")
            query = state.link(**current_listing().parameters, feature=beside)
            st.page_link(state.FEATURE, label="Open", query_params=query)
            st.button("Close", type="tertiary", icon=":material/close:", on_click=show_beside, args=(None, index))
        if other.never_active:
            st.caption("never active")
            return
        st.caption(f"density {100 * other.density:.3g}%, largest activation {number(other.maximum)}")
        draw_tokens(
            lines_of(database, beside, database.examples(beside, n=5, window=SHORTER)),
            key="tokens_beside",
            strongest=other.maximum,
            link=feature_address(current_listing()),
            names=token_names(database),
            legend=False,
            on_opened=lambda another: show_beside(another, index),
        )


def show_beside(other: int | None, index: int) -> None:
    """Show another feature beside this one, or none; for callbacks."""
    state.change(beside=None if other == index else other)
    st.rerun("beside")


def page() -> None:
    database = state.database()
    n_active = np.asarray(database.table["n_active"])
    index = state.current_feature(database.n_features, otherwise=int((n_active > 0).argmax()))
    feature = database.feature(index)
    state.show_title(f"Feature {index}")
    listing = current_listing()
    draw_bar(index, listing, listed(database, listing))
    if feature.never_active:
        st.warning(
            f"Never active on the {database.n_tokens:,} held-out tokens, so it has no activations and no examples.",
            icon=":material/bedtime:",
        )
    left, right = st.columns([5, 3], gap="large")
    with left:
        live.draw_test_box(index, on_opened=lambda other: show_beside(other, index))
        if not feature.never_active:
            draw_examples(index)
    with right, st.container(key="rail"):
        draw_beside(index)
        draw_numbers(database, feature)
    st.caption(
        "Keys: J and K lead to the next and the previous feature. Tab reaches a text, arrow keys walk from token to "
        "token, Enter pins a token's card, Escape closes it."
    )


page()
