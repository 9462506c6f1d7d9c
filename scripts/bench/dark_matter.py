"""The study of dark matter: autoencoders of several widths and at other sites, trained and analysed; docs/results.md.

    python scripts/bench/dark_matter.py [--config CONFIG] [section.key=value ...]

1. `saelab sweep CONFIG` trains the widths on one pass over the activations.
2. A second sweep trains autoencoders of the middle width at other sites: the layer below, and what attention and the
   MLP of the site's layer write.
3. `saelab analyse RUN dark_matter` of each width. The middle one gets the other sites, gradient pursuit and the
   autoencoders trained on a part; every one but the widest gets the widest to compare with.
4. The comparison over widths. Tables go to the terminal and, with a plot, into the folder of the sweep.

Finished steps are not repeated. Overrides of ``analysis.dark_matter.*`` go to the analyses, the others to the sweeps.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import command
from table import table

import saelab
from saelab.analysis.dark_matter import DarkMatter
from saelab.analysis.dark_relations import TARGETS
from saelab.analysis.dark_widths import Widths, widths
from saelab.analysis.intervals import Interval
from saelab.analysis.parts import MAPS, PARTS
from saelab.progress import bar
from saelab.runs.folder import find_runs
from saelab.runs.grid import grid, sweep_folder

PREFIX = "analysis.dark_matter."
PART_TOKENS = 300_000


def main(config: str | Mapping = "dark_matter", overrides: Iterable[str] = ()) -> Path:
    """Run the study; returns the folder with the runs and `dark_matter.md`."""
    overrides = list(overrides)
    ours = [each for each in overrides if each.startswith(PREFIX)]
    rest = [each for each in overrides if not each.startswith(PREFIX)]
    out = saelab.sweep(config, rest, track=bar, say=print)
    runs = grid(config, rest)
    by_width = {run.settings.sae.n_features: Path(run.settings.out) for run in runs}
    numbers = sorted(by_width)
    middle, widest = numbers[len(numbers) // 2], numbers[-1]
    assert out == sweep_folder(runs)

    sites = other_sites(runs[0].settings.site)
    at_sites = [f"out={out}/sites", f"sweep={{site: [{', '.join(sites)}]}}", f"sae.n_features={middle}"]
    saelab.sweep(config, [*rest, *at_sites], track=bar, say=print)
    sources = [str(run.path) for run in find_runs(out / "sites")]

    results = []
    for number in numbers:
        settings = [f"{PREFIX}part_tokens={PART_TOKENS}", *ours]
        if number == middle:
            settings.append(f"{PREFIX}sources=[{','.join(sources)}]")
        else:
            settings += [f"{PREFIX}pursuit_tokens=0", f"{PREFIX}part_tokens=0"]
        if number != widest:
            settings.append(f"{PREFIX}wider={by_width[widest]}")
        found = saelab.analyse(by_width[number], "dark_matter", settings, track=bar, say=print)
        assert isinstance(found, DarkMatter)
        results.append(found)
    write(out, results, widths(results))
    return out


def other_sites(site: str) -> list[str]:
    """For ``blocks.L.hook_resid_post``: the same of the layer below, and what MLP and attention write in layer L."""
    layer = int(site.split(".")[1])
    below = f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"
    return [below, f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.attn.hook_z"]


def write(out: Path, results: Sequence[DarkMatter], found: Widths) -> None:
    report = "\n\n".join(tables(results, found))
    print(report)
    (out / "dark_matter.md").write_text(report + "\n", encoding="utf-8")
    found.plot().write_html(out / "dark_matter.html", include_plotlyjs=True)


def tables(results: Sequence[DarkMatter], found: Widths) -> list[str]:
    """Markdown: the decomposition over widths, R2 by map, norm tests, CE, scaling, the law, experiments."""
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="dark_matter", help="a file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    command.run(lambda: (main(arguments.config, arguments.overrides), None)[1])
