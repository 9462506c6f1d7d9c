"""The names, dtypes and shapes of a feature database's files. FORMAT.md in this folder is the reference.

Imports nothing, for code that only checks whether there is a database.
"""

FEATURES = "features.parquet"
CONTEXTS = "contexts.parquet"
SUMMARY = "summary.json"
FACTS = "facts"
UNFINISHED = "unfinished"

MANIFEST = "manifest.json"
IDENTITY = "identity.json"
FORMAT = "saelab features"
VERSION = 1

MOST_PLACES = 2**31 - 1
SMALLEST_VALUE = 2.0**-24
"""The smallest positive float16; an entry is never stored as 0."""

DTYPES = {
    "tokens": "<i4",
    "by_feature.offsets": "<i8",
    "by_feature.places": "<i4",
    "by_feature.values": "<f2",
    "by_feature.maxima": "<f4",
    "by_token.offsets": "<i8",
    "by_token.features": "<i4",
    "by_token.values": "<f2",
}
"""The arrays of `FACTS`; each is a file NAME.npy."""


def shapes(rows: int, context: int, n_features: int, entries: int) -> dict[str, tuple[int, ...]]:
    """The shape of each array of `DTYPES`."""
    return {
        "tokens": (rows, context),
        "by_feature.offsets": (n_features + 1,),
        "by_feature.places": (entries,),
        "by_feature.values": (entries,),
        "by_feature.maxima": (n_features,),
        "by_token.offsets": (rows * context + 1,),
        "by_token.features": (entries,),
        "by_token.values": (entries,),
    }
