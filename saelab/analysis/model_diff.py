"""What two models have in common: the features of a crosscoder of both, by their decoder rows and on text.

With every site in the units of training (side_by_side.py), z_i the activation of feature i, and d_i1 and d_i2 the parts
of its decoder row at the sites of the first and of the second model:

relative norm   ||d_i2|| / (||d_i1|| + ||d_i2||), each length being the sum over the sites of the model: 0 for a feature
                of the first model only, 1 for one of the second only, 0.5 for a shared one (Lindsey et al. 2024).
                Counted as only in the first below 0.1, as shared from 0.4 to 0.6, as only in the second above 0.9
                (Minder et al. 2025)
cosine          of d_i1 and d_i2
latent scaling  a check of the features of one model only (Minder et al. 2025, arXiv 2504.02922; details as in their
                code). d is the longer of d_i1 and d_i2, and y a target in a model m:

                    beta = argmin sum over tokens of ||beta z_i d - y||^2 = sum z_i d.y / (||d||^2 sum z_i^2)

                and its ratio is beta in the model with the shorter part over beta in the one with the longer.
                *Error ratio*: y is the error of m without feature i, x_m - xhat_m + z_i d_im. Near 1, the other model
                has the feature too, and its row was shrunk to 0 (complete shrinkage).
                *Reconstruction ratio*: y is xhat_m. Near 1, other features stand for it there (latent decoupling).
                A feature that only one model has is near 0 in both

Lengths and cosines are properties of the weights; the rest is over ordinary tokens, sums in float64. Only features that
are active on the text are counted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.intervals import Interval
from saelab.analysis.result import Result
from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.kernels import sddmm
from saelab.lm.settings import SECOND, is_second
from saelab.sae.model import SparseAutoencoder
from saelab.sae.side_by_side import comparable_rows, factors_of, site_shares

if TYPE_CHECKING:
    import plotly.graph_objects as go

ONLY, SHARED = 0.1, (0.4, 0.6)
"""Relative norm below which a feature is only in the first model, and between which it is shared."""
CONFIRMED = (0.2, 0.5)
"""Largest error ratio and reconstruction ratio of a feature that is confirmed as one of one model only."""
_BINS = 50


@dataclass(frozen=True, eq=False, repr=False)
class ModelDiff(Result):
    """What is defined at the head of this file; NaN where a feature is never active or writes nothing."""

    models: tuple[str, ...]
    """Names of the first and of the second model; of two with one name, the second ends in @second."""
    tokens: int
    relative_norm: np.ndarray
    """``[n_features]`` float64"""
    cosine: np.ndarray
    """``[n_features]`` float64"""
    active: np.ndarray
    """Number of tokens on which each feature is active, ``[n_features]`` int64."""
    error_ratio: np.ndarray
    """``[n_features]`` float64"""
    reconstruction_ratio: np.ndarray
    """``[n_features]`` float64"""

    def only_in(self, model: int) -> np.ndarray:
        """Whether each feature is active and only in the first (0) or the second (1) model, ``[n_features]`` bool."""
        norm = self.relative_norm if model == 0 else 1 - self.relative_norm
        return (self.active > 0) & (norm < ONLY)

    @property
    def shared(self) -> np.ndarray:
        """Whether each feature is active and in both models, ``[n_features]`` bool."""
        low, high = SHARED
        return (self.active > 0) & (self.relative_norm >= low) & (self.relative_norm <= high)

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        living, shared = self.active > 0, self.shared
        found: dict[str, int | float | str | Interval] = {
            "tokens": self.tokens,
            "features": len(living),
            "features that are active": int(living.sum()),
            f"shared (relative norm {SHARED[0]} to {SHARED[1]})": int(shared.sum()),
        }
        for i, bound in enumerate((f"below {ONLY}", f"above {1 - ONLY}")):
            found[f"only in {self.models[i]} (relative norm {bound})"] = int(self.only_in(i).sum())
        found["median relative norm"] = _median(self.relative_norm[living])
        found["median cosine of shared features"] = _median(self.cosine[shared])
        for i, model in enumerate(self.models):
            only = self.only_in(i)
            if only.any():
                error, whole = self.error_ratio[only], self.reconstruction_ratio[only]
                found[f"only in {model}: median error ratio"] = _median(error)
                found[f"only in {model}: median reconstruction ratio"] = _median(whole)
                confirmed = int(((error < CONFIRMED[0]) & (whole < CONFIRMED[1])).sum())
                found[f"only in {model}: ratios below {CONFIRMED[0]} and {CONFIRMED[1]}"] = confirmed
        return found

    def plot(self) -> "go.Figure":
        """Number of active features by relative norm."""
        import plotly.graph_objects as go

        edges = np.linspace(0, 1, _BINS + 1)
        counts = np.histogram(self.relative_norm[self.active > 0], edges)[0]
        figure = go.Figure(go.Bar(x=(edges[:-1] + edges[1:]) / 2, y=counts, width=1 / _BINS))
        for bound in (ONLY, *SHARED, 1 - ONLY):
            figure.add_vline(x=bound, line_dash="dot")
        title = f"relative norm: 0 is only in {self.models[0]}, 1 only in {self.models[1]}"
        return figure.update_layout(xaxis_title=title, yaxis_title="features")


@torch.no_grad()
def model_diff(sae: SparseAutoencoder, blocks: Iterable[Block]) -> ModelDiff:
    """The features of `sae`, a crosscoder of two models, compared between the models on the tokens of `blocks`.

    Memory: the decoder once more, and for each block its reconstruction and one number per active entry. Raises
    SaelabError unless `sae` is a crosscoder of as many sites, of equal widths, of each model.
    """
    first, second = _columns_of_models(sae)
    factors = factors_of(sae)
    rows = comparable_rows(sae)[1].float()
    parts = [rows[:, first], rows[:, second]]
    shares = site_shares(sae).double().cpu()
    norm = (shares * _of_second(sae)).sum(1)
    norm[shares.sum(1) == 0] = torch.nan
    own = torch.where((norm > 0.5).to(rows.device)[:, None], parts[1], parts[0])
    n = sae.n_features
    squares, active, tokens = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.long), 0
    along = torch.zeros(2, 2, n, dtype=torch.float64)  # by target, error or reconstruction, and by model
    for block in blocks:
        codes = block.codes
        reconstruction = sae.decode(codes, block.x).float() * factors
        targets = (block.x * factors - reconstruction, reconstruction)
        weights, features = codes.values.double(), codes.features.long()
        for i, target in enumerate(targets):
            for model, columns in enumerate((first, second)):
                dots = sddmm(codes, target[:, columns], own).double()
                along[i, model] += torch.bincount(features, weights * dots, n).cpu()
        squares += torch.bincount(features, weights.square(), n).cpu()
        active += codes.firing_counts().cpu()
        tokens += len(block.x)
    length = own.double().square().sum(1).cpu()
    beta = along / (length * squares)
    beta[0] += torch.stack([(own * part).double().sum(1).cpu() for part in parts]) / length
    longer = (norm > 0.5).long()[None]
    ratios = [(each.gather(0, 1 - longer) / each.gather(0, longer))[0].numpy() for each in beta]
    names = sae.metadata.get("model_name") or "first", sae.metadata.get("second_model_name") or "second"
    return ModelDiff(
        models=(str(names[0]), f"{names[1]}{SECOND}" if names[0] == names[1] else str(names[1])),
        tokens=tokens,
        relative_norm=norm.numpy(),
        cosine=F.cosine_similarity(*parts, dim=1).double().cpu().numpy(),
        active=active.numpy(),
        error_ratio=ratios[0],
        reconstruction_ratio=ratios[1],
    )


def _of_second(sae: SparseAutoencoder) -> Tensor:
    """1 for each site of the second model and 0 for the others, ``[sites]`` float64.

    Raises SaelabError unless `sae` is a crosscoder of two models.
    """
    names = sae.metadata.get("hook_names")
    of_second = [is_second(str(name)) for name in names] if isinstance(names, list) else []
    if len(of_second) != len(sae.site_widths) or not any(of_second) or all(of_second):
        raise SaelabError("model_diff: takes a crosscoder of two models (second_model), and this autoencoder is none")
    return torch.tensor(of_second, dtype=torch.float64)


def _columns_of_models(sae: SparseAutoencoder) -> tuple[Tensor, Tensor]:
    """The dimensions of each model's sites, ``[d]`` each."""
    of_second = _of_second(sae).bool().tolist()
    parts = torch.arange(sae.d_in, device=sae.W_dec.device).split(list(sae.site_widths))
    ours, theirs = ([part for part, second in zip(parts, of_second, strict=True) if second == i] for i in (0, 1))
    if [len(part) for part in ours] != [len(part) for part in theirs]:
        raise SaelabError(
            "model_diff: compares decoder rows of both models, and their sites differ in number or width; site_norms "
            "takes any"
        )
    return torch.cat(ours), torch.cat(theirs)


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")
