"""The tables of the study of dark matter: of one seed, and the spread over several."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from table import table

from saelab.analysis.dark_matter import DarkMatter
from saelab.analysis.dark_relations import TARGETS
from saelab.analysis.dark_widths import Widths
from saelab.analysis.intervals import Interval
from saelab.analysis.parts import MAPS, PARTS


class Study(NamedTuple):
    """The results of one seed."""

    out: Path
    results: list[DarkMatter]
    """By width, rising."""
    widths: Widths
    control: DarkMatter
    """The middle width with a random decoder."""

    @property
    def middle(self) -> DarkMatter:
        return self.results[len(self.results) // 2]


def spread(studies: Sequence[Study]) -> list[str]:
    """Markdown: the main figures, each the mean over studies of different seeds and half of their range."""

    def over(figure: Callable[[Study], Interval | float]) -> str:
        return mean([figure(each) for each in studies])

    def row(figure: Callable[[DarkMatter], Interval | float]) -> list[str]:
        return [over(lambda each, at=at: figure(each.results[at])) for at in range(len(studies[0].results))]

    by_width: dict[str, Callable[[DarkMatter], Interval | float]] = {
        "FVU": lambda r: r.decomposition.fvu,
        "FVU, linear": lambda r: r.decomposition.fvu_linear,
        "FVU, nonlinear": lambda r: r.decomposition.fvu_nonlinear,
        **{f"R2 of the error, {name}": lambda r, name=name: r.decomposition.maps[name].r2 for name in SHOWN},
        **{f"R2 of its squared norm, {n}": lambda r, n=n: r.decomposition.maps[n].r2_of_norm for n in SHOWN},
        "share of the squared error, linear": lambda r: r.decomposition.shares.linear,
        "share of the squared error, nonlinear": lambda r: r.decomposition.shares.nonlinear,
        **{f"mean norm, {part}": lambda r, p=part: r.decomposition.mean_norms[p] for part in PARTS[2:]},
        "CE above clean (nats)": lambda r: r.cost.spliced.value - r.cost.clean.value,
        "share of it recovered by linear": lambda r: r.cost.recovered_by_linear,
        "share of it recovered by nonlinear": lambda r: r.cost.recovered_by_nonlinear,
    }
    laws = {
        name: [over(lambda each, of=of, field=field: getattr(of(each), field)) for field in ("c", "a", "m", "r2")]
        for name, of in (("FVU", lambda s: s.widths.law), ("FVU, nonlinear", lambda s: s.widths.law_of_nonlinear))
    }
    scaling = [
        [
            f"{s.narrower:,} to {s.wider:,}",
            *(over(lambda each, at=at, f=f: getattr(each.widths.scaling[at], f)) for f in ("r2", "added")),
        ]
        for at, s in enumerate(studies[0].widths.scaling)
    ]
    numbers = [f"{each.n_features:,}" for each in studies[0].results]
    seeds = f"Mean of {len(studies)} seeds ± half of their range."
    return [
        seeds,
        table(["features", *numbers], ([name, *row(figure)] for name, figure in by_width.items())),
        table(["widths", "R2 of the error norm", "of the rest, by the nonlinear norm"], scaling),
        table(["power law", "c", "a", "m", "R2"], ([name, *cells] for name, cells in laws.items())),
        table([f"{studies[0].middle.n_features:,} features", "result"], tried(studies, over)),
    ]


def tried(studies: Sequence[Study], over: Callable[[Callable[[Study], Interval | float]], str]) -> list[list[str]]:
    """Rows of `spread` for what was tried with the middle width, and for its control."""
    first, rows = studies[0].middle, []
    pursuits = [each.middle.pursuit for each in studies if each.middle.pursuit is not None]
    if pursuits:
        rows.append(["pursuit, relative change of FVU", mean([each.change for each in pursuits])])
        rows.append(["the same of FVU, nonlinear", mean([each.change_of_nonlinear for each in pursuits])])
    for part in first.on_parts:
        rows.append([f"FVU of one trained on the {part} part", over(lambda s, p=part: s.middle.on_parts[p].fvu)])
    for source, parts in first.from_sites.items():
        for part in parts:
            rows.append(
                [f"R2 of the {part} part from {source}", over(lambda s, a=source, p=part: s.middle.from_sites[a][p].r2)]
            )
    for group in first.missing:
        for where in ("in_linear", "in_nonlinear"):
            rows.append(
                [
                    f"{group} features {where.replace('_', ' ')}",
                    over(lambda s, g=group, w=where: getattr(s.middle.missing[g], w)),
                ]
            )
    for name, figure in CONTROL.items():
        rows.append([f"random decoder: {name}", over(lambda s, f=figure: f(s.control))])
    return rows


def control(result: DarkMatter) -> list[str]:
    """Markdown: the figures of the control."""
    rows = [[name, shown(figure(result))] for name, figure in CONTROL.items()]
    return [table([f"{result.n_features:,} features, random decoder", "result"], rows)]


def mean(figures: Sequence[Interval | float]) -> str:
    """The mean of figures of several seeds, and half of their range."""
    values = [each.value if isinstance(each, Interval) else each for each in figures]
    return f"{sum(values) / len(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"


SHOWN = ("no intercept", "intercept")
CONTROL: dict[str, Callable[[DarkMatter], Interval]] = {
    "FVU": lambda r: r.decomposition.fvu,
    "FVU, nonlinear": lambda r: r.decomposition.fvu_nonlinear,
    "R2 of the error, no intercept": lambda r: r.decomposition.maps["no intercept"].r2,
    "R2 of its squared norm, no intercept": lambda r: r.decomposition.maps["no intercept"].r2_of_norm,
    "CE recovered by linear": lambda r: r.cost.recovered_by_linear,
}


def tables(study: Study) -> list[str]:
    """Markdown: the decomposition over widths, R2 by map, norm tests, CE, scaling, the law, experiments, control."""
    results, found = study.results, study.widths
    of = [(f"{each.n_features:,}", each, each.decomposition) for each in results]
    head = [name for name, _, _ in of]
    first = results[0].decomposition
    about = (
        f"{results[0].site}: {first.tokens:,} scored tokens in {first.rows} rows; maps fitted to "
        f"{first.tokens_of_fit:,} tokens, ridges chosen on {first.tokens_of_validation:,}. Intervals: 95%, over rows; "
        "± is half of one."
    )
    lines = {
        "L0": [brief(d.l0) for _, _, d in of],
        "FVU": [brief(d.fvu) for _, _, d in of],
        "FVU, linear": [brief(d.fvu_linear) for _, _, d in of],
        "FVU, nonlinear": [brief(d.fvu_nonlinear) for _, _, d in of],
        "share of ||error||^2, linear": [brief(d.shares.linear) for _, _, d in of],
        "share of ||error||^2, nonlinear": [brief(d.shares.nonlinear) for _, _, d in of],
        "shrinkage": [brief(d.shrinkage) for _, _, d in of],
        "shrinkage of deviations": [brief(d.shrinkage_of_deviations) for _, _, d in of],
        **{f"mean norm, {part}": [brief(d.mean_norms[part]) for _, _, d in of] for part in PARTS},
    }
    maps = {
        **{f"error, {name}": [brief(d.maps[name].r2) for _, _, d in of] for name in MAPS},
        **{f"error, pooled, {name}": [brief(d.maps[name].r2_pooled) for _, _, d in of] for name in MAPS},
        **{f"squared norm, {name}": [brief(d.maps[name].r2_of_norm) for _, _, d in of] for name in MAPS},
    }
    tests = {
        f"{part}, {label}": [brief(getattr(d.norm_tests[part], field)) for _, _, d in of]
        for part in PARTS
        for field, label in (
            ("on_itself", "on itself"),
            ("on_itself_with_intercept", "on itself, intercept"),
            ("on_x_with_intercept", "on x, intercept"),
        )
    }
    cost = {
        "CE, clean": [brief(r.cost.clean) for _, r, _ in of],
        "CE, Sae(x)": [brief(r.cost.spliced) for _, r, _ in of],
        "CE, Sae(x) + linear": [brief(r.cost.with_linear) for _, r, _ in of],
        "CE, Sae(x) + nonlinear": [brief(r.cost.with_nonlinear) for _, r, _ in of],
        "recovered by linear": [brief(r.cost.recovered_by_linear) for _, r, _ in of],
        "recovered by nonlinear": [brief(r.cost.recovered_by_nonlinear) for _, r, _ in of],
    }
    scaling = [
        [f"{s.narrower:,} to {s.wider:,}", shown(s.r2), shown(s.r2_with_nonlinear), shown(s.added)]
        for s in found.scaling
    ]
    laws = [
        [name, *(shown(each) for each in (law.c, law.a, law.m)), f"{law.r2:.4f}"]
        for name, law in (("FVU", found.law), ("FVU, nonlinear", found.law_of_nonlinear))
    ]
    return [
        about,
        table(["features", *head], ([name, *cells] for name, cells in lines.items())),
        "R2 of a linear map from x:",
        table(["features", *head], ([name, *cells] for name, cells in maps.items())),
        "Norm tests (R2 of the squared norm):",
        table(["features", *head], ([name, *cells] for name, cells in tests.items())),
        f"CE in nats on {results[0].cost.tokens:,} tokens:",
        table(["features", *head], ([name, *cells] for name, cells in cost.items())),
        "Error norm by token, from one width to another:",
        table(["widths", "R2", "with the nonlinear norm", "of the rest"], scaling),
        "Power law in the width:",
        table(["", "c", "a", "m", "R2"], laws),
        *experiments(results),
        *control(study.control),
    ]


def experiments(results: Sequence[DarkMatter]) -> list[str]:
    """The tables of what was tried with some widths only."""
    lines = []
    for each in results:
        name = f"{each.n_features:,}"
        if each.pursuit is not None:
            p = each.pursuit
            lines += [
                [f"{name}: pursuit, FVU", f"{shown(p.fvu)} to {shown(p.fvu_pursued)}"],
                [f"{name}: pursuit, relative change of FVU", shown(p.change)],
                [f"{name}: pursuit, FVU, nonlinear", f"{shown(p.fvu_nonlinear)} to {shown(p.fvu_nonlinear_pursued)}"],
                [f"{name}: pursuit, relative change of FVU, nonlinear", shown(p.change_of_nonlinear)],
            ]
        for part, on in each.on_parts.items():
            what = f"{name}: FVU of an autoencoder trained on the {part} part ({on.training_tokens:,} tokens)"
            lines.append([what, f"{on.fvu:.4f} (L0 {on.l0:.1f}, never active {on.never_active:,})"])
        for source, parts in each.from_sites.items():
            for part in TARGETS:
                what = f"{name}: {part} part from {source}"
                lines.append([what, f"R2 {shown(parts[part].r2)}, left {shown(parts[part].left)}"])
        for group, m in each.missing.items():
            what = f"{name}: {m.features:,} {group} features of the widest"
            lines.append([what, f"linear {shown(m.in_linear)}, nonlinear {shown(m.in_nonlinear)}"])
    return [table(["experiment", "result"], lines)] if lines else []


def shown(figure: Interval) -> str:
    value, low, high = figure
    return f"{value:.4g} [{low:.4g}, {high:.4g}]"


def brief(figure: Interval) -> str:
    """The figure with half of its interval."""
    value, low, high = figure
    return f"{value:.4g} ± {(high - low) / 2:.2g}"
