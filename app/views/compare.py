"""Two runs: their figures side by side, and which of their features are the same."""

from html import escape
from typing import NamedTuple
from urllib.parse import urlencode

import numpy as np
import streamlit as st
from explorer import charts, state
from explorer.components.pairs import draw_pairs
from explorer.components.tokens import draw_tokens, feature_names, lines_of
from explorer.explanations import draw_text
from explorer.pareto import choose_figure, draw_pareto
from explorer.similarity import command, draw_command, draw_stored

from saelab.analysis.matching import DecoderMatch
from saelab.analysis.similarity import Similarity, compare_decoders
from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.features.marks import number
from saelab.runs import folder
from saelab.runs.decoder import decoder_rows
from saelab.runs.folder import RunInfo
from saelab.runs.summary import RunSummary, summarise

FIGURES = {
    "fvu": "FVU",
    "l0": "L0, features per token",
    "delta_ce": "delta CE, nats per token",
    "kl": "KL, nats per token",
    "cosine": "Cosine",
    "loss_recovered_zero": "Loss recovered, zero ablation",
    "loss_recovered_mean": "Loss recovered, mean ablation",
    "never_active": "Never active, features",
    "never_active_share": "Never active, share",
    "n_features": "Features",
    "c_dec": "c_dec",
    "tokens": "N, evaluated tokens",
}
LISTS = {"pairs": "Pairs", "died": "Only in the first", "born": "Only in the second"}
THRESHOLDS = [0.5, 0.7, 0.9]
SORTS = ["cosine", "a", "b", "density_a", "density_b"]
SIZE = 200
MOST_WORK = 2**40  # multiply-adds; some minutes on a laptop


class Side(NamedTuple):
    """One of the two runs."""

    name: str
    run: RunInfo
    summary: RunSummary
    database: Database | None


def side(name: str) -> Side:
    run = state.run(name)
    return Side(name, run, state.read(summarise, of=run), state.database(run) if run.has_features else None)


def draw_figures(a: Side, b: Side) -> None:
    """The figures of both evaluations, and the differences."""
    first, second = (state.read(folder.evaluation, of=each.run) or {} for each in (a, b))
    missing = [each for each, found in ((a, first), (b, second)) if not found]
    for each in missing:
        path = state.code(str(each.run.path))
        st.info(f"{state.plain(each.name)} is not evaluated yet. `saelab eval {path}` evaluates it.")
    rows = []
    for name, title in FIGURES.items():
        values = [found.get(name) for found in (first, second)]
        known = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        if not known:
            continue
        texts = [figure(value) for value in values]
        texts.append(figure(known[1] - known[0], "+") if len(known) == 2 else "")
        cells = "".join(f'<td class="sl-value">{text}</td>' for text in texts)
        rows.append(f"<tr><td>{escape(title)}</td>{cells}</tr>")
    heads = "".join(f"<th>{escape(title)}</th>" for title in ("", a.name, b.name, "difference"))
    if rows:
        st.html(
            f'<table class="sl-facts sl-compare"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        )
    if first and second and first.get("tokens") != second.get("tokens"):
        st.caption("The two are evaluated on different numbers of tokens: small differences may be the text's.")


def figure(value: object, sign: str = "") -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    if value == 0:
        return "0"
    return f"{value:{sign},.0f}" if isinstance(value, int) or abs(value) >= 1e4 else f"{value:{sign}.4g}"


def draw_runs(a: Side, b: Side) -> None:
    """A figure against L0, of all runs of the same model and site."""
    runs = {name: state.read(summarise, of=run) for name, run in state.runs().items()}
    same = {name: run for name, run in runs.items() if run.same_model(a.summary) and run.site == a.summary.site}
    if sum(None not in (run.l0, run.fvu) for run in same.values()) < 2:
        return
    drawn = draw_pareto(same, choose_figure(), "pareto", dict.fromkeys(same, ""), {a.name: "first", b.name: "second"})
    left_out = len(runs) - drawn
    note = f"{drawn:,} evaluated runs of this model and site; the line joins those that no other beats"
    others = f"; {left_out:,} other run{'s are' if left_out > 1 else ' is'} not drawn" if left_out else ""
    st.caption(f"{note}{others}.")


def why_not(a: Side, b: Side) -> str | None:
    """Why the features of two runs cannot be matched, in words; None if they can."""
    first, second = a.summary, b.summary
    if not first.same_model(second):
        named = f"({first.model} and {second.model})" if first.model != second.model else f"of one name, {first.model}"
        what = f"models {named}"
    elif first.site != second.site:
        what = f"sites ({first.site} and {second.site})"
    else:
        return None
    return f"The runs are of different {what}, so their features are not matched"


@st.cache_resource(max_entries=4, show_spinner="matching decoder rows")
def matched(a: str, b: str, stamp: tuple) -> Similarity:
    first, second = decoder_rows(a), decoder_rows(b)
    work = len(first) * len(second) * first.shape[-1]
    if work > MOST_WORK:
        raise SaelabError(
            f"{len(first):,} x {len(second):,} pairs of features are too many to compare while a page waits. "
            f"`{command(a, b)}` does it, and this page shows the result."
        )
    return compare_decoders(first, second)


def chosen_list(match: DecoderMatch, shown: str, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The pairs ``[n, 2]`` of a list, and their cosines."""
    if shown == "born":
        born = match.born(threshold)
        return np.stack([match.best_of_b[born], born], 1), match.cosine_of_b[born]
    pairs = match.pairs
    if shown == "died":
        died = match.died(threshold)
        pairs = np.stack([died, match.best_of_a[died]], 1)
    return pairs, match.cosine_of_a[pairs[:, 0]]


def draw_match(a: Side, b: Side, found: Similarity) -> None:
    match, by_chance = found.match, found.one_to_one_by_chance
    threshold = st.segmented_control(
        "A feature has a counterpart from this cosine on",
        THRESHOLDS,
        **state.bound("threshold", 0.7, THRESHOLDS, clears=["page"]),
        required=True,
    )
    died, born = len(match.died(threshold)), len(match.born(threshold))
    with st.container(horizontal=True, gap="medium"):
        st.metric("Each other's best", f"{int(match.mutual.sum()):,} pairs", width="content")
        st.metric("Mean largest cosine, first to second", f"{match.mean_max_cosine:.3f}", width="content")
        st.metric("The same, second to first", f"{match.mean_max_cosine_of_b:.3f}", width="content")
        st.metric("Mean cosine of one-to-one pairs", f"{found.one_to_one.mean_cosine:.3f}", width="content")
        st.metric("Only in the first", f"{died:,} of {len(match.best_of_a):,}", width="content")
        st.metric("Only in the second", f"{born:,} of {len(match.best_of_b):,}", width="content")
    st.caption(
        f"By chance, with random directions of the same mean and covariance in the place of the other run's rows: "
        f"{found.cosine_of_a_by_chance.mean():.3f}, {found.cosine_of_b_by_chance.mean():.3f} and "
        f"{by_chance.mean_cosine:.3f}. {100 * found.one_to_one.share(threshold):.3g}% of the smaller run's features "
        f"have a partner of at least {threshold:g}, by chance {100 * by_chance.share(threshold):.3g}%."
    )
    with st.expander("Distribution of the largest cosines"):
        plotted = match.plot("first", "second")
        plotted.update_layout(colorway=[charts.COLOUR, "rgb(70, 130, 210)"])
        charts.draw(charts.compact(plotted, 240).update_layout(showlegend=True), "cosines", "Histogram of cosines")
    shown = st.segmented_control(
        "List",
        list(LISTS),
        **state.bound("list", "pairs", list(LISTS), clears=["page", "a", "b"]),
        format_func=lambda name: LISTS[name],
        required=True,
        label_visibility="collapsed",
    )
    pairs, cosines = chosen_list(match, shown, threshold)
    if not len(pairs):
        st.info("There are none at this cosine.")
        return
    draw_list(a, b, pairs, cosines, descending=shown == "pairs")


def draw_list(a: Side, b: Side, pairs: np.ndarray, cosines: np.ndarray, descending: bool) -> None:
    """The chosen pair in both panes, and the list to choose from."""
    sort = state.value("sort", "cosine", SORTS)
    descending = state.value("order", "desc" if descending else "asc", ["asc", "desc"]) == "desc"
    keys = {"cosine": lambda: cosines, "a": lambda: pairs[:, 0], "b": lambda: pairs[:, 1]}
    for each, key, column in ((a, "density_a", 0), (b, "density_b", 1)):
        if each.database is not None:
            keys[key] = lambda table=each.database.table, column=column: table["n_active"][pairs[:, column]]
    values = np.asarray(keys.get(sort, keys["cosine"])())
    order = np.argsort(-values if descending else values, kind="stable")
    page = min(state.value("page", 1, limits=(1, 1e9)), -(-len(pairs) // SIZE))
    rows = order[(page - 1) * SIZE : page * SIZE]
    n_a, n_b = a.summary.n_features or 0, b.summary.n_features or 0
    pair = state.value("a", -1, limits=(0, n_a - 1)), state.value("b", -1, limits=(0, n_b - 1))
    if min(pair) < 0:
        first = pairs[rows[0]].tolist()
        pair = first[0], first[1]
    draw_panes(a, b, pair)

    def sort_by(name: str) -> None:
        again = name == sort
        turned = not descending if again else name == "cosine"
        state.change(sort=name, order="desc" if turned else "asc", page=None)

    draw_pairs(
        a.database,
        b.database,
        pairs[rows],
        cosines[rows],
        key="pair_rows",
        names=(a.name, b.name),
        chosen=pair,
        sort=sort,
        descending=descending,
        first=(page - 1) * SIZE,
        total=len(pairs),
        size=SIZE,
        on_opened=lambda opened: state.change(a=opened[0], b=opened[1]),
        on_sorted=sort_by,
        on_turned=lambda step: state.change(page=page + step),
    )


def draw_panes(a: Side, b: Side, pair: tuple[int, int]) -> None:
    """The strongest examples of both features of a pair, side by side."""
    columns = st.columns(2, gap="large")
    for column, each, feature, key in zip(columns, (a, b), pair, ("tokens_a", "tokens_b"), strict=True):
        with column, st.container(border=True):
            query = {"run": each.name, "feature": str(feature)}
            st.page_link(state.FEATURE, label=f"**Feature {feature}** of {state.plain(each.name)}", query_params=query)
            if each.database is None:
                st.caption("This run has no feature database.")
                continue
            found = each.database.feature(feature)
            draw_text(each.database, feature)
            st.caption(f"density {100 * found.density:.3g}%, largest activation {number(found.maximum)}")
            if found.never_active:
                continue
            draw_tokens(
                lines_of(each.database, feature, each.database.examples(feature, n=6, window=20)),
                key=key,
                strongest=found.usual_maximum,
                link=f"feature?{urlencode({'run': each.name})}&feature=",
                names=feature_names(each.database),
                legend=False,
            )


def page() -> None:
    others = [name for name in state.runs() if name != state.run_name()]
    st.header("Compare", anchor=False)
    if not others:
        st.info("There is no other run here to compare with.")
        return
    named = st.query_params.get("other")
    if named is not None and named not in others:
        state.run(named)  # raises SaelabError if there is no such run; otherwise the two are the same
    found = {name: state.read(summarise, of=state.run(name)) for name in (state.run_name(), *others)}
    own = found.pop(state.run_name())
    first = next((name for name, run in found.items() if own.same_model(run) and own.site == run.site), others[0])
    other = st.selectbox("with", others, **state.bound("other", first, others, clears=["a", "b", "page"]), width=360)
    a, b = side(state.run_name()), side(other)
    st.caption(f"First: {state.plain(a.name)}; second: {state.plain(b.name)}; differences are second minus first.")
    left, right = st.columns(2, gap="large")
    with left:
        draw_figures(a, b)
    with right:
        draw_runs(a, b)
    st.subheader("The same features", anchor=False)
    analysed = "crosscoder" not in (a.summary.kind, b.summary.kind)  # which `saelab analyse RUN similarity` refuses
    reason = why_not(a, b)
    if reason:
        st.info(state.plain(f"{reason}. Figures of different activations do not compare either."))
        if a.summary.same_model(b.summary) and analysed:
            draw_stored(a.name, b.name)
            draw_command(a.name, b.name)
        return
    found = draw_stored(a.name, b.name)
    if found is None:
        weights = [folder.weights(each.run.path) for each in (a, b)]
        found = matched(str(a.run.path), str(b.run.path), state.stamp(weights))
    draw_match(a, b, found)
    if analysed:
        draw_command(a.name, b.name)


page()
