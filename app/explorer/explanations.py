"""Explanations and scores of runs as pages show them: read once, and who made them said in words."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

import streamlit as st

from explorer import state
from saelab.autointerp import lexical
from saelab.autointerp.overview import Explained, Overview, Source, overview
from saelab.autointerp.records import MANUAL, SHUFFLED
from saelab.autointerp.single import Place
from saelab.autointerp.store import EXPLANATIONS, SCORES
from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.runs import folder

LEXICAL = "lexical, from statistics of tokens; no language model"
SHORT = 240
"""Characters of an explanation in lists and on cards."""
LARGE = 50 << 20
"""Bytes from which on reading is announced."""


@dataclass
class _Kept:
    """What was read of a run's records."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    stamp: tuple | None = None
    overview: Overview | None = None
    problem: str = ""


@st.cache_resource(max_entries=8, show_spinner=False)
def _kept(path: str, inputs: str, n_features: int) -> _Kept:
    return _Kept()


def place_of(database: Database) -> Place:
    """Where the explanations and scores of a database's run are."""
    return Place(database, database.folder.parent / folder.AUTOINTERP)


def known(database: Database) -> Overview:
    """The explanations and scores of a database's run; without any if they cannot be read, which `problem` says."""
    return _read(database).overview or Overview(database.n_features)


def problem(database: Database) -> str:
    """Why the explanations and scores cannot be read; "" if they can."""
    return _read(database).problem


def version(database: Database) -> tuple:
    """Changes when explanations or scores do, for caches."""
    place = place_of(database)
    return state.stamp(place.folder / name for name in (EXPLANATIONS, SCORES))


def _read(database: Database) -> _Kept:
    place, stamp = place_of(database), version(database)
    kept = _kept(str(place.folder), place.inputs, database.n_features)
    with kept.lock:
        if kept.stamp == stamp:
            return kept
        before = sum(read for _, read in kept.overview.read) if kept.overview else 0
        if sum(each[1] for each in stamp if each) - before > LARGE:
            with st.spinner("Reading explanations and scores ..."):
                _update(kept, place)
        else:
            _update(kept, place)
        kept.stamp = stamp
    return kept


def _update(kept: _Kept, place: Place) -> None:
    arguments = place.folder, place.inputs, place.database.n_features
    kept.problem = ""
    for before in (kept.overview, None):  # a file that was edited has to be read from its beginning
        try:
            kept.overview = overview(*arguments, before)
            return
        except SaelabError as error:
            kept.overview, kept.problem = None, str(error)
        except OSError as error:  # removed meanwhile
            kept.overview, kept.problem = None, f"{place.folder}: {error.strerror}"


def draw_problem(database: Database) -> None:
    if problem(database):
        state.show_error(SaelabError(problem(database)))


def texts(database: Database, features: Iterable[int]) -> dict[int, str]:
    """The explanations of those of the features that have one, cut."""
    of = known(database)
    found = {feature: of.explanation(feature) for feature in features}
    return {feature: short(each) for feature, each in found.items() if each is not None}


def draw_text(database: Database, feature: int) -> None:
    """The explanation of a feature and who made it, if it has one."""
    found = known(database).explanation(feature)
    if found is not None:
        st.html(explanation_html(found))


def explanation_html(explained: Explained) -> str:
    """An explanation and who made it."""
    made = escape(who(explained.source))
    return f'<div class="sl-explanation"><bdi>{escape(explained.text)}</bdi> <small class="sl-dim">{made}</small></div>'


def short(explained: Explained) -> str:
    """An explanation in one line; the offline explainer's begins with its name."""
    text = explained.text if len(explained.text) <= SHORT else explained.text[:SHORT] + "…"
    return f"{lexical.NAME}: {text}" if explained.source.model == lexical.NAME else text


def who(source: Source) -> str:
    """Who made an explanation, in words."""
    kind = source.kind.removeprefix(SHUFFLED)
    if source.model == lexical.NAME:
        made = LEXICAL
    elif kind == MANUAL:
        made = f"by hand, {source.author}" if source.author else "by hand"
    else:
        made = (
            source.model
            + ("" if kind == "default" else f", {kind}")
            + (f", edited by {source.author}" * bool(source.author))
        )
    return made if not source.control else f"control: written for another feature ({made})"


def judge(name: str) -> str:
    """A judge in words."""
    return {lexical.NAME: "lexical (no language model)", "exact": "exact (nobody is asked)"}.get(name, name)
