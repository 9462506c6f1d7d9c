"""Measures the parts of an autoencoder's error, as parts.py defines them, in three passes over held-out rows.

The first sums the moments from x to the error, for the maps; the second, on the same rows, those from each part to its
squared norm; the third adds up by row what the figures of the scored rows, and of their resamples, are made from.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.intervals import Interval, Statistic, between, draws, ratio
from saelab.analysis.least_squares import LinearMap, Moments, best_ridge, fit, mean_r2, r2
from saelab.analysis.parts import (
    ERROR,
    LINEAR,
    MAPS,
    NONLINEAR,
    PARTS,
    Blocks,
    Decomposition,
    MapFigures,
    NormTest,
    Shares,
    Split,
    parts_of,
)
from saelab.encoded import Autoencoder, Block
from saelab.errors import SaelabError


@torch.no_grad()
def decompose(
    sae: Autoencoder, blocks: Blocks, split: Split, *, resamples: int = 1000
) -> tuple[Decomposition, LinearMap]:
    """The figures, and the map that the parts are made with.

    Reads the rows of the fit twice and the others once: some 8 d_in^2 multiply-adds in float64 for each token, besides
    encoding. Memory: 10 d_in^2 numbers of 8 bytes, and 8 d_in for each scored row and each of the `resamples` that the
    intervals are made from. Raises SaelabError if one of the three sets of rows has no ordinary token.
    """
    fitted, chosen = (_first_sums(sae, blocks(rows)) for rows in (split.fit, split.validation))
    vector, norm = slice(0, -1), slice(-1, None)
    maps: dict[str, LinearMap] = {}
    ridges: dict[str, tuple[float, float]] = {}
    for name in MAPS:
        how = {"intercept": name.startswith("intercept")}
        parts = [(fitted.of_targets(which), chosen.of_targets(which)) for which in (vector, norm)]
        ridge = tuple(best_ridge(*part, **how) if name.endswith("ridge") else 0.0 for part in parts)
        found = [fit(part, each, **how) for (part, _), each in zip(parts, ridge, strict=True)]
        maps[name] = LinearMap(*(torch.cat(both, -1) for both in zip(*found, strict=True)))
        ridges[name] = (ridge[0], ridge[1])

    main = LinearMap(maps[MAPS[0]].weights[:, vector], maps[MAPS[0]].bias[vector])
    tests = _norm_maps(sae, blocks(split.fit), main)
    sums = _Scores(sae, len(split.scored), main, maps, tests, fitted.x / fitted.tokens)
    for block in blocks(split.scored):
        sums.add(block, split.scored)
    if not sums.tokens:
        raise SaelabError("dark_matter: the scored rows hold no ordinary token; use another text")
    return sums.result(fitted.tokens, chosen.tokens, ridges, resamples), main


def _first_sums(sae: Autoencoder, blocks: Iterable[Block]) -> Moments:
    """Sums from x to the error and its squared norm, ``d_in + 1`` targets."""
    sums: Moments | None = None
    for block in blocks:
        x = block.x.double()
        error = x - sae.decode(block.codes, block.x).double()
        if sums is None:
            sums = Moments(x.shape[1], x.shape[1] + 1, x.device)
        sums.add(x, torch.cat([error, error.square().sum(1, keepdim=True)], 1))
    if sums is None:
        raise SaelabError("dark_matter: the rows hold no ordinary token, only special ones; use another text")
    return sums


class _NormMaps(NamedTuple):
    """Maps to the squared norm of each part: from x, without and with intercept, and from the part itself."""

    on_x: tuple[LinearMap, LinearMap]
    on_itself: tuple[list[LinearMap], list[LinearMap]]


def _norm_maps(sae: Autoencoder, blocks: Iterable[Block], linear: LinearMap) -> _NormMaps:
    d, device = len(linear.weights), linear.weights.device
    on_x, on_others = Moments(d, len(PARTS), device), [Moments(d, 1, device) for _ in PARTS[1:]]
    for block in blocks:
        parts = parts_of(block.x, sae.decode(block.codes, block.x), linear)
        norms = _norms(parts)
        on_x.add(parts.x, norms)
        for part, moments, norm in zip(parts[1:], on_others, norms[:, 1:].split(1, 1), strict=True):
            moments.add(part, norm)
    on_itself = [on_x.of_targets(slice(0, 1)), *on_others]
    without, with_ = (
        (fit(on_x, intercept=intercept), [fit(each, intercept=intercept) for each in on_itself])
        for intercept in (False, True)
    )
    return _NormMaps((without[0], with_[0]), (without[1], with_[1]))


def _norms(parts: Iterable[Tensor]) -> Tensor:
    """Squared norms, ``[tokens, parts]``."""
    return torch.stack([part.square().sum(1) for part in parts], 1)


class _Scores:
    """Sums by row over the scored tokens, by name."""

    def __init__(
        self,
        sae: Autoencoder,
        rows: int,
        linear: LinearMap,
        maps: Mapping[str, LinearMap],
        tests: _NormMaps,
        mean: Tensor,
    ) -> None:
        self._mean = mean
        self._sae, self._linear, self._maps, self._tests = sae, linear, maps, tests
        self._rows, self._sums = rows, dict[str, Tensor]()
        self._of_tokens: list[tuple[Tensor, Tensor]] = []
        self.tokens = self.context = 0

    def add(self, block: Block, rows: np.ndarray) -> None:
        x, xhat, error, linear, nonlinear = parts = parts_of(
            block.x, self._sae.decode(block.codes, block.x), self._linear
        )
        norms, row = _norms(parts), block.row_of_token()
        target = torch.cat([error, norms[:, ERROR : ERROR + 1]], 1)
        product = (linear * nonlinear).sum(1)
        on_x = [(norms - test(x)).square() for test in self._tests.on_x]
        on_itself = [
            (norms - torch.cat([test(part) for test, part in zip(tests, parts, strict=True)], 1)).square()
            for tests in self._tests.on_itself
        ]
        figures = {
            "one": torch.ones_like(product)[:, None],
            "l0": block.codes.l0().double()[:, None],
            "x": x,
            "xhat": xhat,
            "norms": norms,
            "norms^2": norms.square(),
            "norm": norms.sqrt(),
            "product": product[:, None],
            "x xhat": (x * xhat).sum(1, keepdim=True),
            "target": target,
            "target^2": target.square(),
            **{name: (target - each(x)).square() for name, each in self._maps.items()},
            **{f"on x {i}": each for i, each in enumerate(on_x)},
            **{f"on itself {i}": each for i, each in enumerate(on_itself)},
        }
        for name, figure in figures.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(self._rows, figure.shape[1], dtype=torch.float64)
            self._sums[name].index_add_(0, row, figure.cpu())
        self.tokens += len(x)
        self.context = block.rows.shape[1]
        number = torch.from_numpy(rows)[row] * self.context + block.positions.cpu() % self.context
        squared = torch.cat([norms[:, ERROR:], (x - self._mean).square().sum(1, keepdim=True)], 1)
        self._of_tokens.append((number, squared.sqrt().float().cpu()))

    def result(
        self, fitted: int, validation: int, ridges: Mapping[str, tuple[float, float]], resamples: int
    ) -> Decomposition:
        d, drawn = self._sums["x"].shape[1], draws(self._rows, resamples, np.random.default_rng(0)).astype(np.float64)
        whole = {name: sums.numpy().sum(0) for name, sums in self._sums.items()}
        of_draws = {name: drawn @ sums.numpy() for name, sums in self._sums.items()}

        def found(statistic: Statistic, *columns: str | tuple[str, int | slice]) -> Interval:
            return between(float(statistic(_taken(whole, columns))), statistic(_taken(of_draws, columns)))

        deviation = ("x", ("norms", 0), "one")
        vector = slice(0, d)

        def map_figures(name: str) -> MapFigures:
            of_vector = [(each, vector) for each in (name, "target", "target^2")]
            of_norm = [(each, d) for each in (name, "target", "target^2")]
            return MapFigures(
                *ridges[name],
                r2=found(mean_r2, *of_vector, "one"),
                r2_pooled=found(_pooled_r2, *of_vector, "one"),
                r2_of_norm=found(r2, *of_norm, "one"),
                fvu_nonlinear=found(lambda sums: _fvu(sums, d), (name, vector), *deviation),
            )

        def norm_test(i: int) -> NormTest:
            return NormTest(
                *(
                    found(r2, (f"{on} {intercept}", i), ("norms", i), ("norms^2", i), "one")
                    for on in ("on x", "on itself")
                    for intercept in (0, 1)
                )
            )

        squared = ("norms", ERROR)
        norms = torch.cat([each for _, each in self._of_tokens]).numpy()
        return Decomposition(
            tokens=self.tokens,
            rows=self._rows,
            tokens_of_fit=fitted,
            tokens_of_validation=validation,
            l0=found(ratio, "l0", "one"),
            fvu=found(lambda sums: _fvu(sums, 1), squared, *deviation),
            fvu_linear=found(
                lambda sums: _fvu(sums[..., d:], 1) - _fvu(np.delete(sums, d, -1), d),
                (MAPS[0], vector),
                squared,
                *deviation,
            ),
            maps={name: map_figures(name) for name in MAPS},
            shares=Shares(
                found(ratio, ("norms", LINEAR), squared),
                found(ratio, ("norms", NONLINEAR), squared),
                found(lambda sums: 2 * ratio(sums), "product", squared),
            ),
            shrinkage=found(ratio, "x xhat", ("norms", 1)),
            shrinkage_of_deviations=found(_shrinkage, "x", "xhat", "x xhat", ("norms", 1), "one"),
            norm_tests={name: norm_test(i) for i, name in enumerate(PARTS)},
            mean_norms={name: found(ratio, ("norm", i), "one") for i, name in enumerate(PARTS)},
            context=self.context,
            token=torch.cat([number for number, _ in self._of_tokens]).numpy(),
            error_norm=norms[:, 0],
            linear_norm=norms[:, 1],
            nonlinear_norm=norms[:, 2],
            deviation=norms[:, 3],
        )


def _taken(sums: Mapping[str, np.ndarray], columns: Iterable[str | tuple[str, int | slice]]) -> np.ndarray:
    """Sums side by side, ``[..., columns]``: all columns of a name, or some."""
    found = []
    for column in columns:
        name, which = (column, slice(None)) if isinstance(column, str) else column
        found.append(sums[name][..., which if isinstance(which, slice) else slice(which, which + 1)])
    return np.concatenate(found, -1)


def _fvu(sums: np.ndarray, k: int) -> np.ndarray:
    """From sums over tokens: k squared errors, x ``[d_in]``, ||x||^2, tokens."""
    x, squared, tokens = sums[..., k:-2], sums[..., -2], sums[..., -1]
    return ratio(np.stack([sums[..., :k].sum(-1), squared - (x**2).sum(-1) / tokens], -1))


def _pooled_r2(sums: np.ndarray) -> np.ndarray:
    k = (sums.shape[-1] - 1) // 3
    error, y, yy = (sums[..., i * k : (i + 1) * k] for i in range(3))
    return 1 - ratio(np.stack([error.sum(-1), (yy - y**2 / sums[..., -1:]).sum(-1)], -1))


def _shrinkage(sums: np.ndarray) -> np.ndarray:
    """The best factor for the deviations of xhat, from sums of x, xhat, x xhat, ||xhat||^2 and tokens."""
    d = (sums.shape[-1] - 3) // 2
    x, xhat, tokens = sums[..., :d], sums[..., d : 2 * d], sums[..., -1]
    both, squared = sums[..., -3] - (x * xhat).sum(-1) / tokens, sums[..., -2] - (xhat**2).sum(-1) / tokens
    return ratio(np.stack([both, squared], -1))
