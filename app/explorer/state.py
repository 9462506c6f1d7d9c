"""What the link says, the run that it names, and reading the run's data.

All state is in the query parameters of the link, so that a reload, Back and a copied link show the same page. All pages
follow one way, and none uses `bind="query-params"` of Streamlit's widgets: in Streamlit 1.67 it loses the parameters of
the page that one leaves, so that Back shows the page without its search (and twice the parameters that two pages bind).

- A widget whose value belongs in the link: `st.text_input("Search", **state.bound("q", ""))`. Before it is drawn it
  takes its value from the link; when it changes, it writes the link. Do not give it a value or an index.
- A value without a widget: `state.value("view", "top")` reads it, `state.change(view="dead")` writes it, in a callback
  (`on_click`, `on_change`, `on_select`). Each change is a step that Back takes back. None removes a parameter.
- A link to a page: `st.page_link(state.FEATURE, query_params=state.link(feature=7))`.

The link is text from elsewhere: `value` and `bound` return the default for what is not a value, and a run is looked up
among the runs that were found; a name from the link is never part of a path.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import streamlit as st

from saelab.errors import SaelabError
from saelab.features.database import Database, open_database
from saelab.features.layout import COLUMNS, FACTS, MANIFEST
from saelab.runs import folder
from saelab.runs.folder import RunInfo
from saelab.runs.summary import SweepRun, read_sweep, summarise

# Not in a folder named "pages": with one, a new server runs the page that a link names without running main.py.
RUNS, RUN, FEATURES, FEATURE = "views/runs.py", "views/run.py", "views/features.py", "views/feature.py"
PROMPT, STEER, COMPARE, MAP = "views/prompt.py", "views/steer.py", "views/compare.py", "views/map.py"
DEAD, ATTENTION, DARK = "views/dead.py", "views/attention.py", "views/dark_matter.py"
EXPLANATIONS, AUDIT = "views/explanations.py", "views/audit.py"
OF_TEXT = (EXPLANATIONS, AUDIT, STEER, DEAD, ATTENTION, DARK)
"""Pages that run the language model, show an analysis that does, or need text."""
OF_ONE_SITE = (STEER, DARK)
"""Pages about features that write where they read."""

SECONDS_BETWEEN_WALKS = 20
"""Folders are searched for runs again after this time, or when a link names an unknown run."""

FILES = (MANIFEST, *(f"{name}.npy" for name in (*FACTS, *(f"table.{column}" for column in COLUMNS))))
"""Files of a database."""

T = TypeVar("T")


# the link


def link(**parameters: object) -> dict[str, str]:
    """The query parameters of a link to a page, with the current run in it; without those that are None."""
    run = {"run": st.session_state["run_name"]} if "run_name" in st.session_state else {}
    return run | {name: _text(value) for name, value in parameters.items() if value is not None}


def value(name: str, default: T, options: Sequence[T] | None = None, limits: tuple[float, float] | None = None) -> T:
    """A parameter of the link, of the type of `default`: text, a whole number, a float, a bool or a pair of floats.

    The default if the link has none, or what it has is of another type, not among the options or outside the limits.
    """
    found = _parsed(st.query_params.get(name), default)
    numbers = [
        number for number in (found if isinstance(found, tuple) else (found,)) if isinstance(number, int | float)
    ]
    outside = limits is not None and not all(limits[0] <= number <= limits[1] for number in numbers)
    return default if found is None or outside or (options is not None and found not in options) else cast(T, found)


def bound(
    name: str,
    default: T,
    options: Sequence[T] | None = None,
    limits: tuple[float, float] | None = None,
    clears: Sequence[str] = (),
) -> dict[str, Any]:
    """The arguments that bind a widget to a parameter of the link: its key, which is `name`, and its callback.

    A change of the widget also removes the parameters in `clears`, such as the page of a list.
    """
    st.session_state[name] = value(name, default, options, limits)
    return {"key": name, "on_change": _changed, "args": (name, default, clears)}


def change(**parameters: object) -> None:
    """Write parameters of the link, for callbacks. None removes one."""
    known = st.query_params.to_dict()
    texts = {name: _text(value) for name, value in parameters.items() if value is not None}
    st.query_params.from_dict({name: text for name, text in known.items() if name not in parameters} | texts)


def _changed(name: str, default: object, clears: Sequence[str]) -> None:
    now = st.session_state[name]
    change(**dict.fromkeys(clears), **{name: None if now == default else now})


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _parsed(text: str | None, like: object) -> object:
    """The value of the type of `like` in a parameter; None if there is none."""
    if text is None or like is None or isinstance(like, str):
        return text
    if isinstance(like, bool):
        return {"0": False, "1": True}.get(text)
    if isinstance(like, int):
        return int(text) if re.fullmatch("-?[0-9]{1,12}", text) else None
    pair = isinstance(like, tuple)
    try:
        numbers = tuple(float(part) for part in (text.split(",") if pair else [text]))
    except ValueError:
        return None
    rising = len(numbers) == (2 if pair else 1) and numbers[0] <= numbers[-1]  # not true of nan
    return None if not rising else numbers if pair else numbers[0]


# the run


def find_runs(folders: Sequence[str]) -> list[SaelabError]:
    """Find the runs in these folders, for `runs`; returns what is wrong with the folders."""
    found, problems = _find_runs(tuple(folders))
    named = [st.query_params[parameter] for parameter in ("run", "other") if parameter in st.query_params]
    if not found or any(name not in found or not _is_run(found[name]) for name in named):
        _find_runs.clear()  # the run may have been made, or removed, since
        found, problems = _find_runs(tuple(folders))
    st.session_state["runs"] = found
    if not found and not problems:
        text = f"There is no run in {', '.join(folders)}. A run is a folder that contains {folder.TRAINING}; "
        problems.append(SaelabError(text + "`saelab train quickstart` makes one."))
    return problems


def pick_run(page: str) -> None:
    """Make the run that the link names the current one: the one before, or the one trained last, if it names none.

    `page` is the page that is drawn. Raises SaelabError if there is no run of this name.
    """
    remembered = st.session_state.pop("run_name", None)
    named = st.query_params.get("run")
    name = named if named is not None else remembered if remembered in runs() else _latest(runs())
    if name is None:
        return
    run(name)
    st.session_state["run_name"] = name
    # Streamlit leaves the address unchanged after a link from a page to itself. After a link from another page it has
    # not changed it yet, and would keep the other page with these parameters in the history.
    if named is None or st.session_state.get("shown_page") == page:
        st.query_params["run"] = name
    st.session_state["shown_page"] = page


def runs() -> Mapping[str, RunInfo]:
    """The runs that were found, by name."""
    return st.session_state["runs"]


def run(name: str) -> RunInfo:
    """The run of this name. Raises SaelabError if there is none."""
    if name not in runs():
        raise SaelabError(f"There is no run {_some([name])!r} here. Choose one of these: {_some(list(runs()))}.")
    return runs()[name]


def run_name() -> str:
    """The name of the current run, which is in the link."""
    return st.session_state["run_name"]


def current_run() -> RunInfo:
    return runs()[run_name()]


def show_title(title: str) -> None:
    """Give the browser's tab a title: the page's, with the run's name."""
    st.set_page_config(page_title=f"{title} · {st.session_state.get('run_name', 'saelab')}")


def current_feature(n_features: int, otherwise: int) -> int:
    """The feature that the link names; without one, the last one shown of this run, or `otherwise`.

    Raises SaelabError if the link names something that is not a feature of the run.
    """
    named = st.query_params.get("feature")
    shown: dict[str, int] = st.session_state.setdefault("last_features", {})
    path = str(current_run().path)
    if named is None:
        index = shown.get(path, otherwise)
        index = index if index < n_features else otherwise
    elif re.fullmatch("[0-9]{1,12}", named) and int(named) < n_features:
        index = int(named)
    else:
        last = f"{n_features - 1:,}"
        raise SaelabError(
            f"This link does not lead to a feature: feature={_some([named])} is not a whole number from 0 to {last}. "
            "Correct the address, or choose a feature on the Features page."
        )
    shown[path] = index
    if named is None:
        change(feature=index)
    return index


@st.cache_data(ttl=SECONDS_BETWEEN_WALKS, max_entries=8, show_spinner=False)
def _find_runs(folders: tuple[str, ...]) -> tuple[dict[str, RunInfo], list[SaelabError]]:
    found: dict[str, RunInfo] = {}
    problems: list[SaelabError] = []
    for searched in folders:
        try:
            below = folder.find_runs(searched)
        except SaelabError as error:
            problems.append(error)
            continue
        for run in below:
            same = run.name in found and found[run.name].path.resolve() != run.path.resolve()
            found[str(run.path) if same else run.name] = run
    return found, problems


def _is_run(run: RunInfo) -> bool:
    return (run.path / folder.TRAINING).is_file()


def _latest(found: Mapping[str, RunInfo]) -> str | None:
    """The run that was trained last, preferring runs with features; None if there is no run."""

    def age(name: str) -> tuple[bool, float]:
        record = found[name].path / folder.TRAINING
        return found[name].has_features, record.stat().st_mtime if record.is_file() else 0.0

    return max(found, key=age, default=None)


# its data


def database(of: RunInfo | None = None) -> Database:
    """The feature database of a run, the current one if None, opened once.

    Raises SaelabError if there is none, or a damaged one.
    """
    path = folder.features((of or current_run()).path)
    # All files: one that became shorter since it was mapped into memory would end the server at the next look at it.
    return _database(str(path), stamp(path / name for name in FILES))


@st.cache_resource(max_entries=8, show_spinner=False)
def _database(path: str, stamp: tuple) -> Database:
    return open_database(path)


def read(reader: Callable[..., T], *arguments: object, of: RunInfo | None = None) -> T:
    """The result of `reader`, a function of `runs.folder`, for a run, the current one if None.

    It is cached until a file of the run changes.
    """
    path = (of or current_run()).path
    return _read(reader, reader.__name__, str(path), stamp(folder.shown_files(path)), *arguments)


def of_array() -> bool:
    """Whether the activations of the current run come from an array, so that it has no language model and no text."""
    return read(summarise).of_array


def refusal(page: str) -> str | None:
    """Why the current run has no such page, in words; None if it has."""
    found = read(summarise)
    if found.of_array and page in OF_TEXT:
        return "This page needs text. The activations of this run come from an array without it."
    if found.kind != "autoencoder" and page in OF_ONE_SITE:
        return f"This page needs features that write where they read. This run is a {found.kind}."
    return None


def sweep(path: Path) -> tuple[SweepRun, ...]:
    """The runs of the sweep in a folder; none if there is no sweep. Raises SaelabError if its summary is damaged."""
    changed = stamp([path / folder.SWEEP])
    return () if changed == (None,) else _read(read_sweep, "read_sweep", str(path), changed)


def analysis(name: str, fields: Iterable[str]) -> dict[str, Any] | None:
    """The result of an analysis of the current run, by the names of its fields; None if there is none.

    Raises SaelabError if it is damaged, or lacks one of the `fields`, as one that another version made.
    """
    found = read(folder.analysis, name)
    if found is not None and not found.keys() >= set(fields):
        raise outdated(name)
    return found


def draw_dark_matter_link(label: str, **parameters: object) -> None:
    """A link to the page of dark matter with these parameters, if the current run has that analysis."""
    if (folder.analysis_folder(current_run().path, "dark_matter") / folder.FIGURES).is_file():
        st.page_link(DARK, label=label, icon=":material/dark_mode:", query_params=link(**parameters))


def outdated(name: str, of: RunInfo | None = None) -> SaelabError:
    """The error for a result of an analysis that does not fit this version, or the rest of the run, the current one if
    None."""
    path = (of or current_run()).path
    return SaelabError(
        f"{folder.analysis_folder(path, name)}: is not what this version of saelab reads; "
        f"`saelab analyse {path} {name} --force` makes it again."
    )


def stamp(paths: Iterable[Path]) -> tuple:
    """Changes when one of the files changes: its argument is a cache's, which then reads them again."""
    return tuple(map(_stamp, paths))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()  # a question before it would leave time in which a writer removes the file
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@st.cache_data(max_entries=400, show_spinner=False)
def _read(_reader: Callable, name: str, path: str, stamp: tuple, *arguments: object):
    return _reader(path, *arguments)  # Streamlit tells results apart by all arguments but the first


# text from elsewhere


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


@contextmanager
def errors_shown() -> Iterator[None]:
    """Shows the error of a block instead of raising it, so that what comes after the block is still drawn.

    It also decorates a function: every fragment, because a fragment that is drawn by itself is outside of all blocks.
    """
    try:
        yield
    except SaelabError as error:
        show_error(error)


def _some(names: list[str], most: int = 8, longest: int = 60) -> str:
    short = [name if len(name) <= longest else name[:longest] + "..." for name in names[:most]]
    return ", ".join(short) + (" and others" if len(names) > most else "")
