"""The loss of a language model with a site's activations replaced. Definitions are in fidelity.py."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.activations.sinks import within
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


@torch.no_grad()
def spliced_losses(
    lm: LanguageModel,
    site: str,
    blocks: Sequence[tuple[int, Tensor, Tensor]],
    mean: Tensor,
    sink_norm: float | None = None,
    track: Track = silent,
) -> dict[str, Any]:
    """CE of the clean, spliced, zero- and mean-ablated runs, KL and ce_tokens, by their names in `Fidelity`.

    `blocks` are the number of the first row, rows ``[rows, context]`` and the reconstruction of their ordinary tokens
    ``[tokens, d_in]``; `mean` is the mean activation ``[d_in]``. Each block takes four runs of the model, which share
    the layers below the site (`SplicedRuns`). With `sink_norm`, a fifth run leaves tokens of larger norms clean; None
    means that there are none, and its CE is that of the spliced run.
    Raises SaelabError if no position has a loss, and, with row and position, if a loss is NaN or infinite.
    """
    names = [name for name in _RUNS if name != WITHOUT_SINKS or sink_norm is not None]
    sums = dict.fromkeys([*names, "kl"], 0.0)
    n, runs = 0, SplicedRuns(lm, site)
    total = sum(rows.numel() for _, rows, _ in blocks)
    for first_row, rows, reconstruction in track(iter(blocks), "spliced loss", total, lambda block: block[1].numel()):
        keep = lm.scored(rows)
        row, position = keep.nonzero(as_tuple=True)
        targets = rows.roll(-1, 1)[keep]
        n += len(targets)
        replacements: dict[str, Callable[[Tensor], Tensor]] = {
            "ce_spliced": partial(_stand_in, reconstruction),
            "ce_zero_ablated": torch.zeros_like,
            "ce_mean_ablated": partial(_stand_in, mean),
        }
        if sink_norm is not None:
            replacements[WITHOUT_SINKS] = partial(_stand_in_below, sink_norm, reconstruction)
        log_p = map(partial(_log_probabilities, keep), runs(rows, replacements.values()))
        clean = next(log_p)
        for name, other in zip(names, chain([clean], log_p), strict=True):
            losses = F.nll_loss(other, targets, reduction="none").double()
            what = f"losses {_RUNS[name]}"
            check_finite(f"{site}: {lm.name}", what, losses[:, None], row + first_row, position)
            sums[name] += losses.sum().item()
            if name == "ce_spliced":
                sums["kl"] += F.kl_div(other, clean, reduction="none", log_target=True).sum(1).double().sum().item()
    if not n:
        raise SaelabError(
            "fidelity: no position has an ordinary token followed by another, so there is no loss; use a larger "
            "`context` or another text"
        )
    means = {name: value / n for name, value in sums.items()}
    return {"ce_tokens": n, WITHOUT_SINKS: means["ce_spliced"], **means}


def _stand_in(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype).expand_as(x)


def _stand_in_below(norm: float, value: Tensor, x: Tensor) -> Tensor:
    """`value` for tokens of norms up to `norm`; the others stay."""
    keep = within(x.float(), norm)
    new = _stand_in(value, x)
    return new if keep is None else torch.where(keep[:, None], new, x)


def _log_probabilities(keep: Tensor, logits: Tensor) -> Tensor:
    return logits[keep].float().log_softmax(-1)
