"""Memory of an autoencoder's training step, of its initialisation and of its calibration.

The bytes per entry were measured on a CPU as tensors alive at once, and rounded up; the tests repeat the measurement.
"""

import torch

from saelab.kernels.cpu import CAST_ENTRIES
from saelab.kernels.products import CAST_ELEMENTS
from saelab.memory import Need, Place, no_numbers
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.encoder import Linear, Scratch, tiles
from saelab.sae.losses import MULTI_FACTOR
from saelab.sae.model import _MOST_ENTRIES, bare_autoencoder
from saelab.sae.settings import SaeSettings
from saelab.sae.thresholds import BLOCK_ENTRIES, key_capacity

_STEP_VECTORS = 10
"""Number of float32 tensors ``[tokens, d_in]`` alive during a step: x, the reconstruction, their difference ..."""
_ENCODED_VECTORS = 3
"""Number of float32 tensors ``[tokens, d_in]`` alive while `encode` runs: x as it was read, x, x centred."""
_ENTRY_BYTES = 100
"""Bytes per active entry, with its position among the tokens and among the features."""
_DENSE_ENTRY_BYTES = {"memory": 70, "gpu": _ENTRY_BYTES}
"""Bytes per entry if all are active; a CPU then uses dense products, which need no positions among the features."""
_AUX_BYTES = 60
"""Bytes per entry of the auxiliary loss."""
_CANDIDATE_BYTES = {"memory": 8, "gpu": 48}
"""Bytes per pre-activation that may decide a threshold: its key, which a CPU sorts in place. The number for a GPU is
computed, not measured: it adds a sort's result, indices before and after, and two more such arrays for radix sort."""
_CALIBRATED_BYTES = 12
"""Bytes per pre-activation of the block that calibration searches: itself, and all tensors made from it."""
_GATHERED_BYTES = 10
"""Bytes per number of the rows that a product on a CPU casts: in bfloat16, in float32, and times a value."""
_FIRST_TOKENS = 4096
"""Tokens of the sample whose reconstruction sets the first scale of the encoder (`initialise`)."""
_THRESHOLD_TOKENS = 1024
"""Tokens of the sample that set the first threshold (`threshold_for`)."""
_LIFTED = 4096
"""Features that are lifted at a time (`lift`)."""


def step_needs(
    settings: SaeSettings, d_in: int, batch: int, where: Place, *, parts: int = 1, rounded: bool = False
) -> list[Need]:
    """Needs of `training_pass`, its losses and their gradients besides the parameters; batch: tokens of a step.

    The batch is cut into `parts`, which are trained on one after the other. `rounded`: the step reads copies of the
    tables in bfloat16. An allocation without a budget limits no entries, so all count as active: an upper bound. A
    ReLU autoencoder starts with about half of them.
    """
    method, bf16, part = allocation_of(settings), settings.selection == "bfloat16", -(-batch // parts)
    tile = _tile_bytes(settings.n_features, d_in, part, where, bf16, method.whole_columns, rounded)
    if settings.needs_gradients:  # the gradient's part has the same shapes, and its table has no copy
        tile += _tile_bytes(settings.n_features, d_in, part, where, bf16, method.whole_columns)
    dense = f"{part:,} x {settings.n_features:,} in {settings.selection}"
    if settings.needs_gradients:
        dense += ", and as much for the gradient's part"
    vectors = _STEP_VECTORS + (3 if settings.needs_gradients else 0)
    entries, entry = settings.largest_k * (1 + MULTI_FACTOR if settings.multi_topk else 1), _ENTRY_BYTES
    if not _has_budget(settings):
        entries, entry = settings.n_features, _DENSE_ENTRY_BYTES[where]
    chosen = 0 if settings.aux.name == "none" else settings.aux.features or max(1, d_in // 2)
    step = part * (4 * vectors * d_in + entry * entries + _AUX_BYTES * chosen)
    each = f"{vectors} x {d_in:,} x 4 + {entries:,} x {entry} + {chosen} x {_AUX_BYTES} bytes"
    how = f"{part:,} tokens x ({each})"
    if parts > 1:
        whole = 3 if settings.needs_gradients else 2  # x, as it was read and scaled, and gradients
        step += (batch - part) * 4 * whole * d_in
        how += f" + {batch - part:,} tokens of other parts x {whole} x {d_in:,} x 4 bytes"
    if not _has_budget(settings):
        how += ", as if all features were active: there is no budget"
    table, shape = settings.n_features * d_in, f"{settings.n_features:,} x {d_in:,}"
    cast = 4 * min(CAST_ELEMENTS, table)
    if where == "memory":  # dense products cast a whole table, sparse ones the rows of some entries
        cast = max(4 * table, _GATHERED_BYTES * CAST_ENTRIES * d_in)
    return [
        Need("tables in bfloat16", rounded * 2 * 2 * table, where, f"2 x {shape} x 2 bytes"),
        Need("table, cast back", rounded * cast, where, "rows of a table that a product casts to float32 at a time"),
        Need("pre-activations", tile, where, f"tiles of {dense}, one at a time, and the weights in that precision"),
        Need(
            "selection",
            _selection_bytes(settings, d_in, batch, tile, where),  # `lift` sees the whole batch
            where,
            "copies of a tile that are searched for features",
        ),
        Need("training step", step, where, how),
    ]


def initialisation_bytes(settings: SaeSettings, d_in: int, sample_tokens: int, where: Place) -> int:
    """Bytes that `new_autoencoder` needs besides the parameters and the sample of `sample_tokens`.

    A ReLU's first reconstruction has every positive entry of a part of the sample, half of all, because decoder rows
    are random directions. Other methods have k entries per token.
    """
    tokens, n_features = min(_FIRST_TOKENS, sample_tokens), settings.n_features
    dense = max(_MOST_ENTRIES, n_features)
    with no_numbers():
        trains_threshold = bare_autoencoder(settings, d_in).log_threshold is not None
    if _has_budget(settings) or trains_threshold:
        entries = tokens * settings.k
    else:
        entries = min(tokens * n_features, dense) // 2
    scores = _tile_bytes(n_features, d_in, tokens, where)
    if trains_threshold:
        scores = max(scores, 3 * 4 * min(_THRESHOLD_TOKENS * n_features, dense))
    median = 4 * d_in * sample_tokens if settings.b_dec_init == "geometric_median" else 0
    return max(median, 4 * _STEP_VECTORS * d_in * tokens + _ENTRY_BYTES * entries + scores)


def calibration_bytes(settings: SaeSettings, tokens: int, where: Place) -> int:
    """Bytes that `calibrate` needs on `tokens` tokens; 0 if inference needs no thresholds set on held-out text."""
    if not allocation_of(settings).calibrated:
        return 0
    largest = settings.k * tokens + 2 * settings.n_features  # two per feature more than its density
    candidates = key_capacity(largest, settings.n_features, tokens * settings.n_features)
    return _CANDIDATE_BYTES[where] * candidates + _CALIBRATED_BYTES * max(BLOCK_ENTRIES, settings.n_features)


def encoding_bytes(settings: SaeSettings, d_in: int, tokens: int, where: Place) -> int:
    """Bytes that `encode` needs on `tokens` tokens besides the parameters, if k features are active on each."""
    tile = _tile_bytes(settings.n_features, d_in, tokens, where)
    return tile + tokens * (4 * _ENCODED_VECTORS * d_in + _ENTRY_BYTES * settings.k)


def _has_budget(settings: SaeSettings) -> bool:
    return allocation_of(settings).initial_threshold is None


def _tile_bytes(
    n_features: int,
    d_in: int,
    tokens: int,
    where: Place,
    bf16: bool = False,
    whole_columns: bool = False,
    rounded: bool = False,
) -> int:
    """Bytes of the buffers of the dense product: a tile of scores, and weights in another precision.

    `rounded`: there is a copy of the weights in bfloat16.
    """
    scratch = Scratch()
    with no_numbers():
        device = torch.device("cuda" if where == "gpu" else "cpu")
        table = torch.empty(n_features, d_in, device=device)
        encoder = Linear(table, torch.empty(n_features, device=device), table.bfloat16() if rounded else None)
        centred = torch.empty(tokens, d_in, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        for tile in tiles(tokens, n_features, device, bf16, whole_columns):
            encoder.scores(centred, tile, scratch)
        return scratch.bytes


def _selection_bytes(settings: SaeSettings, d_in: int, batch: int, tile: int, where: Place) -> int:
    """Bytes of copies of a tile: the auxiliary loss's targets, all columns on a GPU; or of the products of `lift`."""
    aux = settings.aux.name != "none"
    copies = aux + (2 if allocation_of(settings).whole_columns and where == "gpu" else 0)
    lifted = 4 * min(_LIFTED, settings.n_features) * (batch + d_in) if aux and settings.aux.lift else 0
    return max(copies * tile, lifted)
