"""The passes of the model that find effects of features on a metric. Definitions are in attribution.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.errors import SaelabError
from saelab.kernels import sddmm
from saelab.lm.model import LanguageModel
from saelab.lm.splice import SplicedRuns
from saelab.sae.model import SparseAutoencoder

Metric = Callable[[Tensor, Tensor], Tensor]
"""From logits ``[rows, context, vocabulary]`` (float32 or float64) and token ids ``[rows, context]`` to one number per
row ``[rows]``, by operations of torch; a metric that returns a single number is called with one row at a time."""


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects on the metric in the rows of a block; all tensors are on the CPU."""

    clean: Tensor
    """The metric of each row, ``[rows]`` float64."""
    baseline: Tensor | None
    """The metric with b_dec in place of all activations, ``[rows]`` float64; None if no pass was made for it."""
    error: Tensor
    """Effect of the error in each row, ``[rows]`` float64."""
    row: Tensor
    """Row of each effect of a feature, ``[n]`` int64."""
    position: Tensor
    """Its position, ``[n]`` int64; -1 if the effect is that of the whole row."""
    feature: Tensor
    """``[n]`` int64"""
    effect: Tensor
    """``[n]`` float64"""
    active: Tensor
    """Tokens on which each feature is active, ``[n_features]`` int64."""
    tokens: int

    def check_finite(self, first_row: int) -> None:
        """Raises SaelabError if the metric or an effect in a row is NaN or infinite."""
        of_features = torch.zeros_like(self.clean).scatter_add_(0, self.row, self.effect)
        for what, values in (("the metric", self.clean), ("an effect", of_features + self.error)):
            if len(bad := (~values.isfinite()).nonzero()):
                raise SaelabError(f"attribution: {what} is NaN or infinite in row {int(bad[0]) + first_row}")


class _Parts(NamedTuple):
    """Activations of the ordinary tokens of a block, taken apart, in the autoencoder's dtype."""

    x: Tensor
    """``[tokens, d_in]``"""
    codes: Codes
    error: Tensor
    """``[tokens, d_in]``"""


class AttributionPasses:
    """Each method finds the effects in a block of rows ``[rows, context]``, int64, on the model's device."""

    def __init__(self, lm: LanguageModel, sae: SparseAutoencoder, site: str, metric: Metric) -> None:
        self._lm, self._sae, self._site, self._metric = lm, sae, site, metric
        self._runs = SplicedRuns(lm, site)

    def gradient(self, rows: Tensor) -> Effects:
        """Activations times the gradient at x."""
        parts: list[_Parts] = []
        leaf: list[Tensor] = []

        def cut(x: Tensor) -> Tensor:
            parts.append(self._take_apart(x))
            leaf.append(x.detach().clone().requires_grad_())
            return leaf[0]

        logits = self._lm.spliced_logits(rows, self._site, cut, gradients=True)
        clean = self._metric_of(rows, logits)
        return self._along(rows, parts[0], self._slope(clean, leaf[0]), clean, None)

    def integrated(self, rows: Tensor, steps: int) -> Effects:
        """Activations times the mean gradient on the line from b_dec to x."""
        parts: list[_Parts] = []
        leaf: list[Tensor] = []
        nodes, weights = np.polynomial.legendre.leggauss(steps)

        def start(x: Tensor) -> Tensor:
            parts.append(self._take_apart(x))
            return self._sae.b_dec.detach().to(x.dtype).expand_as(x)

        def on_the_way(share: float, x: Tensor) -> Tensor:
            centre = self._sae.b_dec.detach()
            leaf[:] = [(centre + share * (parts[0].x - centre)).to(x.dtype).requires_grad_()]
            return leaf[0]

        replacements = [start, *(partial(on_the_way, (node + 1) / 2) for node in nodes.tolist())]
        found = map(partial(self._metric_of, rows), self._runs(rows, replacements, gradients=True))
        clean, baseline = next(found), next(found)
        slope = torch.zeros_like(parts[0].x)
        for weight, value in zip((weights / 2).tolist(), found, strict=True):
            slope += weight * self._slope(value, leaf[0])
        return self._along(rows, parts[0], slope, clean, baseline)

    @torch.no_grad()
    def exact(self, rows: Tensor, only: Tensor | None = None) -> Effects:
        """The change of the metric when a feature is taken out of a row; `only` some features, or all that are active.

        In each pass every row of the block lacks another feature of its own.
        """
        row_of_token = self._lm.ordinary(rows).nonzero()[:, 0]
        parts: list[_Parts] = []
        pairs: list[tuple[Tensor, Tensor, Tensor]] = []

        def without_error(x: Tensor) -> Tensor:
            parts.append(self._take_apart(x))
            return (parts[0].x - parts[0].error).to(x.dtype)

        def replacements() -> Iterator[Callable[[Tensor], Tensor]]:
            yield without_error  # and when its pass is over, the codes are there
            codes = parts[0].codes
            if only is not None:
                codes = codes.where(torch.isin(codes.features, only.to(codes.features)))
            row, n = row_of_token[codes.row_of_entry()], codes.n_features
            pair, of_entry = (row * n + codes.features).unique(return_inverse=True)  # rising: those of a row in a run
            begin = torch.searchsorted(pair, torch.arange(len(rows), device=rows.device) * n)
            number = torch.arange(len(pair), device=rows.device) - begin[pair // n]  # of the feature in its row
            pairs.append((pair // n, pair % n, number))
            for turn in range(int(number.max()) + 1 if len(number) else 0):
                yield partial(self._without, parts[0].x, codes, (number[of_entry] == turn).nonzero()[:, 0])

        clean, reconstructed, *ablated = map(partial(self._metric_of, rows), self._runs(rows, replacements()))
        row, feature, number = pairs[0]
        effect = clean[row] - torch.stack([clean, *ablated])[number + 1, row]
        return self._effects(parts[0], clean, None, clean - reconstructed, row, -torch.ones_like(row), feature, effect)

    def _take_apart(self, x: Tensor) -> _Parts:
        x = x.detach().to(self._sae.W_dec.dtype)
        codes = self._sae.encode(x)
        return _Parts(x, codes, x - self._sae.decode(codes).detach())

    def _without(self, x: Tensor, codes: Codes, entries: Tensor, model_x: Tensor) -> Tensor:
        """Activations x less the contributions of some entries, at most one of a token, in the dtype of `model_x`."""
        new, token = x.clone(), codes.row_of_entry()[entries]
        new[token] -= codes.values[entries, None] * self._sae.W_dec[codes.features[entries]]
        return new.to(model_x.dtype)

    def _slope(self, values: Tensor, leaf: Tensor) -> Tensor:
        """The gradient of the metric at the activations `leaf`, in the autoencoder's dtype."""
        slope = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0] if values.requires_grad else None
        if slope is None:
            raise SaelabError(
                "attribution: the metric does not depend on the logits; compute it from them by operations of torch, "
                "without item() or detach()"
            )
        return slope.to(self._sae.W_dec.dtype)

    def _along(self, rows: Tensor, parts: _Parts, slope: Tensor, clean: Tensor, baseline: Tensor | None) -> Effects:
        """Effects of each feature at each token, and of the error, as products with `slope` ``[tokens, d_in]``."""
        row, position = self._lm.ordinary(rows).nonzero(as_tuple=True)
        token = parts.codes.row_of_entry()
        effect = parts.codes.values * sddmm(parts.codes, slope, self._sae.W_dec.detach())
        by_token = (parts.error.double() * slope.double()).sum(1)
        error = torch.zeros(len(rows), dtype=torch.float64, device=rows.device).index_add_(0, row, by_token)
        found = (row[token], position[token], parts.codes.features, effect)
        return self._effects(parts, clean, baseline, error, *found)

    def _effects(
        self,
        parts: _Parts,
        clean: Tensor,
        baseline: Tensor | None,
        error: Tensor,
        row: Tensor,
        position: Tensor,
        feature: Tensor,
        effect: Tensor,
    ) -> Effects:
        clean, error, effect = (each.detach().double().cpu() for each in (clean, error, effect))
        baseline = None if baseline is None else baseline.detach().double().cpu()
        row, position, feature = (each.long().cpu() for each in (row, position, feature))
        active = parts.codes.firing_counts().cpu()
        return Effects(clean, baseline, error, row, position, feature, effect, active, len(parts.x))

    def _metric_of(self, rows: Tensor, logits: Tensor) -> Tensor:
        """The metric of each row, ``[rows]``."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found = self._metric(logits, rows)
        if isinstance(found, Tensor) and found.ndim == 0:
            found = torch.stack([self._metric(logits[i : i + 1], rows[i : i + 1]) for i in range(len(rows))])
        if not isinstance(found, Tensor) or found.shape != rows.shape[:1]:
            what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise SaelabError(
                f"attribution: the metric gave {what} for {len(rows)} rows; return one number per row, as a tensor"
            )
        return found
