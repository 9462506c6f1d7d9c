"""What autoencoders of several widths at one site leave out, compared by token (2410.14670, sections on scaling).

    results = [saelab.read_analysis(run, "dark_matter") for run in runs]
    found = widths(results)

power law   FVU(width) = c + a width^-m, c and a not negative, least squares: m by search, c and a exactly. The band is
            that of the curves fitted to resamples of the rows. The paper reads the parts off it: FVU - c are features
            that are absent, c - FVU_nonlinear linear error that no width removes, and the rest is nonlinear
scaling     R2 of ||error|| of the wider one, by token, as a linear function (with intercept) of that of the narrower
            one; fitted on half of the scored rows, measured on the others. `added` is the share of the remaining
            variance that ||Nonlinear|| of the narrower one explains besides, as the paper takes it

Needs numpy, and only the stored results. Intervals are over rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saelab.analysis.intervals import Interval, add_by_row, between, draws, interval
from saelab.analysis.result import Result
from saelab.errors import SaelabError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from saelab.analysis.dark_matter import DarkMatter

_EXPONENTS = np.geomspace(0.02, 4, 400)
_RESAMPLES = 500


class PowerLaw(NamedTuple):
    """``c + a width^-m``; the ends of the intervals of c, a and m are far apart if few widths are given."""

    c: Interval
    a: Interval
    m: Interval
    low: np.ndarray
    """Lower end of the band at each width, ``[widths]``."""
    high: np.ndarray
    r2: float
    """On the widths it is fitted to."""


class Scaling(NamedTuple):
    """How well the error norms of a narrower autoencoder predict those of a wider one, token by token."""

    narrower: int
    """Number of features."""
    wider: int
    r2: Interval
    r2_with_nonlinear: Interval
    added: Interval
    """(r2_with_nonlinear - r2) / (1 - r2)"""


@dataclass(frozen=True, eq=False, repr=False)
class Widths(Result):
    """The figures that the head of the file defines, widths rising."""

    site: str
    n_features: tuple[int, ...]
    fvu: tuple[Interval, ...]
    fvu_linear: tuple[Interval, ...]
    fvu_nonlinear: tuple[Interval, ...]
    law: PowerLaw
    """The power law of FVU."""
    law_of_nonlinear: PowerLaw
    scaling: tuple[Scaling, ...]

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        lines: dict[str, int | float | str | Interval] = {"site": self.site}
        for width, *parts in zip(self.n_features, self.fvu, self.fvu_linear, self.fvu_nonlinear, strict=True):
            for name, each in zip(("FVU", "FVU, linear", "FVU, nonlinear"), parts, strict=True):
                lines[f"{name}, {width:,} features"] = each
        for name, law in (("FVU", self.law), ("FVU, nonlinear", self.law_of_nonlinear)):
            lines |= {f"{name}: c": law.c, f"{name}: exponent m": law.m}
        for each in self.scaling:
            pair = f"{each.narrower:,} to {each.wider:,}"
            lines[f"R2 of the error norm, {pair}"] = each.r2
            lines[f"of the rest by the nonlinear norm, {pair}"] = each.added
        return lines

    def plot(self) -> "go.Figure":
        """FVU and its nonlinear part over the width, with the bands of the fitted laws; the width axis is log."""
        import plotly.graph_objects as go

        figure = go.Figure(layout={"title": f"{self.site}: FVU over the number of features"})
        for name, values, law, colour in (
            ("FVU", self.fvu, self.law, "31,119,180"),
            ("FVU, nonlinear", self.fvu_nonlinear, self.law_of_nonlinear, "255,127,14"),
        ):
            x = [*self.n_features, *reversed(self.n_features)]
            y = [*law.high, *law.low[::-1]]
            figure.add_scatter(
                x=x, y=y, fill="toself", line={"width": 0}, fillcolor=f"rgba({colour},0.2)", showlegend=False
            )
            up, down = [v.high - v.value for v in values], [v.value - v.low for v in values]
            figure.add_scatter(
                x=self.n_features,
                y=[v.value for v in values],
                error_y={"array": up, "arrayminus": down},
                name=name,
                mode="lines+markers",
                line={"color": f"rgb({colour})"},
            )
        figure.update_xaxes(type="log", title="features")
        return figure.update_yaxes(title="share of the variance", rangemode="tozero")


def widths(results: "Sequence[DarkMatter]") -> Widths:
    """The comparison of results at one site, on the same tokens.

    Raises SaelabError if there are fewer than two, if two have the same width, or if sites or tokens differ.
    """
    results = sorted(results, key=lambda each: each.n_features)
    found = [each.decomposition for each in results]
    if len({each.n_features for each in results}) < max(2, len(results)):
        raise SaelabError("dark_matter: the comparison takes two or more autoencoders of different widths")
    for each in results[1:]:
        same = np.array_equal(each.decomposition.token, found[0].token)
        if each.site != results[0].site or not same:
            raise SaelabError(
                f"dark_matter: the results of {results[0].n_features:,} and {each.n_features:,} features are "
                "of different sites or tokens; analyse them with the same settings"
            )
    numbers = np.array([each.n_features for each in results])
    row = np.unique(found[0].token // found[0].context, return_inverse=True)[1]
    rows = int(row.max()) + 1

    def by_row(*columns: np.ndarray) -> np.ndarray:
        sums = np.zeros((rows, len(columns)))
        add_by_row(sums, row, np.stack(columns, 1))
        return sums

    drawn = draws(rows, _RESAMPLES, np.random.default_rng(0))
    deviation = drawn @ by_row(found[0].deviation.astype(np.float64) ** 2)

    def law(name: str, of: Callable[..., Interval]) -> PowerLaw:
        squared = by_row(*(getattr(each, name).astype(np.float64) ** 2 for each in found))
        return power_law(numbers, np.array([of(each).value for each in found]), (drawn @ squared) / deviation)

    pairs = [(i, j) for i in range(len(found)) for j in range(i + 1, len(found))]
    return Widths(
        site=results[0].site,
        n_features=tuple(map(int, numbers)),
        fvu=tuple(each.fvu for each in found),
        fvu_linear=tuple(each.fvu_linear for each in found),
        fvu_nonlinear=tuple(each.fvu_nonlinear for each in found),
        law=law("error_norm", lambda each: each.fvu),
        law_of_nonlinear=law("nonlinear_norm", lambda each: each.fvu_nonlinear),
        scaling=tuple(
            Scaling(
                int(numbers[i]),
                int(numbers[j]),
                *_scaling(found[i].error_norm, found[i].nonlinear_norm, found[j].error_norm, row, rows),
            )
            for i, j in pairs
        ),
    )


def power_law(numbers: np.ndarray, values: np.ndarray, drawn: np.ndarray) -> PowerLaw:
    """The law fitted to `values` ``[widths]`` at `numbers`; its intervals are of the fits to each of `drawn`
    ``[resamples, widths]``."""
    c, a, m = _fitted(numbers, values[None])
    fitted = _curve(numbers, c, a, m)[0]
    of_draws = _fitted(numbers, drawn)
    curves = _curve(numbers, *of_draws)
    low, high = np.quantile(curves, [0.025, 0.975], axis=0) if len(curves) else np.full((2, len(values)), np.nan)
    rest = ((values - fitted) ** 2).sum() / ((values - values.mean()) ** 2).sum()
    parts = [between(float(each[0]), of) for each, of in zip((c, a, m), of_draws, strict=True)]
    return PowerLaw(parts[0], parts[1], parts[2], low, high, float(1 - rest))


def _curve(numbers: np.ndarray, c: np.ndarray, a: np.ndarray, m: np.ndarray) -> np.ndarray:
    return c[:, None] + a[:, None] * numbers ** -m[:, None]


def _fitted(numbers: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c, a and m of each line of `values` ``[n, widths]``."""
    best = np.full(len(values), np.inf)
    found = np.zeros((3, len(values)))
    for m in _EXPONENTS:
        x = numbers.astype(np.float64) ** -m
        centred, mean = x - x.mean(), values.mean(1)
        a = np.maximum(values @ centred / (centred @ centred), 0)
        c = mean - a * x.mean()
        through_zero = c < 0
        a, c = np.where(through_zero, values @ x / (x @ x), a), np.where(through_zero, 0, c)
        error = ((values - c[:, None] - a[:, None] * x) ** 2).sum(1)
        better = error < best
        best = np.where(better, error, best)
        found[:, better] = np.stack([c, a, np.full(len(values), m)])[:, better]
    return found[0], found[1], found[2]


def _scaling(
    error: np.ndarray, nonlinear: np.ndarray, wider: np.ndarray, row: np.ndarray, rows: int
) -> tuple[Interval, Interval, Interval]:
    """R2 without and with the nonlinear norm, and what it adds."""
    error, nonlinear, wider = (each.astype(np.float64) for each in (error, nonlinear, wider))
    half = row % 2 == 0
    sums = np.zeros((rows, 5))
    residuals = []
    for columns in ([error], [error, nonlinear]):
        x = np.stack([*columns, np.ones_like(error)], 1)
        residuals.append((wider - x @ np.linalg.lstsq(x[half], wider[half], rcond=None)[0]) ** 2)
    add_by_row(sums, row[~half], np.stack([*residuals, wider, wider**2, np.ones_like(wider)], 1)[~half])
    sums = sums[sums[:, 4] > 0]

    def rest(s: np.ndarray, i: int) -> np.ndarray:
        return s[..., i] / (s[..., 3] - s[..., 2] ** 2 / s[..., 4])

    return (
        interval(sums, lambda s: 1 - rest(s, 0)),
        interval(sums, lambda s: 1 - rest(s, 1)),
        interval(sums, lambda s: 1 - rest(s, 1) / rest(s, 0)),
    )
