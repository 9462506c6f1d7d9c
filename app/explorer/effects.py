"""Effects of steering one feature on predictions, from the stored analysis or computed for this feature alone."""

from dataclasses import dataclass
from html import escape
from typing import Any, get_args

import numpy as np
import plotly.graph_objects as go
import streamlit as st

from explorer import charts, live, state
from explorer.components.tokens import draw_tokens, feature_names, lines_of
from explorer.listing import Listing, feature_address, version
from saelab.analysis.intervals import Interval
from saelab.analysis.result import rebuilt
from saelab.analysis.settings import Mode, SteeringSettings
from saelab.analysis.steering_report import CONTEXTS, DIRECTIONS, MODES, SteeringEffects, mean_of
from saelab.features.database import Database
from saelab.features.examples import example_at
from saelab.features.marks import visible
from saelab.runs.effects import effects_of, tokens_in_passes

NAME = "steering"
EFFECTS = {
    "kl": ("KL", "KL(clean || steered) of the prediction of the next token, nats"),
    "logits": ("Logits", "root mean square of the change of the logits, less their mean change"),
    "next_token": ("Next token", "change of the log-probability of the token that follows in the text, nats"),
    "changed": ("Top token", "share of the tokens after which another token is the most likely one"),
}
TOKENS = {"own": "its strongest tokens", "random": "random tokens"}
OTHER_COLOUR = "rgb(128, 128, 128)"  # seen in both themes
WINDOW = 32
ABLATE = MODES.index("ablate")


@dataclass(frozen=True, eq=False)
class Effects:
    """The effects of a feature: line `index` of a result, which may have those of other features too."""

    result: SteeringEffects
    index: int
    stored: bool

    @property
    def feature(self) -> int:
        return int(self.result.features[self.index])


def stored() -> SteeringEffects | None:
    """The stored analysis of the current run; None if there is none. Raises SaelabError if it is damaged."""
    found = state.analysis(NAME, ())
    try:
        return None if found is None else rebuilt(SteeringEffects, found)
    except (KeyError, TypeError, ValueError) as error:
        raise state.outdated(NAME) from error


def draw_effects(steered: int | None) -> None:
    """The effects of a feature: the one that the link names, else `steered`, else one of the stored analysis."""
    st.subheader("Effects on predictions", anchor=False)
    result, path = stored(), state.code(str(state.current_run().path))
    if result is None:
        st.info(f"Not analysed yet. `saelab analyse {path} {NAME}` measures the effects of 200 features.")
    best = None if result is None else int(result.features[np.argmax(result.score[:, 0])])
    feature = state.value("of", -1, limits=(0, 10**9))
    feature = feature if feature >= 0 else best if steered is None else steered
    if result is not None:
        draw_shares(result, feature)
    if feature is None:
        return
    found = chosen(result, feature)
    if found is None:
        draw_button(feature, among=None if result is None else len(result.features))
        return
    draw_feature(found, steered)


def chosen(result: SteeringEffects | None, feature: int) -> Effects | None:
    """What is known of a feature: in the stored analysis, or measured since the page was opened."""
    at = np.flatnonzero(result.features == feature) if result is not None else []
    if result is not None and len(at):
        return Effects(result, int(at[0]), True)
    key, measured = st.session_state.get("measured_effects", (None, None))
    return Effects(measured, 0, False) if measured is not None and key == _key(feature) else None


def draw_button(feature: int, among: int | None) -> None:
    """A button that measures one feature, with its cost."""
    database = live.database()
    if among is not None:
        st.caption(f"Feature {feature} is not among the {among:,} features of the stored analysis.")
    if database is None or feature >= database.n_features:
        st.caption("Without a feature database that has this feature, its strongest tokens are not known.")
        return
    tokens = tokens_in_passes(database)
    contexts = SteeringSettings().contexts
    if st.button(
        f"Measure feature {feature}",
        key="measure",
        icon=":material/science:",
        help=f"{contexts} contexts of each kind: the model runs on some {tokens:,} tokens, mostly above the site only",
    ):
        st.session_state.pop("measured_effects", None)
        with st.spinner("Steering the feature at its strongest tokens and at random ones ..."):
            measured = effects_of(live.live(), database, feature)
        st.session_state["measured_effects"] = _key(feature), measured
        st.rerun()
    st.caption(f"It takes passes over some {tokens:,} tokens: seconds on a small model.")


def _key(feature: int) -> tuple:
    database = live.database()
    return state.run_name(), None if database is None else version(database), feature


def draw_feature(found: Effects, steered: int | None) -> None:
    result, i = found.result, found.index
    database = live.database()
    st.markdown(f"**Feature {found.feature}**")
    with st.container(horizontal=True, gap="medium"):
        st.metric(
            "Steering score",
            f"{result.score[i, 0]:.2f}",
            help="At random contexts, how much more the logits of its target tokens rise than those of all tokens when "
            "it is added. Its targets rise most at its own contexts.",
            width="content",
        )
        st.metric("Of a random direction", f"{result.score[i, 1]:.2f}", width="content")
        st.metric("Share of all activation", f"{100 * result.share[i]:.2g}%", width="content")
    if database is not None:
        size = len(database.vocabulary)
        tokens = [visible(database.vocabulary.text(int(t)))[:20] for t in result.targets[i, 0] if 0 <= t < size]
        st.caption(state.plain("Target tokens: " + "  ".join(f"“{token}”" for token in tokens)))
    effect = st.segmented_control(
        "Effect",
        list(EFFECTS),
        **state.bound("effect", "kl", list(EFFECTS)),
        format_func=lambda name: EFFECTS[name][0],
        required=True,
        label_visibility="collapsed",
    )
    st.html(table(found, str(effect)))
    whose = (
        f"In parentheses: 95% intervals over the {len(result.features):,} features of the analysis."
        if found.stored
        else f"Measured for this feature only, at {result.contexts} tokens of each kind, so there are no intervals."
    )
    st.caption(
        f"{EFFECTS[str(effect)][1]}; mean over {result.contexts} tokens, one of them steered at a time. The random "
        f"direction changes the activation by the same length at the same tokens. {whose}"
    )
    with st.container(horizontal=True, gap="small"):
        st.page_link(state.FEATURE, label="Open its page", query_params=state.link(feature=found.feature))
        if found.feature != steered:
            text, steer = state.value("text", "") or None, f"{found.feature}:add:1"
            st.page_link(state.STEER, label="Write with it", query_params=state.link(text=text, steer=steer))
    if database is not None:
        draw_contexts(found, database)


def table(found: Effects, effect: str) -> str:
    """The means of an effect over the contexts: of the feature, of its random direction, and of all features."""
    result = found.result
    values = getattr(result, effect)
    heads = ["feature", "random direction", *(["all features", "all random directions"] if found.stored else [])]
    lines = []
    for c, context in enumerate(CONTEXTS):
        for m, mode in enumerate(get_args(Mode)):
            cells = [number_of(values[found.index, c, m, d]) for d in range(2)]
            if found.stored:
                cells += [with_ends(mean_of(values[:, c, m, d])) for d in range(len(DIRECTIONS))]
            row = "".join(f'<td class="sl-value">{escape(cell)}</td>' for cell in cells)
            lines.append(f"<tr><td>{escape(mode)}, {escape(TOKENS[context])}</td>{row}</tr>")
    titles = "".join(f'<th class="sl-value">{escape(head)}</th>' for head in heads)
    head = f"<thead><tr><th></th>{titles}</tr></thead>"
    return (
        f'<div class="sl-wide"><table class="sl-facts sl-effects">{head}<tbody>{"".join(lines)}</tbody></table></div>'
    )


def number_of(value: float) -> str:
    return "–" if not np.isfinite(value) else f"{value:.3g}"


def with_ends(mean: Interval) -> str:
    ends = f" ({mean.low:.3g} to {mean.high:.3g})" if np.isfinite(mean.low) and np.isfinite(mean.high) else ""
    return f"{number_of(mean.value)}{ends}"


def draw_contexts(found: Effects, database: Database) -> None:
    """The steered tokens, each with a frame in its text."""
    result, feature = found.result, found.feature
    which = st.segmented_control(
        "Steered at",
        list(TOKENS),
        **state.bound("at", "own", list(TOKENS)),
        format_func=TOKENS.__getitem__,
        required=True,
        label_visibility="collapsed",
    )
    rows, context = database.facts.rows.shape
    kind = CONTEXTS.index(str(which))
    row, position = result.row[found.index, kind], result.position[found.index, kind]
    active = database.facts.activations(feature)
    own = result.row[found.index, 0] * context + result.position[found.index, 0]
    inside = (result.row[found.index] < rows).all() and (result.position[found.index] < context).all()
    if inside and not np.isin(own, active.places).all():  # it is of another text, or of other weights
        raise state.outdated(NAME)
    if not inside:
        st.caption("Some of these tokens are not in the feature database; make it from more tokens to see them.")
        return
    places = (row * context + position).tolist()
    draw_tokens(
        lines_of(
            database,
            feature,
            [example_at(database.facts, database.vocabulary, active, place, WINDOW) for place in places],
        ),
        key="effect_tokens",
        strongest=database.feature(feature).usual_maximum or 1.0,
        link=feature_address(Listing()),
        names=feature_names(database),
    )
    st.caption("The frame marks the token that is steered; shades are the feature's activation in the clean run.")


def draw_shares(result: SteeringEffects, feature: int | None) -> None:
    """Activation share against the effect of ablation, a point per feature; a click chooses the feature."""
    correlation = result.share_against_effect()
    figure = go.Figure()
    names = ("feature", "random direction")
    for d, colour in ((1, OTHER_COLOUR), (0, charts.COLOUR)):
        figure.add_trace(
            go.Scatter(
                x=result.share.tolist(),
                y=result.logits[:, 0, ABLATE, d].tolist(),
                name=names[d],
                mode="markers",
                customdata=result.features.tolist(),
                marker={"size": 6 if d == 0 else 4, "color": colour, "opacity": 0.8},
                hovertemplate="feature %{customdata}<br>share %{x:.2e}, change %{y:.3f}<extra></extra>",
            )
        )
    at = np.flatnonzero(result.features == feature)
    figure.add_trace(
        go.Scatter(
            x=result.share[at].tolist(),
            y=result.logits[at, 0, ABLATE, 0].tolist(),
            name="chosen",
            mode="markers",
            hoverinfo="skip",
            marker={"size": 15, "color": "rgba(0, 0, 0, 0)", "line": {"color": charts.COLOUR, "width": 2}},
        )
    )
    figure.update_xaxes(title="share of the sum of all activations", type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(title="change of the logits", type="log", exponentformat="power")
    charts.compact(figure, 360, top=36)
    legend = {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"}  # on a phone the buttons are above
    figure.update_layout(showlegend=True, legend=legend)

    def picked(selection: Any) -> None:
        if selection["points"]:
            state.change(of=int(selection["points"][0]["customdata"]))

    charts.draw_selectable(figure, "shares", "Activation share against the effect of ablation", "pan", picked)
    st.caption(
        f"Root mean square change of the logits when each of {len(result.features):,} features is ablated at its "
        f"{result.contexts} strongest tokens, and when a random direction of the same length is. Rank correlation of "
        f"share and effect: {with_ends(correlation)}. A feature of small share and large effect acts more than it "
        "represents. Click on a point to choose its feature."
    )
