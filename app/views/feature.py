"""One feature: where it is active, from the strongest activation to the near miss; then its numbers and its relatives.

Examples, the feature beside it and its neighbours are fragments: what the reader chooses draws one of them again.
"""

import random

import numpy as np
import streamlit as st
from explorer import live, state
from explorer.beside import draw_beside, show_beside
from explorer.components.copy_link import draw_copy_link
from explorer.examples import draw_examples
from explorer.explained_feature import draw_explanations, draw_headline
from explorer.listing import SIZE, Listed, Listing, current_listing, listed
from explorer.numbers import draw_numbers


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


def page() -> None:
    database = state.database()
    n_active = np.asarray(database.table["n_active"])
    index = state.current_feature(database.n_features, otherwise=int((n_active > 0).argmax()))
    feature = database.feature(index)
    state.show_title(f"Feature {index}")
    listing = current_listing()
    draw_bar(index, listing, listed(database, listing))
    st.caption(state.plain(f"{database.site} of {database.origin}, {database.n_features:,} features"))
    if not database.of_array:  # its rows have no text to explain
        draw_headline(database, feature)
    if not feature.never_active:
        state.draw_dark_matter_link("What is left out where it is active", feature=index)
    else:
        st.warning(
            f"Never active on the {database.n_tokens:,} held-out tokens, so it has no activations and no examples.",
            icon=":material/bedtime:",
        )
    left, right = st.columns([5, 3], gap="large")
    with left:
        if not database.of_array:
            live.draw_test_box(index, on_opened=lambda other: show_beside(other, index))
        if not feature.never_active:
            draw_examples(index)
    with right, st.container(key="rail"):
        draw_beside(index)
        if not database.of_array:
            draw_explanations(index)
        draw_numbers(database, feature)
    st.caption(
        "Keys: J and K lead to the next and the previous feature. Tab reaches a text, arrow keys walk from token to "
        "token, Enter pins a token's card, Escape closes it."
    )


page()
