"""The features of a run: search, filter and sort them; each row opens one."""

from typing import NamedTuple

import numpy as np
import streamlit as st
from explorer import state
from explorer.components.histogram import draw_histogram
from explorer.components.rows import Column, Row, draw_rows
from explorer.listing import SHOWN, SIZE, Listed, Listing, current_listing, feature_address, listed, version

from saelab.features.database import Database
from saelab.features.search import Found, Match, match_of

HELP = r"""Features that are active on this text, those with most of their activation on it first.

- `import numpy`: text in any case, also across tokens; ␣ is a space and ↵ a line break
- `/def \w+/`: a regular expression, in this case
- `token:import`: a token that is this text
- `promotes:import`: tokens that the feature makes more likely
- `id:7,12,40-50`: features by index"""
COLUMNS = [
    Column("id", "feature", True),
    Column("density", "density", True, "share of the held-out tokens on which the feature is active, and their number"),
    Column("maximum", "max", True, "largest activation"),
    Column("bars", "activations", False, "histogram from 0 to the maximum; heights are logarithmic"),
    Column(
        "tokens", "promotes / active on", False, "tokens that it makes more likely; tokens with most of its activation"
    ),
    Column("text", "example", False, "the match, or the strongest activation, is framed"),
]
SCORE = Column("score", "match", True, "share of its activation that lies on the match; for promotes:, the logit")
# The column of the database that each column sorts by; "" is the order of the query.
SORTS = {"id": "feature", "density": "density", "maximum": "maximum", "score": ""}


class Facet(NamedTuple):
    """Counts of features in bins of a column, logarithmic."""

    edges: np.ndarray
    counts: np.ndarray


@st.cache_resource(max_entries=32, show_spinner=False)
def facet(_database: Database, version: tuple, column: str) -> Facet:
    """How many features that are ever active lie in 40 bins of a column."""
    values = np.asarray(_database.table[column])[np.asarray(_database.table["n_active"]) > 0]
    low, high = np.log10([values.min(), values.max()]) if len(values) else (-1.0, 0.0)
    edges = 10.0 ** np.linspace(low, max(high, low + 0.01), 41)
    edges[0], edges[-1] = edges[0] * 0.999, edges[-1] * 1.001  # so that rounding leaves no feature out
    edges = np.array([float(f"{edge:.5g}") for edge in edges])  # short enough for a link
    return Facet(edges, np.histogram(values, edges)[0])


def draw_facet(database: Database, listing: Listing, column: str, title: str) -> None:
    """A histogram whose brush filters the list."""
    edges, counts = facet(database, version(database), column)
    chosen = None
    if column in listing.parameters:
        low, high = getattr(listing, column)
        first, last = np.searchsorted(edges, [low * 1.0001, high * 0.9999], side="right") - 1
        chosen = (max(0, int(first)), min(len(counts) - 1, max(int(first), int(last))))

    def choose(bins: tuple[int, int] | None) -> None:
        ends = (float(edges[bins[0]]), float(edges[bins[1] + 1])) if bins else None
        state.change(page=None, **{column: ends})

    draw_histogram(counts, edges, key=f"{column}_bars", title=title, noun="features", chosen=chosen, on_chosen=choose)


def draw_filters(database: Database, listing: Listing) -> None:
    search, shown = st.columns([3, 2], vertical_alignment="bottom", gap="medium")
    with search:
        st.text_input(
            "Search",
            placeholder="text, /regex/, token:, promotes:, id:",
            help=HELP,
            icon=":material/search:",
            **state.bound("q", "", clears=("page", "sort", "order")),
        )
    with shown:
        never = int(database.arrays.manifest["never_active"])
        labels = {"active": "active", "never": f"{never:,} never active", "all": "all"}
        st.segmented_control(
            "Show",
            SHOWN,
            format_func=labels.__getitem__,
            required=True,
            **state.bound("show", "active", SHOWN, clears=("page",)),
        )
    left, right = st.columns(2, gap="medium")
    with left:
        draw_facet(database, listing, "density", "density")
    with right:
        draw_facet(database, listing, "maximum", "largest activation")


def rows_of(database: Database, found: Found | None, features: np.ndarray) -> list[Row]:
    """The rows of some features of the list: where each matches the query, or else is most active."""
    scored = found if has_scores(found) else None
    numbers: dict[int, int] = {}
    if scored:
        at = np.flatnonzero(np.isin(scored.features, features)).tolist()
        numbers = dict(zip(scored.features[at].tolist(), at, strict=True))

    def row(feature: int, top: int) -> Row:
        strongest = Match(top, top, top) if top >= 0 else None
        if scored is None:
            return Row(feature, strongest)
        number = numbers[feature]
        return Row(feature, match_of(database.facts, scored, number) or strongest, score(scored, number))

    top = database.table["top_places"][features, 0].tolist() if len(features) else []
    return [row(*each) for each in zip(features.tolist(), top, strict=True)]


def has_scores(found: Found | None) -> bool:
    return found is not None and (found.shares is not None or found.logits is not None)


def score(found: Found, number: int) -> str:
    """The share of a feature's activation that lies on the match, or the logit of the match."""
    if found.shares is not None:
        return f"{100 * found.shares[number]:.3g}%"
    return f"{found.logits[number]:+.2f}" if found.logits is not None else ""


def draw_list(database: Database, listing: Listing, found: Listed) -> None:
    total = len(found.features)
    page = min(state.value("page", 1, limits=(1, 1e9)), max(1, -(-total // SIZE)))
    first = (page - 1) * SIZE
    matched = has_scores(found.found)

    def sort_by(key: str) -> None:
        sort = SORTS.get(key, "")
        again = sort == listing.sort
        rising = listing.order == "desc" if again else sort == "feature"
        state.change(sort=sort or None, order="asc" if sort and rising else None, page=None)

    draw_rows(
        database,
        rows_of(database, found.found, found.features[first : first + SIZE]),
        [*COLUMNS[:1], SCORE, *COLUMNS[1:]] if matched else COLUMNS,
        key="rows",
        link=feature_address(listing),
        sort=next((key for key, column in SORTS.items() if column == listing.sort and (column or matched)), ""),
        descending=listing.order == "desc",
        first=first,
        total=total,
        size=SIZE,
        remember=True,
        on_sorted=sort_by,
        on_turned=lambda step: state.change(page=page + int(step)),
    )


def page() -> None:
    database = state.database()
    listing = current_listing()
    draw_filters(database, listing)
    found = listed(database, listing)
    st.caption(
        f"{len(found.features):,} of {database.n_features:,} features; densities are of {database.n_tokens:,} tokens"
    )
    if len(found.features):
        draw_list(database, listing, found)
    else:
        st.info("No feature matches. Change the search, or widen the ranges.")


page()
