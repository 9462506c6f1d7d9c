"""How well an autoencoder finds the planted features of synth_world.py: the scores of SynthSAEBench, for synth.py.

Each latent of the autoencoder stands for the planted feature whose direction has the largest absolute cosine with its
decoder row. All means are over all latents, dead ones too.

F1                  mean over latents of the F1 score as detector of that feature: active or not, on each sample.
                    Precision, recall and F1 of a latent are 0 where undefined
MCC                 mean absolute cosine of the one-to-one pairs with the largest sum (Hungarian algorithm)
uniqueness          different features that latents stand for, over the number of latents
explained variance  1 - FVU, as in saelab/analysis/fidelity.py
dead                share of latents that are active on none of the samples
L0                  mean number of active latents of a sample
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from synth_world import Drawn
from torch import Tensor

from saelab.codes import Codes
from saelab.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Scores:
    """The figures defined at the head of this file."""

    l0: float
    f1: float
    precision: float
    recall: float
    mcc: float
    uniqueness: float
    explained_variance: float
    dead: float
    f1_by_quarter: tuple[float, float, float, float]
    """F1 of the quarters of the latents by their own density, the densest first."""
    true_l0: float
    samples: int


@torch.no_grad()
def score(sae: SparseAutoencoder, directions: Tensor, held_out: Iterable[Drawn], scale: float) -> Scores:
    """Scores of `sae`, trained on ``scale * x``, as a detector of the planted `directions` ``[n_true, d_in]``."""
    cosines = (F.normalize(sae.W_dec, dim=1) @ F.normalize(directions, dim=1).T).abs()
    best = cosines.argmax(1)
    counts = torch.zeros(3, sae.n_features, dtype=torch.float64, device=best.device)
    samples = error = squares = true = 0.0
    total = torch.zeros(sae.d_in, dtype=torch.float64, device=best.device)
    for drawn in held_out:
        x = drawn.x * scale
        codes = sae.encode(x)
        counts += hits(codes, drawn.truth, best)
        error += (x.double() - sae.decode(codes)).square().sum().item()
        squares, total = squares + x.double().square().sum().item(), total + x.double().sum(0)
        samples, true = samples + len(x), true + drawn.truth.nnz
    active, planted, both = counts
    deviation = squares - total.square().sum().item() / samples
    precision, recall = _ratio(both, active), _ratio(both, planted)
    f1 = _ratio(2 * both, active + planted)
    by_density = f1[active.argsort(descending=True, stable=True)].tensor_split(4)
    return Scores(
        l0=active.sum().item() / samples,
        f1=f1.mean().item(),
        precision=precision.mean().item(),
        recall=recall.mean().item(),
        mcc=matched_cosine(cosines),
        uniqueness=len(best.unique()) / len(best),
        explained_variance=1 - error / deviation,
        dead=(active == 0).double().mean().item(),
        f1_by_quarter=tuple(part.mean().item() for part in by_density),  # type: ignore[arg-type]
        true_l0=true / samples,
        samples=int(samples),
    )


def hits(codes: Codes, truth: Codes, best: Tensor) -> Tensor:
    """Number of samples on which each latent is active, its feature, and both: ``[3, latents]`` float64.

    `best` ``[latents]`` is the feature of each latent, an index into those of `truth`.
    """
    latents = codes.to_dense() > 0
    features = (truth.to_dense() > 0)[:, best]
    return torch.stack([each.sum(0) for each in (latents, features, latents & features)]).double()


def matched_cosine(cosines: Tensor) -> float:
    """Mean of the absolute cosines ``[latents, features]`` of the one-to-one pairs with the largest sum."""
    sizes = cosines.abs().cpu().double().numpy()
    return float(sizes[linear_sum_assignment(sizes, maximize=True)].mean())


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """`part` / `whole`, 0 where `whole` is 0."""
    return torch.where(whole > 0, part / whole.clamp_min(1), 0.0)
