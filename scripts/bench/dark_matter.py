"""The study of dark matter: autoencoders of several widths and at other sites, trained and analysed; docs/results.md.

    python scripts/bench/dark_matter.py [--config CONFIG] [--seeds 3] [section.key=value ...]

1. `saelab sweep CONFIG` trains the widths on one pass over the activations.
2. A second sweep trains autoencoders of the middle width at other sites: the layer below, and what attention and the
   MLP of the site's layer write.
3. A third trains the control, the middle width with a random decoder that stays as it is.
4. `saelab analyse RUN dark_matter` of each width. The middle one gets the other sites, gradient pursuit and the
   autoencoders trained on a part; every one but the widest gets the widest to compare with.
5. The comparison over widths. Tables go to the terminal and, with a plot, into the folder of the sweep.

With several seeds there is a study of each, in OUT/seed0 ..., and a table of their mean and spread in OUT.
Finished steps are not repeated. Overrides of ``analysis.dark_matter.*`` go to the analyses, the others to the sweeps.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import command
from dark_tables import Study, spread, tables

import saelab
from saelab.analysis.dark_matter import DarkMatter
from saelab.analysis.dark_widths import widths
from saelab.progress import bar
from saelab.runs.folder import find_runs
from saelab.runs.grid import grid, sweep_folder

PREFIX = "analysis.dark_matter."
PART_TOKENS = 300_000


def main(config: str | Mapping = "dark_matter", overrides: Iterable[str] = (), seeds: int | None = None) -> Path:
    """Run the study, once or with `seeds` seeds; returns the folder with the runs and `dark_matter.md`."""
    overrides = list(overrides)
    if seeds is None:
        return study(config, overrides).out
    out = sweep_folder(grid(config, [each for each in overrides if not each.startswith(PREFIX)]))
    studies = [study(config, [*overrides, f"seed={seed}", f"out={out}/seed{seed}"]) for seed in range(seeds)]
    report = "\n\n".join(spread(studies))
    print(report)
    (out / "dark_matter.md").write_text(report + "\n", encoding="utf-8")
    return out


def study(config: str | Mapping, overrides: Sequence[str]) -> Study:
    """Run the study with one seed."""
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
    frozen = [f"out={out}/frozen", f"sweep={{sae.n_features: [{middle}]}}", "sae.freeze=decoder"]
    saelab.sweep(config, [*rest, *frozen], track=bar, say=print)

    def analysed(run: Path, *settings: str) -> DarkMatter:
        found = saelab.analyse(run, "dark_matter", [*settings, *ours], track=bar, say=print)
        assert isinstance(found, DarkMatter)
        return found

    results = []
    for number in numbers:
        settings = [f"{PREFIX}part_tokens={PART_TOKENS}"]
        if number == middle:
            settings.append(f"{PREFIX}sources=[{','.join(sources)}]")
        else:
            settings = [f"{PREFIX}pursuit_tokens=0", f"{PREFIX}part_tokens=0"]
        if number != widest:
            settings.append(f"{PREFIX}wider={by_width[widest]}")
        results.append(analysed(by_width[number], *settings))
    [control] = find_runs(out / "frozen")
    found = Study(out, results, widths(results), analysed(control.path, f"{PREFIX}part_tokens=0"))
    write(found)
    return found


def other_sites(site: str) -> list[str]:
    """For ``blocks.L.hook_resid_post``: the same of the layer below, and what MLP and attention write in layer L."""
    layer = int(site.split(".")[1])
    below = f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"
    return [below, f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.attn.hook_z"]


def write(found: Study) -> None:
    report = "\n\n".join(tables(found))
    print(report)
    (found.out / "dark_matter.md").write_text(report + "\n", encoding="utf-8")
    found.widths.plot().write_html(found.out / "dark_matter.html", include_plotlyjs=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="dark_matter", help="a file, or the name of a shipped config")
    parser.add_argument("--seeds", type=command.whole(1), help="a study of each of so many seeds, from 0")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    command.run(lambda: (main(arguments.config, arguments.overrides, arguments.seeds), None)[1])
