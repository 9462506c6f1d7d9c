"""A list of features as HTML: a link to each, with numbers. Text from elsewhere is escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from urllib.parse import urlencode

import streamlit as st

from explorer import state
from explorer.html import HUE
from saelab.features.marks import cut, number, visible


@dataclass(frozen=True)
class Row:
    """A feature in a list; a column is shown if a row has a number for it."""

    feature: int
    name: str
    """A token that stands for the feature; "" if none is known."""
    explanation: str = ""
    activation: float | None = None
    was: float | None = None
    """Its activation before a change."""
    quantile: float | None = None
    """Percentage of the feature's activations at or below this one."""
    density: float | None = None
    effect: float | None = None
    """Change of a logit by this activation, in nats."""


_COLUMNS = {
    "was": ("before", "largest activation on the text before the edit", number),
    "activation": ("activation", "", number),
    "quantile": ("quantile", "share of the feature's activations that are at or below this one", "{:.1f}%".format),
    "density": (
        "density",
        "share of the held-out tokens on which the feature is active",
        lambda share: f"{100 * share:.3g}%",
    ),
    "effect": ("logit", "direct effect of this activation on the logit, in nats", "{:+.2f}".format),
}


def draw_features(rows: Sequence[Row]) -> None:
    """Draw a list of features in the order of `rows`; each is a link to the feature's page."""
    columns = [name for name in _COLUMNS if any(getattr(row, name) is not None for row in rows)]
    strongest = max((row.activation or 0.0 for row in rows), default=0.0) or 1.0
    titles = {name: (_COLUMNS[name][0], _COLUMNS[name][1]) for name in columns}
    if "was" in titles:
        titles["activation"] = ("after", "largest activation on the edited text")
    head = "".join(f'<th title="{escape(hint)}">{title}</th>' for title, hint in titles.values())
    st.html(
        f'<table class="sl-features"><thead><tr><th>feature</th><th class="sl-name"></th>{head}</tr></thead><tbody>'
        + "".join(_row(row, columns, strongest) for row in rows)
        + "</tbody></table>"
    )


def _row(row: Row, columns: Sequence[str], strongest: float) -> str:
    address = escape(f"feature?{urlencode(state.link(feature=row.feature))}")
    token = escape(visible(cut(row.name))) if row.name else ""
    said = f' <small class="sl-dim"><bdi>{escape(row.explanation)}</bdi></small>' if row.explanation else ""
    cells = "".join(f"<td>{_cell(row, name)}</td>" for name in columns)
    share = 100 * (row.activation or 0.0) / strongest
    bar = f"background: linear-gradient(90deg, rgba({HUE}, .3) {share:.0f}%, transparent {share:.0f}%)"
    return (
        f'<tr><td><a href="{address}" target="_self">{row.feature}</a></td>'
        f'<td class="sl-name" style="{bar}"><bdi>{token}</bdi>{said}</td>{cells}</tr>'
    )


def _cell(row: Row, column: str) -> str:
    value = getattr(row, column)
    return "" if value is None else escape(_COLUMNS[column][2](value))
