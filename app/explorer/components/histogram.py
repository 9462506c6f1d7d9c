"""A histogram in which the reader can choose a range, by dragging or with the arrow keys."""

import numpy as np

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
    brush: bool = True,
) -> tuple[int, int] | None:
    """Draw counts ``[bins]`` between edges ``[bins + 1]``; returns the range of bins that the reader has just chosen.

    Both ends of the range are included; all bins mean that the choice was taken back, None that nothing was chosen.
    `chosen` is the range to show. `noun` is what is counted. `log` gives the counts a logarithmic axis.
    """
    data = {
        "counts": np.asarray(counts).tolist(),
        "edges": rounded(np.asarray(edges)),
        "title": title,
        "noun": noun,
        "log": log,
        "chosen": list(chosen) if chosen else None,
        "brush": brush,
    }
    changed = _mount(key=key, data=packed(data), on_range_change=lambda: None).range
    if changed is None:
        return None
    low, high = (int(changed[0]), int(changed[1])) if len(changed) == 2 else (0, len(counts) - 1)
    return (low, high) if 0 <= low <= high < len(counts) else None
