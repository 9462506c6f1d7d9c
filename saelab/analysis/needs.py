"""The memory that evaluating autoencoders needs. Autoencoders of a sweep are evaluated together."""

from collections.abc import Sequence

from saelab.activations.needs import pass_need
from saelab.activations.sinks import MEDIAN_TOKENS
from saelab.analysis.decoder import TILE
from saelab.analysis.settings import EvalSettings
from saelab.lm.model import LanguageModel
from saelab.lm.needs import logits_bytes
from saelab.memory import Need, Place, no_numbers
from saelab.sae.needs import encoding_bytes
from saelab.sae.new import bare_autoencoder
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
    saes: Sequence[tuple[SaeSettings, str]],
    widths: dict[str, int],
    lm: LanguageModel,
    settings: EvalSettings,
    context: int,
    where: Place,
) -> list[Need]:
    """Needs of one `Evaluation` for each of `saes`, settings and site, that share the passes of the model.

    `widths` has d_in of each site; `lm` may have no weights. Raises Uncountable as `pass_need` does.
    """
    rows = settings.rows_per_forward
    tokens, vocabulary, d_in = rows * context, len(lm.unembedding), sum(widths[site] for _, site in saes)
    with no_numbers():
        tables = [list(bare_autoencoder(sae, widths[site]).parameters()) for sae, site in saes]
        weights = sum(parameter.nbytes for table in tables for parameter in table)
    encoding = max(
        encoding_bytes(sae, widths[site], tokens, where) + tokens * (_ERROR_BYTES * widths[site] + _TOKEN_BYTES)
        for sae, site in saes
    )
    logits, record = 4 * tokens * vocabulary, 2 * 4 * tokens * max(widths.values())
    losses = record + max(logits_bytes(lm, rows, context) + 2 * logits, _LOSS_TENSORS * logits)
    cosines = max(4 * sae.n_features * (TILE + widths[site]) for sae, site in saes)
    kept = min(settings.tokens, settings.ce_tokens) + tokens
    median, each = min(settings.tokens, MEDIAN_TOKENS) + tokens, 4 * d_in + _TOKEN_BYTES * len(saes)
    return [
        Need("autoencoder", weights, where, f"{len(saes)} x as in training"),
        Need("reconstructions", 4 * kept * d_in, where, f"{kept:,} tokens for CE x {d_in:,} x 4 bytes"),
        Need("first activations", median * each, where, f"{median:,} tokens x {each:,} bytes", (ENCODING,)),
        pass_need(lm, list(widths), rows, context, where, phases=(ENCODING,)),
        Need("encoding", encoding, where, f"{tokens:,} tokens at once, and their errors", (ENCODING,)),
        Need("runs of the model", losses, where, f"{rows} rows x {context} tokens with logits, counted", (LOSSES,)),
        Need("decoder rows", cosines, where, f"{TILE:,} of them with all others", (DECODER,)),
    ]
