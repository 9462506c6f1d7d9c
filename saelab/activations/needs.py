"""The memory that activations need on their way from the model or a cache to training."""

from collections.abc import Sequence

from saelab.activations.array.rows import Array
from saelab.activations.cache.reader import Cache
from saelab.activations.settings import StreamSettings
from saelab.activations.shuffle import group_tokens
from saelab.activations.source import SAMPLE_TOKENS
from saelab.activations.stream import names_of
from saelab.lm.model import LanguageModel
from saelab.lm.needs import pass_bytes, site_widths
from saelab.memory import BEGINNING, READING, STEP, Need, Place

_ORIGIN_BYTES = 24
"""Bytes per token of an `ActivationBatch` for its id, row and position, int64."""


def pass_need(
    lm: LanguageModel,
    sites: Sequence[str],
    rows: int,
    context: int,
    where: Place,
    *,
    gradients: bool = False,
    what: str = "pass of the model",
    phases: tuple[str, ...] = (),
) -> Need:
    """One `run_model` on `rows` rows of `context` tokens; `lm` may have no weights (`outlined_language_model`).

    The results of a pass are joined, then its ordinary tokens are picked and cast to float32: twice two copies. Raises
    Uncountable if the model does not run without weights.
    """
    width = sum(site_widths(lm, sites).values())
    copies = 2 * rows * context * width * (lm.dtype.itemsize + 4)
    how = f"{rows} rows x {context} tokens at {len(sites)} site{'s' * (len(sites) > 1)}"
    if gradients:
        how += f", logits and backward pass of {min(rows, lm.rows_at_once(context))} at a time"
    counted = pass_bytes(lm, rows, context, sites, gradients=gradients)
    return Need(what, counted + copies, where, f"{how}, counted", phases)


def gathered_need(
    lm: LanguageModel, sites: Sequence[str], rows: int, context: int, own_pass: Need, processes: int, *, gradients: bool
) -> Need:
    """The activations of a pass of each of several processes, and a copy of this process's, which it sends.

    They are gathered after `own_pass` has freed its memory.
    """
    width = sum(site_widths(lm, sites).values())
    tokens, each = rows * context, lm.dtype.itemsize * width + _ORIGIN_BYTES + 4 * width * gradients
    needed = (processes + 1) * tokens * each * (processes > 1)
    how = f"{processes} and a copy x {tokens:,} tokens x {each:,} bytes, less the pass of the model"
    return Need("passes of all processes", max(0, needed - own_pass.bytes), own_pass.where, how, (READING,))


def stream_needs(
    stream: StreamSettings, d_in: int, where: Place, *, batch_tokens: int, sample_tokens: int, gradients: bool
) -> list[Need]:
    """Needs of `FromModel`: a group, or the sample if that is larger, the order of the group, and the sample itself.

    d_in is the sum of the sites' widths.
    """
    group = group_tokens(stream.buffer_tokens, batch_tokens)
    tokens, each = max(group, sample_tokens), (8 if gradients else 4) * d_in + _ORIGIN_BYTES
    return [
        Need("shuffle buffer", tokens * each, where, f"{tokens:,} tokens x {each:,} bytes", (BEGINNING, READING, STEP)),
        Need("order of the buffer", 8 * group, "memory", f"{group:,} tokens x 8 bytes"),
        _sample_need(sample_tokens, d_in, where),
    ]


def array_need(array: Array, rows: int, where: Place, phases: tuple[str, ...]) -> Need:
    """`rows` rows of an array that are read at once, in the dtype of its files and in float32."""
    each = array.d_in * (8 + 4)
    return Need("rows of the array", rows * each, where, f"{rows:,} rows x {each:,} bytes", phases)


def cached_needs(
    cache: Cache | Array,
    site: str | Sequence[str],
    where: Place,
    *,
    batch_tokens: int,
    buffer_tokens: int,
    gradients: bool,
) -> list[Need]:
    """Needs of `FromCache`: two groups, the sample's batches, which are trained on later, and the sample itself.

    Raises SaelabError if the cache has no such site (one or several), or no gradients.
    """
    tokens, each = cache.group_capacity(buffer_tokens), cache.token_bytes(site, gradients=gradients)
    sample_tokens = min(SAMPLE_TOKENS, cache.tokens)
    ahead = sample_tokens + batch_tokens
    d_in = cache.d_in if isinstance(cache, Array) else sum(cache.sites[name] for name in names_of(site))
    return [
        Need(
            "shuffle buffers", 2 * tokens * each, "memory", f"2 x {tokens:,} tokens x {each:,} bytes", (BEGINNING, STEP)
        ),
        Need(
            "first batches",
            ahead * (each + _ORIGIN_BYTES),
            "memory",
            f"{ahead:,} tokens x {each + _ORIGIN_BYTES:,} bytes, kept from the sample",
            (BEGINNING, STEP),
        ),
        _sample_need(sample_tokens, d_in, where),
    ]


def _sample_need(tokens: int, d_in: int, where: Place) -> Need:
    """The sample that training starts from, float32, unscaled and scaled."""
    return Need("sample", 2 * 4 * d_in * tokens, where, f"2 x {tokens:,} tokens x {d_in:,} x 4 bytes", (BEGINNING,))
