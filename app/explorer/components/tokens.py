"""Lines of tokens, shaded by activation. Each token is a door to the other features that are active on it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import streamlit as st

from explorer import explanations
from explorer.components.mount import component, marked, packed, rounded
from saelab.features.database import Database
from saelab.features.examples import Example
from saelab.features.facts import ActiveFeatures
from saelab.features.marks import number
from saelab.features.token_facts import percentiles, strongest_others

_mount = component(
    "tokens", '<div class="root"><div class="lines"></div><div class="card" popover="manual"></div></div>'
)
AROUND = 3
"""Examples are alike if their tokens are the same from this many before to this many after the peak."""


class Name(NamedTuple):
    """What stands for a feature."""

    token: str = ""
    explanation: str = ""


@dataclass(frozen=True, eq=False)
class Line:
    """Consecutive tokens of a text. All sequences have one item per token."""

    tokens: Sequence[str]
    token_ids: Sequence[int] | np.ndarray
    activations: np.ndarray
    percentiles: np.ndarray | None = None
    """Percentage of the feature's activations that are at or below the token's."""
    others: Sequence[ActiveFeatures] = ()
    """Other features that are active on each token, strongest first."""
    start: int = 0
    """Position of the first token in its row."""
    row: int | None = None
    peak: int | None = None
    """Index of the token that gets a frame."""
    side: str = ""
    """Short text beside the line."""
    heading: str = ""
    """Text above the line."""
    marks: Sequence[int] = ()
    """Indices of tokens with a line below and above them."""
    note: str = ""
    """Text below the line."""
    alike: bool = False
    """Whether the line is folded into the last one that is not."""


def draw_tokens(
    lines: Sequence[Line],
    *,
    key: str,
    strongest: float,
    link: str,
    names: Callable[[Iterable[int]], dict[int, Name]],
    what: str = "activation",
    legend: bool = True,
    on_opened: Callable[[int], None] | None = None,
    on_pinned: Callable[[], None] | None = None,
) -> None:
    """Draw lines of tokens.

    Hovering over a token, or walking to it with the arrow keys, shows a card; a click or Enter pins it. `strongest` is
    the activation from which on the shading is full; `what` names the values. `names` gives what to show beside
    each of the other features on the card. `link` is the address of a feature without its index, which they lead to.

    With `on_opened`, a plain click on one of these features calls it with the feature, before the page is drawn again,
    instead of following the link. With `on_pinned`, a click on a token also reaches Python:
    ``st.session_state[key].pinned`` is then [line, token].
    """
    texts: dict[str, int] = {}
    folded = [sum(1 for _ in _following(lines, index)) for index in range(len(lines))]
    sent = []
    for line, more in zip(lines, folded, strict=True):
        facts: dict = {
            "tokens": [texts.setdefault(marked(token), len(texts)) for token in line.tokens],
            "ids": [int(token) for token in line.token_ids],
            "activations": rounded(line.activations),
            "start": line.start,
            "row": line.row,
            "peak": line.peak,
            "side": line.side,
            "heading": line.heading,
            "marks": list(line.marks) or None,
            "note": line.note,
            "alike": line.alike or None,
            "more": more or None,
        }
        if line.percentiles is not None:
            shares = zip(line.percentiles, line.activations > 0, strict=True)
            facts["percentiles"] = [_percentage(share) if active else 0 for share, active in shares]
        if line.others:
            facts["others"] = [
                [x for pair in zip(other.features.tolist(), rounded(other.values), strict=True) for x in pair]
                for other in line.others
            ]
        sent.append({name: value for name, value in facts.items() if value is not None and value != ""})
    shown = names(sorted({int(feature) for line in lines for other in line.others for feature in other.features}))
    data = {
        "lines": sent,
        "texts": list(texts),
        "names": {feature: marked(name.token) for feature, name in shown.items()},
        "explained": {feature: name.explanation for feature, name in shown.items() if name.explanation},
        "strongest": rounded(np.array([strongest]))[0],
        "above": any(bool((line.activations > strongest).any()) for line in lines),
        "what": what,
        "link": link,
        "legend": legend,
        "opens": on_opened is not None,
        "report": on_pinned is not None,
    }

    def opened() -> None:
        feature = st.session_state[key].opened
        if feature is not None and on_opened is not None:
            on_opened(int(feature))

    callbacks = {"on_opened_change": opened} | ({"on_pinned_change": on_pinned} if on_pinned else {})
    _mount(key=key, data=packed(data), **callbacks)


def lines_of(database: Database, feature: int, examples: Sequence[Example], heading: str = "") -> list[Line]:
    """Lines of examples of a feature, under a heading.

    Examples with the same text around the peak follow the first one, folded.
    """
    active = database.facts.activations(feature)
    groups: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        around = example.token_ids[max(0, example.index - AROUND) : example.index + AROUND + 1]
        # rows of an array with one label differ in what the label leaves out
        key = (example.row,) if database.of_array else tuple(around.tolist())
        groups.setdefault(key, []).append(example)
    return [
        Line(
            with_row(database, example.row, example.tokens),
            example.token_ids,
            example.activations,
            percentiles(active, example.activations),
            strongest_others(database.facts, example.row, example.start, len(example.tokens), feature),
            example.start,
            database.first_row + example.row,
            example.index,
            number(example.activation),
            heading if example is examples[0] else "",
            alike=example is not group[0],
        )
        for group in groups.values()
        for example in group
    ]


def with_row(database: Database, row: int, tokens: list[str]) -> list[str]:
    """The tokens of a row; those of an array, which are labels, with the number of the row."""
    name = f"row {database.first_row + row}"
    return [token if token == name else f"{token} · {name}" for token in tokens] if database.of_array else tokens


def feature_names(database: Database) -> Callable[[Iterable[int]], dict[int, Name]]:
    """The function that names features by the token with most of their activation, and by their explanation."""

    def names(features: Iterable[int]) -> dict[int, Name]:
        chosen = list(features)
        tokens = database.table["top_tokens"][chosen, 0].tolist() if chosen else []
        explained = explanations.texts(database, chosen)
        return {
            feature: Name(database.vocabulary.text(token)[:40] if token >= 0 else "", explained.get(feature, ""))
            for feature, token in zip(chosen, tokens, strict=True)
        }

    return names


def _following(lines: Sequence[Line], index: int) -> Iterable[Line]:
    """The lines that are folded into a line."""
    if not lines[index].alike:
        for line in lines[index + 1 :]:
            if not line.alike:
                return
            yield line


def _percentage(share: float) -> float:
    """Rounded so that only the largest activation is at 100."""
    return 100 if share >= 100 else min(99.9, round(float(share), 1))
