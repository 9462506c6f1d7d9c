"""The memory and disk that making a feature database needs, apart from the language model and its passes.

The bytes per entry were measured as the growth of a process and rounded up. The number of entries is tokens x L0; of an
autoencoder without a budget the L0 is not known before it is trained, so its target, or k, is counted.
"""

import math

from saelab.features.coactivation import coactivation_bytes
from saelab.features.facts_writer import FEATURE_ENTRIES, PAIRS
from saelab.features.layout import SIZES, arrays
from saelab.features.merge import BUCKET
from saelab.features.settings import FeatureSettings
from saelab.features.shards import SHARD_ENTRIES, SHARD_PLACES
from saelab.features.weights import weight_bytes
from saelab.memory import Need, Place, no_numbers, size
from saelab.sae.needs import encoding_bytes
from saelab.sae.new import Widths, bare_autoencoder
from saelab.sae.settings import SaeSettings

_FILLED_BYTES = 12
"""Bytes per entry of a shard that is being filled."""
_SORTED_BYTES = 72
"""Bytes per entry of a shard that is being sorted, by feature or by token."""
_BUCKET_ENTRY_BYTES = 112
"""Bytes per entry of a bucket: merged, counted, sorted by value and by token id."""
_PAIR_BYTES = 40
"""Bytes per pair of feature and token id that is in memory: collected, and sorted by token id."""
_TOTALS_BYTES = 48
"""Bytes per feature for its number of entries and its maximum, and sums over these."""
_WORD_BYTES = 200
"""Bytes per token of the vocabulary, as Python objects."""
_TOKEN_BYTES = 16
"""Most bytes of text per token of a vocabulary, on average; 5 to 8 in usual ones."""


def index_needs(
    settings: FeatureSettings,
    sae: SaeSettings,
    widths: Widths,
    vocabulary: int,
    context: int,
    where: Place,
) -> list[Need]:
    """Needs of the autoencoder on its device `where`, of `Index`, and of the database's files.

    Text is read and encoded in turn; shards are sorted, then merged; co-activation and the columns of the weights come
    last.
    """
    l0 = sae.sparsity.target_l0 or sae.k
    rows = math.ceil(settings.tokens / max(1, context - 1))  # with a BOS token in each
    places, n_features, forward = rows * context, sae.n_features, min(rows, settings.rows_per_forward) * context
    entries, shard_places = math.ceil(places * l0), min(places, SHARD_PLACES + forward)
    shard = min(math.ceil(shard_places * l0), SHARD_ENTRIES + math.ceil(forward * l0))
    shards = math.ceil(entries / max(1, shard - math.ceil(forward * l0)))
    pairs = min(entries, vocabulary * n_features)
    pair_files = math.ceil(pairs / PAIRS)
    bucket = min(BUCKET, entries + n_features * FEATURE_ENTRIES)
    with no_numbers():
        weights = sum(parameter.nbytes for parameter in bare_autoencoder(sae, *widths).parameters())
    encoding = encoding_bytes(sae, widths.d_in, forward, where)
    columns = weight_bytes(n_features, widths.largest, vocabulary) + weights * (len(widths.sites) > 1)
    sorting = shard * _SORTED_BYTES
    merging = bucket * _BUCKET_ENTRY_BYTES + min(pairs, PAIRS + BUCKET) * _PAIR_BYTES + vocabulary * _WORD_BYTES
    filled = shard * _FILLED_BYTES
    sizes = {"rows": rows, "context": context, "n_features": n_features, "entries": entries, "pairs": pairs}
    files = _file_bytes(sizes | {"vocabulary": vocabulary, "vocabulary_bytes": _TOKEN_BYTES * vocabulary})
    return [
        Need("autoencoder", weights, where, f"{n_features:,} features of {widths.d_in:,} dimensions x 4 bytes"),
        Need("encoding", encoding, where, f"{forward:,} tokens at once", ("encoding",)),
        Need("text to index", 8 * places, "memory", f"{places:,} places x 8 bytes, read and joined"),
        Need("totals", n_features * _TOTALS_BYTES, "memory", f"{n_features:,} features x {_TOTALS_BYTES} bytes"),
        Need("shard", filled, "memory", f"{shard:,} entries x {_FILLED_BYTES} bytes", ("reading", "encoding")),
        Need("sorting", sorting, "memory", f"{shard:,} entries x {_SORTED_BYTES} bytes", ("sorting",)),
        Need(
            "merging", merging, "memory", f"{bucket:,} entries x {_BUCKET_ENTRY_BYTES} bytes, and pairs", ("merging",)
        ),
        Need("co-activation", coactivation_bytes(n_features), "memory", "of all features", ("co-activation",)),
        Need("weights", columns, where, "their columns", ("weights",)),
        Need(
            "facts",
            files["tokens"] + files["by_feature"] + files["by_token"],
            "disk",
            f"{entries:,} entries x 12 bytes ({settings.tokens:,} tokens, L0 {l0:g}), {places:,} places x 12",
        ),
        Need(
            "vocabulary",
            files["vocabulary"] + files["by_vocabulary"],
            "disk",
            f"at most {pairs:,} pairs of feature and token id x 8 bytes, {vocabulary:,} tokens x {24 + _TOKEN_BYTES}",
        ),
        Need("table", files["table"], "disk", f"{n_features:,} features x {files['table'] // n_features:,} bytes"),
        Need(
            "shards",
            8 * entries + shards * (12 * n_features + 1024),
            "disk",
            f"{entries:,} entries x 8 bytes in {shards:,} shards of {size(12 * n_features)} besides, until the end",
        ),
        Need(
            "sorted pairs",
            8 * pairs + pair_files * (8 * vocabulary + 1024),
            "disk",
            f"at most {pairs:,} pairs x 8 bytes in {pair_files:,} files of {size(8 * vocabulary)} besides, for a time",
        ),
    ]


def _file_bytes(sizes: dict[str, int]) -> dict[str, int]:
    """Bytes of the arrays of a database, by group (such as ``by_feature``), with a header of 128 bytes each."""
    assert sizes.keys() == set(SIZES)
    groups: dict[str, int] = {}
    for name, (dtype, shape) in arrays(sizes).items():
        group = name.split(".")[0]
        groups[group] = groups.get(group, 0) + 128 + int(dtype[-1]) * math.prod(shape)
    return groups
