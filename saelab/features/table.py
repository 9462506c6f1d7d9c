"""The table of a feature database: a line per feature; columns mapped from disk, filtered and sorted with numpy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saelab.errors import SaelabError, did_you_mean
from saelab.features.arrays import Arrays
from saelab.features.layout import COLUMNS

_SCALARS = [name for name, (_, *width) in COLUMNS.items() if not width]
SORTABLE = ("feature", "density", "mean", "maximum", *_SCALARS)
"""Names of the columns with one number per feature."""


class Page(NamedTuple):
    """Some lines of a filtered and sorted table."""

    features: np.ndarray
    """``[n]`` int64"""
    total: int
    """Lines that pass the filter."""


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of `layout.COLUMNS`, and four that follow from them: feature, density, mean, maximum."""

    arrays: Arrays

    names = tuple(COLUMNS)
    """The columns that are stored."""

    def __len__(self) -> int:
        return int(self.arrays.manifest["n_features"])

    def __getitem__(self, column: str) -> np.ndarray:
        """A column ``[n_features, ...]``. Raises SaelabError if there is no such column."""
        if column == "feature":
            return np.arange(len(self))
        if column == "density":
            return self._whole("n_active") / self.arrays.manifest["n_tokens"]
        if column == "mean":
            return self._whole("mass") / np.maximum(self._whole("n_active"), 1)
        if column == "maximum":
            return self.arrays["by_feature.maxima"]
        if column not in COLUMNS:
            raise SaelabError(f"The table has no column {column!r}.{did_you_mean(column, [*SORTABLE, *COLUMNS])}")
        return self.arrays[f"table.{column}"]

    def page(
        self,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        among: np.ndarray | None = None,
        sort: str | None = None,
        descending: bool = True,
        first: int = 0,
        n: int = 200,
    ) -> Page:
        """`n` features, from number `first` on, of those whose columns lie in `ranges`, both ends included.

        `among` are the features to choose from, all if None. They are sorted by the column `sort`; ties keep their
        order, and None keeps the order of `among`. Raises SaelabError if there is no such column.
        """
        features = np.arange(len(self)) if among is None else np.asarray(among)
        for column, (low, high) in (ranges or {}).items():
            values = self._scalar(column)[features]
            features = features[(values >= low) & (values <= high)]
        if sort is not None:
            values = self._scalar(sort)[features]
            features = features[np.argsort(-values if descending else values, kind="stable")]
        return Page(features[first : first + n], len(features))

    def _scalar(self, column: str) -> np.ndarray:
        if column not in SORTABLE:
            raise SaelabError(f"The table cannot be sorted or filtered by {column!r}.{did_you_mean(column, SORTABLE)}")
        return self._whole(column) if column in COLUMNS else self[column]

    def _whole(self, column: str) -> np.ndarray:
        """A stored column that is about to be read from end to end."""
        self.arrays.read_ahead(f"table.{column}")
        return self[column]
