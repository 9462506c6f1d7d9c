"""The names, dtypes and shapes of a feature database's files. FORMAT.md in this folder is the reference.

Imports nothing, for code that only checks whether there is a database.
"""

MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
IDENTITY = "identity.json"
FORMAT = "saelab features"
VERSION = 2
EARLIER = ("facts", "features.parquet", "contexts.parquet", "summary.json")
"""Files of version 1."""

MOST_PLACES = 2**31 - 1
SMALLEST_VALUE = 2.0**-24
"""The smallest positive float16; an entry is never stored as 0."""

BINS = 50
"""Bins of a feature's histogram, from 0 to its maximum."""
QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Shares of a feature's activations that lie at or below the columns of `quantiles`."""
TOP_PLACES = 20
TOP_TOKENS = 5
LIST_LENGTH = 10
"""Top and bottom logits, and neighbours of each kind, per feature."""
LOGIT_BINS = 40
NEURONS = 3
COACTIVATION_ENTRIES = 4096
"""Entries on which a feature counts how often others are active with it."""

FACTS = {
    "tokens": ("<i4", "rows", "context"),
    "by_feature.offsets": ("<i8", "n_features + 1"),
    "by_feature.places": ("<i4", "entries"),
    "by_feature.values": ("<f2", "entries"),
    "by_feature.maxima": ("<f4", "n_features"),
    "by_token.offsets": ("<i8", "places + 1"),
    "by_token.features": ("<i4", "entries"),
    "by_token.values": ("<f2", "entries"),
    "vocabulary.offsets": ("<i8", "vocabulary + 1"),
    "vocabulary.bytes": ("|u1", "vocabulary_bytes"),
    "vocabulary.counts": ("<i8", "vocabulary"),
    "by_vocabulary.offsets": ("<i8", "vocabulary + 1"),
    "by_vocabulary.features": ("<i4", "pairs"),
    "by_vocabulary.mass": ("<f4", "pairs"),
}
"""The text and its activations: dtype and shape of each array, in the sizes of the manifest."""

ACTIVITY = {
    "n_active": ("<i8",),
    "mass": ("<f8",),
    "mean_square": ("<f8",),
    "skew": ("<f4",),
    "kurtosis": ("<f4",),
    "quantiles": ("<f4", len(QUANTILES)),
    "histogram": ("<i4", BINS),
    "first_place": ("<i4",),
    "last_place": ("<i4",),
    "token_entropy": ("<f4",),
    "top_places": ("<i4", TOP_PLACES),
    "top_tokens": ("<i4", TOP_TOKENS),
    "top_token_shares": ("<f4", TOP_TOKENS),
    "coactive_neighbours": ("<i4", LIST_LENGTH),
    "coactive_phi": ("<f4", LIST_LENGTH),
    "coactive_jaccard": ("<f4", LIST_LENGTH),
}
"""Columns of the table that are statistics of the activations: dtype, and the width of those with several values."""

WEIGHTS = {
    "encoder_norm": ("<f4",),
    "decoder_norm": ("<f4",),
    "encoder_decoder_cosine": ("<f4",),
    "top_logit_tokens": ("<i4", LIST_LENGTH),
    "top_logits": ("<f4", LIST_LENGTH),
    "bottom_logit_tokens": ("<i4", LIST_LENGTH),
    "bottom_logits": ("<f4", LIST_LENGTH),
    "logit_histogram": ("<i4", LOGIT_BINS),
    "logit_range": ("<f4", 2),
    "decoder_neighbours": ("<i4", LIST_LENGTH),
    "decoder_cosines": ("<f4", LIST_LENGTH),
    "encoder_neighbours": ("<i4", LIST_LENGTH),
    "encoder_cosines": ("<f4", LIST_LENGTH),
    "neurons": ("<i4", NEURONS),
    "neuron_weights": ("<f4", NEURONS),
    "neuron_shares": ("<f4", NEURONS),
    "decoder_map": ("<f4", 2),
}
"""Columns of the table that follow from the weights."""

COLUMNS = ACTIVITY | WEIGHTS
SIZES = ("rows", "context", "n_features", "entries", "vocabulary", "vocabulary_bytes", "pairs")
"""The sizes in the manifest; `places` is rows * context."""
NOT_SIZES = ("n_tokens", "never_active", "site", "model", "d_in", "lens")
"""What else readers take from the manifest."""


def arrays(sizes: dict[str, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array of a database; each is a file NAME.npy. A column is `table.COLUMN`."""
    known = sizes | {"places": sizes["rows"] * sizes["context"]}

    def length(dimension: str) -> int:
        name, _, more = dimension.partition(" + ")
        return known[name] + int(more or 0)

    facts = {name: (dtype, tuple(map(length, shape))) for name, (dtype, *shape) in FACTS.items()}
    table = {f"table.{name}": (dtype, (sizes["n_features"], *width)) for name, (dtype, *width) in COLUMNS.items()}
    return facts | table
