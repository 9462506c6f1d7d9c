"""The loss of a language model with a site's activations replaced. Definitions are in fidelity.py."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.lm.splice import SplicedRuns
from saelab.progress import Track, silent


@torch.no_grad()
def spliced_losses(
    lm: LanguageModel,
    site: str,
    blocks: Sequence[tuple[Tensor, Tensor]],
    mean: Tensor,
    track: Track = silent,
) -> dict[str, Any]:
    """CE of the clean, spliced, zero- and mean-ablated runs, KL and ce_tokens, by their names in `Fidelity`.

    `blocks` are pairs of rows ``[rows, context]`` and the reconstruction of their ordinary tokens ``[tokens, d_in]``;
    `mean` is the mean activation ``[d_in]``. Each block takes four runs of the model, which share the layers below the
    site (`SplicedRuns`).
    Raises SaelabError if no position has a loss.
    """
    sums = dict.fromkeys(["ce_clean", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated", "kl"], 0.0)
    n, runs = 0, SplicedRuns(lm, site)
    total = sum(rows.numel() for rows, _ in blocks)
    for rows, reconstruction in track(iter(blocks), "spliced loss", total, lambda block: block[0].numel()):
        keep = lm.scored(rows)
        targets = rows.roll(-1, 1)[keep]
        n += len(targets)
        replacements: dict[str, Callable[[Tensor], Tensor]] = {
            "ce_spliced": partial(_stand_in, reconstruction),
            "ce_zero_ablated": torch.zeros_like,
            "ce_mean_ablated": partial(_stand_in, mean),
        }
        log_p = map(partial(_log_probabilities, keep), runs(rows, replacements.values()))
        clean = next(log_p)
        sums["ce_clean"] += _summed_loss(clean, targets)
        for name, other in zip(replacements, log_p, strict=True):
            sums[name] += _summed_loss(other, targets)
            if name == "ce_spliced":
                sums["kl"] += F.kl_div(other, clean, reduction="none", log_target=True).sum(1).double().sum().item()
    if not n:
        raise SaelabError(
            "fidelity: no position has an ordinary token followed by another, so there is no loss; use a larger "
            "`context` or another text"
        )
    return {"ce_tokens": n} | {name: value / n for name, value in sums.items()}


def _stand_in(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.dtype).expand_as(x)


def _log_probabilities(keep: Tensor, logits: Tensor) -> Tensor:
    return logits[keep].float().log_softmax(-1)


def _summed_loss(log_p: Tensor, targets: Tensor) -> float:
    return F.nll_loss(log_p, targets, reduction="none").double().sum().item()
