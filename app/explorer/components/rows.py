"""A table of features. Each row is a link; headers sort."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import streamlit as st

from explorer import explanations
from explorer.components.mount import component, marked, packed
from explorer.components.tokens import with_row
from saelab.features.database import Database
from saelab.features.marks import number
from saelab.features.ranges import usual_maximum
from saelab.features.search import Match

_mount = component("rows", '<div class="root"></div>')
LONGEST = 60
"""Most characters of a token in a row."""
BEFORE = 24
"""Most characters of a snippet before the token that is lit, so that a narrow column shows it."""
AROUND = 8
"""Most tokens of a snippet before and after it."""
TOKENS = 5
NUMBER = "number:"
"""What the key of a column begins with whose cells are in `Row.numbers`."""


class Column(NamedTuple):
    """A column of the table. `key` is id, density, maximum, bars, tokens, score, text, or `NUMBER` and a name."""

    key: str
    label: str
    sortable: bool = False
    hint: str = ""


@dataclass(frozen=True, eq=False)
class Row:
    """A feature and what its row shows besides its columns of the database."""

    feature: int
    match: Match | None = None
    """Where its snippet is, and the tokens of it that are lit."""
    score: str = ""
    note: str = ""
    numbers: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """By the keys of columns: a number, and what stands below it."""


def draw_rows(
    database: Database,
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    key: str,
    link: str,
    sort: str = "",
    descending: bool = True,
    first: int = 0,
    total: int = 0,
    size: int = 0,
    remember: bool = False,
    on_opened: Callable[[int], None] | None = None,
    on_sorted: Callable[[str], None] | None = None,
    on_turned: Callable[[int], None] | None = None,
) -> None:
    """Draw features as rows, each a link.

    `link` is the address of a feature without its index. A page of `size` rows starts with number `first` of `total`;
    0 for no paging. With `remember`, the browser keeps the position in the table for Back and reload. Before the page
    is drawn again, `on_sorted` is called with the key of a header that was pressed, `on_turned` with the pages to go
    on, -1 or 1, and `on_opened`, if given, with the feature of a row, instead of following its link.
    """
    keys = {column.key for column in columns}
    data = {
        "columns": [list(column) for column in columns],
        "rows": _rows(database, rows, keys),
        "link": link,
        "sort": sort,
        "descending": descending,
        "first": first,
        "total": total,
        "size": size,
        "remember": remember,
        "opens": on_opened is not None,
    }
    acts = {"opened": on_opened, "sorted": on_sorted, "turned": on_turned}

    def called(event: str) -> Callable[[], None]:
        def call() -> None:
            value, act = st.session_state[key][event], acts[event]
            if value is not None and act is not None:
                act(value)

        return call

    _mount(key=key, data=packed(data), **{f"on_{event}_change": called(event) for event in acts})


def percent(share: float) -> str:
    """A density with three significant digits: "1.23%", "0.00033%"."""
    return "0%" if share == 0 else f"{float(f'{100 * share:.3g}'):.10f}".rstrip("0").rstrip(".") + "%"


def _rows(database: Database, rows: Sequence[Row], keys: set[str]) -> list[dict]:
    """The columns `keys` of the rows; reads only these lines of the table."""
    table, chosen = database.table, [row.feature for row in rows]
    of = {name: table[name][chosen] for name in ("n_active", "histogram", "top_logit_tokens", "top_tokens")}
    maxima = database.facts.maxima[chosen]
    explained = explanations.texts(database, chosen) if "text" in keys else {}
    sent = []
    for i, row in enumerate(rows):
        line: dict = {"id": row.feature}
        n = int(of["n_active"][i])
        if "density" in keys:
            line |= {"density": percent(n / database.n_tokens), "n": f"{n:,}"}
        if "maximum" in keys:
            line["maximum"] = number(float(maxima[i]))
        if "bars" in keys:
            line["bars"] = _sparkline(of["histogram"][i])
        if "tokens" in keys:
            lists = [
                [t for t in of[name][i].tolist() if t >= 0][:TOKENS] for name in ("top_logit_tokens", "top_tokens")
            ]
            line["tokens"] = [[_short(database.vocabulary.text(token)) for token in each] for each in lists]
        if "score" in keys:
            line |= {"score": row.score, "note": row.note}
        if "text" in keys and row.match is not None:
            line |= _snippet(database, row.feature, row.match)
        if "text" in keys and row.feature in explained:
            line["explained"] = explained[row.feature]
        line |= row.numbers
        sent.append(line)
    return sent


def _snippet(database: Database, feature: int, match: Match) -> dict:
    """Some tokens around a match, each with its percentage of full shading, and the first and last one lit."""
    facts = database.facts
    row, position = divmod(match.place, facts.rows.shape[1])
    first = max(0, position - AROUND)
    tokens = with_row(database, row, database.vocabulary.window(facts.rows[row, first : position + AROUND + 1]))
    while sum(len(token) for token in tokens[: position - first]) > BEFORE:
        tokens, first = tokens[1:], first + 1
    first = match.place - position + first
    stop = first + len(tokens)
    places, values = facts.between(feature, first, stop)
    shares, maximum = np.zeros(stop - first, int), usual_maximum(facts, database.table, feature)
    shares[places - first] = np.minimum(np.ceil(100 * values / maximum), 100) if maximum > 0 else 0
    lit = [max(0, match.first - first), match.last - first]
    return {"text": [_short(token) for token in tokens], "shares": shares.tolist(), "lit": lit}


def _short(token: str) -> str:
    return marked(token if len(token) <= LONGEST else token[:LONGEST] + "…")


def _sparkline(histogram: np.ndarray) -> str:
    """Heights of the bars, logarithmic, as letters from a (none) to z."""
    highest = max(1, int(histogram.max(initial=0)))
    heights = np.ceil(25 * np.log1p(histogram) / np.log1p(highest)).astype(int)
    return bytes((97 + heights).tolist()).decode()
