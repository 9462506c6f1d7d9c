"""The model of the current run, in memory once a page needs it, and what the pages about typed text share.

Importing this file imports no torch; `live` does, when a page calls it.
"""

from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from explorer import state
from explorer.components.tokens import Line, Name, draw_tokens, feature_names
from saelab.analysis.short_text import ShortText
from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.features.facts import ActiveFeatures
from saelab.features.token_facts import OTHERS, percentiles
from saelab.runs import folder
from saelab.runs.live import Live, open_live
from saelab.runs.summary import summarise

MOST_CHARACTERS = 2000
"""Most characters of a text that a link may hold."""
PAUSE = "300ms"


def live() -> Live:
    """The model and autoencoder of the current run, loaded at the first call, with a spinner.

    Raises SaelabError if they cannot be loaded, at once when that was so before; the page then has a button to try
    again.
    """
    found = _opened(*_version())
    if isinstance(found, SaelabError):
        st.button("Load the model again", icon=":material/refresh:", on_click=_opened.clear, key="load_again")
        raise SaelabError(f"This needs the run's language model and autoencoder, which cannot be loaded. {found}")
    return found


def read(text: str, bos: bool = True) -> ShortText:
    """The features on a typed text. Raises SaelabError as `live` and `saelab.runs.live.Live.read` do, and if the text
    is longer than a link should be."""
    if len(text) > MOST_CHARACTERS:
        raise SaelabError(f"The text has {len(text):,} characters, more than {MOST_CHARACTERS:,}; shorten it.")
    return _read(live(), *_version(), text, bos)


def database() -> Database | None:
    """The feature database of the current run, or None if it has none. Raises SaelabError if it is damaged."""
    return state.database() if state.current_run().has_features else None


def line(text: ShortText, values: np.ndarray, feature: int | None = None, chosen: int | None = None) -> Line:
    """A line of tokens with a value each; if they are activations of `feature`, with their percentiles.

    `chosen` is the token that gets a frame.
    """
    known = database() if feature is not None else None
    return Line(
        text.tokens,
        text.token_ids,
        values,
        percentiles(known.facts.activations(feature), values) if known and feature is not None else None,
        [_strongest(text, token, feature) for token in range(len(text))],
        peak=chosen,
    )


def draw(
    lines: Sequence[Line],
    key: str,
    strongest: float,
    what: str = "activation",
    legend: bool = True,
    on_opened: Callable[[int], None] | None = None,
    on_pinned: Callable[[], None] | None = None,
) -> None:
    """Draw lines of tokens whose values are `what`.

    A feature that the reader opens from a token's card is passed to `on_opened`; without it, its page opens.
    """
    draw_tokens(
        lines,
        key=key,
        strongest=strongest,
        link=f"feature?{urlencode(state.link(feature=''))}",
        names=names,
        what=what,
        legend=legend,
        on_opened=on_opened,
        on_pinned=on_pinned,
    )


def scale(feature: int, values: np.ndarray) -> float:
    """The activation from which on the shading is full: the feature's usual maximum, or the largest of `values`."""
    known = database()
    return (known.feature(feature).usual_maximum if known else 0.0) or float(values.max(initial=0)) or 1.0


def names(features: Iterable[int]) -> dict[int, Name]:
    """The token with most of its activation, and the explanation, of each feature. Without a database: none."""
    known = database()
    return feature_names(known)(features) if known else {}


@st.fragment
@state.errors_shown()
def draw_test_box(feature: int, on_opened: Callable[[int], None] | None = None) -> None:
    """A line to type in, and the activations of a feature on the text some 0.3 s after typing stops.

    `on_opened` is called with a feature that the reader opens from a token's card.
    """
    text = st.text_input(
        "Test on your own text",
        live=PAUSE,
        label_visibility="collapsed",
        placeholder="Type a text to see this feature on it; the first one loads the language model",
        **state.bound("text", ""),
    )
    if not text:
        return
    found = read(text)
    values = found.of(feature)
    draw([line(found, values, feature)], "test_tokens", scale(feature, values), on_opened=on_opened)
    with st.container(horizontal=True, gap="small"):
        more = state.link(text=text, shade="feature", of=feature)
        st.page_link(state.PROMPT, label="All features of this text", query_params=more)
        if state.refusal(state.STEER) is None:
            steer = state.link(text=text, steer=f"{feature}:add:1")
            st.page_link(state.STEER, label="Steer from this text", query_params=steer)
        draw_attention_link(text, int(values.argmax()), feature)


def reads_heads() -> bool:
    """Whether the current run is of the outputs of attention heads, so that the Attention page is about it."""
    return state.read(summarise).only_at(".attn.hook_z")


def draw_attention_link(text: str, token: int, feature: int | None = None, bos: bool = True) -> None:
    """A link to the heads and sources of a feature at a token of a typed text, for runs that have them."""
    if reads_heads():
        where = state.link(text=text, token=token, of=feature, bos=None if bos else False)
        st.page_link(state.ATTENTION, label="Heads and sources", query_params=where)


def _strongest(text: ShortText, token: int, besides: int | None) -> ActiveFeatures:
    features, values = text.at(token)
    others = features != besides
    features, values = features[others], values[others]
    chosen = np.argsort(-values, kind="stable")[:OTHERS]
    return ActiveFeatures(features[chosen], values[chosen])


def _version() -> tuple[str, tuple]:
    """The path of the current run, and what changes when its weights or settings do."""
    run = state.current_run().path
    return str(run), state.stamp([run / folder.SETTINGS, folder.weights(run)])


@st.cache_resource(max_entries=2, show_spinner="Loading the language model and the autoencoder ...")
def _opened(path: str, stamp: tuple) -> Live | SaelabError:
    """The run in memory, or why it cannot be loaded: also kept, since a Hub out of reach takes long to give up on."""
    try:
        return open_live(path)
    except SaelabError as error:
        return error


@st.cache_resource(max_entries=32, show_spinner=False)
def _read(_live: Live, path: str, stamp: tuple, text: str, bos: bool) -> ShortText:
    return _live.read(text, bos)
