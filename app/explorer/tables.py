"""Small tables of features and tokens as HTML, with links; all text is escaped."""

import math
from collections.abc import Iterable
from html import escape
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from explorer import state
from saelab.features.database import Database
from saelab.features.marks import cut, number, visible

AT_ONCE = 200
"""Lines of a list that are shown at once."""


def page(name: str, total: int) -> slice:
    """The lines to show of a list of `total`; draws the choice of a page, parameter NAME_page, if there are several."""
    pages = math.ceil(total / AT_ONCE)
    if pages <= 1:
        return slice(0, total)
    parameter = f"{name}_page"
    shown = st.number_input(f"Page, of {pages}", 1, pages, **state.bound(parameter, 1, limits=(1, pages)), width=160)
    return slice((shown - 1) * AT_ONCE, shown * AT_ONCE)


def link(feature: int, run: str | None = None) -> str:
    """A feature's index that links to its page."""
    query = urlencode(state.link(feature=feature) | ({} if run is None else {"run": run}))
    return f'<a href="feature?{escape(query)}" target="_self">{feature}</a>'


def links(features: Iterable[int]) -> str:
    return f'<div class="sl-links">{" ".join(link(int(feature)) for feature in features)}</div>'


def features(database: Database, chosen: np.ndarray) -> str:
    """A table of features: index, density, largest activation, and the tokens with most of its activation."""
    density, active, maximum = (database.table[name] for name in ("density", "n_active", "maximum"))
    lines = []
    for f in chosen.tolist():
        values = (f"{density[f]:.2e}", f"{active[f]:,}", number(float(maximum[f])))
        cells = "".join(f'<td class="sl-value">{text}</td>' for text in values)
        lines.append(f'<tr><td>{link(f)}</td>{cells}<td class="sl-snippet">{top_tokens(database, f)}</td></tr>')
    head = "".join(f"<th>{title}</th>" for title in ("feature", "density", "active on", "max", "active on tokens"))
    return f'<table class="sl-facts"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def top_tokens(database: Database, feature: int) -> str:
    """The tokens with most of a feature's activation, as HTML."""
    ids = [token for token in database.table["top_tokens"][feature].tolist() if token >= 0]
    return " ".join(f"<span>{escape(visible(cut(database.vocabulary.text(token))))}</span>" for token in ids)
