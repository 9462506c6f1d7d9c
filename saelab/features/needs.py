"""The memory and disk that making a feature database needs, apart from the language model and its passes.

The bytes per entry were measured as the growth of a process and rounded up. The number of entries is tokens x L0; of an
autoencoder without a budget the L0 is not known before it is trained, so its target, or k, is counted.
"""

import math
from collections.abc import Mapping

from saelab.features.layout import DTYPES, LIST_LENGTH, shapes
from saelab.features.merge import BUCKET
from saelab.features.settings import FeatureSettings
from saelab.features.shards import SHARD_ENTRIES, SHARD_PLACES
from saelab.features.statistics import BINS
from saelab.features.weights import weight_bytes
from saelab.memory import Need, Place, no_numbers, size
from saelab.sae.model import bare_autoencoder
from saelab.sae.needs import encoding_bytes
from saelab.sae.settings import SaeSettings

_SHARD_ENTRY_BYTES = 72
"""Bytes per entry of a shard: while it is sorted by feature, or by token."""
_BUCKET_ENTRY_BYTES = 192
"""Bytes per entry of a bucket, and per token of its contexts: merged, counted, searched for peaks, compressed."""
_LISTED_BYTES = 32
"""Bytes per token or neighbour in a list of a feature: its id, its text, its value."""
_WORD_BYTES = 200
"""Bytes per token of the vocabulary, as Python strings and for Arrow."""
_CELL_BYTES = 4
"""Most bytes on disk per token of a context, compressed: its text and activation; 3.5 if tokens are random."""
_FEATURE_BYTES = 800
"""Most bytes on disk of a feature's line in the table, compressed."""


def index_needs(
    settings: FeatureSettings,
    sae: SaeSettings,
    d_in: int,
    vocabulary: int,
    context: int,
    where: Place,
    *,
    pass_bytes: int,
    text_bytes: int,
) -> list[Need]:
    """Needs of the autoencoder on its device `where`, of `Index`, and of the database's files.

    First the text is read, which takes `text_bytes`; then it is encoded, which takes `pass_bytes` of the model on
    `where`; then shards are merged; then the weights' columns are computed. What a step frees is counted once.
    """
    l0 = sae.sparsity.target_l0 or sae.k
    rows = math.ceil(settings.tokens / max(1, context - 1))  # with a BOS token in each
    places, n_features, forward = rows * context, sae.n_features, min(rows, settings.rows_per_forward) * context
    entries, shard_places = math.ceil(places * l0), min(places, SHARD_PLACES + forward)
    shard = min(math.ceil(shard_places * l0), SHARD_ENTRIES + math.ceil(forward * l0))
    shards = math.ceil(entries / max(1, shard - math.ceil(forward * l0)))
    cells = min(n_features * settings.contexts, entries) * min(settings.window, context)
    bucket = max(min(BUCKET, entries + cells), settings.contexts * settings.window)
    with no_numbers():
        weights = sum(parameter.nbytes for parameter in bare_autoencoder(sae, d_in).parameters())
    listed, encoding = 4 * LIST_LENGTH, encoding_bytes(sae, d_in, forward, where)
    sorting, merging = shard * _SHARD_ENTRY_BYTES, bucket * _BUCKET_ENTRY_BYTES + vocabulary * _WORD_BYTES
    encoded = {where: pass_bytes + encoding}  # freed before merging
    freed = encoded.get("memory", 0)
    merged = {"memory": max(freed, merging)}
    return [
        Need("autoencoder", weights, where, f"{n_features:,} features of {d_in:,} dimensions x 4 bytes"),
        Need("encoding", encoding, where, f"{forward:,} tokens at once"),
        Need("text to index", 8 * places, "memory", f"{places:,} places x 8 bytes, read and joined"),
        _more("text", text_bytes, freed + sorting, "memory"),
        Need("shard", sorting, "memory", f"{shard:,} entries x {_SHARD_ENTRY_BYTES} bytes"),
        Need(
            "statistics",
            n_features * (4 * BINS + 40 + listed * _LISTED_BYTES),
            "memory",
            f"{n_features:,} features with {BINS} bins and {listed} tokens and neighbours",
        ),
        _more("merging", merging, freed, "memory"),
        _more("weights", weight_bytes(n_features, d_in, vocabulary), merged.get(where, encoded[where]), where),
        Need(
            "facts",
            _facts_bytes({"rows": rows, "context": context, "n_features": n_features, "entries": entries}),
            "disk",
            f"{entries:,} entries x 12 bytes ({settings.tokens:,} tokens, L0 {l0:g})",
        ),
        Need(
            "tables",
            n_features * _FEATURE_BYTES + cells * _CELL_BYTES,
            "disk",
            f"{n_features:,} features x {_FEATURE_BYTES} bytes, {cells:,} tokens of contexts x {_CELL_BYTES}",
        ),
        Need(
            "shards",
            8 * entries + shards * (12 * n_features + 1024),
            "disk",
            f"{entries:,} entries x 8 bytes in {shards:,} shards of {size(12 * n_features)} besides, until the end",
        ),
    ]


def _more(what: str, needed: int, free: int, where: Place) -> Need:
    return Need(what, max(0, needed - free), where, f"{size(needed)}, less {size(free)} that other steps need")


def _facts_bytes(sizes: Mapping[str, int]) -> int:
    """Bytes of the arrays of a database, with a header of 128 bytes each."""
    widths = {name: int(dtype[-1]) for name, dtype in DTYPES.items()}
    return sum(128 + widths[name] * math.prod(shape) for name, shape in shapes(**sizes).items())
