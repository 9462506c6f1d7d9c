"""The heads and sources of a feature of attention output on a typed text, and all heads on the held-out text.

For an autoencoder of a layer's heads (hook_z). A click on a token chooses where; a feature that is active there is
taken apart by head, by source position, and by the features of lower layers that other runs of the model know.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st
from explorer import charts, live, state
from explorer.attribution_tree import draw_tree

from saelab.analysis.attention.report import Attention
from saelab.analysis.result import rebuilt
from saelab.analysis.short_text import ShortText
from saelab.errors import SaelabError
from saelab.features.marks import number, visible
from saelab.runs import folder
from saelab.runs.summary import RunSummary, summarise

if TYPE_CHECKING:
    from saelab.analysis.attention.circuit import Circuit
    from saelab.analysis.attention.direct import DirectAttribution
    from saelab.analysis.attention.prompt import Prompt

ATTRIBUTION, PATTERN = "attribution", "pattern"
SHADES = {ATTRIBUTION: "added to the feature", PATTERN: "attention"}
EVERY = -1
FAINT = 0.01  # share of the strongest source below which a source is not shaded
CHOSEN = ("token", "of", "head")
NAME = "attention"
ANALYSE = "`saelab analyse {} attention` measures the heads on held-out text."
COLUMNS = {
    "previous": "attention to the token before",
    "self": "attention to the token itself",
    "first": "attention to the first token",
    "duplicate": "attention to earlier occurrences of the token",
    "induction": "attention to what followed earlier occurrences of the token",
    "entropy": "of the attention, in nats",
    "distance": "mean number of tokens back",
    "features": "living features with the largest share of their decoder row in this head",
    "clusters": "clusters of features that are alike, among the ten with the largest shares",
    "largest cluster": "share of the ten in the largest cluster",
    "polysemantic": "1 if no cluster has 90% of the ten",
}


def others() -> dict[str, RunSummary]:
    """The other runs of this run's model, by name, with their summaries."""
    own = state.read(summarise)
    found = {name: state.read(summarise, of=run) for name, run in state.runs().items() if name != state.run_name()}
    return {name: summary for name, summary in found.items() if own.same_model(summary) and summary.trained}


@st.cache_resource(max_entries=2, show_spinner="Measuring the maps around the heads ...")
def _circuit(path: str, stamp: tuple, others: tuple[str, ...]) -> "Circuit":
    return live.live().circuit([Path(other) for other in others])


@st.cache_resource(max_entries=16, show_spinner=False)
def _prompt(_circuit: "Circuit", path: str, stamp: tuple, others: tuple[str, ...], ids: tuple[int, ...]) -> "Prompt":
    return live.live().attend(_circuit, ids)


def draw_typed() -> None:
    """A typed text, a token of it, and a feature there, taken apart."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.toggle("Begin with BOS", **state.bound("bos", True), help="as the rows of the training do")
    typed = st.text_area(
        "Prompt",
        height="content",
        max_chars=live.MOST_CHARACTERS,
        placeholder="Type a text, then press Ctrl+Enter. The first one loads the language model.",
        **state.bound("text", "", clears=CHOSEN),
    )
    if not typed:
        st.caption("Nothing is typed yet.")
        return
    text = live.read(typed, state.value("bos", True))
    chosen = state.value("token", len(text) - 1, None, (0, len(text) - 1))
    features, values = text.at(chosen)
    if not len(features):
        draw_tokens(text, np.zeros(len(text), np.float32), chosen, SHADES[ATTRIBUTION])
        st.caption("No feature is active here. Special tokens, such as BOS, have none. Click on another token.")
        return
    order = np.argsort(-values, kind="stable")
    feature = draw_choice(features[order], values[order])
    other = others()
    paths = tuple(str(state.run(name).path) for name in other)
    run = state.current_run().path
    version = state.stamp([folder.weights(each) for each in (run, *map(Path, paths))])
    circuit = _circuit(str(run), version, paths)
    prompt = _prompt(circuit, str(run), version, paths, tuple(text.token_ids.tolist()))
    draw_feature(text, circuit, prompt, layer_of(live.live().site), feature, chosen, other)


def draw_choice(features: np.ndarray, values: np.ndarray) -> int:
    """Draw the choice among the features of a token; returns the chosen one."""
    names = live.names(features)
    labels = {
        int(f): "  ".join([str(f), *([visible(names[int(f)].token)] if int(f) in names else []), number(float(v))])
        for f, v in zip(features, values, strict=True)
    }
    options = list(labels)
    return int(
        st.selectbox(
            "Feature at this token, with its activation",
            options,
            format_func=lambda feature: labels[feature],
            **state.bound("of", options[0], options, clears=("head",)),
        )
    )


def draw_feature(
    text: ShortText,
    circuit: "Circuit",
    prompt: "Prompt",
    layer: int,
    feature: int,
    chosen: int,
    other: Mapping[str, RunSummary],
) -> None:
    """A feature at a token: by source on the text, by head as bars, and as a tree."""
    from saelab.analysis.attention.direct import direct
    from saelab.analysis.attention.tree import grow

    found = direct(circuit.heads[layer], prompt, layer, feature, chosen)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        shade = st.segmented_control(
            "Shade sources by", list(SHADES), required=True, **state.bound("shade", ATTRIBUTION, list(SHADES))
        )
        heads = [EVERY, *range(len(found.contributions))]
        head = st.selectbox(
            "Head",
            heads,
            width=150,
            format_func=lambda head: "all heads" if head == EVERY else f"{layer}.{head}",
            **state.bound("head", EVERY, heads),
        )
        depth = st.number_input("Depth of the tree", 1, 4, width=150, **state.bound("depth", 2, None, (1, 4)))
    draw_tokens(text, sources(found, prompt, layer, str(shade), int(head)), chosen, SHADES[str(shade)])
    against = float(found.by_source.clamp_max(0).sum())
    st.caption(
        f"Click on a token to choose another. Feature {feature} has {number(found.pre_activation)} here: sources add "
        f"{number(float(found.by_source.clamp_min(0).sum()))} and {number(against)}, its bias {number(found.bias)}. "
        "Attention patterns are taken as they are."
    )
    left, right = st.columns([2, 3], gap="large")
    with left:
        by_head = found.by_head.numpy()
        figure = charts.bars(
            np.arange(len(by_head)), by_head, 0.8, f"head of layer {layer}", "added to the feature", "%{x}: %{y:.3g}"
        )
        charts.draw(figure, "by_head", "what each head adds to the feature")
    with right:
        tree = grow(circuit, prompt, layer, feature, chosen, depth=int(depth), branches=6, least=0.02)
        draw_tree(tree, text.tokens, links(other, layer))
        if len(circuit.heads) + len(circuit.stream) == 1:
            st.caption(
                "Sources end at the outputs of lower layers. With other runs of this model in the explorer, of "
                "`blocks.N.attn.hook_z` or of the residual stream, they are taken apart into features."
            )


def sources(found: "DirectAttribution", prompt: "Prompt", layer: int, shade: str, head: int) -> np.ndarray:
    """What shades each token: what it adds to the feature if that is above 0, or the attention to it; 0 if faint."""
    by_head = found.contributions.clamp_min(0) if head != EVERY else found.by_source[None].clamp_min(0)
    if shade == PATTERN:
        pattern = prompt.heads[layer].pattern[0, :, found.position, : found.position + 1]
        by_head = pattern if head != EVERY else pattern.mean(0, keepdim=True)
    values = np.zeros(len(prompt.ids), np.float32)
    values[: found.position + 1] = by_head[max(head, 0)].cpu().numpy()
    return np.where(values < FAINT * values.max(), 0, values)


def layer_of(site: str) -> int:
    return int(site.split(".")[1])


def links(other: Mapping[str, RunSummary], layer: int) -> dict[tuple[str, int], str]:
    """The run of each autoencoder of the tree, by kind of feature and layer."""
    found = {("attention feature", layer): state.run_name()}
    for name, summary in other.items():
        site = summary.site or ""
        if summary.only_at(".attn.hook_z"):
            found.setdefault(("attention feature", layer_of(site)), name)
        elif summary.only_at(".hook_resid_pre") or summary.only_at(".hook_resid_post"):
            found.setdefault(("stream feature", layer_of(site) + site.endswith("post")), name)
    return found


def draw_tokens(text: ShortText, values: np.ndarray, chosen: int, what: str) -> None:
    line = live.line(text, values, chosen=chosen)
    live.draw([line], "source_tokens", float(values.max()) or 1.0, what, on_pinned=pinned)


def pinned() -> None:
    """A click on a token: it is the chosen one."""
    at = st.session_state["source_tokens"].pinned
    if at:
        state.change(token=at[1], of=None, head=None)


def draw_heads(stored: Mapping[str, Any]) -> None:
    """The table of all heads, which a click on a title sorts, and the families of the features."""
    found = rebuilt(Attention, stored)
    st.subheader("Heads on held-out text")
    frame = found.heads()
    own_first = np.argsort(frame["layer"].to_numpy() != found.layer, kind="stable")
    counts = dict.fromkeys(("layer", "head", "features", "clusters", "polysemantic"), "{:.0f}")
    shown = frame.iloc[own_first].style.format(counts, precision=3)
    titles = {name: st.column_config.Column(help=text) for name, text in COLUMNS.items()}
    st.dataframe(shown, hide_index=True, column_config=titles, key="heads", placeholder="")
    families = ", ".join(
        f"{name} {100 * value:.0f}% ({100 * low:.0f} to {100 * high:.0f})"
        for name, (value, low, high) in found.families.items()
        if value
    )
    st.caption(
        f"{found.tokens:,} tokens. Attention that is equal on all tokens has an induction score of "
        f"{found.chance['induction']:.3f}. Families of the {found.alive:,} living features of layer {found.layer}, by "
        f"what they read: {families}."
    )


def page() -> None:
    st.header("Attention", anchor=False)
    if not live.reads_heads():
        site = state.plain(state.read(summarise).site or "another site")
        st.info(
            f"This run's autoencoder reads {site}. This page needs one of the outputs of attention heads, "
            "`blocks.N.attn.hook_z`: train one with `saelab train ... site=blocks.2.attn.hook_z`."
        )
        return
    with state.errors_shown():
        draw_typed()
    try:
        stored = state.read(folder.analysis, NAME)
    except SaelabError as error:
        return state.show_error(error)
    if stored is None:
        st.caption(ANALYSE.format(state.code(str(state.current_run().path))))
        return
    draw_heads(stored)


page()
