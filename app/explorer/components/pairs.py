"""A table of pairs: a feature of one run and one of another, with their cosine. A row chooses its pair."""

from collections.abc import Callable, Sequence

import numpy as np
import streamlit as st

from explorer.components.mount import component, marked, packed
from saelab.features.database import Database

_mount = component("pairs", '<div class="root"></div>')
TOKENS, LONGEST = 4, 24


def draw_pairs(
    a: Database | None,
    b: Database | None,
    pairs: np.ndarray,
    cosines: np.ndarray,
    *,
    key: str,
    names: tuple[str, str],
    chosen: tuple[int, int] | None,
    sort: str,
    descending: bool,
    first: int,
    total: int,
    size: int,
    on_opened: Callable[[tuple[int, int]], None],
    on_sorted: Callable[[str], None],
    on_turned: Callable[[int], None],
) -> None:
    """Draw pairs ``[n, 2]`` of features of two runs, which `names` names; a run without a database has no densities.

    The `size` rows start with number `first` of `total`. Headers sort by a, b, cosine, density_a and density_b. The
    callbacks get the pair of a row that was pressed, the name of a header, and the pages to go on, -1 or 1.
    """
    sides = {"a": (a, pairs[:, 0]), "b": (b, pairs[:, 1])}
    data = {
        "names": [marked(name) for name in names],
        "sides": {side: _side(database, features) for side, (database, features) in sides.items()},
        "cosines": [f"{cosine:.3f}" for cosine in cosines.tolist()],
        "chosen": list(chosen) if chosen else None,
        "sort": sort,
        "descending": descending,
        "first": first,
        "total": total,
        "size": size,
    }

    def opened() -> None:
        pair = st.session_state[key].opened
        if pair is not None:
            on_opened((int(pair[0]), int(pair[1])))

    def sorted_by() -> None:
        if st.session_state[key].sorted is not None:
            on_sorted(st.session_state[key].sorted)

    def turned() -> None:
        if st.session_state[key].turned is not None:
            on_turned(int(st.session_state[key].turned))

    _mount(
        key=key,
        data=packed(data),
        on_opened_change=opened,
        on_sorted_change=sorted_by,
        on_turned_change=turned,
    )


def _side(database: Database | None, features: Sequence[int] | np.ndarray) -> dict:
    """What the rows show of the features of one run."""
    ids = [int(feature) for feature in features]
    if database is None:
        return {"ids": ids}
    tokens = database.table["top_tokens"][ids].tolist() if ids else []
    density = (database.table["n_active"][ids] / database.n_tokens).tolist() if ids else []
    short = [[_short(database, token) for token in line[:TOKENS] if token >= 0] for line in tokens]
    return {"ids": ids, "density": [f"{value:.2g}" for value in density], "tokens": short}


def _short(database: Database, token: int) -> str:
    text = database.vocabulary.text(token)
    return marked(text if len(text) <= LONGEST else text[:LONGEST] + "…")
