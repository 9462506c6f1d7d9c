"""The error of an autoencoder divided into a part that is linear in x and the rest, on held-out rows.

    x = Sae(x) + Linear + Nonlinear        Linear = map(x)        Nonlinear = x - Sae(x) - Linear

After Engels, Riggs and Tegmark, "Decomposing the Dark Matter of Sparse Autoencoders" (2410.14670). The rows are divided
into three disjoint sets: the maps are fitted to the tokens of the first, the ridge is chosen on the second, and every
figure is measured on the third. The paper permutes tokens instead, and measures FVU_nonlinear on all of them.

map              least squares from x to the error. Four are fitted: without and with an intercept, each with ridge 0
                 and with the ridge that validation chooses. The parts are those of the paper's, the first: without both
R2 of the error  1 - squared error / squared deviation from the mean of the scored tokens, by dimension; the mean over
                 dimensions as the paper takes it, and pooled (both sums over all dimensions)
R2 of its norm   that of a map from x to ||error||^2, the squared norm, fitted in the same four ways
FVU              sum ||error||^2 / sum ||x - mean x||^2
FVU_nonlinear    sum ||Nonlinear||^2 / sum ||x - mean x||^2: FVU of the predictor Sae(x) + Linear
FVU_linear       FVU - FVU_nonlinear
shares           of sum ||error||^2: that of Linear, that of Nonlinear, and twice their product, which sum to 1
shrinkage        <x, Sae(x)> / <Sae(x), Sae(x)>, sums over tokens: the best factor for Sae(x). Above 1 the autoencoder
                 shrinks, and shrinkage is linear error; also for the deviations from both means
norm test        R2 of ||V||^2 as a linear function of x, and as one of V, for V = each part, without and with
                 intercept. High if V is a sum of few nearly orthogonal features, and also if V has a large mean or a
                 scale by token. It has no floor without an intercept: it may be far below 0

Sums are float64. Intervals are over the scored rows, with the maps as fitted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from saelab.analysis.intervals import Interval
from saelab.analysis.least_squares import LinearMap
from saelab.encoded import Block
from saelab.errors import SaelabError

PARTS = ("x", "reconstruction", "error", "linear", "nonlinear")
ERROR, LINEAR, NONLINEAR = 2, 3, 4
"""Their indices in `PARTS`."""
MAPS = ("no intercept", "no intercept, ridge", "intercept", "intercept, ridge")
"""The four maps; the parts are those of the first."""
Blocks = Callable[[np.ndarray], Iterable[Block]]
"""From numbers of rows to the blocks of these rows, in this order."""
_SHARES = (0.5, 0.6)
"""Where the rows of the fit end, and those of validation."""


class Split(NamedTuple):
    """Numbers of the rows that the maps are fitted to, that choose the ridge, and that are scored; disjoint."""

    fit: np.ndarray
    validation: np.ndarray
    scored: np.ndarray


class MapFigures(NamedTuple):
    """The figures of one of the four maps."""

    ridge: float
    ridge_of_norm: float
    r2: Interval
    """R2 of the error, mean over dimensions."""
    r2_pooled: Interval
    r2_of_norm: Interval
    fvu_nonlinear: Interval


class NormTest(NamedTuple):
    """R2 of a part's squared norm."""

    on_x: Interval
    on_x_with_intercept: Interval
    on_itself: Interval
    on_itself_with_intercept: Interval


class Shares(NamedTuple):
    """Shares of the error's summed squared norm; they sum to 1."""

    linear: Interval
    nonlinear: Interval
    twice_product: Interval


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The figures that the head of the file defines."""

    tokens: int
    """Scored tokens."""
    rows: int
    """Scored rows."""
    tokens_of_fit: int
    tokens_of_validation: int
    l0: Interval
    fvu: Interval
    fvu_linear: Interval
    maps: dict[str, MapFigures]
    """By the names in `MAPS`."""
    shares: Shares
    shrinkage: Interval
    shrinkage_of_deviations: Interval
    norm_tests: dict[str, NormTest]
    """By the names in `PARTS`."""
    mean_norms: dict[str, Interval]
    """Mean of ||V||, by the names in `PARTS`."""
    context: int
    """Tokens per row."""
    token: np.ndarray
    """row * context + position of each scored token, in the numbers of all held-out rows, ``[tokens]`` int64."""
    error_norm: np.ndarray
    """||error|| of each scored token, ``[tokens]`` float32."""
    linear_norm: np.ndarray
    nonlinear_norm: np.ndarray
    deviation: np.ndarray
    """||x - mean x|| of each scored token, with the mean of the tokens of the fit, ``[tokens]`` float32."""

    @property
    def fvu_nonlinear(self) -> Interval:
        return self.maps[MAPS[0]].fvu_nonlinear


class Parts(NamedTuple):
    """x and the parts that it is the sum of, ``[tokens, d_in]`` float64."""

    x: Tensor
    reconstruction: Tensor
    error: Tensor
    """linear + nonlinear"""
    linear: Tensor
    nonlinear: Tensor


def parts_of(x: Tensor, reconstruction: Tensor, linear: LinearMap) -> Parts:
    """The parts of x ``[tokens, d_in]``, given its reconstruction and the map from x to the error."""
    x, reconstruction = x.double(), reconstruction.double()
    error, of_x = x - reconstruction, linear(x)
    return Parts(x, reconstruction, error, of_x, error - of_x)


def split_rows(rows: int, seed: int = 0) -> Split:
    """Half of the rows for the fit, a tenth for validation, the rest to be scored; drawn at random.

    Raises SaelabError if there are fewer than five rows.
    """
    if rows < 5:
        raise SaelabError(f"dark_matter: {rows} rows cannot be divided into three sets; use more tokens")
    drawn = np.random.default_rng(seed).permutation(rows)
    return Split(*np.split(drawn, [round(share * rows) for share in _SHARES]))
