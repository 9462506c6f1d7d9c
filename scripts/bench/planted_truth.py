"""Activations made from a planted dictionary, and scores of how much of it an autoencoder finds, for planted.py.

    x = sum of active features (Zipf-distributed, independent) of magnitude * direction + noise

Directions are random unit vectors, more of them than dimensions. Feature r is active on a token with the probability
that a capped Zipf curve gives rank r, the probabilities summing to the mean number of active features; magnitudes are
uniform between 0.5 and 1.5. A loss for gradients comes from a fixed random linear readout into a few classes, whose
label is drawn from its own prediction on the noiseless activation: a stand-in for a language model's next token.
Some features can be small (`Small`): half of them move the readout's logits far, the other half are their control.

Scores, the same for every method, on fresh tokens, in inference mode (thresholds, or the k largest of a token):

recovered       share of the planted features that can be paired one-to-one with decoder rows at a cosine above 0.9
mean cosine     mean over planted features of the largest cosine with any decoder row
FVU, L0         as in saelab/analysis/fidelity.py
dead            features active on none of the tokens
under-used      features, dead ones included, active on less than half of what the planted curve gives their rank
                by density, and below the uniform density (losses.under_used)
delta CE        what the reconstruction adds to the readout's loss, in nats
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.sae.allocation.capacity import expected_densities, ranks
from saelab.sae.initial import initialise
from saelab.sae.losses import under_used
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.settings import SaeSettings
from saelab.sae.thresholds import calibrate
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import train

_BLOCK = 4096
"""Tokens drawn or encoded at a time."""

RECOVERED = 0.9
"""Cosine from which a decoder row counts as a planted feature."""

_SHARE = 0.5
"""Share of its rank's planted density below which a feature is under-used."""


@dataclass(frozen=True)
class Small:
    """Planted features of small magnitude, orthogonal to all others; every other one of them has a large effect."""

    every: int
    """One feature in so many is small."""
    magnitude: float
    """Their magnitude, as a share of the others'."""
    effect: float
    """Standard deviation over classes of the logits that an effective one adds at its mean magnitude. The others of
    the dictionary add some 4 / sqrt(d_in)."""


@dataclass(frozen=True)
class Planted:
    """A dictionary and the other parameters of a distribution of activations."""

    directions: Tensor
    """Unit vectors ``[n_true, d_in]``, the most frequent first."""
    probabilities: Tensor
    """Probability that each feature is active on a token, ``[n_true]`` float64."""
    readout: Tensor
    """``[d_in, classes]``."""
    noise: float
    """Length of the noise, as a share of the length of the signal (both as root mean squares)."""
    exponent: float
    shift: float
    scale: float
    """Factor of the activations, so that E||x||^2 = d_in."""
    magnitudes: Tensor
    """Mean magnitude of each active feature before scaling, ``[n_true]``."""
    effective: Tensor
    """Features of small magnitude and large effect, bool ``[n_true]``."""


@dataclass(frozen=True)
class Sample:
    """Activations, gradients of the readout's loss at them, both ``[tokens, d_in]``, and labels ``[tokens]`` int64."""

    x: Tensor
    gradients: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Scores:
    """The figures defined at the head of this file."""

    k: float
    """The budget of inference that gives the target L0."""
    l0: float
    recovered: float
    mean_cosine: float
    fvu: float
    dead: float
    under_used: float
    delta_ce: float
    tokens: int


def plant(
    d_in: int,
    n_true: int,
    l0: float,
    *,
    exponent: float,
    shift: float,
    noise: float,
    seed: int,
    classes: int = 32,
    small: Small | None = None,
) -> Planted:
    """A dictionary of `n_true` random directions, `l0` of them active on a token on average."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(n_true, d_in, generator=generator), dim=1)
    probabilities = expected_densities(n_true, l0, 1, exponent, shift)
    # a logit is a sum over active features of a direction's product with a column: this makes it a few units wide
    readout = torch.randn(d_in, classes, generator=generator) * 4 / (d_in * l0) ** 0.5
    readout = readout * l0**0.5
    magnitudes, effective = torch.ones(n_true), torch.zeros(n_true, dtype=torch.bool)
    if small is not None:
        which = torch.arange(small.every // 2, n_true, small.every)
        axes = torch.linalg.qr(directions[which].T).Q.T
        directions = F.normalize(directions - directions @ axes.T @ axes, dim=1)
        directions[which], magnitudes[which] = axes, small.magnitude
        effective[which[::2]] = True
        logits = small.effect * torch.randn(int(effective.sum()), classes, generator=generator)
        own = directions[effective]
        readout = readout + own.T @ (logits / small.magnitude - own @ readout)
    unscaled = Planted(directions, probabilities, readout, noise, exponent, shift, 1.0, magnitudes, effective)
    x = draw(unscaled, 20_000, seed + 1_000_003).x
    scale = (d_in / x.square().sum(1).double().mean().item()) ** 0.5
    return replace(unscaled, readout=readout / scale, scale=scale)


@torch.no_grad()
def draw(planted: Planted, tokens: int, seed: int) -> Sample:
    """`tokens` independent activations; the same seed gives the same ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(tokens, planted.directions.shape[1])
    sample = Sample(x, torch.empty_like(x), torch.empty(tokens, dtype=torch.long))
    for start in range(0, tokens, _BLOCK):
        rows = slice(start, min(start + _BLOCK, tokens))
        parts = _draw(planted, rows.stop - start, generator)
        sample.x[rows], sample.gradients[rows], sample.labels[rows] = parts
    return sample


def _draw(planted: Planted, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    d_in, p = planted.directions.shape[1], planted.probabilities
    active = torch.rand(tokens, len(p), generator=generator) < p
    magnitude = active * (0.5 + torch.rand(tokens, len(p), generator=generator)) * planted.magnitudes
    signal = planted.scale * magnitude @ planted.directions
    # E magnitude^2 = 13 / 12, and the cross terms of random directions vanish on average
    deviation = planted.noise * planted.scale * (float((p * planted.magnitudes.square()).sum()) * 13 / 12 / d_in) ** 0.5
    x = signal + deviation * torch.randn(tokens, d_in, generator=generator)
    labels = torch.multinomial((signal @ planted.readout).softmax(1), 1, generator=generator).squeeze(1)
    wrong = (x @ planted.readout).softmax(1) - F.one_hot(labels, planted.readout.shape[1])
    return x, wrong @ planted.readout.T, labels


def learn(
    settings: SaeSettings, training: TrainingSettings, data: Sample, seed: int
) -> tuple[SparseAutoencoder, Tensor | None, list[float]]:
    """An autoencoder trained on `data` in its order; the densities its thresholds must reproduce; FVU per log line."""
    sae = random_dictionary(settings, data, seed)
    x, gradients = data.x.split(training.batch), data.gradients.split(training.batch)
    batches = (Batch(x, gradients=g if settings.needs_gradients else None) for x, g in zip(x, gradients, strict=True))
    fvu: list[float] = []
    trained = train(sae, batches, training, settings, log=lambda metrics: fvu.append(metrics["fvu"]))
    return sae.requires_grad_(False), trained.densities, fvu


def random_dictionary(settings: SaeSettings, data: Sample, seed: int) -> SparseAutoencoder:
    """The start of a training: random directions, with the best common scale."""
    torch.manual_seed(seed + 500_009)  # another seed than the planted one, which would draw the planted directions
    sae = SparseAutoencoder(data.x.shape[1], settings.n_features, settings.k)
    initialise(sae, data.x[:16_384], settings.b_dec_init)
    return sae


def set_l0(sae: SparseAutoencoder, densities: Tensor | None, l0: float, x: Tensor) -> float:
    """Set inference so that `l0` features are active on the tokens x ``[tokens, d_in]``; returns the budget for it.

    Token choice (`densities` None) uses the integer k that comes nearest. Thresholds reproduce the densities times a
    common factor, more than 1 if some features have too few positive pre-activations for their densities.
    """
    if densities is None:
        realised: dict[int, float] = {}
        for k in range(max(1, int(l0)), sae.n_features + 1):
            sae.k = k
            realised[k] = _mean_l0(sae, x)
            if realised[k] >= l0 or realised[k] == realised.get(k - 1):  # enough, or no positive pre-activations left
                break
        sae.k = min(realised, key=lambda k: abs(realised[k] - l0))
        return sae.k
    budget = (densities.sum() if densities.ndim else densities * sae.n_features).item()
    factor = l0 / budget
    for _ in range(6):
        targets = (factor * densities).clamp_max(1)
        sae.threshold = calibrate(sae.pre_activations, x.split(_BLOCK), targets, len(x)).threshold.reshape(-1)
        active = _mean_l0(sae, x)
        if abs(active / l0 - 1) < 0.005:
            break
        factor *= l0 / max(active, 1e-9)
    return factor * budget


def _mean_l0(sae: SparseAutoencoder, x: Tensor) -> float:
    return sum(int(sae.encode(block).l0().sum()) for block in x.split(_BLOCK)) / len(x)


@torch.no_grad()
def score(sae: SparseAutoencoder, planted: Planted, held_out: Sample, k: float) -> Scores:
    """Scores of `sae` in inference mode against the planted dictionary; `k` is the budget that `set_l0` returned."""
    n, x = len(held_out.x), held_out.x
    mean = x.double().mean(0)
    error = deviation = clean = spliced = 0.0
    counts = torch.zeros(sae.n_features, dtype=torch.long)
    for start in range(0, n, _BLOCK):
        block, labels = x[start : start + _BLOCK], held_out.labels[start : start + _BLOCK]
        codes = sae.encode(block)
        reconstruction = sae.decode(codes)
        counts += codes.firing_counts()
        error += (block.double() - reconstruction).square().sum().item()
        deviation += (block.double() - mean).square().sum().item()
        clean += F.cross_entropy(block @ planted.readout, labels, reduction="sum").item()
        spliced += F.cross_entropy(reconstruction @ planted.readout, labels, reduction="sum").item()
    densities = counts.double() / n
    l0 = float(planted.probabilities.sum())
    curve = expected_densities(sae.n_features, l0, 1, planted.exponent, planted.shift)[ranks(densities)]
    cosines = cosine_similarity(planted.directions, sae.W_dec)
    return Scores(
        k=k,
        l0=densities.sum().item(),
        recovered=len(largest_matching(cosines > RECOVERED)) / len(cosines),
        mean_cosine=cosines.amax(1).mean().item(),
        fvu=error / deviation,
        dead=(counts == 0).double().mean().item(),
        under_used=under_used(densities, curve, _SHARE, l0 / sae.n_features).double().mean().item(),
        delta_ce=(spliced - clean) / n,
        tokens=n,
    )


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of all pairs of rows: a ``[n, d]``, b ``[m, d]`` -> ``[n, m]``."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def largest_matching(allowed: Tensor) -> dict[int, int]:
    """The largest set of allowed pairs (row, column) without a common row or column, as a map from row to column.

    `allowed` is bool ``[n, m]``. The Hungarian method for weights 0 and 1: each row searches a path of swaps that frees
    a column for it. Only whether a cosine exceeds the bound matters, so this is the largest possible count.
    """
    reachable: list[list[int]] = [[] for _ in range(len(allowed))]
    for row, column in allowed.nonzero().tolist():
        reachable[row].append(column)
    of_row: dict[int, int] = {}
    of_column: dict[int, int] = {}
    for start in range(len(reachable)):
        came_from: dict[int, int] = {}
        queue, free = [start], None
        for row in queue:
            for column in reachable[row]:
                if column in came_from:
                    continue
                came_from[column] = row
                if column not in of_column:
                    free = column
                    break
                queue.append(of_column[column])
            if free is not None:
                break
        while free is not None:  # swap along the path that led here, back to the start
            row = came_from[free]
            of_column[free] = row
            before = of_row.get(row)
            of_row[row], free = free, before
    return of_row
