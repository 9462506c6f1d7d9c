"""A matrix of numbers between 0 and 1 as a picture, with a label for each row."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import streamlit as st
from PIL import Image

from saelab.features.marks import visible

CELL = 14
"""Pixels."""
LONGEST = 16


def draw_heatmap(values: np.ndarray, labels: Sequence[str], what: str) -> None:
    """Draw `values` ``[n, n]``; 0 is the page's background, 1 full orange. `labels` are text from elsewhere."""
    picture = np.zeros((*values.shape, 4), np.uint8)
    picture[..., :3] = 255, 140, 0
    picture[..., 3] = np.round(255 * np.clip(values, 0, 1))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    names = "".join(f"<div>{escape(visible(label)[:LONGEST])}</div>" for label in labels)
    size = f"{CELL * len(labels)}px"
    style = f"width: {size}; height: {size}; background: url({source}) 0 0 / 100% 100%"
    st.html(
        f'<div class="sl-matrix"><div class="sl-labels">{names}</div>'
        f'<div class="sl-picture" role="img" aria-label="{escape(what)}" style="{style}"></div></div>'
    )
