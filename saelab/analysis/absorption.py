"""Absorption: a feature that is silent on some tokens of its concept because a narrower feature has taken over.

    found = absorption(sae, x, letters, train)  # x at the last token of words, letters: the first letter of each

Chanin et al. 2024 (arXiv 2409.14507), as SAEBench measures it. Each class is a concept; some words are fitted to, the
others are scored. A class has

probe        a logistic regression of x; p is its direction, of length 1
main         the features that stand for the class: the first k by how far their means differ, in standard deviations,
             where k grows up to 10 as long as F1 of a logistic regression of these k activations rises by more than
             0.03. (SAEBench orders them by the weights of an L1 probe; the rule for k is the paper's.)

On scored words of the class that the probe gets right, with x p > 0, an active feature i contributes z_i d_i p:

full         1 if no main feature is active, and the feature with the largest contribution has a cosine to p of at least
             0.025 and contributes at least 0.4 of x p
fraction     T = x p, P what the main features contribute, A the three largest contributions of others with a cosine of
             at least 0.1: 0 if P >= T or A < 0.4 T; 1 if P <= 0; else B / (B + P) with B = min(A, T - P)

The rates are means over the words of a class, and over classes. Intervals are over words. The paper uses models of 1 B
parameters and more, and SAEBench of 2 B. Read both F1 first: without a good probe the model does not know the concept,
and without good main features there is nothing that narrower ones could take over from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.affine import check_affine, check_reconstructs
from saelab.analysis.intervals import Interval, interval
from saelab.analysis.result import Result
from saelab.codes import Codes
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MAIN = 10
"""Most main features of a class."""
RISE = 0.03
"""F1 that one more main feature must add."""
SHARE = 0.4
"""Least share of x p that an absorbing feature contributes."""
COSINE_FULL, COSINE = 0.025, 0.1
ABSORBERS = 3
LEAST = 10
"""Fewest words of a class, in the fit and among the scored; classes with fewer are left out."""


class Concept(NamedTuple):
    """A class of words."""

    label: int
    words: int
    """Scored words of the class that the probe gets right."""
    probe_f1: float
    """F1 of the probe on the scored words of all classes."""
    main: tuple[int, ...]
    """Features."""
    main_f1: float
    """F1 of the logistic regression of their activations, on the same words."""
    full: float
    """Mean of `full` over `words`; NaN without words."""
    fraction: float


@dataclass(frozen=True, eq=False, repr=False)
class Absorption(Result):
    """Rates of absorption; the head of the file defines them."""

    full: Interval
    fraction: Interval
    probe_f1: float
    """Mean over classes."""
    main_f1: float
    """Mean over classes."""
    concepts: tuple[Concept, ...]
    left_out: int
    """Classes with too few words."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        return {
            "full absorption (share of words)": self.full,
            "absorption, fraction": self.fraction,
            "F1 of the probes": self.probe_f1,
            "F1 of the main features": self.main_f1,
            "main features per class": float(np.mean([len(each.main) for each in self.concepts])),
            "classes": len(self.concepts),
            "classes left out": self.left_out,
        }

    def by_class(self) -> "pd.DataFrame":
        """A line per class."""
        import pandas as pd

        return pd.DataFrame(self.concepts, columns=list(Concept._fields)).set_index("label")

    def plot(self) -> "go.Figure":
        """Both rates of each class."""
        import plotly.graph_objects as go

        labels = [str(each.label) for each in self.concepts]
        figure = go.Figure(layout={"barmode": "group", "xaxis_title": "class", "yaxis_title": "share of words"})
        figure.add_bar(x=labels, y=[each.full for each in self.concepts], name="full")
        figure.add_bar(x=labels, y=[each.fraction for each in self.concepts], name="fraction")
        return figure


@torch.no_grad()
def absorption(sae: SparseAutoencoder, x: Tensor, labels: Tensor, train: Tensor) -> Absorption:
    """Absorption rates of classes of words in `sae`.

    x ``[words, d_in]`` are activations where the class of a word is known to the model, unscaled as `sae` takes them;
    `labels` ``[words]`` int64, -1 for words of no class; `train` ``[words]`` bool, the words that probes and main
    features are fitted to, the others are scored. Raises SaelabError if shapes disagree, if no class has enough
    words, for a transcoder, and for an autoencoder that is not `affine`.
    """
    if not len(x) == len(labels) == len(train):
        raise SaelabError(f"absorption: {len(x)} activations, {len(labels)} labels and {len(train)} of `train`")
    check_affine(sae, "absorption")
    check_reconstructs(sae, "absorption")
    x, labels, train = x.detach(), labels.to(x.device), train.to(x.device)
    codes, concepts, left_out, columns = sae.encode(x), [], 0, []
    classes = [int(label) for label in labels.unique() if label >= 0]
    for label in classes:
        positive = labels == label
        if min((positive & train).sum(), (positive & ~train).sum()) < LEAST:
            left_out += 1
            continue
        weights, bias = logistic(x[train], positive[train])
        guess, p = x.double() @ weights + bias > 0, F.normalize(weights, dim=0)
        main, main_f1 = _main(codes, positive, train)
        scored = positive & ~train & guess & (x.double() @ p > 0)
        full, fraction = _absorbed(sae.W_dec.double(), codes, x.double() @ p, p, main)
        columns.append(torch.stack([scored, full * scored, fraction * scored]).double())
        words = int(scored.sum())
        rates = [float(each[scored].double().mean()) if words else float("nan") for each in (full, fraction)]
        concepts.append(Concept(label, words, _f1(guess[~train], positive[~train]), main, main_f1, *rates))
    if not concepts:
        raise SaelabError(
            f"absorption: none of {len(classes)} classes has {LEAST} words to fit and {LEAST} to score; give more words"
        )
    sums = torch.stack(columns)[:, :, ~train].permute(2, 1, 0).cpu().numpy()  # [words, 3, classes]
    flat = sums.reshape(len(sums), -1)
    return Absorption(
        full=interval(flat, lambda s: _mean_rate(s, 1), resamples=500),
        fraction=interval(flat, lambda s: _mean_rate(s, 2), resamples=500),
        probe_f1=float(np.mean([each.probe_f1 for each in concepts])),
        main_f1=float(np.mean([each.main_f1 for each in concepts])),
        concepts=tuple(concepts),
        left_out=left_out,
    )


def logistic(x: Tensor, positive: Tensor, penalty: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weights ``[d]`` and bias of a logistic regression of x ``[tokens, d]``, classes of equal weight, in float64.

    `penalty` is that of the squared weights where the inputs have a mean of 0 and a root mean square of 1.
    """
    x, y = x.double(), positive.double()
    mean = x.mean(0)
    scale = (x - mean).square().mean().sqrt().clamp_min(1e-12)
    inputs, weight = (x - mean) / scale, torch.where(positive, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        margin = inputs @ parameters[:-1] + parameters[-1]
        value = F.binary_cross_entropy_with_logits(margin, y, weight) + penalty * parameters[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    weights = parameters.detach()[:-1] / scale
    return weights, parameters.detach()[-1] - weights @ mean


def _main(codes: Codes, positive: Tensor, train: Tensor) -> tuple[tuple[int, ...], float]:
    """The main features of a class, and F1 of their logistic regression on the words that are scored."""
    entries, n = codes.row_of_entry(), codes.n_features

    def sums(words: Tensor, power: int) -> Tensor:
        kept = words[entries]
        zeros = torch.zeros(n, dtype=torch.float64, device=words.device)
        return zeros.index_add(0, codes.features[kept].long(), codes.values[kept].double() ** power)

    inside, outside = positive & train, ~positive & train
    means = [sums(words, 1) / words.sum() for words in (inside, outside)]
    variance = sums(train, 2) / train.sum() - (sums(train, 1) / train.sum()).square()
    difference = (means[0] - means[1]).abs() / variance.clamp_min(1e-12).sqrt()
    order = difference.argsort(descending=True, stable=True)[:MAIN]
    place = torch.full((n,), -1, device=order.device)
    place[order] = torch.arange(len(order), device=order.device)
    known = place[codes.features.long()] >= 0
    dense = torch.zeros(codes.tokens, len(order), dtype=torch.float64, device=order.device)
    dense[entries[known], place[codes.features[known].long()]] = codes.values[known].double()
    best, scored = -RISE, 0.0
    for k in range(1, len(order) + 1):
        weights, bias = logistic(dense[train, :k], positive[train])
        guess = dense[:, :k] @ weights + bias > 0
        f1 = _f1(guess[train], positive[train])
        if f1 <= best + RISE:
            return tuple(order[: k - 1].tolist()), scored
        best, scored = f1, _f1(guess[~train], positive[~train])
    return tuple(order.tolist()), scored


def _absorbed(W_dec: Tensor, codes: Codes, total: Tensor, p: Tensor, main: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`full` (0 or 1) and `fraction` of every word, float64 ``[words]``; total = x p."""
    along = W_dec @ p
    cosine = along / torch.linalg.vector_norm(W_dec, dim=1).clamp_min(1e-12)
    is_main = torch.zeros(codes.n_features, dtype=torch.bool, device=p.device)
    is_main[list(main)] = True
    token, feature = codes.row_of_entry(), codes.features.long()
    contribution, of_main = codes.values.double() * along[feature], is_main[feature]
    order = contribution.argsort(descending=True, stable=True)
    order = order[token[order].argsort(stable=True)]  # by word, largest contribution first

    first = torch.zeros_like(total, dtype=torch.bool)
    heads = codes.offsets[:-1].long()[codes.offsets.diff() > 0]
    strongest = order[heads]
    first[token[strongest]] = (cosine[feature[strongest]] >= COSINE_FULL) & (
        contribution[strongest] >= SHARE * total[token[strongest]]
    )
    zeros = torch.zeros_like(total)
    by_main = zeros.index_add(0, token[of_main], contribution[of_main])
    active_main = zeros.index_add(0, token[of_main], torch.ones_like(contribution[of_main])) > 0
    others = order[~of_main[order] & (cosine[feature[order]] >= COSINE) & (contribution[order] > 0)]
    counts = torch.bincount(token[others], minlength=len(total))
    rank = torch.arange(len(others), device=p.device) - (counts.cumsum(0) - counts)[token[others]]
    others = others[rank < ABSORBERS]
    by_others = zeros.index_add(0, token[others], contribution[others])

    absorbed = torch.minimum(by_others, total - by_main)
    fraction = torch.where(by_main <= 0, 1.0, absorbed / (absorbed + by_main))
    fraction = torch.where((by_main >= total) | (by_others < SHARE * total), 0.0, fraction)
    return (first & ~active_main).double(), fraction.double()


def _mean_rate(sums: np.ndarray, which: int) -> np.ndarray:
    """Mean over classes with words of the rate `which` (1: full, 2: fraction), from sums ``[..., 3 x classes]``."""
    by_class = sums.reshape(*sums.shape[:-1], 3, -1)
    with np.errstate(invalid="ignore"):
        rates = by_class[..., which, :] / by_class[..., 0, :]
    return np.nanmean(rates, -1) if np.isfinite(rates).any() else np.full(rates.shape[:-1], np.nan)


def _f1(guess: Tensor, truth: Tensor) -> float:
    hits = (guess & truth).sum()
    return float(2 * hits / (guess.sum() + truth.sum()).clamp_min(1))
