"""Features with their explanations and scores, as a table for other programs."""

import csv
import io

import numpy as np

from saelab.autointerp.overview import Overview
from saelab.features.database import Database


def table_of(database: Database, features: np.ndarray, known: Overview) -> str:
    """A table as CSV: a line for each of the features ``[n]``, in this order.

    Columns: feature, density, active tokens, the largest activation, the latest explanation with its kind, model and
    author, and for each score its value, and that of the shuffled control. A text that a spreadsheet would take for a
    formula begins with an apostrophe.
    """
    density, n_active = database.table["density"][features], database.table["n_active"][features]
    maxima = database.facts.maxima[features]
    columns = [
        (f"{label}{of}", values)
        for label, both in known.columns.items()
        for of, values in zip(("", ", shuffled"), both, strict=True)
    ]
    columns = [(label, values[features]) for label, values in columns if np.isfinite(values).any()]
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    names = ["feature", "density", "active tokens", "maximum", "explanation", "kind", "model", "author"]
    out.writerow(map(_inert, [*names, *(label for label, _ in columns)]))
    for i, feature in enumerate(features.tolist()):
        found = known.explanation(feature)
        said = map(_inert, (found.text, *found.source)) if found else [""] * 4
        scores = [f"{values[i]:.6g}" if np.isfinite(values[i]) else "" for _, values in columns]
        out.writerow([feature, f"{density[i]:.6g}", n_active[i], f"{maxima[i]:.6g}", *said, *scores])
    return text.getvalue().encode("utf-8", "backslashreplace").decode()


def _inert(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
