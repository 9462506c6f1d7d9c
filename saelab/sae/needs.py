"""The memory that an autoencoder's training step needs, and what it needs before the first one and after the last.

The bytes per entry were measured on a CPU as tensors alive at once, and rounded up; the tests repeat the measurement.
"""

import torch

from saelab.memory import Need, Place, no_numbers
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.encoder import Linear, Scratch, tiles
from saelab.sae.losses import MULTI_FACTOR
from saelab.sae.model import _MOST_ENTRIES, bare_autoencoder
from saelab.sae.settings import SaeSettings
from saelab.sae.thresholds import BLOCK_ENTRIES, keys_held

_STEP_VECTORS = 10
"""Vectors ``[tokens, d_in]`` in float32: x, the reconstruction, their difference, and the like."""
_ENTRY_BYTES = 100
"""Of an active entry, with its position among the tokens and among the features."""
_DENSE_ENTRY_BYTES = {"memory": 70, "gpu": _ENTRY_BYTES}
"""Of an entry if all are active; a CPU then takes dense products, which need no positions among the features."""
_AUX_BYTES = 60
"""Of an entry of the auxiliary loss."""
_CANDIDATE_BYTES = {"memory": 8, "gpu": 48}
"""Of a pre-activation that may decide a threshold: its key, which a CPU sorts in place. The rest on a GPU is computed,
not measured: a sort's result, indices before and after, and as much again as two of these for radix sort."""
_CALIBRATED_BYTES = 12
"""Of a pre-activation of the block that calibration looks through: itself, and all that is made of it."""
_FIRST_TOKENS = 4096
"""Of the sample: those whose reconstruction sets the first scale of the encoder (`initialise`)."""
_THRESHOLD_TOKENS = 1024
"""Of the sample: those that set the first threshold (`threshold_for`)."""
_LIFTED = 4096
"""Features that are lifted at a time (`lift`)."""


def step_needs(settings: SaeSettings, d_in: int, batch: int, where: Place) -> list[Need]:
    """What `training_pass`, its losses and their gradients need beside the parameters; batch: tokens of a step.

    An allocation without a budget limits nothing, so all entries count as active: an upper bound. A ReLU autoencoder
    starts with about half of them.
    """
    method, bf16 = allocation_of(settings), settings.selection == "bfloat16"
    tile = _tile_bytes(settings.n_features, d_in, batch, where, bf16, method.whole_columns)
    tile *= 2 if settings.needs_gradients else 1  # the gradient's part has the same shapes
    dense = f"{batch:,} x {settings.n_features:,} in {settings.selection}"
    if settings.needs_gradients:
        dense += ", with the gradient's part beside it"
    vectors = _STEP_VECTORS + (3 if settings.needs_gradients else 0)
    entries, entry = settings.k * (1 + MULTI_FACTOR if settings.multi_topk else 1), _ENTRY_BYTES
    if not _has_budget(settings):
        entries, entry = settings.n_features, _DENSE_ENTRY_BYTES[where]
    chosen = 0 if settings.aux.name == "none" else settings.aux.features or max(1, d_in // 2)
    step = batch * (4 * vectors * d_in + entry * entries + _AUX_BYTES * chosen)
    each = f"{vectors} x {d_in:,} x 4 + {entries:,} x {entry} + {chosen} x {_AUX_BYTES} bytes"
    how = f"{batch:,} tokens x ({each})"
    if not _has_budget(settings):
        how += ", as if all features were active: there is no budget"
    return [
        Need("pre-activations", tile, where, f"tiles of {dense}, one at a time, and the weights in that precision"),
        Need(
            "selection",
            _selection_bytes(settings, d_in, batch, tile, where),
            where,
            "copies of a tile in which features are looked for",
        ),
        Need("training step", step, where, how),
    ]


def initialisation_bytes(settings: SaeSettings, d_in: int, sample_tokens: int, where: Place) -> int:
    """What `new_autoencoder` needs beside the parameters and the sample of `sample_tokens`.

    A ReLU's first reconstruction has every positive entry of a part of the sample: half of them, for decoder rows
    point anywhere. Those of other methods have k a token.
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
    """What `calibrate` needs on `tokens` tokens; 0 if inference needs no thresholds set on held-out text."""
    if not allocation_of(settings).calibrated:
        return 0
    largest = settings.k * tokens + 2 * settings.n_features  # looked at: two of each feature beyond its density
    candidates = keys_held(largest, settings.n_features, tokens * settings.n_features)
    return _CANDIDATE_BYTES[where] * candidates + _CALIBRATED_BYTES * max(BLOCK_ENTRIES, settings.n_features)


def _has_budget(settings: SaeSettings) -> bool:
    return allocation_of(settings).initial_threshold is None


def _tile_bytes(
    n_features: int, d_in: int, tokens: int, where: Place, bf16: bool = False, whole_columns: bool = False
) -> int:
    """The buffers of the dense product: a tile of scores, and weights in low precision."""
    scratch = Scratch()
    with no_numbers():
        device = torch.device("cuda" if where == "gpu" else "cpu")
        encoder = Linear(torch.empty(n_features, d_in, device=device), torch.empty(n_features, device=device))
        centred = torch.empty(tokens, d_in, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        for tile in tiles(tokens, n_features, device, bf16, whole_columns):
            encoder.scores(centred, tile, scratch)
        return scratch.bytes


def _selection_bytes(settings: SaeSettings, d_in: int, batch: int, tile: int, where: Place) -> int:
    """Copies of a tile: of the auxiliary loss's targets, of all columns on a GPU; or the products of `lift`."""
    aux = settings.aux.name != "none"
    copies = aux + (2 if allocation_of(settings).whole_columns and where == "gpu" else 0)
    lifted = 4 * min(_LIFTED, settings.n_features) * (batch + d_in) if aux and settings.aux.lift else 0
    return max(copies * tile, lifted)
