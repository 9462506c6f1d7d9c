"""Steering: a prompt's continuation by the clean model, and by the model with some features set to other activations.

Nothing is generated before the button is pressed. `saelab.analysis.steering` says what the modes do.
"""

import re
from typing import NamedTuple, cast, get_args

import numpy as np
import streamlit as st
from explorer import live, state
from explorer.components.tokens import Line
from explorer.effects import draw_effects

from saelab.analysis.settings import Intervention, Mode
from saelab.features.marks import number, visible

MOST_FEATURES = 8
MOST_TOKENS = 100
LARGEST = 1e6  # strength


class Change(NamedTuple):
    """One feature of the link: ``7:add:1.5``."""

    feature: int
    mode: Mode
    strength: float
    """In units of the feature's usual maximum on the held-out text; of activation, if that is not known or 0."""

    def __str__(self) -> str:
        return f"{self.feature}:{self.mode}:{self.strength:g}"


def changes() -> list[Change]:
    """The changes in the link. What is not one is left out."""
    found = []
    for part in state.value("steer", "").split(","):
        match = re.fullmatch(r"(\d{1,9}):([a-z]+):(-?[0-9.]+(?:e[+-]?\d+)?)", part)
        if match and match[2] in get_args(Mode):
            try:
                strength = float(match[3])
            except ValueError:
                continue
            found.append(Change(int(match[1]), cast(Mode, match[2]), max(-LARGEST, min(LARGEST, strength))))
    return found[:MOST_FEATURES]


def write(found: list[Change]) -> None:
    state.change(steer=",".join(map(str, found)) or None, of=None)


def draw_changes() -> list[Change]:
    """Draw a line of widgets for each change; returns the changes."""
    found = changes()
    for i, change in enumerate(found):
        for field, value in change._asdict().items():
            st.session_state[f"{field}_{i}"] = value

    def changed(i: int) -> None:
        feature, mode, strength = (st.session_state[f"{field}_{i}"] for field in Change._fields)
        write([*found[:i], Change(feature, mode, strength), *found[i + 1 :]])

    for i, change in enumerate(found):
        call = {"on_change": changed, "args": (i,)}
        with st.container(horizontal=True, vertical_alignment="bottom", key=f"change_{i}"):
            st.number_input("Feature", 0, 10**9, key=f"feature_{i}", width=130, **call)
            st.selectbox("Mode", get_args(Mode), key=f"mode_{i}", width=110, **call)
            st.number_input(
                strength_label(change.feature),
                -LARGEST,
                LARGEST,
                step=0.5,
                key=f"strength_{i}",
                width=230,
                disabled=change.mode == "ablate",
                **call,
            )
            st.button(
                "Remove",
                icon=":material/close:",
                key=f"remove_{i}",
                on_click=write,
                args=([*found[:i], *found[i + 1 :]],),
            )
            name = live.names([change.feature]).get(change.feature) if known(change.feature) else None
            if name is not None and (name.token or name.explanation):
                st.caption(state.plain(name.explanation or f"most active on {visible(name.token)}"))
    used = {change.feature for change in found}
    new = Change(next(feature for feature in range(MOST_FEATURES + 1) if feature not in used), "add", 1.0)
    st.button(
        "Add a feature",
        key="add",
        icon=":material/add:",
        on_click=write,
        args=([*found, new],),
        disabled=len(found) == MOST_FEATURES,
    )
    return found


def known(feature: int) -> bool:
    database = live.database()
    return database is not None and feature < database.n_features


def unit(feature: int) -> float:
    """The activation that strength 1 stands for."""
    database = live.database()
    return (database.feature(feature).usual_maximum if database is not None and known(feature) else 0.0) or 1.0


def strength_label(feature: int) -> str:
    one, database = unit(feature), live.database()
    if one == 1.0 or database is None:
        return "Strength, activation"
    far = one < float(database.facts.maxima[feature])
    return f"Strength × its {'usual ' if far else ''}maximum, {number(one)}"


def draw_options() -> dict[str, int | float | str]:
    """Draw the options of `steer`; returns them."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        new_tokens = st.number_input(
            "New tokens", 1, MOST_TOKENS, width=130, **state.bound("n", 30, None, (1, MOST_TOKENS))
        )
        temperature = st.number_input(
            "Temperature",
            0.0,
            5.0,
            step=0.1,
            width=130,
            help="0 takes the most likely token",
            **state.bound("temperature", 0.0, None, (0, 5)),
        )
        seed = st.number_input("Seed", 0, 10**9, width=130, **state.bound("seed", 0, None, (0, 10**9)))
        where = st.segmented_control(
            "Steer",
            ["all", "new"],
            format_func={"all": "all tokens", "new": "new tokens only"}.__getitem__,
            required=True,
            help="special tokens such as BOS are always left clean",
            **state.bound("where", "all", ["all", "new"]),
        )
    return {
        "new_tokens": int(new_tokens),
        "temperature": float(temperature or 0),
        "seed": int(seed),
        "where": str(where),
    }


class Shown(NamedTuple):
    """What was generated, and from what."""

    asked: tuple
    tokens: tuple[list[str], list[str]]
    token_ids: tuple[list[int], list[int]]
    prompt_tokens: int
    kl: np.ndarray
    log_probs: tuple[float, float, float]
    """Mean over the new tokens: of the clean text, of the steered text, and of the steered text in the clean model."""


def generate(text: str, bos: bool, found: list[Change], options: dict, asked: tuple) -> Shown:
    """Raises SaelabError if the model cannot be loaded or the steering makes no sense."""
    model = live.live()
    interventions = [Intervention(f, mode, strength * unit(f)) for f, mode, strength in found]
    result = model.steer(model.token_ids(text, bos), interventions, **options)
    n, clean, steered = result.prompt_tokens, result.clean, result.steered
    means = [float(p[n:].mean()) for p in (clean.log_probs, steered.log_probs, result.clean_log_probs)]
    return Shown(
        asked,
        (model.tokens(clean.ids), model.tokens(steered.ids)),
        (clean.ids, steered.ids),
        n,
        result.kl.numpy(),
        (means[0], means[1], means[2]),
    )


def draw_result(shown: Shown) -> None:
    n = shown.prompt_tokens
    per_token = shown.kl[n:]
    left, right = st.columns(2, gap="large")
    for column, title, which, values in (
        (left, "Clean", 0, np.zeros(len(shown.token_ids[0]))),
        (right, "Steered", 1, shown.kl),
    ):
        with column:
            st.markdown(f"**{title}**")
            line = Line(shown.tokens[which], shown.token_ids[which], values, peak=n)
            live.draw([line], f"{title.lower()}_text", float(shown.kl.max()) or 1.0, "KL, nats:", legend=which == 1)
            if which == 0:
                st.caption(f"Mean log-probability of a new token: {shown.log_probs[0]:.2f} nats.")
            else:
                st.caption(
                    f"Mean log-probability of a new token: {shown.log_probs[1]:.2f} nats; in the clean model "
                    f"{shown.log_probs[2]:.2f}. Mean KL(clean || steered) of the predictions of the new tokens: "
                    f"{per_token.mean():.3f} nats."
                )
    st.caption("The frame marks the first new token. A token's shade is the KL of the two predictions of this token.")


def draw_texts(text: str, bos: bool, found: list[Change], options: dict) -> None:
    """Draw the button that generates the two texts, and the texts once they are generated."""
    asked = (state.run_name(), text, bos, tuple(found), tuple(options.items()))
    if st.button("Generate", key="generate", type="primary", icon=":material/play_arrow:", disabled=not found):
        st.session_state.pop("steered", None)
        with st.spinner("Generating both texts ..."):
            st.session_state["steered"] = generate(text, bos, found, options, asked)
    shown: Shown | None = st.session_state.get("steered")
    if not found:
        st.caption("Add a feature to steer.")
    if shown is None or shown.asked[0] != state.run_name():
        return
    if shown.asked != asked:
        st.caption("The settings have changed since these texts were generated.")
    draw_result(shown)


def page() -> None:
    text = st.text_area(
        "Prompt",
        height="content",
        max_chars=live.MOST_CHARACTERS,
        placeholder="The text to continue",
        **state.bound("text", ""),
    )
    bos = st.toggle("Begin with BOS", **state.bound("bos", True), help="as the rows of the training do")
    found = draw_changes()
    options = draw_options()
    with state.errors_shown():
        draw_texts(text or "", bos, found, options)
    with state.errors_shown():
        draw_effects(found[0].feature if found else None)


page()
