"""A run: its evaluation, its training, which it follows, and how densities and active features are spread."""

import time
from html import escape

import numpy as np
import streamlit as st
from explorer import charts, state
from explorer.components.histogram import draw_histogram
from explorer.components.leave import leave_for
from explorer.components.rows import Column, Row, draw_rows
from explorer.components.tokens import with_row
from explorer.evaluation import draw_evaluation, shown
from explorer.html import facts_html
from explorer.listing import Listing, feature_address, version

from saelab.features.database import Database
from saelab.features.densities import density_histogram, rank_frequency
from saelab.features.layout import EARLIER
from saelab.features.marks import number, visible
from saelab.features.per_token import PerToken, active_per_token
from saelab.runs import folder

VIEWS = {"overview": "Overview", "dead": "Dead and under-used", "allocation": "Active features per token"}
CURVES = {
    "fvu": "FVU of the batch",
    "l0": "L0, active features per token",
    "dead": "Dead features (in training)",
    "aux": "Auxiliary loss",
    "targets": "Features targeted by the auxiliary loss",
    "share_reached": "Share of targeted features with a gradient",
    "multi_topk": "FVU of the batch with four times the budget",
    "l1": "L1 penalty, before its weight",
    "lr": "Learning rate",
    "gradient_norm": "Norm of the gradient",
    "tokens_per_second": "Tokens per second",
}
# Streamlit shows texts that stand alone in a page's file, so these have comments.
FOLLOWED_FOR = 300  # seconds after the last change of a file of the training
ENOUGH_TOKENS = 300_000  # with fewer, "never active" says little
LONGEST = 40  # characters shown of a token in a line of text
UNDER_USED = [1e-5, 1e-4, 1e-3]
AT_ONCE = 50
COLUMNS = [
    Column("id", "feature"),
    Column("density", "density"),
    Column("maximum", "max"),
    Column("tokens", "promotes / active on"),
]


def followed() -> bool:
    """Whether the run is still training: its record is not complete, and its files change."""
    path = state.current_run().path
    if not folder.unfinished(path):
        return False
    files = [file for file in (path / folder.METRICS, path / folder.TRAINING) if file.is_file()]
    return time.time() - max(file.stat().st_mtime for file in files) < FOLLOWED_FOR


def draw_training() -> None:
    metrics = state.read(folder.metrics)
    x = next((name for name in ("tokens", "step") if name in metrics), None)
    if x is None:
        st.info("No training metrics were logged.")
        return
    names = [name for name in CURVES if name in metrics]
    names += [name for name in metrics if name not in CURVES and name not in ("tokens", "step")]
    values = {name: metrics[name].dropna().unique().tolist() for name in names}
    constant = {name: found[0] for name, found in values.items() if len(found) == 1}
    names = [name for name, found in values.items() if len(found) > 1]
    for start in range(0, len(names), 3):
        for column, name in zip(st.columns(3, gap="medium"), names[start : start + 3], strict=False):
            with column:
                title = CURVES.get(name, name)
                charts.draw(charts.curve(metrics, x, name, title), f"curve-{name}", f"{title} over training")
    if constant:
        said = ", ".join(f"{CURVES.get(name, name)} {shown(value)}" for name, value in constant.items())
        st.caption(state.plain(f"Constant: {said}."))


def draw_origin(origin: dict) -> None:
    """Where an adopted autoencoder comes from, in place of a training log."""
    trained = origin.get("trained_on")
    trained = trained if isinstance(trained, dict) else {}
    st.caption("Another trainer made this autoencoder, and `saelab adopt` a run of it: there is no training log.")
    said = {
        "model_name": "Trained on the model",
        "hook_name": "Trained at the site",
        "dataset_path": "Trained on the text",
        "context_size": "Tokens per row in training",
    }
    source = "by the checkpoint's metadata"
    rows = [("Adopted from", str(origin.get("from")), "", ""), ("Written by", str(origin.get("trainer")), "", "")]
    rows += [(title, str(trained[name]), "", source) for name, title in said.items() if name in trained]
    rows.append(("SHA-256 of its weights", str(origin.get("sha256")), "", ""))
    with st.container(key="origin"):
        st.html(facts_html(rows))


@state.errors_shown()
def draw_progress(live: bool) -> None:
    """The curves of the training, and if it is not finished, how far it is; drawn again every few seconds if `live`."""
    run = state.current_run()
    if live and not followed():
        st.rerun()  # the training ended: the whole page has more to show
    unfinished = state.read(folder.unfinished)
    if unfinished and live:
        metrics = state.read(folder.metrics)
        tokens = f"{int(metrics['tokens'].iloc[-1]):,}" if "tokens" in metrics and len(metrics) else "0"
        planned = folder.training_record(run.path).get("planned_tokens")
        of = f" of {planned:,}" if isinstance(planned, int) else ""
        st.info(f"Training: {tokens}{of} tokens. This page follows it.", icon=":material/progress_activity:")
    elif unfinished:
        goes_on = f"`saelab train --resume {state.code(str(run.path))}` goes on with it."
        st.warning(f"{unfinished[0].upper()}{unfinished[1:]}. {goes_on}", icon=":material/warning:")
    origin = state.read(folder.adopted)
    st.subheader("Training" if origin is None else "Origin", anchor=False)
    if origin is None:
        draw_training()
    else:
        draw_origin(origin)


def open_features(low: float, high: float) -> None:
    """Open the features whose density lies from `low` up to `high`; for callbacks, too."""
    st.session_state["opening"] = (low, high)


def draw_densities(database: Database) -> None:
    density = database.table["density"]
    edges, counts = density_histogram(density)
    # the ends are rounded outwards, so that every feature of a bar is in its range
    low, high = 10 ** (edges[:-1] - 1e-9), np.minimum(10 ** (edges[1:] + 1e-9), 1)
    left, right = st.columns(2, gap="large")
    with left:
        draw_histogram(
            counts,
            10**edges,
            key="densities",
            title="Features by density",
            noun="features",
            on_chosen=lambda bins: open_features(low[bins[0]], high[bins[1]]) if bins else None,
        )
    with right:
        ranks, densities = rank_frequency(density)
        figure = charts.ranks(ranks, densities, "rank of the feature", "density")
        figure.update_traces(customdata=densities)
        selection = charts.draw_selectable(figure, "ranks", "Density of the features by rank, log-log")
        chosen = [point["customdata"] for point in selection["points"]]
        if chosen:
            open_features(min(chosen), max(chosen))
    if "opening" in st.session_state:
        ends = tuple(float(f"{end:.12g}") for end in st.session_state.pop("opening"))
        leave_for(state.FEATURES, state.link(density=ends))
    st.caption(
        f"Density: the share of {database.n_tokens:,} held-out tokens on which a feature is active. Drag across a "
        "chart to open those features."
    )


def draw_features(database: Database, features: np.ndarray, columns: list[Column], name: str) -> None:
    """A table of features, some at a time; NAME_page of the link is the number of the page."""
    parameter = f"{name}_page"
    page = min(state.value(parameter, 1, limits=(1, 1e9)), -(-len(features) // AT_ONCE))
    first = (page - 1) * AT_ONCE
    draw_rows(
        database,
        [Row(feature) for feature in features[first : first + AT_ONCE].tolist()],
        columns,
        key=f"{name}_rows",
        link=feature_address(Listing()),
        first=first,
        total=len(features),
        size=AT_ONCE if len(features) > AT_ONCE else 0,
        on_turned=lambda step: state.change(**{parameter: page + int(step)}),
    )


def draw_dead(database: Database) -> None:
    """Never active and under-used features."""
    n_active = database.table["n_active"]
    dead = np.flatnonzero(n_active == 0)
    st.subheader(f"{len(dead):,} of {database.n_features:,} features are never active", anchor=False)
    caution = ""
    if database.n_tokens < ENOUGH_TOKENS:
        caution = f" These are few tokens: on {ENOUGH_TOKENS:,} or more, some of them may be active."
    st.caption(f"On none of {database.n_tokens:,} held-out tokens, in inference mode.{caution}")
    st.page_link(state.DEAD, label="Why they are dead", query_params=state.link())
    if len(dead):
        with st.container(width=640):
            draw_features(database, dead, [Column("id", "feature"), Column("tokens", "promotes")], "dead")
    below = st.selectbox(
        "Under-used: density below",
        UNDER_USED,
        **state.bound("below", UNDER_USED[1], UNDER_USED, clears=["under_page"]),
        format_func=lambda density: f"{density:g}",
        width=220,
    )
    density = database.table["density"]
    rare = np.flatnonzero((n_active > 0) & (density < below))
    rare = rare[np.argsort(density[rare], kind="stable")]
    st.subheader(f"{len(rare):,} features are active, but on less than {below:g} of the tokens", anchor=False)
    if len(rare):
        with st.container(width=800):
            draw_features(database, rare, COLUMNS, "under")


def draw_allocation(database: Database) -> None:
    """How many features are active on each token, and where they are most."""
    found = per_token(database)
    if found.constant:
        st.info(
            f"Every one of the {database.n_tokens:,} ordinary tokens has {number(found.mean)} active features: this "
            "autoencoder gives each token the same number, so there is nothing to compare between tokens."
        )
        return
    first, last = np.flatnonzero(found.counts)[[0, -1]]
    group = -(-int(last - first + 1) // 100)
    counts = np.add.reduceat(found.counts[first : last + 1], np.arange(0, last - first + 1, group))
    lowest = first + group * np.arange(len(counts))
    st.caption(
        f"Active features on each of {database.n_tokens:,} ordinary tokens: {number(found.mean)} on average (L0), from "
        f"{first:,} to {last:,}."
    )
    hover = "%{x}: %{y:,} tokens" if group == 1 else f"%{{x}} ± {(group - 1) / 2:g}: %{{y:,}} tokens"
    figure = charts.bars(lowest + (group - 1) / 2, counts, group, "active features on a token", "tokens", hover)
    charts.draw(figure, "l0", "Histogram of the number of active features per token")
    st.subheader("Tokens by their mean number of active features", anchor=False)
    vocabulary = database.vocabulary
    common = np.flatnonzero(vocabulary.counts >= max(10, database.n_tokens // 10_000))
    common = common[np.argsort(-found.by_id[common], kind="stable")]
    left, right = st.columns(2, gap="large")
    for column, title, ids in ((left, "most", common[:15]), (right, "fewest", common[::-1][:15])):
        rows = [
            (
                shortened(vocabulary.text(int(token))),
                number(float(found.by_id[token])),
                f"{vocabulary.counts[token]:,} times",
                "",
            )
            for token in ids
        ]
        with column:
            st.caption(title)
            st.html(facts_html(rows))
    st.subheader("Single tokens with the most active features", anchor=False)
    st.html(hardest(database, found))


def hardest(database: Database, found: PerToken) -> str:
    """The places with the most active features in their text, as HTML."""
    rows, context, lines = database.facts.rows, database.facts.rows.shape[1], []
    for place, l0 in zip(found.hardest.tolist(), found.hardest_l0.tolist(), strict=True):
        row, position = divmod(place, context)
        start = max(0, position - 12)
        window = with_row(database, row, database.vocabulary.window(rows[row, start : position + 6]))
        texts = [shortened(text) for text in window]
        at = position - start
        text = f"{escape(''.join(texts[:at]))}<mark>{escape(texts[at])}</mark>{escape(''.join(texts[at + 1 :]))}"
        lines.append(
            f'<tr><td class="sl-value">{l0:,}</td><td class="sl-snippet">{text}</td>'
            f'<td class="sl-dim">row {database.first_row + row}, token {position}</td></tr>'
        )
    return f'<table class="sl-facts"><tbody>{"".join(lines)}</tbody></table>'


def shortened(token: str) -> str:
    return visible(token if len(token) <= LONGEST else f"{token[:LONGEST]}…")


def per_token(database: Database) -> PerToken:
    return _per_token(database, version(database))


@st.cache_resource(max_entries=4, show_spinner="counting active features")
def _per_token(_database: Database, version: tuple) -> PerToken:
    return active_per_token(_database.facts, _database.vocabulary)


def draw_overview(database: Database | None) -> None:
    with state.errors_shown():
        draw_evaluation()
    if database is not None:
        st.subheader("Densities", anchor=False)
        with state.errors_shown():
            draw_densities(database)
    live = followed()
    st.fragment(draw_progress, run_every=5 if live else None)(live)
    with st.expander("Settings, with defaults and overrides (config.yaml)"), state.errors_shown():
        st.code(state.read(folder.settings_text), language="yaml")


def page() -> None:
    run = state.current_run()
    st.header(state.plain(state.run_name()), anchor=False)
    database = None
    earlier = any((folder.features(run.path) / name).exists() for name in EARLIER)
    if run.has_features or earlier:  # of an earlier format: the error says so
        with state.errors_shown():
            database = state.database()
    else:
        st.info(f"No features yet. `saelab index {state.code(str(run.path))}` makes them.")
    if database is None:
        return draw_overview(None)
    width = database.arrays.manifest["d_in"]
    st.caption(state.plain(f"{database.n_features:,} features of {database.site} ({width} wide) of {database.origin}"))
    view = st.segmented_control(
        "View",
        list(VIEWS),
        **state.bound("view", "overview", list(VIEWS)),
        format_func=lambda name: VIEWS[name],
        required=True,
        label_visibility="collapsed",
    )
    if view == "dead":
        draw_dead(database)
    elif view == "allocation":
        draw_allocation(database)
    else:
        draw_overview(database)


page()
