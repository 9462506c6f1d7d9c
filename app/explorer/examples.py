"""The examples of a feature: its strongest activations, intervals, a range, random ones, and near misses."""

from html import escape

import numpy as np
import streamlit as st

from explorer import state
from explorer.beside import show_beside
from explorer.components.tokens import Line, draw_tokens, feature_names, lines_of
from explorer.listing import current_listing, feature_address
from saelab.features.database import Database, Feature
from saelab.features.layout import BINS
from saelab.features.marks import cut, number, visible

TOP, INTERVALS, RANGE, RANDOM, NEAR = "top", "intervals", "range", "random", "near misses"
LABELS = {TOP: "Top", INTERVALS: "Intervals", RANGE: "Range", RANDOM: "Random", NEAR: "Near misses"}
WINDOW = 32
SHORTER = 24
"""Tokens of a window in intervals, of which there are many."""


@st.fragment(key="examples")
@state.errors_shown()
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
        strongest=feature.usual_maximum,
        link=feature_address(current_listing()),
        names=feature_names(database),
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
    low, high = feature.bars.edges[[bins[0], bins[1] + 1]].tolist()
    return low, high if bins[1] == BINS - 1 else float(np.nextafter(np.float32(high), np.float32(0)))


def draw_range(database: Database, feature: Feature, low: float, high: float) -> None:
    """What the activations of a range have in common."""
    found = database.tokens_in_range(feature.index, low, high, 5)
    text = f"{found.n:,} activations from {number(low)} to {number(high)}"
    if found.n:
        shares = zip(found.tokens.tolist(), found.shares.tolist(), strict=True)
        most = ", ".join(f"“{visible(cut(database.vocabulary.text(token)))}” {share:.0%}" for token, share in shares)
        text += f"; {found.peak_share:.0%} are on the token of the strongest one. Most are on {most}."
    st.html(f'<div class="sl-note">{escape(text)}</div>')
