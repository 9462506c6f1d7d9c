"""A recursive attribution as nested lists that open at a click. Text from elsewhere is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import streamlit as st

from explorer import state
from explorer.html import HUE, OTHER_HUE
from saelab.features.marks import cut, visible

if TYPE_CHECKING:
    from saelab.analysis.attention.tree import Node

LEAST = 1e-4
"""Share of its parent from which on a rounding is shown."""
_STYLE = """<style>
.sl-tree details > details, .sl-tree details > div { margin-left: 1.3rem; }
.sl-tree summary { cursor: pointer; }
.sl-tree div { padding-left: .95rem; }
.sl-tree .sl-bar { padding: 0 .3rem; }
.sl-tree .sl-number { display: inline-block; min-width: 4.4rem; text-align: right; padding-right: .7rem;
  font-variant-numeric: tabular-nums; }
</style>"""


def draw_tree(root: "Node", tokens: Sequence[str], runs: Mapping[tuple[str, int], str]) -> None:
    """Draw a tree below a feature, its first level open. `tokens` are the texts of the positions.

    `runs` names the run of the autoencoder of each kind of feature and layer, for links to its features.
    """
    st.html(f'{_STYLE}<div class="sl-tree">{_node(root, tokens, runs, abs(root.total) or 1.0, True)}</div>')


def _node(
    node: "Node", tokens: Sequence[str], runs: Mapping[tuple[str, int], str], whole: float, opened: bool = False
) -> str:
    share = min(100.0, 100 * abs(node.contribution) / whole)
    hue = HUE if node.contribution > 0 else OTHER_HUE
    bar = f"background: linear-gradient(90deg, rgba({hue}, .3) {share:.0f}%, transparent {share:.0f}%)"
    line = f'<span class="sl-number" style="{bar}">{node.contribution:+.3g}</span>{_label(node, tokens, runs)}'
    if not node.children:
        return f"<div>{line}</div>"
    # what is below a feature is in units of its own activation
    below = abs(node.total) or 1.0 if node.feature is not None else whole
    shown = (child for child in node.children if child.kind != "rounding" or abs(child.contribution) > LEAST * below)
    children = "".join(_node(child, tokens, runs, below) for child in shown)
    return f"<details{' open' if opened else ''}><summary>{line}</summary>{children}</details>"


def _label(node: "Node", tokens: Sequence[str], runs: Mapping[tuple[str, int], str]) -> str:
    name = escape(node.kind)
    if node.kind == "rest":
        return f"{node.merged} smaller parts"
    if node.feature is not None and node.layer is not None:
        run = runs.get((node.kind, node.layer))
        feature = str(node.feature)
        if run is not None:
            address = escape(f"feature?{urlencode(state.link() | {'run': run, 'feature': feature})}")
            feature = f'<a href="{address}" target="_self">{feature}</a>'
        name = f"{name} {feature}"
    if node.layer is not None and node.kind not in ("source", "embedding"):
        name += f", layer {node.layer}"
    if node.position is not None:
        token = escape(visible(cut(tokens[node.position])))
        name += f' <span class="sl-dim">{node.position}</span> <bdi class="sl-bar">{token}</bdi>'
    return name
