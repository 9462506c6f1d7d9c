"""The weights that a training starts from, and the first thresholds, both fitted to a sample of activations."""

from collections.abc import Callable

import torch
from torch import Tensor

from saelab.kernels import spmm
from saelab.ranks import total
from saelab.sae.allocation.rules import Rule
from saelab.sae.model import BLOCK_ROWS, SparseAutoencoder

MOST_ENTRIES = 2**24
"""Most pre-activations of the sample that the initial scale and thresholds are fitted to if no budget limits them."""


@torch.no_grad()
def initialise(
    sae: SparseAutoencoder,
    sample: Tensor,
    b_dec_init: str = "mean",
    target: Tensor | None = None,
    rule: Rule | None = None,
    zero_decoder: bool = False,
) -> None:
    """Set the weights: random unit decoder rows, encoder = decoder, b_dec = centre of `sample` ``[tokens, d_in]``.

    `b_dec_init` names the centre: mean, geometric_median or zero. The encoder is then scaled so that the first
    reconstruction of the sample, of the entries that `rule` selects (None: the rule of inference), has the least
    squared error that a common factor can give, unless its rows are bound to those of the decoder. With `target`
    ``[tokens, d_out]``, b_dec is the centre of `target`, the encoder has other random unit rows, and b_enc centres
    x; with `zero_decoder` the decoder is then 0, as sparsify has it, and the encoder keeps its unit rows. So it does
    with trained thresholds: random rows on either side explain next to nothing, and with the factor, some 0.01, every
    pre-activation would be below the least threshold, half a bandwidth.
    """
    _draw(sae, sae.W_dec)
    sae.renormalise_decoder()
    sae.b_enc.zero_()
    output = sample if target is None else target
    sae.b_dec.copy_(CENTRES[b_dec_init](output))
    if sae.centred:
        sae.W_enc.copy_(sae.W_dec)
    else:
        _draw(sae, sae.W_enc)
        sae.W_enc.div_(torch.linalg.vector_norm(sae.W_enc, dim=1, keepdim=True))
        sae.b_enc.copy_(-sae.W_enc @ sample.mean(0))
    if zero_decoder:
        sae.W_dec.zero_()
    thresholds_of_transcoder = target is not None and sae.log_threshold is not None
    if sae.tied or sae.aligned or zero_decoder or thresholds_of_transcoder:
        return
    rule = sae.rule if rule is None else rule
    tokens = 4096 if rule.slots(1) is not None else max(1, min(4096, MOST_ENTRIES // sae.all_features))
    first = total(spmm(sae.encode_by(sample[:tokens], rule), sae.W_dec), sae.ranks.features)
    factor = ((output[:tokens] - sae.b_dec) * first).sum() / first.square().sum().clamp_min(1e-12)
    sae.W_enc.mul_(factor)
    if not sae.centred:
        sae.b_enc.mul_(factor)


@torch.no_grad()
def threshold_for(sae: SparseAutoencoder, l0: float, sample: Tensor) -> float:
    """The threshold that `l0` pre-activations per token of `sample` ``[tokens, d_in]`` exceed on average."""
    tokens = max(1, min(1024, MOST_ENTRIES // sae.all_features))
    pre = sae.pre_activations(sample[:: max(1, len(sample) // tokens)][:tokens])  # neighbours are alike
    entries = max(1, min(round(l0 * len(pre)), len(pre) * sae.all_features))
    largest = pre.flatten().topk(min(entries, pre.numel())).values
    return torch.cat(sae.ranks.features.gather(largest)).topk(entries).values[-1].item()


@torch.no_grad()
def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to `points` ``[n, d]`` (Weiszfeld's iteration), ``[d]``.

    Stops when a step moves it by less than `tolerance` times its distance to the points.
    """
    median = points.mean(0)
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(points - median, dim=1).clamp_min(1e-12)
        weights = 1 / distance
        new = (weights[:, None] * points).sum(0) / weights.sum()
        moved = torch.linalg.vector_norm(new - median)
        median = new
        if moved < tolerance * distance.mean():
            break
    return median


CENTRES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda points: points.mean(0),
    "geometric_median": geometric_median,
    "zero": lambda points: torch.zeros_like(points[0]),
}
"""The centres of points ``[n, d]`` that `initialise` knows, ``[d]``."""


def _draw(sae: SparseAutoencoder, table: Tensor) -> None:
    """Set the rows of `table` to normal numbers: on a CPU those that a process with all rows would draw."""
    if sae.ranks.features.size == 1:
        table.normal_()
        return
    for start in range(0, sae.all_features, BLOCK_ROWS):
        drawn = table.new_empty(min(BLOCK_ROWS, sae.all_features - start), table.shape[1]).normal_()
        first, last = max(sae.part.start, start), min(sae.part.stop, start + len(drawn))
        if first < last:
            table[first - sae.part.start : last - sae.part.start] = drawn[first - start : last - start]
