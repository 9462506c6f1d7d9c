"""How far decoder rows are sums of few common directions: a small autoencoder of the rows of W_dec.

    found = meta_structure(sae.W_dec)
    found.explained, found.explained_by_chance

The rows, scaled to length 1, are the data. A BatchTopK autoencoder (`allocation: mutual_choice`) is trained on them
with this package's trainer, with k active meta-features per row on average. Explained is 1 - FVU: the share of the
variance of the rows about their mean that its reconstruction explains, in inference, with the threshold at which k per
row are active.

By chance: the same training on `random_rows`, which have the same mean and covariance. An autoencoder explains some of
any rows, more if they have few large directions of variance; only what it explains beyond that is structure.

The literature calls the small autoencoder a meta-SAE.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.intervals import Interval, interval, ratio
from saelab.analysis.result import Result
from saelab.analysis.similarity import random_rows
from saelab.errors import SaelabError
from saelab.sae.model import Batch
from saelab.sae.new import new_autoencoder
from saelab.sae.settings import AllocationSettings, SaeSettings
from saelab.sae.thresholds import calibrate
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import train

if TYPE_CHECKING:
    import plotly.graph_objects as go

BATCH = 1024


@dataclass(frozen=True, eq=False, repr=False)
class MetaStructure(Result):
    """Variance of decoder rows that a small autoencoder of them explains; the head of the file defines it."""

    n_features: int
    """Number of decoder rows."""
    meta_features: int
    """Features of the autoencoder of the rows."""
    l0: float
    """Its active features per row."""
    never_active: int
    """Its features that are active on no row."""
    explained: Interval
    """1 - FVU; the interval is over decoder rows."""
    explained_by_chance: Interval
    explained_of_row: np.ndarray
    """1 - squared error over squared length, both about the mean row, of each decoder row, ``[n_features]`` float32."""
    explained_of_row_by_chance: np.ndarray
    """The same of random rows."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        return {
            "decoder rows": self.n_features,
            "meta-features": self.meta_features,
            "L0 (active meta-features per row)": self.l0,
            "never active (meta-features)": self.never_active,
            "variance of the rows explained": self.explained,
            "variance of random rows explained": self.explained_by_chance,
        }

    def plot(self) -> "go.Figure":
        """Histograms of the share explained of each row, and of random rows."""
        import plotly.graph_objects as go

        figure = go.Figure(layout={"barmode": "overlay", "xaxis_title": "share explained", "yaxis_title": "rows"})
        for name, shares in (("decoder", self.explained_of_row), ("random", self.explained_of_row_by_chance)):
            counts, edges = np.histogram(shares.clip(-1, 1), 50, (-1.0 if shares.min() < 0 else 0.0, 1.0))
            figure.add_bar(x=(edges[:-1] + edges[1:]) / 2, y=counts, name=name, opacity=0.7)
        return figure


def meta_structure(
    W_dec: Tensor, *, meta_features: int | None = None, k: int = 4, rows_seen: int = 1_000_000, seed: int = 0
) -> MetaStructure:
    """Explained variance of the rows of `W_dec` ``[n_features, d]``, beside that of random rows of the same shape.

    `meta_features` defaults to 3 d, at most a quarter of the rows. Each of the two trainings shows the rows in random
    order until about `rows_seen` were shown, which takes rows_seen x meta_features x d multiply-adds and a few times
    more for the gradients. Raises SaelabError if there are too few rows or meta-features.
    """
    rows = F.normalize(W_dec.detach().float(), dim=1)
    rows = rows[rows.any(1)]
    meta_features = meta_features or min(3 * rows.shape[1], len(rows) // 4)
    if not 1 <= k <= meta_features < len(rows):
        raise SaelabError(
            f"meta_structure: {meta_features} meta-features with k={k} of {len(rows)} decoder rows; give more "
            "meta-features than k, and fewer than there are rows"
        )
    like = torch.from_numpy(random_rows(rows.cpu().numpy(), np.random.default_rng(seed))).to(rows.device)
    real, by_chance = (_explained(each, meta_features, k, rows_seen, seed) for each in (rows, like))
    return MetaStructure(
        n_features=len(rows),
        meta_features=meta_features,
        l0=real.l0,
        never_active=real.never_active,
        explained=real.explained,
        explained_by_chance=by_chance.explained,
        explained_of_row=real.of_row,
        explained_of_row_by_chance=by_chance.of_row,
    )


class _Explained(NamedTuple):
    explained: Interval
    of_row: np.ndarray
    l0: float
    never_active: int


def _explained(rows: Tensor, meta_features: int, k: int, rows_seen: int, seed: int) -> _Explained:
    """What an autoencoder trained on unit `rows` ``[n, d]`` explains of them."""
    rows = rows * rows.shape[1] ** 0.5
    batch = min(BATCH, len(rows))
    settings = SaeSettings(meta_features, k, allocation=AllocationSettings("mutual_choice"))
    training = TrainingSettings(tokens=max(rows_seen, batch), batch=batch)
    sae = new_autoencoder(settings, rows, seed=seed)
    train(sae, _batches(rows, batch, seed), training, settings)
    sae.requires_grad_(False)
    density = torch.tensor(k / meta_features, dtype=torch.float64)
    sae.threshold = calibrate(sae.pre_activations, rows.split(BATCH), density, len(rows)).threshold.reshape(1)
    centre = rows.mean(0)
    errors, active, counts = [], 0, torch.zeros(meta_features, dtype=torch.long, device=rows.device)
    for part in rows.split(BATCH):
        codes = sae.encode(part)
        errors.append((part - sae.decode(codes)).square().sum(1))
        active, counts = active + codes.nnz, counts + codes.firing_counts()
    error = torch.cat(errors).double().cpu().numpy()
    deviation = (rows - centre).square().sum(1).double().cpu().numpy()
    return _Explained(
        interval(np.stack([error, deviation], 1), lambda sums: 1 - ratio(sums)),
        (1 - error / deviation.clip(1e-12)).astype(np.float32),
        active / len(rows),
        int((counts == 0).sum()),
    )


def _batches(rows: Tensor, batch: int, seed: int) -> Iterator[Batch]:
    """Whole batches of the rows in random orders, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for start in range(0, len(rows) - batch + 1, batch):
            yield Batch(rows[order[start : start + batch]])
