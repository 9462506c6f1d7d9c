"""Lists of features, as a user writes them: `7,12`, `40-50` (to 50), `40:50` (to 49), `40:`, `:50`."""

import re

import numpy as np

from saelab.errors import SaelabError
from saelab.features.facts import Facts

EXAMPLE = "7,12,40-50"
_PART = re.compile(r"\s*(?:([0-9]{1,12})\s*(?:-\s*([0-9]{1,12}))?|([0-9]{1,12})?\s*:\s*([0-9]{1,12})?)\s*")


def indices(text: str, facts: Facts, *, cut: bool = False) -> np.ndarray:
    """The features that `text` names, ``[n]`` int64, each once, in its order.

    Raises SaelabError if a part names no features, or one that does not exist; with `cut` only if none of its features
    exists.
    """
    found = [np.zeros(0, np.int64)]
    seen = np.zeros(facts.n_features, bool)
    for part in text.split(","):
        first, stop = _ends(part, facts.n_features)
        facts.check(first)
        if not cut:
            facts.check(stop - 1)
        new = first + np.flatnonzero(~seen[first:stop])
        seen[new] = True
        if len(new):  # a link may name all features again and again
            found.append(new)
    return np.concatenate(found)


def _ends(part: str, n_features: int) -> tuple[int, int]:
    """The first feature of a part, and the one after the last."""
    ends = _PART.fullmatch(part)
    if ends is None:
        raise SaelabError(f"{part.strip()!r} is not a feature or a range of features, such as {EXAMPLE} or 0:100")
    if ":" in part:
        first, stop = int(ends[3] or 0), int(ends[4] or n_features)
    else:
        first = int(ends[1])
        stop = int(ends[2] or first) + 1
    if first >= stop:
        least = "the end of first:end is not in it" if ":" in part else "it ends before it begins"
        raise SaelabError(f"{part.strip()!r} is not a range of features: {least}")
    return first, stop
