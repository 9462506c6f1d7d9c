"""Another feature beside the one of the page: parameter `beside` of the link."""

import streamlit as st

from explorer import state
from explorer.components.tokens import draw_tokens, feature_names, lines_of
from explorer.explanations import draw_text
from explorer.listing import current_listing, feature_address
from saelab.features.marks import number

WINDOW = 24


@st.fragment(key="beside")
@state.errors_shown()
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
        draw_text(database, beside)
        st.caption(f"density {100 * other.density:.3g}%, largest activation {number(other.maximum)}")
        draw_tokens(
            lines_of(database, beside, database.examples(beside, n=5, window=WINDOW)),
            key="tokens_beside",
            strongest=other.usual_maximum,
            link=feature_address(current_listing()),
            names=feature_names(database),
            legend=False,
            on_opened=lambda another: show_beside(another, index),
        )


def show_beside(other: int | None, index: int) -> None:
    """Show another feature beside this one, or none; for callbacks."""
    state.change(beside=None if other == index else other)
    st.rerun("beside")
