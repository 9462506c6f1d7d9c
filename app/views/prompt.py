"""A text token by token: typed, or a row of the held-out text. A click on a token lists its features.

A typed text needs the model, which is loaded once something is typed; a row is read from the feature database.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import streamlit as st
from explorer import live, state
from explorer.components.tokens import with_row
from explorer.feature_list import Row, draw_features
from explorer.heatmap import draw_heatmap

from saelab.analysis.short_text import ShortText, changes
from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.features.marks import number, visible
from saelab.runs.live import text_at

TYPED, HELD_OUT = "typed", "held-out"
L0, ERROR, FEATURE, SIMILAR = "L0", "error", "feature", "similarity"
SHADES = {
    ERROR: "share of the norm that is error",
    L0: "active features",
    FEATURE: "activation",
    SIMILAR: "cosine with the chosen token",
}
ACTIVATION, QUANTILE, WEIGHTED = "activation", "quantile", "density-weighted"
# What a change of the text removes from the link. (Streamlit would show a string here on the page.)
CHOSEN = ("token", "lock")
CUTS = {1.0: "any density", 0.1: "10%", 0.01: "1%", 0.001: "0.1%"}
MOST_ROWS = 200
MOST_CHANGES = 40
MOST_IN_MATRIX = 128


def draw_source(database: Database | None) -> str | int | None:
    """Draw the choice of the text; returns the typed text or the row, None if nothing is typed."""
    with st.container(horizontal=True, vertical_alignment="center"):
        source = HELD_OUT if state.of_array() else TYPED
        if database is not None and not state.of_array():
            source = st.segmented_control(
                "Text",
                [TYPED, HELD_OUT],
                format_func={TYPED: "Typed", HELD_OUT: "Held-out text"}.__getitem__,
                required=True,
                label_visibility="collapsed",
                **state.bound("from", TYPED, [TYPED, HELD_OUT], clears=CHOSEN),
            )
        if source == TYPED:
            st.toggle("Begin with BOS", **state.bound("bos", True), help="as the rows of the training do")
    if database is not None and source == HELD_OUT:
        first = database.first_row
        last = first + len(database.facts.rows) - 1
        row = st.number_input(
            f"Row, {first:,} to {last:,}",
            first,
            last,
            width=200,
            **state.bound("row", first, None, (first, last), CHOSEN),
        )
        return int(row) - first
    text = st.text_area(
        "Prompt",
        height="content",
        max_chars=live.MOST_CHARACTERS,
        placeholder="Type a text, then press Ctrl+Enter. The first one loads the language model.",
        **state.bound("text", "", clears=CHOSEN),
    )
    return text or None


def draw_shades(text: ShortText, database: Database | None) -> tuple[str, int]:
    """Draw the choice of what shades the tokens; returns it, and the feature that may be it."""
    options = [name for name in SHADES if name != ERROR or text.errors is not None]
    constant = len(np.unique(text.l0[text.l0 > 0])) < 2  # as of a TopK autoencoder
    default = FEATURE if constant and text.errors is None else options[0]
    strongest = int(text.features[text.values.argmax()]) if len(text.values) else 0
    with st.container(horizontal=True, vertical_alignment="bottom"):
        shade = st.segmented_control(
            "Shade tokens by", options, required=True, **state.bound("shade", default, options)
        )
        if shade == FEATURE:
            last = (live.live().sae.n_features if database is None else database.n_features) - 1
            feature = st.number_input("Feature", 0, last, width=150, **state.bound("of", strongest, None, (0, last)))
            return FEATURE, int(feature)
    return str(shade), strongest


def draw_line(text: ShortText, shade: tuple[str, int], chosen: int, key: str, **options: Any) -> None:
    """The tokens of a text, with shades."""
    name, feature = shade
    if name == FEATURE:
        values = text.of(feature)
    elif name == ERROR and text.errors is not None and text.norms is not None:
        values = np.divide(text.errors, text.norms, out=np.zeros_like(text.norms), where=text.norms > 0)
    elif name == SIMILAR:
        values = text.similarity()[chosen]
    else:
        values = text.l0.astype(np.float32)
    line = live.line(text, values, feature if name == FEATURE else None, chosen)
    strongest = live.scale(feature, values) if name == FEATURE else float(values.max()) or 1.0
    live.draw([line], key, strongest, SHADES[name], **options)


def draw_orders(database: Database | None) -> tuple[str, float]:
    """Draw what orders the features of a token, and the density above which they are left out; returns both."""
    if database is None:
        return ACTIVATION, 1.0
    orders = [ACTIVATION, QUANTILE, WEIGHTED]
    sort = st.segmented_control(
        "Sort features by",
        orders,
        required=True,
        help="density-weighted: activation times the number of zeros of the density, -log10(density)",
        **state.bound("sort", ACTIVATION, orders),
    )
    cut = st.selectbox(
        "Leave out features denser than",
        list(CUTS),
        format_func=CUTS.__getitem__,
        width=230,
        **state.bound("cut", 1.0, list(CUTS)),
    )
    return str(sort), cut


def draw_target(text: ShortText, token: int) -> int:
    """Draw the choice of the token whose logit the effects are on; returns its id."""
    following = int(text.token_ids[token + 1]) if token + 1 < len(text) else None
    if following is None:
        following = live.live().next_token(text.token_ids.tolist())
    shown = visible(live.live().tokens([following])[0])
    typed = st.text_input(
        "Effect on the logit of",
        max_chars=60,
        width=260,
        placeholder=f"{shown} (the next token)",
        help="The first token of what you type counts; a word within a text begins with a space. Direct effect: "
        "activation times decoder row, through the final norm at its scale, times the unembedding.",
        **state.bound("target", ""),
    )
    return live.live().token_ids(typed, bos=False)[0] if typed else following


def draw_token(
    text: ShortText, token: int, database: Database | None, order: tuple[str, float], target: int | None
) -> None:
    """The features that are active on a token."""
    features, values = text.at(token)
    name, of_array = state.plain(visible(text.tokens[token])[:40]), state.of_array()
    st.markdown(f"**{name}**" if of_array else f"**Token {token}** {name}")  # the name of a row has its number
    facts = [*([] if of_array else [f"id {text.token_ids[token]}"]), f"{len(features)} features"]
    if text.norms is not None and text.errors is not None and text.norms[token] > 0:
        share = 100 * text.errors[token] / text.norms[token]
        facts.append(f"norm {number(float(text.norms[token]))}, error {share:.0f}% of it")
    st.caption(" · ".join(facts))
    if not len(features):
        st.caption("No feature is active here. Special tokens, such as BOS, have none.")
        return
    listed, hidden = ordered(database, features, values, order)
    if hidden:
        st.caption(f"{hidden} features that are denser than {CUTS[order[1]]} are left out.")
    if len(listed) > MOST_ROWS:
        st.caption(f"The first {MOST_ROWS} of {len(listed)}.")
        listed = listed[:MOST_ROWS]
    names = live.names(features[listed])
    effects = None if target is None else live.live().logit_effects(text, token, target)
    if database is not None:
        shares = database.table["density"][features[listed]].tolist()
        ranks = quantiles(database, features[listed], values[listed]).tolist()
    else:
        shares = ranks = [None] * len(listed)
    draw_features(
        [
            Row(
                int(features[i]),
                *names.get(int(features[i]), ("", "")),
                activation=float(values[i]),
                quantile=rank,
                density=share,
                effect=None if effects is None else float(effects[i]),
            )
            for i, rank, share in zip(listed.tolist(), ranks, shares, strict=True)
        ]
    )


def ordered(
    database: Database | None, features: np.ndarray, values: np.ndarray, order: tuple[str, float]
) -> tuple[np.ndarray, int]:
    """The places of the features that are not too dense in the order to list them, and how many are too dense."""
    if database is None:
        return np.argsort(-values, kind="stable"), 0
    sort, cut = order
    density, weight = database.table["density"][features], values
    if sort == QUANTILE:
        weight = quantiles(database, features, values)
    elif sort == WEIGHTED:
        weight = values * -np.log10(density.clip(1e-9, 1))
    found = np.argsort(-weight, kind="stable")
    found = found[density[found] <= cut]
    return found, len(features) - len(found)


def quantiles(database: Database, features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Percentage of each feature's activations at or below a value, ``[features]``; 100 if it was never active."""
    actives = map(database.facts.activations, features.tolist())
    return np.array(
        [
            100 * float((active.values <= value).mean()) if len(active.values) else 100.0
            for active, value in zip(actives, values, strict=True)
        ]
    )


def draw_features_of(text: ShortText, chosen: int, database: Database | None, bos: bool | None) -> None:
    """The features of the chosen token, and beside them those of the locked one. `bos` is None for held-out text."""
    locked = state.value("lock", -1, None, (0, len(text) - 1))
    st.session_state["locks"] = locked >= 0
    with st.container(horizontal=True, vertical_alignment="bottom"):
        order = draw_orders(database)
        has_effects = bos is not None and live.live().lens is not None
        target = draw_target(text, chosen) if has_effects else None
        st.toggle(
            "Lock this token",
            key="locks",
            on_change=lambda: state.change(lock=chosen if st.session_state["locks"] else None),
            help="keeps its features on the page while you click on other tokens",
        )
    if locked < 0 or locked == chosen:
        return draw_token(text, chosen, database, order, target)
    left, right = st.columns(2, gap="large")
    with left:
        draw_token(text, locked, database, order, target)
    with right:
        draw_token(text, chosen, database, order, target)


def draw_edit(text: ShortText, typed: str, shade: tuple[str, int], bos: bool) -> None:
    """The text once more, to edit, and the features that the edit changes."""
    if not st.toggle("Edit and compare", **state.bound("compare", False)):
        return
    edited = st.text_area("Edited prompt", height=110, max_chars=live.MOST_CHARACTERS, **state.bound("edit", typed))
    other = live.read(edited or "", bos)
    draw_line(other, shade, len(other) - 1, "edited_tokens")
    found = changes(text, other)
    appeared, vanished = int((found.before == 0).sum()), int((found.after == 0).sum())
    st.caption(
        f"{appeared} features appeared, {vanished} vanished, {len(found.features) - appeared - vanished} changed. An "
        "activation is the largest on the text; the largest change comes first."
    )
    shown = slice(0, MOST_CHANGES)
    names = live.names(found.features[shown])
    draw_features(
        [
            Row(int(feature), *names.get(int(feature), ("", "")), activation=float(now), was=float(was))
            for feature, was, now in zip(found.features[shown], found.before[shown], found.after[shown], strict=True)
        ]
    )


def draw_similarity(text: ShortText) -> None:
    if not st.toggle("Similarity of the tokens", **state.bound("matrix", False)):
        return
    if len(text) > MOST_IN_MATRIX:
        st.caption(f"The first {MOST_IN_MATRIX} tokens.")
    st.caption("Cosine of the codes of each two tokens; full colour is 1.")
    cosines = text.similarity()[:MOST_IN_MATRIX, :MOST_IN_MATRIX]
    draw_heatmap(cosines, text.tokens[:MOST_IN_MATRIX], "cosines of the tokens' codes")


def read(source: str | int, bos: bool | None, database: Database | None) -> ShortText:
    """The text of a source. Raises SaelabError if it needs the model, and this cannot be loaded."""
    if isinstance(source, int):
        assert database is not None, "without one there are no rows"
        found = text_at(database, source)
        return replace(found, tokens=with_row(database, source, found.tokens))
    try:
        return live.read(source, bool(bos))
    except SaelabError:
        if database is not None:
            st.caption("Held-out text needs no language model.")
        raise


def pinned() -> None:
    """A click on a token: it is the chosen one."""
    at = st.session_state["prompt_tokens"].pinned
    if at:
        state.change(token=at[1])


def page() -> None:
    try:
        database = live.database()
    except SaelabError as error:
        state.show_error(error)
        database = None
    if database is None and state.of_array():
        path = state.code(str(state.current_run().path))
        st.info(f"This page shows rows of the feature database. `saelab index {path}` makes it.")
        return
    source = draw_source(database)
    if source is None:
        st.caption("Nothing is typed yet." + (" Held-out text needs no model." if database else ""))
        return
    bos = state.value("bos", True) if isinstance(source, str) else None
    text = read(source, bos, database)
    chosen = state.value("token", len(text) - 1, None, (0, len(text) - 1))
    shade = draw_shades(text, database)
    draw_line(text, shade, chosen, "prompt_tokens", on_pinned=pinned)
    if len(text) > 1:
        st.caption(f"{len(text)} tokens. Click on a token to list its features.")
    draw_features_of(text, chosen, database, bos)
    if isinstance(source, str):
        live.draw_attention_link(source, chosen, bos=bool(bos))
    if isinstance(source, int):
        state.draw_dark_matter_link("What of this token is left out", place=source * len(text) + chosen)
    if isinstance(source, str) and bos is not None:
        draw_edit(text, source, shade, bos)
    if len(text) > 1:
        draw_similarity(text)


page()
