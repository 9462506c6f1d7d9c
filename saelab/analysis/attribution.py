"""Effects of features on a metric of the logits, through all that the model does after their site.

    x = sum over features of a W_dec row + b_dec + error        a: the activation of a feature on a token

The effect of a feature on a row of text is the metric with the feature less the metric without it, so it is positive
if the feature raises the metric. The error is a part of its own: it stays when a feature is taken out, and no gradient
passes through it or through the encoder. Special tokens stay clean. There are three methods:

exact        the metric less the metric with the feature's activation at 0 on all tokens of the row and everything else
             at the site as it is
gradient     sum over tokens of a (W_dec row . gradient of the metric at x): exact if the metric is linear in x
integrated   the same with the mean gradient on the line from x = b_dec, where all activations and the error are 0, to
             x. Effects of features and error add up to the metric less the baseline, which is the metric at b_dec

The error's effect is found in the same way: by gradients, or exactly, with x replaced by its reconstruction.

Exact effects and those of gradients do not add up, because features act together after the site. Integrated gradients
divide what all of them do together, so they are no estimate of a single ablation. `gap` says how far their sum is from
the difference: the sum over rows of |sum of effects - difference| over the sum of |difference|. It comes from rounding
and from the Gauss-Legendre rule with `steps` nodes that takes the mean. If it is above 0.05, use more steps.

Cost per row, in passes through the layers above the site, besides one through those below it: gradient 1 and a backward
pass; integrated 2, and `steps` with a backward pass each; exact 2, and one for each feature that is active in the row
(for a block of rows, as many as its row with the most such features needs).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.affine import check_affine
from saelab.analysis.attribution_passes import AttributionPasses, Metric
from saelab.analysis.intervals import Interval, interval
from saelab.analysis.result import Result
from saelab.analysis.steering import check_fits
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Method = Literal["gradient", "integrated", "exact"]


class Entries(NamedTuple):
    """Some single effects, the largest in absolute value first."""

    row: np.ndarray
    """``[n]`` int64"""
    position: np.ndarray
    """Position in the row, ``[n]`` int64; -1 if the method is exact: the effect of the whole row."""
    feature: np.ndarray
    """``[n]`` int64"""
    effect: np.ndarray
    """``[n]`` float64, in units of the metric"""


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Result):
    """Effects on a metric, in its units; the head of the file defines them."""

    site: str
    method: str
    tokens: int
    """Ordinary tokens of the text."""
    metric: np.ndarray
    """The metric of each row in the clean run, ``[rows]`` float64."""
    baseline: np.ndarray | None
    """The metric of each row with b_dec in place of all activations, ``[rows]`` float64; only of method integrated."""
    effect: np.ndarray
    """Effect of each feature, summed over rows, ``[n_features]`` float64; 0 if it is nowhere active, NaN if it is
    active but was not asked for."""
    active: np.ndarray
    """Tokens on which each feature is active, ``[n_features]`` int64."""
    by_row: np.ndarray
    """Sum of the features' effects in each row, ``[rows]`` float64."""
    error_by_row: np.ndarray
    """Effect of the error in each row, ``[rows]`` float64."""
    strongest: Entries
    """The strongest effects of single features in single rows, at single positions unless the method is exact."""

    @property
    def error(self) -> float:
        """Effect of the error, summed over rows."""
        return float(self.error_by_row.sum())

    @property
    def gap(self) -> float | None:
        """How far the effects are from adding up, as a share; None unless the method is integrated."""
        if self.baseline is None:
            return None
        difference = self.metric - self.baseline
        return float(np.abs(self.by_row + self.error_by_row - difference).sum() / np.abs(difference).sum())

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        largest = self.by_feature().head(5)
        named = (f"{feature} ({effect:.3g})" for feature, effect in zip(largest.feature, largest.effect, strict=True))
        found: dict[str, int | float | str | Interval] = {
            "site": self.site,
            "method": self.method,
            "rows": len(self.metric),
            "tokens": self.tokens,
            "metric (mean of rows)": _mean(self.metric),
            "effect of the features (mean of rows)": _mean(self.by_row),
            "effect of the error (mean of rows)": _mean(self.error_by_row),
            "largest effects (sum of rows)": ", ".join(named),
        }
        if self.baseline is None or self.gap is None:
            return found
        return found | {"metric at the baseline (mean of rows)": _mean(self.baseline), "gap of the sum": self.gap}

    def by_feature(self) -> "pd.DataFrame":
        """A line per active feature that was asked for: effect, active tokens; the largest absolute effect first."""
        import pandas as pd

        which = np.flatnonzero((self.active > 0) & ~np.isnan(self.effect))
        which = which[np.argsort(-np.abs(self.effect[which]), kind="stable")]
        return pd.DataFrame({"feature": which, "effect": self.effect[which], "active": self.active[which]})

    def plot(self) -> "go.Figure":
        """The 20 features with the largest effects, and the error."""
        import plotly.graph_objects as go

        largest = self.by_feature().head(20)
        names = [*(f"feature {feature}" for feature in largest.feature), "error"]
        figure = go.Figure(go.Bar(x=[*largest.effect, self.error], y=names, orientation="h"))
        figure.update_yaxes(autorange="reversed")
        title = f"{self.site}: effects on the metric, {self.method}"
        return figure.update_layout(title=title, xaxis_title=f"effect, sum over {len(self.metric):,} rows")


def attribute(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    rows: Tensor,
    metric: Metric,
    site: str | None = None,
    *,
    method: Method = "gradient",
    steps: int = 16,
    features: Collection[int] | None = None,
    rows_per_forward: int = 16,
    strongest: int = 1000,
    track: Track = silent,
) -> Attribution:
    """The effect of every feature at `site` on `metric`, on the text `rows` ``[rows, context]``.

    `site` defaults to the one the autoencoder was trained at. `steps` is the number of nodes of integrated gradients.
    `features` limits the exact method, which takes a pass for each, to some features. The result has the `strongest`
    single effects too. Memory: a pass over `rows_per_forward` rows, fewer if their logits would have more than 2^26
    numbers, with what its backward pass needs.

    Raises SaelabError for an unknown site, method or feature, a transcoder, widths or devices that differ, a row
    without an ordinary token, and a metric that is not one finite number per row or does not depend on the logits.
    """
    site = site or sae.metadata.get("hook_name")
    if site is None:
        raise SaelabError("attribution: the autoencoder does not say its site; pass site='blocks.N.hook_resid_post'")
    _check(lm, sae, rows, site, method, features)
    for name, number in (("steps", steps), ("rows_per_forward", rows_per_forward)):
        if number < 1:
            raise SaelabError(f"attribution: {name}={number} is not a positive number")
    passes = AttributionPasses(lm, sae, site, metric)
    only = None if features is None else torch.tensor(sorted(set(features)), dtype=torch.long)
    effect = torch.zeros(sae.n_features, dtype=torch.float64)
    active = torch.zeros(sae.n_features, dtype=torch.long)
    best, parts, starts, first, tokens = torch.zeros(4, 0, dtype=torch.float64), [], [], 0, 0
    blocks = rows.split(min(rows_per_forward, lm.rows_at_once(rows.shape[1])))
    for block in track(iter(blocks), "attribution", rows.numel(), lambda block: block.numel()):
        ids = block.to(lm.device).long()
        if method == "exact":
            found = passes.exact(ids, only)
        else:
            found = passes.integrated(ids, steps) if method == "integrated" else passes.gradient(ids)
        found.check_finite(first)
        active += found.active
        tokens += found.tokens
        effect.scatter_add_(0, found.feature, found.effect)
        by_row = torch.zeros(len(block), dtype=torch.float64).scatter_add_(0, found.row, found.effect)
        parts.append((found.clean, by_row, found.error))
        starts += [] if found.baseline is None else [found.baseline]
        here = torch.stack([found.row.double() + first, found.position.double(), found.feature.double(), found.effect])
        best = torch.cat([best, here], 1)
        best = best[:, best[3].abs().argsort(descending=True, stable=True)[:strongest]]
        first += len(block)
    if only is not None:
        effect[(active > 0) & ~torch.isin(torch.arange(sae.n_features), only)] = torch.nan
    row, position, feature = best[:3].long().numpy()
    metrics, by_row, error = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Attribution(
        site=site,
        method=method,
        tokens=tokens,
        metric=metrics,
        baseline=torch.cat(starts).numpy() if starts else None,
        effect=effect.numpy(),
        active=active.numpy(),
        by_row=by_row,
        error_by_row=error,
        strongest=Entries(row, position, feature, best[3].numpy()),
    )


def next_token_loss(lm: LanguageModel) -> Metric:
    """The metric of the loss: cross-entropy of the next token in nats, summed over the `scored` positions of a row."""

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
        return (losses * lm.scored(rows)[:, :-1]).sum(1)

    return loss


def _check(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    rows: Tensor,
    site: str,
    method: str,
    features: Collection[int] | None,
) -> None:
    """Raises SaelabError for what `attribute` cannot do."""
    check_fits(sae, lm.name, site, lm.width(site), lm.device, "attribution")
    check_affine(sae, "attribution")
    if method not in get_args(Method):
        raise SaelabError(f"attribution: {method!r} is not a method; use {', '.join(get_args(Method))}")
    if features is not None and method != "exact":
        raise SaelabError("attribution: features= limits the passes of the exact method; the others give all features")
    for feature in features or ():
        if not 0 <= feature < sae.n_features:
            raise SaelabError(f"attribution: there is no feature {feature}: features are 0 to {sae.n_features - 1}")
    empty = (~lm.ordinary(rows).any(1)).nonzero().flatten().tolist()
    if not len(rows) or empty:
        which = f"row {empty[0]} has" if empty else "there is"
        raise SaelabError(f"attribution: {which} no ordinary token; leave such rows out")


def _mean(of_rows: np.ndarray) -> Interval:
    """Mean over rows with its interval."""
    return interval(np.stack([of_rows, np.ones(len(of_rows))], 1))
