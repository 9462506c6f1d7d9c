"""The features of a run: search, filter and sort them; each row opens one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import streamlit as st
from explorer import explanations, state
from explorer.components.histogram import draw_histogram
from explorer.components.rows import NUMBER, Column, Row, draw_rows
from explorer.listing import SHOWN, SIZE, Listed, Listing, current_listing, feature_address, listed, shares_at, version

from saelab.autointerp.overview import Overview
from saelab.autointerp.tables import table_of
from saelab.features.database import Database
from saelab.features.search import Found, Match, match_of

HELP = r"""Features that are active on this text, those with most of their activation on it first.

- `import numpy`: text in any case, also across tokens; ␣ is a space and ↵ a line break
- `/def \w+/`: a regular expression, in this case
- `token:import`: a token that is this text
- `promotes:import`: tokens that the feature makes more likely
- `id:7,12,40-50`: features by index
- `explanation:import`: features whose explanation has this text, in any case"""
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
ACTIVE_ON = Column("tokens", "active on", False, "tokens with most of its activation")
"""The column of tokens if there are no logits."""
SCORE = Column("score", "match", True, "share of its activation that lies on the match; for promotes:, the logit")
# The column of the database that each column sorts by; "" is the order of the query.
EXPLAINED = Column("text", "explanation and example", False, "the latest explanation; and an example")
SORTS = {"id": "feature", "density": "density", "maximum": "maximum", "score": ""}


BETWEEN = "|"
"""Between the labels of scores in the link."""


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
            placeholder="text, /regex/, token:, id:"
            if database.of_array
            else "text, /regex/, token:, promotes:, id:, explanation:",
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


def draw_scores_shown(explained: Overview) -> list[str]:
    """The choice of the scores that have a column; returns their labels."""
    labels = list(explained.columns)
    if not labels:
        return []
    shown = [label for label in state.value("scores", labels[0]).split(BETWEEN) if label in labels]
    st.session_state["scores_shown"] = shown

    def chosen() -> None:
        names = BETWEEN.join(st.session_state["scores_shown"])
        state.change(scores=None if names == labels[0] else names)

    st.pills(
        "Scores",
        labels,
        selection_mode="multi",
        format_func=state.plain,
        key="scores_shown",
        on_change=chosen,
        help="of the latest explanation, with that of its shuffled control below",
    )
    return shown


def site_columns(shares: Iterable[str]) -> list[Column]:
    """A column for each site of a crosscoder but the first."""
    why = "in the length of the decoder row, in the units of training: 1 if it is at this site alone"
    return [Column(NUMBER + site, f"site {i}", True, f"share of {site} {why}") for i, site in enumerate(shares, 2)]


def score_columns(explained: Overview, labels: Sequence[str]) -> list[Column]:
    """A column for each of the chosen scores, named by the score, and by the judge if two have the same name."""
    names = {measure.label: measure.score for measure in explained.measures}
    several = [name for name in names.values() if [*names.values()].count(name) > 1]
    return [
        Column(
            NUMBER + label,
            label if names[label] in several else names[label],
            True,
            f"{label}, of the latest explanation; below it, of its shuffled control",
        )
        for label in labels
    ]


def numbers_of(explained: Overview, labels: Sequence[str], feature: int) -> dict[str, tuple[str, str]]:
    """The cells of a feature's scores."""
    values = {label: [float(line[feature]) for line in explained.columns[label]] for label in labels}
    return {
        NUMBER + label: (f"{own:.2f}", f"{control:.2f} shuffled" if np.isfinite(control) else "")
        for label, (own, control) in values.items()
        if np.isfinite(own)
    }


def rows_of(
    database: Database,
    found: Found | None,
    features: np.ndarray,
    labels: Sequence[str],
    shares: Mapping[str, np.ndarray],
) -> list[Row]:
    """The rows of some features of the list: where each matches the query, or else is most active; its share at the
    sites of a crosscoder, and its scores."""
    explained = explanations.known(database)
    scored = found if has_scores(found) else None
    numbers: dict[int, int] = {}
    if scored:
        at = np.flatnonzero(np.isin(scored.features, features)).tolist()
        numbers = dict(zip(scored.features[at].tolist(), at, strict=True))

    def row(feature: int, top: int) -> Row:
        strongest = Match(top, top, top) if top >= 0 else None
        own = {NUMBER + site: (f"{share[feature]:.3f}", "") for site, share in shares.items()}
        own |= numbers_of(explained, labels, feature)
        if scored is None:
            return Row(feature, strongest, numbers=own)
        number = numbers[feature]
        match = match_of(database.facts, scored, number) or strongest
        return Row(feature, match, score(scored, number), numbers=own)

    top = database.table["top_places"][features, 0].tolist() if len(features) else []
    return [row(*each) for each in zip(features.tolist(), top, strict=True)]


def has_scores(found: Found | None) -> bool:
    return found is not None and (found.shares is not None or found.logits is not None)


def score(found: Found, number: int) -> str:
    """The share of a feature's activation that lies on the match, or the logit of the match."""
    if found.shares is not None:
        return f"{100 * found.shares[number]:.3g}%"
    return f"{found.logits[number]:+.2f}" if found.logits is not None else ""


def draw_list(database: Database, listing: Listing, found: Listed, labels: Sequence[str]) -> None:
    total = len(found.features)
    page = min(state.value("page", 1, limits=(1, 1e9)), max(1, -(-total // SIZE)))
    first = (page - 1) * SIZE
    matched = has_scores(found.found)
    explained = explanations.known(database)
    columns = [*COLUMNS[:1], SCORE, *COLUMNS[1:]] if matched else [*COLUMNS]
    shares = shares_at(database)
    columns[-2:-2] = [*site_columns(shares), *score_columns(explained, labels)]
    left_out = ["bars", "tokens"][: max(0, len(labels) - 1)]  # so that the explanation keeps its room
    columns = [column for column in columns if column.key not in left_out]
    if explained.latest:
        columns[-1] = EXPLAINED
    if database.lens is None:
        columns = [ACTIVE_ON if column.key == "tokens" else column for column in columns]

    sorts = SORTS | {NUMBER + label: label for label in (*shares, *labels)}

    def sort_by(key: str) -> None:
        sort = sorts.get(key, "")
        again = sort == listing.sort
        rising = listing.order == "desc" if again else sort == "feature"
        state.change(sort=sort or None, order="asc" if sort and rising else None, page=None)

    draw_rows(
        database,
        rows_of(database, found.found, found.features[first : first + SIZE], labels, shares),
        columns,
        key="rows",
        link=feature_address(listing),
        sort=next((key for key, column in sorts.items() if column == listing.sort and (column or matched)), ""),
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
    explanations.draw_problem(database)
    explained = explanations.known(database)
    labels = draw_scores_shown(explained)
    found = listed(database, listing)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(
            f"{len(found.features):,} of {database.n_features:,} features"
            f"{'' if database.of_array else f', {len(explained.latest):,} explained'}; "
            f"densities are of {database.n_tokens:,} tokens"
        )
        st.download_button(
            "CSV",
            lambda: table_of(database, found.features, explained),
            "features.csv",
            "text/csv",
            on_click="ignore",
            icon=":material/download:",
            help="all features of this list, in this order, with their explanations and all scores",
        )
    if len(found.features):
        draw_list(database, listing, found, labels)
    else:
        st.info("No feature matches. Change the search, or widen the ranges.")


page()
