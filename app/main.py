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


def home() -> None:
    """The bare address: continues to the feature that the link names, or to the overview."""
    link = st.query_params.to_dict()
    st.switch_page(state.FEATURE if "feature" in link else state.OVERVIEW, query_params=link)


def main() -> None:
    st.set_page_config(page_title="saelab", page_icon=ICON, layout="wide")
    page = st.navigation(
        [
            st.Page(home, title="saelab", default=True, visibility="hidden"),
            st.Page(state.OVERVIEW, title="Overview", icon=":material/monitoring:", url_path="overview"),
            st.Page(state.FEATURES, title="Features", icon=":material/table_rows:", url_path="features"),
            st.Page(state.FEATURE, title="Feature", icon=":material/center_focus_strong:", url_path="feature"),
        ]
    )
    st.html(STYLE)
    try:
        state.keep_filters()
        state.pick_run(sys.argv[1:] or ["runs"])
        if page.url_path in ("overview", "features"):
            st.query_params.pop("feature", None)  # the browser's back button may have left it there
        page.run()
    except SaelabError as error:
        state.show_error(error)


main()
