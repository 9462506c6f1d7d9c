"""The runs: a card per run or sweep, sorted, and two ticked runs to compare."""

import math
from datetime import datetime
from html import escape

import streamlit as st
from explorer import state
from explorer.components.leave import leave_for
from explorer.pareto import choose_figure
from explorer.sweeps import draw_sweep, sweeps_of

from saelab.features.marks import number
from saelab.runs.summary import RunSummary, summarise

AT_ONCE = 100
# Figures from the lowest on, the newest and the largest first.
SORTS = {
    "newest": lambda name, run: -run.trained,
    "name": lambda name, run: name,
    "FVU": lambda name, run: unknown_last(run.fvu),
    "delta CE": lambda name, run: unknown_last(run.delta_ce),
    "L0": lambda name, run: unknown_last(run.l0),
    "dead": lambda name, run: unknown_last(run.never_active),
    "size": lambda name, run: -run.bytes,
}


def unknown_last(value: float | None) -> float:
    return math.inf if value is None else value


def size(n_bytes: float) -> str:
    """Bytes in words: "1.2 GB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while n_bytes >= 1000 and len(units) > 1:
        n_bytes /= 1000
        units.pop(0)
    return f"{n_bytes:.3g} {units[0]}"


def sparkline(curve: tuple[float, ...]) -> str:
    """The curve as a small filled drawing, with its first and last value in words."""
    low, high = min(curve), max(curve)
    across, up = 100 / (len(curve) - 1), 90 / ((high - low) or 1.0)
    points = ",".join(f"{i * across:.1f}% {95 - (value - low) * up:.1f}%" for i, value in enumerate(curve))
    words = f"FVU over training, from {number(curve[0])} to {number(curve[-1])}"
    shape = f"polygon(0% 100%,{points},100% 100%)"
    return f'<div class="sl-spark" role="img" aria-label="{words}" style="clip-path: {shape}"></div>'


def figures(run: RunSummary) -> str:
    """The figures of a card, as HTML."""

    def shown(value: float | None) -> str:
        return "–" if value is None else number(value)

    share = ""
    if run.never_active is not None and run.n_features:
        share = f" ({100 * run.never_active / run.n_features:.1f}%)"
    dead = f"{run.never_active:,}{share}" if run.never_active is not None else "–"
    on = f"dead on {run.tokens:,} tokens" if run.tokens is not None else "dead"
    facts = [
        (shown(run.fvu), "FVU"),
        (shown(run.delta_ce), "delta CE, nats"),
        (shown(run.l0), "L0"),
        (dead, on),
        (f"{run.n_features:,}" if run.n_features is not None else "–", "features"),
        (size(run.bytes), "on disk"),
        (f"{datetime.fromtimestamp(run.trained):%Y-%m-%d %H:%M}", "adopted" if run.adopted else "trained"),
    ]
    drawn = [f"<div><b>{escape(value)}</b><span>{escape(title)}</span></div>" for value, title in facts]
    if len(run.curve) > 1:
        drawn.append(f"<div>{sparkline(run.curve)}<span>FVU over training</span></div>")
    where = " · ".join(text for text in (run.model, run.site) if text)
    return f'<div class="sl-note">{escape(where)}</div><div class="sl-figures">{"".join(drawn)}</div>'


def tick(name: str, ticked: str) -> None:
    """Remember the first ticked run in the link, and the pair once there is a second one."""
    if ticked and ticked != name:
        st.session_state["pair"] = {"run": ticked, "other": name}
        state.change(tick=None)
    else:
        state.change(tick=name if st.session_state[f"tick-{name}"] else None)


def draw_card(name: str, run: RunSummary, ticked: str) -> None:
    with st.container(border=True, gap="small"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.page_link(
                state.RUN, label=f"**{state.plain(name)}**", query_params=state.link() | {"run": name}, width="stretch"
            )
            st.session_state[f"tick-{name}"] = name == ticked
            st.checkbox("compare", key=f"tick-{name}", on_change=tick, args=(name, ticked), width="content")
        st.html(figures(run))
        if run.unfinished:
            st.caption(state.plain(f"{run.unfinished[0].upper()}{run.unfinished[1:]}."))
        if run.problem:
            st.warning(state.plain(run.problem), icon=":material/warning:")


def page() -> None:
    if "pair" in st.session_state:
        leave_for(state.COMPARE, st.session_state.pop("pair"))
    runs = state.runs()
    found = {name: state.read(summarise, of=run) for name, run in runs.items()}
    sweeps = {str(sweep.path): sweep for sweep in sweeps_of(runs)}  # a run may have the name of a sweep
    figure = "fvu"
    with st.container(horizontal=True, vertical_alignment="bottom"):
        counted = f"{len(found):,} run{'s' * (len(found) != 1)}"
        st.header(counted + (f", {len(sweeps):,} sweep{'s' * (len(sweeps) != 1)}" if sweeps else ""), anchor=False)
        if sweeps:
            figure = choose_figure()
        order = st.selectbox("Sort by", list(SORTS), **state.bound("sort", "newest", list(SORTS)), width=160)
    ticked = state.value("tick", "", list(found))
    if ticked:
        st.info(f"Tick a second run to compare it with {state.plain(ticked)}.")
    key = SORTS[order]
    # A sweep stands where its first run would.
    grouped = {name for sweep in sweeps.values() for name in sweep.names.values()}
    groups = {name: [name] for name in found if name not in grouped}
    groups |= {name: list(sweep.names.values()) for name, sweep in sweeps.items()}
    names = sorted(
        groups, key=lambda group: min(((key(name, found[name]), name) for name in groups[group]), default=())
    )
    pages = -(-len(names) // AT_ONCE)
    shown = 1
    if pages > 1:
        shown = st.number_input(f"Page, of {pages}", 1, pages, **state.bound("page", 1, limits=(1, pages)), width=160)
    for name in names[(shown - 1) * AT_ONCE : shown * AT_ONCE]:
        if name in sweeps:
            draw_sweep(sweeps[name], found, key, figure, ticked)
        else:
            draw_card(name, found[name], ticked)


page()
