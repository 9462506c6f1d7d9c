"""The explorer of runs: `streamlit run app/main.py -- RUN [RUN ...]`, where RUN is a run folder or a folder of runs.

Pages only draw; every number comes from `saelab.features`. Streamlit runs this file again at each click: it finds the
run that the link or the sidebar names, then runs the page. Text from elsewhere is always escaped.
"""

import sys
from pathlib import Path

import streamlit as st
from explorer import state
from explorer.html import STYLE

from saelab.errors import SaelabError

# A local file, because Streamlit loads its own page icons from another server.
ICON = Path(__file__).with_name("icon.svg")


PAGES = [
    st.Page(state.RUNS, title="Runs", icon=":material/stacks:", url_path="runs"),
    st.Page(state.RUN, title="Run", icon=":material/monitoring:", url_path="run"),
    st.Page(state.FEATURES, title="Features", icon=":material/table_rows:", url_path="features"),
    st.Page(state.FEATURE, title="Feature", icon=":material/center_focus_strong:", url_path="feature"),
    st.Page(state.PROMPT, title="Prompt", icon=":material/text_fields:", url_path="prompt"),
    st.Page(state.STEER, title="Steer", icon=":material/tune:", url_path="steer"),
    st.Page(state.COMPARE, title="Compare", icon=":material/compare_arrows:", url_path="compare"),
    st.Page(state.MAP, title="Map", icon=":material/scatter_plot:", url_path="map"),
]


def home() -> None:
    """The bare address: continues to the feature or the run that the link names, or to the runs."""
    link = st.query_params.to_dict()
    page = state.FEATURE if "feature" in link else state.RUN if "run" in link else state.RUNS
    st.switch_page(page, query_params=link)


def main() -> None:
    st.set_page_config(page_title="saelab", page_icon=ICON, layout="wide")
    page = st.navigation([st.Page(home, title="saelab", default=True, visibility="hidden"), *PAGES])
    st.html(STYLE)
    try:
        state.pick_run(sys.argv[1:] or ["runs"])
        page.run()
    except SaelabError as error:
        state.show_error(error)


main()
