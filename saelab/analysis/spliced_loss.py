"""The loss of a language model with a site's activations replaced. Definitions are in fidelity.py."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.activations.stream import check_finite
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.lm.splice import SplicedRuns
from saelab.progress import Track, silent

WITHOUT_SINKS = "ce_spliced_without_sinks"
_RUNS = {
    "ce_clean": "in the clean run",
    "ce_spliced": "with the reconstruction in place of the activations",
    "ce_zero_ablated": "with zeros in place of the activations",
    "ce_mean_ablated": "with the mean in place of the activations",
    WITHOUT_SINKS: "with the reconstruction in place of all activations but sinks",
}


class Spliced(NamedTuple):
    """Rows of text and what takes the place of their activations at the site."""

    first_row: int
    """Number of the first row."""
    rows: Tensor
    """Token ids ``[rows, context]``."""
    reconstructions: Sequence[Tensor]
    """Each autoencoder's reconstruction of the ordinary tokens, ``[tokens, d_in]``."""
    no_sink: Tensor | None = None
    """Which of these tokens are no sinks, bool ``[tokens]``; None in all blocks if there are no sinks."""


@torch.no_grad()
def spliced_losses(
    lm: LanguageModel,
    site: str,
    blocks: Sequence[Spliced],
    mean: Tensor,
    track: Track = silent,
) -> list[dict[str, Any]]:
    """CE of the clean, spliced, zero- and mean-ablated runs, KL and ce_tokens, by their names in `Fidelity`.

    One dictionary for each autoencoder; `mean` is the mean activation ``[d_in]``. Each block takes three runs of the
    model and one for each autoencoder, which share the layers below the site (`SplicedRuns`). If the blocks say which
    tokens are no sinks, one more for each leaves the sinks clean; otherwise there are none, and its CE is that of the
    spliced run.
    Raises SaelabError if no position has a loss, and, with row and position, if a loss is NaN or infinite.
    """
    sinks = any(block.no_sink is not None for block in blocks)
    of_each = ["ce_spliced", *([WITHOUT_SINKS] if sinks else [])]
    saes = range(len(blocks[0].reconstructions)) if blocks else range(1)
    names = ["ce_clean", *(name for _ in saes for name in of_each), "ce_zero_ablated", "ce_mean_ablated"]
    of = [None, *(sae for sae in saes for _ in of_each), None, None]
    shared: dict[str, float] = dict.fromkeys(("ce_clean", "ce_zero_ablated", "ce_mean_ablated"), 0.0)
    own: list[dict[str, float]] = [dict.fromkeys([*of_each, "kl"], 0.0) for _ in saes]
    n, runs = 0, SplicedRuns(lm, site)
    total = sum(block.rows.numel() for block in blocks)
    for block in track(iter(blocks), "spliced loss", total, lambda block: block.rows.numel()):
        rows = block.rows
        keep = lm.scored(rows)
        row, position = keep.nonzero(as_tuple=True)
        targets = rows.roll(-1, 1)[keep]
        n += len(targets)
        replacements: list[Callable[[Tensor], Tensor]] = []
        for reconstruction in block.reconstructions:
            replacements.append(partial(stand_in, reconstruction))
            if block.no_sink is not None:
                replacements.append(partial(_stand_in_at, block.no_sink, reconstruction))
        replacements += [torch.zeros_like, partial(stand_in, mean)]
        log_p = map(partial(log_probabilities, keep), runs(rows, replacements))
        clean = next(log_p)
        for sae, name, other in zip(of, names, chain([clean], log_p), strict=True):
            sums = shared if sae is None else own[sae]
            losses = F.nll_loss(other, targets, reduction="none").double()
            what = f"losses {_RUNS[name]}"
            check_finite(f"{site}: {lm.name}", what, losses[:, None], row + block.first_row, position)
            sums[name] += losses.sum().item()
            if name == "ce_spliced":
                sums["kl"] += F.kl_div(other, clean, reduction="none", log_target=True).sum(1).double().sum().item()
    if not n:
        raise SaelabError(
            "fidelity: no position has an ordinary token followed by another, so there is no loss; use a larger "
            "`context` or another text"
        )
    means = [{name: value / n for name, value in (shared | sums).items()} for sums in own]
    return [{"ce_tokens": n, WITHOUT_SINKS: each["ce_spliced"], **each} for each in means]


def stand_in(value: Tensor, x: Tensor) -> Tensor:
    """`value` in the place of x, in its dtype: a replacement as `LanguageModel.spliced_logits` takes it."""
    return value.to(x.dtype).expand_as(x)


def _stand_in_at(tokens: Tensor, value: Tensor, x: Tensor) -> Tensor:
    """`value` at these `tokens`, bool ``[tokens]``; the others stay."""
    return torch.where(tokens[:, None], stand_in(value, x), x)


def log_probabilities(keep: Tensor, logits: Tensor) -> Tensor:
    """Log-probabilities at the positions in `keep` ``[rows, context]``, ``[positions, vocabulary]`` float32."""
    return logits[keep].float().log_softmax(-1)
