"""The loss of a training step: a sum of terms. All terms are ratios, so the scale of the data does not matter.

A `Term` has a name (also in the metrics), a weight that may depend on the step, a value, and a request: the entries
that its value needs besides the active ones. `terms` lists the terms of a training.

fvu          squared error over squared deviation from the batch mean
nested       mean of the same over reconstructions from the first features only (Matryoshka, Bussmann et al. 2025,
             arXiv 2503.17547). The weights of fvu and nested make their sum the mean over all G prefixes, with the
             whole autoencoder as the last. The paper and SAELens take the sum, dictionary_learning the mean
multi_topk   the same for a reconstruction with four times the budget, at an eighth of the weight (Gao et al. 2024,
             arXiv 2406.04093)
aux          share of the error that features of little use leave unexplained (their choice: training/usage.py)
             aux_k: dead features, together (Gao et al. 2024)
             aux_zipf: dead features, together, and each under-used one alone (Ayonrinde 2024, arXiv 2411.02124, says
             that it generalises aux_k to under-used features; the formula is our reconstruction)
l1           sum of a over the features, per token, where a is activation times length of the decoder row, over
             sqrt(d_out) (Bricken et al. 2023). A gated encoder's activation is here that of its gate, relu(z)
lp           sum of a^p, per token, smoothed at 0: (a + e)^p - e^p with e = 1e-3. (dictionary_learning lowers p from
             1 while it trains; here it is constant)
tanh         sum of tanh(slope * activation * length of the decoder row), per token: a smooth L0 (Anthropic, January
             2025)
gate         fvu of the reconstruction by relu(z) of a gated encoder, with the decoder detached: it trains the gate,
             which has no gradient from fvu (Rajamanoharan et al. 2024, arXiv 2404.16014)
l0           mean number of active features per token, or (L0 / target - 1)^2; trains JumpReLU's thresholds
             (Rajamanoharan et al. 2024, arXiv 2407.14435)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.kernels import per_entry, sddmm, spmm
from saelab.ranks import ALONE, Axis, Ranks, total
from saelab.sae.allocation.rules import Rule, TokenChoice
from saelab.sae.allocation.selection import Request, Selection
from saelab.sae.encoder import Encoder
from saelab.sae.settings import SaeSettings, SparsitySettings

SMOOTHING = 1e-3
"""lp is smoothed below about this activation over sqrt(d_out); the gradient of a^p at 0 is infinite."""
MULTI_FACTOR = 4
MULTI_WEIGHT = 1 / 8


@dataclass(frozen=True)
class Forward:
    """The forward pass of a training step, from which terms compute their values."""

    encoder: Encoder
    W_dec: Tensor
    read: Tensor | None
    """The copy of W_dec in bfloat16 that decoding reads; None: W_dec itself."""
    added: Tensor
    """What the reconstruction has besides the features' rows: b_dec ``[d_out]``, or with a skip connection b_dec +
    W_skip x ``[tokens, d_out]``."""
    centre: Tensor | None
    """Vector that is subtracted from x: b_dec, or None."""
    x: Tensor
    """``[tokens, d_in]``"""
    target: Tensor
    """The values to reconstruct, ``[tokens, d_out]``."""
    codes: Codes
    """The active entries, with gradients."""
    pre: Tensor
    """Their pre-activations, with gradients, ``[nnz]``."""
    reconstructions: tuple[Tensor, ...]
    """By the first features of each size of `prefixes`, ``[tokens, d_out]``; the last is that of the whole."""
    deviation: Tensor
    """`squared_deviation` of the target of the whole batch, a scalar."""
    ranks: Ranks = ALONE
    """The processes that share the step. Tokens, features and entries are of this one, and values of terms of all."""
    batch: int = 0
    """Tokens of all processes."""
    site_widths: tuple[int, ...] = ()
    """Widths of the sites of a crosscoder; of one site, empty or one width."""
    prefixes: tuple[int, ...] = ()
    """Numbers of features, of this process, of the nested autoencoders; the last is that of all."""

    @property
    def reconstruction(self) -> Tensor:
        """``[tokens, d_out]``"""
        return self.reconstructions[-1]

    def decode(self, selection: Selection) -> Tensor:
        """The reconstruction from other entries, with gradients, ``[tokens, d_out]``."""
        pre = self.encoder.pre(selection.pattern, self.x, self.centre, selection.pre)
        values = self.encoder.values(pre, selection.pattern)
        decoded = spmm(selection.pattern.with_values(values), self.W_dec, read=self.read)
        return total(decoded, self.ranks.features) + self.added


class Term(NamedTuple):
    name: str
    weight: Callable[[int], float]
    """Weight in a step; steps count from 0."""
    value: Callable[[Forward, Selection | None, Tensor], Tensor]
    """A scalar with its gradient, from the forward pass, the entries that were requested, and which features are dead,
    bool ``[n_features]``."""
    request: Callable[[Rule, Tensor | None], Request | None] = lambda rule, targets: None
    """The entries that the value needs, given the rule of the step and the features that an auxiliary loss targets."""


def terms(settings: SaeSettings, d_in: int, steps: int) -> list[Term]:
    """The terms that `settings` name, for a training of `steps` steps on inputs ``[tokens, d_in]``."""
    share = 1 / len(settings.prefix_sizes)
    reconstruction = Term("fvu", lambda step: share, lambda forward, *_: _fvu(forward, forward.reconstruction))
    if share < 1:
        return [reconstruction, Term("nested", lambda step: 1 - share, _nested), *_named(settings, d_in, steps)]
    return [reconstruction, *_named(settings, d_in, steps)]


def _named(settings: SaeSettings, d_in: int, steps: int) -> list[Term]:
    named = [settings.encoder.name, *["multi_topk"] * settings.multi_topk, settings.aux.name, settings.sparsity.name]
    return [TERMS[name](settings, d_in, steps) for name in named if name in TERMS]


def _multi_topk(settings: SaeSettings, d_in: int, steps: int) -> Term:
    return Term("multi_topk", lambda step: MULTI_WEIGHT, _wider_fvu, lambda rule, _: Request(rule.times(MULTI_FACTOR)))


def _aux(settings: SaeSettings, d_in: int, steps: int) -> Term:
    options = settings.aux
    strongest = TokenChoice(options.features or max(1, d_in // 2))

    def request(rule: Rule, targets: Tensor | None) -> Request | None:
        # a GPU's host would have to wait to know whether there are any
        none = targets is not None and targets.device.type == "cpu" and not targets.any()
        return None if none else Request(strongest, targets)

    def value(forward: Forward, entries: Selection | None, dead: Tensor) -> Tensor:
        return auxiliary(forward, entries, None if options.name == "aux_k" else ~dead, settings.unit_norm)

    return Term("aux", lambda step: options.coefficient, value, request)


def _gate(settings: SaeSettings, d_in: int, steps: int) -> Term:
    return Term("gate", lambda step: 1.0, gate)


def _l1(settings: SaeSettings, d_in: int, steps: int) -> Term:
    return Term("l1", _rising(settings.sparsity, steps), l1)


def _lp(settings: SaeSettings, d_in: int, steps: int) -> Term:
    p = settings.sparsity.p
    return Term("lp", _rising(settings.sparsity, steps), lambda forward, *_: lp(forward, p))


def _tanh(settings: SaeSettings, d_in: int, steps: int) -> Term:
    slope = settings.sparsity.slope
    return Term("tanh", _rising(settings.sparsity, steps), lambda forward, *_: smooth_l0(forward, slope))


def _l0(settings: SaeSettings, d_in: int, steps: int) -> Term:
    target = settings.sparsity.target_l0
    return Term("l0", _rising(settings.sparsity, steps), lambda forward, *_: l0(forward, target))


def _rising(options: SparsitySettings, steps: int) -> Callable[[int], float]:
    rise = max(1.0, options.warmup * steps)
    return lambda step: options.coefficient * min(1.0, (step + 1) / rise)


TERMS: dict[str, Callable[[SaeSettings, int, int], Term]] = {
    "multi_topk": _multi_topk,
    "aux_k": _aux,
    "aux_zipf": _aux,
    "gated": _gate,
    "l1": _l1,
    "lp": _lp,
    "tanh": _tanh,
    "l0": _l0,
}
"""The terms that the settings `encoder`, `multi_topk`, `aux` and `sparsity` can name; other names have no term."""


def batch_fvu(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error over squared deviation from the batch mean: x, reconstruction ``[tokens, d]`` -> scalar."""
    # the deviation first, so that its temporary is freed before that of the error is allocated
    deviation = squared_deviation(x)
    return torch.linalg.vector_norm(x - reconstruction).square() / deviation


def row_lengths(rows: Tensor, site_widths: Sequence[int]) -> Tensor:
    """Length of each of `rows` ``[n, d]``; of a crosscoder the sum of those of its parts at the sites, ``[n]``."""
    if len(site_widths) < 2:
        return torch.linalg.vector_norm(rows, dim=1)
    return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in rows.split(list(site_widths), 1)]).sum(0)


def squared_deviation(x: Tensor, axis: Axis = ALONE.data, tokens: int = 0) -> Tensor:
    """Squared deviation of x ``[tokens, d]`` from the mean over tokens, summed; a scalar.

    If processes along `axis` have parts of the tokens, x is the part of this one, and `tokens` the number of all.
    """
    mean = x.mean(0) if axis.size == 1 else axis.sum_(x.sum(0)) / tokens
    return axis.sum_(torch.linalg.vector_norm(x - mean).square())


def _wider_fvu(forward: Forward, wider: Selection | None, *_: Any) -> Tensor:
    assert wider is not None
    return _fvu(forward, forward.decode(wider))


def nested_products(codes: Codes, W_dec: Tensor, read: Tensor | None, prefixes: tuple[int, ...]) -> Iterator[Tensor]:
    """``codes[:, :m] @ W_dec[:m]`` for each m of `prefixes`, which rise, ``[tokens, d_out]``.

    Each is the one before it and one product more, of the entries in between.
    """
    if len(prefixes) == 1:
        yield spmm(codes, W_dec, read=read)
        return
    decoded = None
    for start, stop in pairwise((0, *prefixes)):
        segment = codes.where((codes.features >= start) & (codes.features < stop))
        more = spmm(segment, W_dec, read=read)
        decoded = more if decoded is None else decoded + more
        yield decoded


def _nested(forward: Forward, *_: Any) -> Tensor:
    """Mean FVU over the nested autoencoders that are smaller than the whole, a scalar."""
    return torch.stack([_fvu(forward, each) for each in forward.reconstructions[:-1]]).mean()


def _fvu(forward: Forward, reconstruction: Tensor) -> Tensor:
    error = total(torch.linalg.vector_norm(forward.target - reconstruction).square(), forward.ranks.data)
    return error / forward.deviation


def auxiliary(
    forward: Forward, strongest: Selection | None, living: Tensor | None = None, unit_norm: bool = True
) -> Tensor:
    """Share of the error that chosen features leave unexplained: ``||e - ehat||^2 / ||e - mean e||^2``, a scalar.

    e ``[tokens, d_out]`` is detached. `strongest` holds the chosen features' largest pre-activations of each token,
    -inf in empty slots; ehat decodes those above zero, without bias. The gradient reaches exactly the encoder and
    decoder rows that ehat uses. b_dec receives none: neither side of the ratio contains it, and it is detached in the
    encoder's input. The value is 0 if nothing was chosen, or if the ratio is not finite (no error left).

    Chosen features that are `living`, bool ``[n_features]``, have no part in ehat. Instead each adds to the numerator
    what it alone would change, ``||e - z d||^2 - ||e||^2`` for its value z and its decoder row d on every token that
    it was chosen for. The sum may be less than -||e||^2, since features that each explain the same part of e all count.
    With `unit_norm` no gradient changes the length of these rows d.

    With prefixes the value is the mean over the nested autoencoders, each with its error and those chosen features that
    it has. (The paper on Matryoshka autoencoders takes the error of the whole only.)
    """
    if strongest is None:
        return forward.x.new_zeros(())
    pattern, ranks = strongest.pattern, forward.ranks
    filled = pattern.values > -torch.inf
    known = None if strongest.pre is None else torch.where(filled, strongest.pre, 0.0)
    centre = None if forward.centre is None else forward.centre.detach()
    values = forward.encoder.pre(pattern, forward.x.detach(), centre, known).relu() * filled
    together, alone = values, None
    if living is not None:
        alone = living[ranks.features.part(len(living))][pattern.features]
        together = values * ~alone
    any_filled = ranks.every.max_(filled.any().to(values.dtype)) > 0
    decoded = nested_products(pattern.with_values(together), forward.W_dec, forward.read, forward.prefixes)
    ratios = []
    for size, reconstruction, explained in zip(forward.prefixes, forward.reconstructions, decoded, strict=True):
        error = (forward.target - reconstruction).detach()
        squares = total(torch.linalg.vector_norm(error - total(explained, ranks.features)).square(), ranks.data)
        if alone is not None:
            changing = pattern.with_values(values * (alone & (pattern.features < size)))
            squares = squares + total(_changes_alone(forward, changing, error, unit_norm), ranks.every)
        deviation = squared_deviation(error, ranks.data, forward.batch)
        # a ratio over 0 that is replaced by 0 would still have a gradient of NaN
        ratio = squares / torch.where(deviation > 0, deviation, 1.0)
        ratios.append(torch.where(torch.isfinite(ratio) & (deviation > 0) & any_filled, ratio, 0.0))
    return ratios[0] if len(ratios) == 1 else torch.stack(ratios).mean()


def _changes_alone(forward: Forward, codes: Codes, error: Tensor, unit_norm: bool) -> Tensor:
    """Sum over entries of ``||e - z d||^2 - ||e||^2``, a scalar."""
    z, products = codes.values, sddmm(codes, error, forward.W_dec, read=forward.read)
    # a gradient to lengths would be as large as W_dec, and with unit_norm the optimiser removes it anyway; of a
    # crosscoder it also says how a row is divided among the sites
    rows = forward.W_dec.detach() if unit_norm and len(forward.site_widths) < 2 else forward.W_dec
    return (z * (z * per_entry(codes, torch.linalg.vector_norm(rows, dim=1).square()) - 2 * products)).sum()


def l1(forward: Forward, *_: Any) -> Tensor:
    """Mean over tokens of the sum of activation times length of the decoder row, over sqrt(d_out); a scalar."""
    return _summed(forward, _contributions(forward)) / (forward.batch * forward.target.shape[1] ** 0.5)


def lp(forward: Forward, p: float) -> Tensor:
    """Mean over tokens of the sum of ``(a + e)^p - e^p``, a scalar; a as in `l1`, e = `SMOOTHING`."""
    lengths = _contributions(forward) / forward.target.shape[1] ** 0.5
    return _summed(forward, (lengths + SMOOTHING).pow(p) - SMOOTHING**p) / forward.batch


def smooth_l0(forward: Forward, slope: float) -> Tensor:
    """Mean over tokens of the sum of ``tanh(slope * activation * length of the decoder row)``, a scalar."""
    return _summed(forward, torch.tanh(slope * _contributions(forward))) / forward.batch


def _contributions(forward: Forward) -> Tensor:
    """Activation of each entry (a gated encoder's gate) times the length of its decoder row, ``[nnz]``."""
    lengths = per_entry(forward.codes, row_lengths(forward.W_dec, forward.site_widths))
    return forward.encoder.penalised(forward.pre, forward.codes.values) * lengths


def _summed(forward: Forward, values: Tensor) -> Tensor:
    """The sum of values ``[nnz]`` of the entries, over all processes."""
    return total(values.sum(), forward.ranks.every)


def gate(forward: Forward, *_: Any) -> Tensor:
    """FVU of the reconstruction by relu(z) of the active entries, with W_dec, b_dec and W_skip detached; a scalar.

    Its gradient reaches the gate: W_enc, b_enc, and b_dec through the centring of x.
    """
    opened = forward.codes.with_values(forward.encoder.penalised(forward.pre, forward.codes.values))
    decoded = total(spmm(opened, forward.W_dec.detach(), read=forward.read), forward.ranks.features)
    return _fvu(forward, decoded + forward.added.detach())


def l0(forward: Forward, target: float | None) -> Tensor:
    """L0 of the batch, a scalar, or ``(L0 / target - 1)^2``; its gradient reaches only the thresholds."""
    active = forward.encoder.active(forward.pre, forward.codes).sum()
    found = total(active, forward.ranks.every) / forward.batch
    return found if target is None else (found / target - 1).square()


def under_used(densities: Tensor, expected: Tensor, share: float, uniform: float) -> Tensor:
    """Features active on less than `share` of the tokens expected of their rank: bool ``[n_features]``.

    densities and expected ``[n_features]``; expected is the capped Zipf curve at each feature's rank. Only features
    below the `uniform` density k / n_features count: the densest ones may lie under a curve that does not fit their
    shape, and still be used enough.
    """
    return (densities < share * expected) & (densities < uniform)
