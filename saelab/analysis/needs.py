"""The memory that evaluating autoencoders needs. Autoencoders of a sweep are evaluated together."""

from collections.abc import Sequence

from saelab.activations.array.rows import Array
from saelab.activations.needs import array_need, pass_need
from saelab.activations.sinks import MEDIAN_TOKENS
from saelab.activations.sites import Sites, as_sites
from saelab.analysis.decoder import TILE
from saelab.analysis.settings import EvalSettings
from saelab.lm.model import LanguageModel
from saelab.lm.needs import logits_bytes
from saelab.memory import Need, Place, no_numbers
from saelab.sae.needs import encoding_bytes
from saelab.sae.new import bare_autoencoder, widths_of
from saelab.sae.settings import SaeSettings

ENCODING, LOSSES, DECODER = "encoding", "losses", "decoder"
"""Phases of an evaluation: held-out text is encoded, the model runs with reconstructions, decoder rows are compared."""
_ERROR_BYTES = 4 + 3 * 8
"""Bytes per number of a block's activations while its errors are summed: the reconstruction, and three in float64."""
_TOKEN_BYTES = 64
"""Bytes per token of a block besides: its row, position, norm and figures, with temporaries."""
_LOSS_TENSORS = 6
"""Most tensors of the size of the logits at once: the logits, log-probabilities of the clean run and of another, and
three that the KL divergence makes."""


def evaluation_needs(
    saes: Sequence[tuple[SaeSettings, str | Sites]],
    widths: dict[str, int],
    lm: LanguageModel | Array,
    settings: EvalSettings,
    context: int,
    where: Place,
) -> list[Need]:
    """Needs of one `Evaluation` for each of `saes`, settings and sites, that share the passes of the model.

    `widths` has the width of each site; `lm` may have no weights; an array needs no runs of a model. Raises
    Uncountable as `pass_need` does.
    """
    rows = settings.rows_per_forward
    tokens = rows * context
    of = [(sae, widths_of(as_sites(sites), widths)) for sae, sites in saes]
    d_out = sum(each.d_out or each.d_in for _, each in of)
    with no_numbers():
        tables = [list(bare_autoencoder(sae, *each).parameters()) for sae, each in of]
        weights = sum(parameter.nbytes for table in tables for parameter in table)
    encoding = max(
        encoding_bytes(sae, each.d_in, tokens, where) + tokens * (_ERROR_BYTES * each.largest + _TOKEN_BYTES)
        for sae, each in of
    )
    cosines = max(4 * sae.n_features * (TILE + each.largest) for sae, each in of)
    median, first = min(settings.tokens, MEDIAN_TOKENS) + tokens, 4 * d_out + _TOKEN_BYTES * len(saes)
    return [
        Need("autoencoder", weights, where, f"{len(saes)} x as in training"),
        Need("first activations", median * first, where, f"{median:,} tokens x {first:,} bytes", (ENCODING,)),
        *(
            [array_need(lm, tokens, where, (ENCODING,))]
            if isinstance(lm, Array)
            else _loss_needs(lm, widths, d_out, settings, context, where)
        ),
        Need("encoding", encoding, where, f"{tokens:,} tokens at once, and their errors", (ENCODING,)),
        Need("decoder rows", cosines, where, f"{TILE:,} of them with all others", (DECODER,)),
    ]


def _loss_needs(
    lm: LanguageModel, widths: dict[str, int], d_out: int, settings: EvalSettings, context: int, where: Place
) -> list[Need]:
    """Needs of the passes of the model: for activations, and for losses with reconstructions."""
    rows = settings.rows_per_forward
    tokens = rows * context
    kept = min(settings.tokens, settings.ce_tokens) + tokens
    record = 2 * 4 * tokens * max(widths.values())
    losses = 0
    for model in lm.models:  # one after the other
        logits = 4 * tokens * len(model.unembedding)
        needed = max(logits_bytes(model, rows, context) + 2 * logits, _LOSS_TENSORS * logits)
        losses = max(losses, record + needed)
    return [
        Need("reconstructions", 4 * kept * d_out, where, f"{kept:,} tokens for CE x {d_out:,} x 4 bytes"),
        pass_need(lm, list(widths), rows, context, where, phases=(ENCODING,)),
        Need("runs of the model", losses, where, f"{rows} rows x {context} tokens with logits, counted", (LOSSES,)),
    ]
