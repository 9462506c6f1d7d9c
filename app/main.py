"""The explorer of runs: `streamlit run app/main.py -- RUN [RUN ...]`, run folders or folders that hold them.

Pages only draw; every number comes from `saelab.features`. This file is run anew at each click: it finds the run that
the link or the sidebar names, then runs the page. Text that is not ours is escaped wherever it is shown.
"""

import sys
from pathlib import Path

import streamlit as st
from explorer import state
from explorer.html import STYLE

from saelab.errors import SaelabError

# A file: Streamlit's own icons for this place come from another server.
ICON = Path(__file__).with_name("icon.svg")


def home() -> None:
    """The bare address: on to the feature that the link names, if it names one, else to the overview."""
    wanted = st.query_params.to_dict()
    st.switch_page(state.FEATURE if "feature" in wanted else state.OVERVIEW, query_params=wanted)


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
            st.query_params.pop("feature", None)  # going back in the browser may have left it
        page.run()
    except SaelabError as error:
        state.show_error(error)


main()
