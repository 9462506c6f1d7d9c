"""The stored analysis `similarity` of two runs: what only it knows is drawn, its matched decoders are returned."""

from typing import Any

import streamlit as st

from explorer import state
from saelab.analysis.intervals import Interval
from saelab.analysis.result import rebuilt
from saelab.analysis.similarity import Similarity, training_of
from saelab.runs import folder

NAME = "similarity"


def command(first: str, second: str) -> str:
    """The command that compares the run in the folder `first` with that in `second`."""
    return f'saelab analyse {first} {NAME} "analysis.{NAME}.other=[{second}]"'


def draw_stored(first: str, second: str) -> Similarity | None:
    """Draw the codes and the weights of two runs beside each other, if a comparison of them is stored.

    Returns their matched decoders; None without a stored comparison, or if the runs are of different sites. Raises
    SaelabError if the result is damaged.
    """
    found = _stored(first, second)
    if found is None:
        return None
    try:
        _draw(found)
        return None if found["decoders"] is None else rebuilt(Similarity, found["decoders"])
    except (KeyError, TypeError) as error:
        raise state.outdated(NAME, of=state.run(first)) from error


def draw_command(first: str, second: str) -> None:
    """Draw the command that compares two runs, if no comparison of them is stored."""
    if _stored(first, second) is not None:
        return
    line = state.code(command(*(str(state.run(name).path) for name in (first, second))))
    st.caption(f"`{line}` also compares their codes on held-out text.")
    if _stored(second, first) is not None:
        query = {"run": second, "other": first}
        st.page_link(state.COMPARE, label="It is stored for the two the other way round", query_params=query)


def _stored(first: str, second: str) -> dict[str, Any] | None:
    """The comparison of `first` with `second`, with the weights of `first` as `run`; None if none is stored.

    It is found by the training of the weights, so that a run that was trained again has none.
    """
    a, training = state.run(first), training_of(folder.training_record(state.run(second).path))
    found = state.read(folder.analysis, NAME, of=a)
    if found is None or training is None:
        return None
    try:
        for other in found["others"]:
            if other["weights"]["training"] == training:
                return other | {"run": found["run"]}
    except (KeyError, TypeError) as error:
        raise state.outdated(NAME, of=a) from error
    return None


def _draw(found: dict[str, Any]) -> None:
    cka, chance = rebuilt(Interval, found["cka"]["cka"]), found["cka"]["by_chance"]
    sides = {"first": found["run"], "second": found["weights"]}
    by_chance = sides["first"]["c_dec_by_chance"]
    with st.container(horizontal=True, gap="medium"):
        st.metric(
            "Linear CKA of codes",
            f"{cka.value:.3f}",
            help="1: the codes are equal up to a rotation and a factor. By chance: one run's tokens in a random order. "
            f"95% interval over rows of text: {cka.low:.3f} to {cka.high:.3f}.",
            width="content",
        )
        st.metric("CKA by chance", f"{chance:.3f}", width="content")
        for name, of in sides.items():
            what = f"Mean absolute cosine of two of its decoder rows; of random directions {by_chance:.4f}."
            st.metric(f"c_dec, {name}", f"{of['c_dec']:.4f}", help=what, width="content")
        for name, of in sides.items():
            if (meta := of["meta"]) is not None:
                real, random = (rebuilt(Interval, meta[key]) for key in ("explained", "explained_by_chance"))
                what = (
                    f"Variance of its decoder rows that an autoencoder of {meta['meta_features']:,} features explains; "
                    f"of random rows {random.value:.1%}."
                )
                st.metric(f"Rows explained, {name}", f"{real.value:.1%}", help=what, width="content")
    st.caption(f"Codes of {found['cka']['tokens']:,} held-out tokens. c_dec of random directions: {by_chance:.4f}.")
