"""A histogram in which the reader can choose a range, by dragging or with the arrow keys."""

from collections.abc import Callable

import numpy as np
import streamlit as st

from explorer.components.mount import component, packed, rounded

_mount = component(
    "histogram",
    '<div class="root" role="group"><div class="head"><span class="title"></span>'
    '<span class="readout dim" aria-live="polite"></span><button class="clear" hidden>all</button></div>'
    '<div class="plot"><svg preserveAspectRatio="none" aria-hidden="true"><path class="out"></path>'
    '<path class="in"></path><path class="over"></path></svg>'
    '<div class="handle" role="slider" tabindex="0" aria-label="from"></div>'
    '<div class="handle" role="slider" tabindex="0" aria-label="to"></div></div><div class="axis"></div></div>',
)


def draw_histogram(
    counts: np.ndarray,
    edges: np.ndarray,
    *,
    key: str,
    title: str,
    noun: str,
    log: bool = False,
    chosen: tuple[int, int] | None = None,
    on_chosen: Callable[[tuple[int, int] | None], None] | None = None,
) -> None:
    """Draw counts ``[bins]`` between edges ``[bins + 1]``.

    `chosen` is the range of bins to show, both ends included. `on_chosen` is called with the range that the reader has
    just chosen, None for all, before the page is drawn again; without it, no range can be chosen. `noun` is what is
    counted. `log` gives the counts a logarithmic axis.
    """
    data = {
        "counts": np.asarray(counts).tolist(),
        "edges": rounded(np.asarray(edges)),
        "title": title,
        "noun": noun,
        "log": log,
        "chosen": list(chosen) if chosen else None,
        "brush": on_chosen is not None,
    }

    def changed() -> None:
        ends = st.session_state[key].range
        if ends is None or on_chosen is None:
            return
        low, high = (int(ends[0]), int(ends[1])) if len(ends) == 2 else (0, len(counts) - 1)
        if 0 <= low <= high < len(counts):
            on_chosen(None if (low, high) == (0, len(counts) - 1) else (low, high))

    _mount(key=key, data=packed(data), on_range_change=changed)
