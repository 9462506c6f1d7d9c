"""The current run and feature, which the link names (`?run=..&feature=..`), and reading their data.

The link decides. Anything that changes the run or the feature writes it to the link, and pages read it from there.
The session remembers the last run and feature for links that name none, such as those in the sidebar.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import streamlit as st

from saelab.errors import SaelabError
from saelab.features.database import Database, open_database
from saelab.features.layout import MANIFEST
from saelab.runs import folder
from saelab.runs.folder import RunInfo

# Not in a folder named "pages": with one, a new server runs the page that a link names without running main.py.
RUNS, RUN, FEATURES, FEATURE = "views/runs.py", "views/run.py", "views/features.py", "views/feature.py"
PROMPT, STEER, COMPARE, MAP = "views/prompt.py", "views/steer.py", "views/compare.py", "views/map.py"

T = TypeVar("T")


def pick_run(folders: Sequence[str]) -> None:
    """Draw the picker and make the run that the link names the current one. Raises SaelabError if there is none."""
    runs, problems = _find_runs(folders)
    if not runs:
        nothing = SaelabError(
            f"There is no run in {', '.join(folders)}. A finished run is a folder that contains {folder.TRAINING}; "
            "`saelab train quickstart` makes one."
        )
        raise problems[0] if problems else nothing
    remembered = st.session_state.get("run_name")
    name = st.query_params.get("run", remembered if remembered in runs else _latest(runs))
    known = name in runs
    if known:
        st.session_state["run_picker"] = name
    else:
        st.session_state.pop("run_picker", None)
    with st.sidebar:
        st.selectbox(
            "Run",
            list(runs),
            index=0 if known else None,
            placeholder="choose a run",
            key="run_picker",
            on_change=_picked,
        )
        for problem in problems:
            show_error(problem)
    if not known:
        raise SaelabError(f"There is no run {name!r} here. Choose one in the sidebar: {_some(list(runs))}.")
    st.session_state["run_name"], st.session_state["run"] = name, runs[name]
    st.query_params["run"] = name


def current_run() -> RunInfo:
    return st.session_state["run"]


def current_feature(n_features: int, otherwise: int) -> int:
    """The feature that the link names; without one, the last one shown of this run, or `otherwise`.

    Raises SaelabError if the link names something that is not a feature of the run.
    """
    named = st.query_params.get("feature")
    shown: dict[str, int] = st.session_state.setdefault("last_features", {})
    run = str(current_run().path)
    if named is None:
        index = shown.get(run, otherwise)
        index = index if index < n_features else otherwise
    elif re.fullmatch("[0-9]{1,12}", named) and int(named) < n_features:
        index = int(named)
    else:
        last = f"{n_features - 1:,}"
        raise SaelabError(
            f"This link does not lead to a feature: feature={_some([named])} is not a whole number from 0 to {last}. "
            "Correct the address, or choose a feature on the Features page."
        )
    shown[run] = index
    st.query_params["feature"] = str(index)
    return index


def go_to(index: int) -> None:
    """Show another feature of the run; for callbacks on the feature page."""
    st.query_params["feature"] = str(index)


def link_to(index: int) -> dict[str, str]:
    """The part of a link that names a feature of the current run."""
    return {"run": st.session_state["run_name"], "feature": str(index)}


def database() -> Database:
    """The feature database of the current run, opened once. Raises SaelabError if there is none, or a damaged one."""
    path = folder.features(current_run().path)
    return _database(str(path), _stamp([path / MANIFEST]))


@st.cache_resource(max_entries=8, show_spinner=False)
def _database(path: str, stamp: tuple) -> Database:
    return open_database(path)


def read(reader: Callable[..., T], *arguments: object) -> T:
    """The result of `reader`, a function of `runs.folder`, for the current run; cached until a file of it changes."""
    run = current_run().path
    return _read(reader, reader.__name__, str(run), _stamp(folder.shown_files(run)), *arguments)


def _stamp(paths: Sequence[Path]) -> tuple:
    stats = [path.stat() if path.is_file() else None for path in paths]
    return tuple((stat.st_mtime_ns, stat.st_size) if stat else None for stat in stats)


@st.cache_data(max_entries=200, show_spinner=False)
def _read(_reader: Callable, name: str, path: str, stamp: tuple, *arguments: object):
    return _reader(path, *arguments)  # Streamlit tells results apart by all arguments but the first


def plain(text: str) -> str:
    """Text escaped so that Streamlit shows it without Markdown: for the contents of links, files and folder names."""
    text = re.sub(r"([\\`*_{}\[\]()<>#+!|~$&:^-])", r"\\\1", text)
    # Streamlit would still turn a bare address into a link.
    return text.replace("//", "/\u200b/").replace("www.", "www\u200b.").replace("@", "@\u200b")


def code(text: str) -> str:
    """Text for use between backticks in Markdown."""
    return text.replace("`", "'")


def show_error(error: SaelabError) -> None:
    st.error(plain(str(error)), icon=":material/error:")


def _find_runs(folders: Sequence[str]) -> tuple[dict[str, RunInfo], list[SaelabError]]:
    found: dict[str, RunInfo] = {}
    problems: list[SaelabError] = []
    for searched in folders:
        try:
            runs = folder.find_runs(searched)
        except SaelabError as error:
            problems.append(error)
            continue
        for run in runs:
            same = run.name in found and found[run.name].path.resolve() != run.path.resolve()
            found[str(run.path) if same else run.name] = run
    return found, problems


def _latest(runs: dict[str, RunInfo]) -> str:
    """The run that was trained last, preferring runs with features."""
    return max(runs, key=lambda name: (runs[name].has_features, (runs[name].path / folder.TRAINING).stat().st_mtime))


def _picked() -> None:
    if st.session_state["run_picker"] is not None:
        st.query_params.from_dict({"run": st.session_state["run_picker"]})


def _some(names: list[str], most: int = 8, longest: int = 60) -> str:
    short = [name if len(name) <= longest else name[:longest] + "..." for name in names[:most]]
    return ", ".join(short) + (" and others" if len(names) > most else "")
