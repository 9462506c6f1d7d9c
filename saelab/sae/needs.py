"""Memory of an autoencoder's training step, of its initialisation and of its calibration.

The bytes per entry were measured on a CPU as tensors alive at once, and rounded up; the tests repeat the measurement.
"""

from typing import NamedTuple

import torch

from saelab.kernels.cpu import CAST_ENTRIES
from saelab.kernels.products import CAST_ELEMENTS
from saelab.memory import BEGINNING, READING, STEP, THRESHOLDS, Need, Place, no_numbers
from saelab.ranks import ALONE, Axis, Ranks
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.encoder import Linear, Scratch, tiles
from saelab.sae.initial import MOST_ENTRIES
from saelab.sae.losses import MULTI_FACTOR
from saelab.sae.model import BLOCK_ROWS
from saelab.sae.new import first_rule
from saelab.sae.normalisation import NORMALISATIONS
from saelab.sae.settings import SaeSettings
from saelab.sae.thresholds import BLOCK_ENTRIES, key_capacity

_STEP_VECTORS = 10
"""Number of float32 tensors ``[tokens, d_in]`` alive during a step: x, the reconstruction, their difference ..."""
_WHOLE_VECTORS = 2
"""Those of them that have the tokens of all processes: x as it was read, and x. Gradients add as many."""
_ENCODED_VECTORS = 3
"""Number of float32 tensors ``[tokens, d_in]`` alive while `encode` runs: x as it was read, x, x centred."""
_ENTRY_BYTES = 100
"""Bytes per active entry, with its position among the tokens and among the features."""
_DENSE_ENTRY_BYTES = {"memory": 70, "gpu": _ENTRY_BYTES}
"""Bytes per entry if all are active; a CPU then uses dense products, which need no positions among the features."""
_AUX_BYTES = 60
"""Bytes per entry of the auxiliary loss."""
_ALONE_BYTES = 22
"""As many more if features explain the error each alone."""
_GATED_BYTES = 30
"""As many more per active entry of a gated encoder: its magnitude besides its gate, and a second reconstruction."""
_PREFIX_VECTORS = 4
"""Number of float32 tensors ``[tokens, d_in]`` more for each prefix: reconstruction, error, that of the auxiliary
loss."""
_SEGMENT_BYTES = {"memory": 40, "gpu": 60}
"""As many more per entry, of the auxiliary loss too, if prefixes divide them."""
_MET_BYTES = {"candidates": 95, "auxiliary loss": 3}
"""Bytes per entry, of this process or another one, among which this process chooses."""
_OWN_BYTES = {"candidates": 80, "auxiliary loss": 15}
"""Bytes per entry meanwhile that this process proposes: it knows the budget of all, but not what the others have."""
_CANDIDATE_BYTES = {"memory": 8, "gpu": 48}
"""Bytes per pre-activation that may decide a threshold: its key, which a CPU sorts in place. The number for a GPU is
computed, not measured: it adds a sort's result, indices before and after, and two more such arrays for radix sort."""
_CALIBRATED_BYTES = 12
"""Bytes per pre-activation of the block that calibration searches: itself, and all tensors made from it."""
_GATHERED_BYTES = 10
"""Bytes per number of the rows that a product on a CPU casts: in bfloat16, in float32, and times a value."""
_FIRST_TOKENS = 4096
"""Tokens of the sample whose reconstruction sets the first scale of the encoder (`initialise`)."""
_FITTED_MATRICES = 6
"""Number of float64 matrices ``[d_in, d_in]`` alive while whitening is fitted: the covariance, its decomposition ..."""
_THRESHOLD_TOKENS = 1024
"""Tokens of the sample that set the first threshold (`threshold_for`)."""
_LIFTED = 4096
"""Features that are lifted at a time (`lift`)."""


def step_needs(
    settings: SaeSettings,
    d_in: int,
    batch: int,
    where: Place,
    *,
    parts: int = 1,
    rounded: bool = False,
    ranks: Ranks = ALONE,
) -> list[Need]:
    """Needs of `training_pass`, its losses and their gradients besides the parameters; batch: tokens of a step.

    The batch is cut into `parts`, which are trained on one after the other. `rounded`: the step reads copies of the
    tables in bfloat16. An allocation without a budget limits no entries, so all count as active: an upper bound. A
    ReLU autoencoder starts with about half of them. If several processes share the step, these are the needs of each.
    """
    method, bf16, part = allocation_of(settings), settings.selection == "bfloat16", -(-batch // parts)
    tokens, n_features = ranks.data.share(part), ranks.features.share(settings.n_features)
    tile = _tile_bytes(n_features, d_in, tokens, where, bf16, method.whole_columns, rounded)
    if settings.needs_gradients:  # the gradient's part has the same shapes, and its table has no copy
        tile += _tile_bytes(n_features, d_in, tokens, where, bf16, method.whole_columns)
    dense = f"{tokens:,} x {n_features:,} in {settings.selection}"
    if settings.needs_gradients:
        dense += ", and as much for the gradient's part"
    nested = len(settings.prefix_sizes) - 1
    vectors = _STEP_VECTORS + (3 if settings.needs_gradients else 0) + _PREFIX_VECTORS * nested
    budgets = [settings.largest_k, *[MULTI_FACTOR * settings.largest_k] * settings.multi_topk]
    entries, entry = sum(min(n_features, k) for k in budgets), _ENTRY_BYTES
    if not _has_budget(settings):
        entries, entry = n_features, _DENSE_ENTRY_BYTES[where]
    entry += _GATED_BYTES * (settings.encoder.name == "gated") + _SEGMENT_BYTES[where] * (nested > 0)
    chosen = min(n_features, aux_entries(settings, d_in))
    aux = _AUX_BYTES + _ALONE_BYTES * (settings.aux.name == "aux_zipf") + _SEGMENT_BYTES[where] * (nested > 0)
    step = tokens * (4 * vectors * d_in + entry * entries + aux * chosen)
    each = f"{vectors} x {d_in:,} x 4 + {entries:,} x {entry} + {chosen} x {aux} bytes"
    how = f"{tokens:,} tokens x ({each})"
    if tokens < batch:
        whole = _WHOLE_VECTORS * (2 if settings.needs_gradients else 1)
        step += (batch - tokens) * 4 * whole * d_in
        how += f" + {batch - tokens:,} tokens of other parts x {whole} x {d_in:,} x 4 bytes"
    if not _has_budget(settings):
        how += ", as if all features were active: there is no budget"
    table, shape = n_features * d_in, f"{n_features:,} x {d_in:,}"
    cast = 4 * min(CAST_ELEMENTS, table)
    if where == "memory":  # dense products cast a whole table, sparse ones the rows of some entries
        cast = max(4 * table, _GATHERED_BYTES * CAST_ENTRIES * d_in)
    return [
        Need("tables in bfloat16", rounded * 4 * table, where, f"2 x {shape} x 2 bytes", (READING, STEP, THRESHOLDS)),
        Need(
            "table, cast back",
            rounded * cast,
            where,
            "rows of a table that a product casts to float32 at a time",
            (STEP,),
        ),
        Need(
            "pre-activations",
            tile,
            where,
            f"tiles of {dense}, one at a time, and the weights in that precision; kept from step to step",
            (READING, STEP, THRESHOLDS),
        ),
        Need(
            "selection",
            _selection_bytes(settings, n_features, d_in, ranks.data.share(batch), tile, where),  # `lift` sees all parts
            where,
            "copies of a tile that are searched for features",
            (STEP,),
        ),
        Need("training step", step, where, how, (STEP,)),
        _met_need(settings, d_in, part, where, ranks),
    ]


def aux_entries(settings: SaeSettings, d_in: int) -> int:
    """Most features of a token that the auxiliary loss uses."""
    return 0 if settings.aux.name == "none" else settings.aux.features or max(1, d_in // 2)


class Candidates(NamedTuple):
    """The candidates of one process for a rule."""

    axis: Axis
    """The processes whose candidates the rule compares."""
    proposed: int
    """Candidates before those of the other processes are known."""
    sent: int
    """Those of them that other processes, or all, may choose."""
    by_all: bool
    """Whether all processes make the same choice among the candidates of all; if not, each makes a part of it."""


def candidates(settings: SaeSettings, k: int, batch: int, ranks: Ranks) -> list[Candidates]:
    """The candidates of a process if the budget is k per token.

    Of feature choice there are two: those of its first phase, which is mutual choice, and its own, which are proposed
    for capacities up to twice as large (`Bands`).
    """
    tokens, n_features = ranks.data.share(batch), ranks.features.share(settings.n_features)
    of_tokens, of_features = tokens * min(k, n_features), -(-k * batch // ranks.features.size)
    proposed, share = min(k * batch, tokens * n_features), -(-k * batch // ranks.every.size)
    group = max(1, settings.n_features // k)
    of_groups = tokens * min(k, -(-n_features // group) + (n_features % group > 0))  # a border may cut a group
    by_batch = Candidates(ranks.every, proposed, share, True)
    return {
        "token_choice": [Candidates(ranks.features, of_tokens, of_tokens, False)],
        "group_max": [Candidates(ranks.features, of_groups, of_groups, False)],
        "mutual_choice": [by_batch],
        "feature_choice": [by_batch, Candidates(ranks.data, 2 * of_features, of_features, False)],
        "threshold": [],
    }[settings.allocation.name]


def _met_need(settings: SaeSettings, d_in: int, batch: int, where: Place, ranks: Ranks) -> Need:
    """The entries of all processes among which one chooses; the largest of the choices of a step."""
    k = settings.largest_k * (MULTI_FACTOR if settings.multi_topk else 1)
    tokens, n_features = ranks.data.share(batch), ranks.features.share(settings.n_features)
    aux = tokens * min(n_features, aux_entries(settings, d_in))
    choices = [("candidates", each) for each in candidates(settings, k, batch, ranks)]
    choices.append(("auxiliary loss", Candidates(ranks.features, aux, aux, False)))
    needed, met, what = max((_met_bytes(what, each), _met(each), what) for what, each in choices)
    return Need("entries of all processes", needed, where, f"{met:,} of the {what}, among which each chooses", (STEP,))


def _met(found: Candidates) -> int:
    return found.sent * (found.axis.size if found.by_all else 1)


def _met_bytes(what: str, found: Candidates) -> int:
    if found.axis.size == 1:
        return 0
    return _MET_BYTES[what] * _met(found) + _OWN_BYTES[what] * found.proposed


def initialisation_bytes(
    settings: SaeSettings, d_in: int, sample_tokens: int, where: Place, axis: Axis = ALONE.features
) -> int:
    """Bytes that `new_autoencoder` needs besides the parameters and the sample of `sample_tokens`.

    The processes along `axis` share the features.

    A ReLU's first reconstruction has every positive entry of a part of the sample, half of all, because decoder rows
    are random directions. Other methods have k entries per token.
    """
    tokens, n_features = min(_FIRST_TOKENS, sample_tokens), axis.share(settings.n_features)
    dense = max(MOST_ENTRIES, settings.n_features)
    rule = first_rule(settings)
    k = 0 if rule is None else rule.slots(1) or 0
    entries = tokens * k if k else min(tokens * n_features, dense) // 2
    scores = _tile_bytes(n_features, d_in, tokens, where)
    if settings.encoder.name == "jumprelu":
        scores = max(scores, 3 * 4 * min(_THRESHOLD_TOKENS * n_features, dense))
    median = 4 * d_in * sample_tokens if settings.b_dec_init == "geometric_median" else 0
    first = 4 * _STEP_VECTORS * d_in * tokens + _ENTRY_BYTES * entries + scores
    if axis.size > 1:
        drawn = 4 * d_in * min(BLOCK_ROWS, settings.n_features)
        proposed, by_all = tokens * min(k, n_features), rule is not None and rule.compares == "batch"
        sent = -(-k * tokens // axis.size) if by_all else proposed
        first += _met_bytes("candidates", Candidates(axis, proposed, sent, by_all))
        first = max(first, drawn)
    return max(median, first)


def input_needs(inputs: str, d_in: int, sample_tokens: int, where: Place) -> list[Need]:
    """Needs of `activations.inputs` besides those of a scale."""
    if inputs in NORMALISATIONS:
        how = "a copy of the first activations"
        return [Need("tokens, normalised", 4 * d_in * sample_tokens, where, how, (BEGINNING,))]
    if inputs != "whiten":
        return []
    square = f"{d_in:,} x {d_in:,}"
    fitting = _FITTED_MATRICES * 8 * d_in**2 + 4 * d_in * sample_tokens
    how = f"{_FITTED_MATRICES} x {square} x 8 bytes, and a copy of the first activations"
    return [
        Need("whitening", 12 * d_in**2, where, f"{square} x 4 bytes, and its inverse in float64"),
        Need("whitening, while it is fitted", fitting, where, how, (BEGINNING,)),
    ]


def calibration_bytes(settings: SaeSettings, tokens: int, where: Place) -> int:
    """Bytes that `calibrate` needs on `tokens` tokens; 0 if inference needs no thresholds set after training."""
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
        device = torch.device("meta" if where == "gpu" else "cpu")  # a build without CUDA can plan too
        table = torch.empty(n_features, d_in, device=device)
        encoder = Linear(table, torch.empty(n_features, device=device), table.bfloat16() if rounded else None)
        centred = torch.empty(tokens, d_in, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        for tile in tiles(tokens, n_features, device, bf16, whole_columns):
            encoder.scores(centred, tile, scratch)
        return scratch.bytes


def _selection_bytes(settings: SaeSettings, n_features: int, d_in: int, batch: int, tile: int, where: Place) -> int:
    """Bytes of copies of a tile: the auxiliary loss's targets, all columns on a GPU; or of the products of `lift`."""
    aux = settings.aux.name != "none"
    copies = aux + (2 if allocation_of(settings).whole_columns and where == "gpu" else 0)
    lifted = 4 * min(_LIFTED, n_features) * (batch + d_in) if aux and settings.aux.lift else 0
    return max(copies * tile, lifted)
