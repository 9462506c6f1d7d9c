"""The list of features that the link names: a query, ranges, an order. Features shows it; Feature walks along it."""

from dataclasses import dataclass, fields
from math import inf
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from explorer import state
from saelab.features.database import Database
from saelab.features.layout import MANIFEST
from saelab.features.marks import typed
from saelab.features.search import Found
from saelab.features.table import SORTABLE

SIZE = 200
"""Features on a page of the list."""
SHOWN = ("active", "never", "all")


@dataclass(frozen=True)
class Listing:
    """What chooses and orders the features; the fields are parameters of the link."""

    q: str = ""
    """A query in the syntax of `saelab.features.search`."""
    sort: str = ""
    """A column; "" for the order of the query, best first, or of the indices."""
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


OPTIONS = {"sort": ("", *SORTABLE), "order": ("asc", "desc"), "show": SHOWN}


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
    return _listed(database, version(database), listing)


def version(database: Database) -> tuple:
    """Changes when the database does, for caches."""
    return str(database.folder), state.stamp([database.folder / MANIFEST])


@st.cache_resource(max_entries=32, show_spinner=False)
def _listed(_database: Database, version: tuple, listing: Listing) -> Listed:
    found = _database.search(typed(listing.q)) if listing.q else None
    ranges: dict[str, tuple[float, float]] = {
        column: given for column in ("density", "maximum") if (given := listing.parameters.get(column))
    }
    named = listing.q.startswith("id:")  # a feature that was asked for is shown whether it is active or not
    if listing.show != "all" and not named:
        ranges["n_active"] = (0, 0) if listing.show == "never" else (1, inf)
    among = None if found is None else found.features
    order = listing.sort or None
    page = _database.table.page(ranges, among, order, listing.order == "desc", n=_database.n_features)
    return Listed(page.features, found)


def feature_address(listing: Listing) -> str:
    """The address of a feature of the current run, without its index, that keeps the list."""
    return f"feature?{urlencode(state.link(**listing.parameters))}&feature="
