"""The explorer of runs: `streamlit run app/main.py -- RUN [RUN ...]`, where RUN is a run folder or a folder of runs.

Pages only draw; every number comes from saelab. Streamlit runs this file again at each click: it finds the run that the
link names, then runs the page. Text from elsewhere is always escaped.
"""

from pathlib import Path

import streamlit as st
from explorer import llm, state
from explorer.html import STYLE

from saelab.errors import SaelabError

# A local file, because Streamlit loads its own page icons from another server.
ICON = Path(__file__).with_name("icon.svg")
LAYOUT = Path(__file__).with_name("style.css")


PAGES = {
    path: st.Page(path, title=title, icon=f":material/{icon}:", url_path=Path(path).stem)
    for path, title, icon in [
        (state.RUNS, "Runs", "stacks"),
        (state.RUN, "Run", "monitoring"),
        (state.FEATURES, "Features", "table_rows"),
        (state.FEATURE, "Feature", "center_focus_strong"),
        (state.EXPLANATIONS, "Explanations", "rate_review"),
        (state.AUDIT, "Audit", "fact_check"),
        (state.PROMPT, "Prompt", "text_fields"),
        (state.STEER, "Steer", "tune"),
        (state.COMPARE, "Compare", "compare_arrows"),
        (state.MAP, "Map", "scatter_plot"),
        (state.DEAD, "Dead features", "heart_broken"),
        (state.ATTENTION, "Attention", "account_tree"),
        (state.DARK, "Dark matter", "dark_mode"),
    ]
}


def home() -> None:
    """The bare address: continues to the feature or the run that the link names, or to the runs."""
    link = st.query_params.to_dict()
    page = state.FEATURE if "feature" in link else state.RUN if "run" in link else state.RUNS
    st.switch_page(page, query_params=link)


def draw_sidebar() -> None:
    """Links to the pages of the current run, and the choice of another run."""

    def picked() -> None:
        st.query_params.from_dict({"run": st.session_state["run_picker"]})

    with st.sidebar:
        for path, page in PAGES.items():  # Streamlit's own list of pages has links without the run
            if not state.link() or state.refusal(path) is None:
                st.page_link(path, label=page.title, icon=page.icon, query_params=state.link(), width="stretch")
        name = state.link().get("run")
        st.session_state["run_picker"] = name
        st.selectbox(
            "Run",
            list(state.runs()),
            index=None if name is None else 0,
            key="run_picker",
            placeholder="choose a run",
            on_change=picked,
        )


def draw_breadcrumb(title: str) -> None:
    """Runs / the run / the page."""
    crumbs = {state.RUNS: "Runs", state.RUN: state.run_name()}
    with st.container(horizontal=True, vertical_alignment="center", gap=None, key="breadcrumb"):
        for path, label in crumbs.items():
            st.page_link(path, label=state.plain(label), query_params=state.link())
        st.caption(title, width="content")


def main() -> None:
    st.set_page_config(page_title="saelab", page_icon=ICON, layout="wide")
    first = st.Page(home, title="saelab", default=True, visibility="hidden")
    page = st.navigation([first, *PAGES.values()], position="hidden")
    st.html(STYLE)
    st.html(LAYOUT)
    if page.url_path == first.url_path:
        return page.run()
    problems, folders = [], ()
    try:
        folders = llm.options().runs
    except SaelabError as error:
        problems.append(error)
    problems += state.find_runs(folders)
    try:
        state.pick_run(page.url_path)
    except SaelabError as error:
        problems.append(error)
    draw_sidebar()
    for problem in problems:
        state.show_error(problem)
    feature = state.value("feature", -1) if page.url_path == PAGES[state.FEATURE].url_path else -1
    state.show_title(page.title if feature < 0 else f"{page.title} {feature}")
    overview = page.url_path == PAGES[state.RUNS].url_path
    if state.link() and not overview:
        draw_breadcrumb(page.title)
    if state.link() or (overview and state.runs()):
        with state.errors_shown():
            path = next(path for path, each in PAGES.items() if each.url_path == page.url_path)
            if state.link() and (reason := state.refusal(path)):
                st.info(reason)
            else:
                page.run()


main()
