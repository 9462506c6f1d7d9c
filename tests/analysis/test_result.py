"""A result is the same after it was stored, and draws itself with its text escaped."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from saelab.analysis.intervals import Interval
from saelab.analysis.result import Result, rebuilt, stored, with_arrays


@dataclass(frozen=True)
class Part:
    name: str
    curve: np.ndarray
    share: float


@dataclass(frozen=True, eq=False, repr=False)
class Made(Result):
    count: int
    fvu: Interval
    undefined: float
    missing: Part | None
    parts: tuple[Part, ...]
    by_site: dict[str, Interval]
    pair: tuple[int, str]
    codes: np.ndarray

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        return {"<b>count</b>": self.count, "FVU": self.fvu, "text": "<script>"}

    def plot(self) -> go.Figure:
        return go.Figure()


def made() -> Made:
    part = Part("a", np.arange(3.0), 0.5)
    fvu = Interval(0.25, 0.2, math.nan)
    codes = np.zeros((2, 0), np.int8)
    return Made(12345, fvu, math.inf, None, (part, Part("b", np.arange(2), 1)), {"x.y": fvu}, (1, "é"), codes)


def test_a_result_is_the_same_after_it_was_stored() -> None:
    figures, arrays = stored(made())
    assert sorted(arrays) == ["codes", "parts.0.curve", "parts.1.curve"]
    again = rebuilt(Made, with_arrays(json.loads(json.dumps(figures, allow_nan=False)), arrays))
    assert (again.count, again.missing, again.pair) == (12345, None, (1, "é"))
    assert again.fvu[:2] == (0.25, 0.2) and math.isnan(again.fvu.high) and isinstance(again.fvu, Interval)
    assert math.isnan(again.undefined) and again.by_site["x.y"][:2] == (0.25, 0.2)
    assert [part.name for part in again.parts] == ["a", "b"] and isinstance(again.parts[1], Part)
    assert (again.parts[0].curve == np.arange(3.0)).all() and again.codes.shape == (2, 0)


def test_a_result_draws_itself_with_its_text_escaped() -> None:
    html, text = made()._repr_html_(), repr(made())
    assert "&lt;b&gt;count" in html and "&lt;script&gt;" in html and "<script" not in html and "12,345" in html
    assert text == "Made(<b>count</b>: 12,345, FVU: 0.25 [0.2, nan], text: <script>)"
    frame = made().to_frame()
    assert frame.loc["FVU", "low"] == 0.2 and frame.loc["<b>count</b>", "low"] is None
