"""The list of features that the link names: a query, ranges, an order. Features shows it; Feature walks along it."""

from dataclasses import dataclass, fields
from math import inf
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from explorer import explanations, state
from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.features.layout import MANIFEST
from saelab.features.marks import typed
from saelab.features.search import Found
from saelab.features.table import SORTABLE
from saelab.runs import folder
from saelab.runs.decoder import site_shares

SIZE = 200
"""Features on a page of the list."""
MOST_SITES = 4
"""Most sites of a crosscoder whose shares have room in the list."""
SHOWN = ("active", "never", "all")


@dataclass(frozen=True)
class Listing:
    """What chooses and orders the features; the fields are parameters of the link."""

    q: str = ""
    """A query in the syntax of `saelab.features.search`, or `EXPLANATION` and a text."""
    sort: str = ""
    """A column, the label of a score or, of a crosscoder, a site; anything else, such as "": the order of the query,
    best first, or of the indices."""
    order: str = "desc"
    density: tuple[float, float] = (0.0, 1.0)
    maximum: tuple[float, float] = (0.0, inf)
    show: str = "active"
    """Whether features that are active, that are never active, or all are shown."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the link that are not the default."""
        found = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in found.items() if value != default}


EXPLANATION = "explanation:"
"""What a query for a text in explanations begins with."""
OPTIONS = {"order": ("asc", "desc"), "show": SHOWN}


class Listed(NamedTuple):
    """The features of a list."""

    features: np.ndarray
    """``[n]`` int64, in order."""
    found: Found | None
    """What the query found, in the query's order."""

    def position(self, feature: int) -> int | None:
        """Number of a feature in the list, from 0; None if it is not in it."""
        at = np.flatnonzero(self.features == feature)
        return int(at[0]) if len(at) else None


def current_listing() -> Listing:
    """The list that the link names."""
    default = Listing()
    names = [field.name for field in fields(Listing)]
    return Listing(**{name: state.value(name, getattr(default, name), OPTIONS.get(name)) for name in names})


def listed(database: Database, listing: Listing) -> Listed:
    """The features of a list. Raises SaelabError if its query cannot be read."""
    at_site = listing.sort in database.sites.more  # only then is the whole decoder read
    shares = shares_at(database).get(listing.sort) if at_site else None
    weights = None if shares is None else state.stamp([folder.weights(state.current_run().path)])
    return _listed(database, (version(database), explanations.version(database), weights), listing, shares)


def shares_at(database: Database) -> dict[str, np.ndarray]:
    """The share of each site of a crosscoder, but the first, in the length of each decoder row, ``[n_features]``.

    Empty for what is no crosscoder, if it has more than `MOST_SITES` sites, or if its decoder cannot be read: the page
    of a feature says why.
    """
    sites = database.sites.inputs
    if not 1 < len(sites) <= MOST_SITES:
        return {}
    try:
        shares = state.read(site_shares)
    except SaelabError:
        return {}
    if shares.shape != (database.n_features, len(sites)):  # the run was trained again since
        return {}
    return dict(zip(sites[1:], shares.T[1:], strict=True))


def version(database: Database) -> tuple:
    """Changes when the database does, for caches."""
    return str(database.folder), state.stamp([database.folder / MANIFEST])


@st.cache_resource(max_entries=32, show_spinner=False)
def _listed(_database: Database, version: tuple, listing: Listing, _shares: np.ndarray | None) -> Listed:
    explained = explanations.known(_database)
    found = None
    if listing.q.startswith(EXPLANATION):
        found = Found(explained.search(typed(listing.q).removeprefix(EXPLANATION)))
    elif listing.q:
        found = _database.search(typed(listing.q))
    ranges: dict[str, tuple[float, float]] = {
        column: given for column in ("density", "maximum") if (given := listing.parameters.get(column))
    }
    named = listing.q.startswith("id:")  # a feature that was asked for is shown whether it is active or not
    if listing.show != "all" and not named:
        ranges["n_active"] = (0, 0) if listing.show == "never" else (1, inf)
    among = None if found is None else found.features
    order, falling = listing.sort if listing.sort in SORTABLE else None, listing.order == "desc"
    features = _database.table.page(ranges, among, order, falling, n=_database.n_features).features
    scores = explained.columns[listing.sort][0] if listing.sort in explained.columns else _shares
    if scores is not None:
        scores = scores[features]
        features = features[np.argsort(-scores if falling else scores, kind="stable")]  # those without one come last
    return Listed(features, found)


def feature_address(listing: Listing) -> str:
    """The address of a feature of the current run, without its index, that keeps the list."""
    return f"feature?{urlencode(state.link(**listing.parameters))}&feature="
