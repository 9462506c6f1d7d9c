"""Registers a component from its JavaScript and CSS files, and packs its data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from streamlit.components import v2

from saelab.features.marks import pieces

HERE = Path(__file__).parent
LONGEST = 2000
"""Most characters of a token that are sent."""


def component(name: str, html: str) -> Callable[..., Any]:
    """The component whose files are `name`.js and `name`.css; shared.js and shared.css come before them."""

    def read(kind: str) -> str:
        return "".join((HERE / f"{file}.{kind}").read_text("utf-8") for file in ("shared", name))

    return v2.component(f"saelab_{name}", html=html, css=read("css"), js=read("js"))


def packed(data: dict[str, Any]) -> bytes:
    """JSON without spaces and escapes: a third shorter than what Streamlit makes of the same dictionary."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def marked(token: str) -> str:
    r"""A token with its marks for white space and invisible characters between \x01 and \x02.

    No other control character is left. An empty token stays empty: it mostly has a part of the character before it.
    Past `LONGEST` characters, a mark says how long the token is.
    """
    found = pieces(token[:LONGEST])
    if len(token) > LONGEST:
        found.append((f"… {len(token):,} characters", True))
    return "".join(f"\x01{text}\x02" if mark else text for text, mark in found)


def rounded(values: np.ndarray) -> list[float]:
    """Numbers with three significant digits, from 1,000 on with all digits before the point, as `marks.number` has."""
    short = (round(value) if 1000 <= abs(value) < 1e15 else float(f"{value:.3g}") for value in values.tolist())
    return [int(value) if value.is_integer() else value for value in map(float, short)]
