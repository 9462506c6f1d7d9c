"""All architectures on the demo language model, at matched L0; docs/results.md.

    saelab cache quickstart --out caches/quickstart --tokens 1.3e6 cache.gradients=true
    python scripts/bench/architectures.py --cache caches/quickstart          # about two hours on one core

The `sae` section of each shipped config, with the numbers of features, tokens and so on of the quickstart. For each,
`saelab sweep` trains and evaluates L0 16 and 64 with one seed and L0 32 with three, which set the initial weights. The
same command goes on after a kill. Several commands with --only and different architectures may run at the same time.

    python scripts/bench/architectures.py --cache caches/quickstart --tune --only relu,gated

finds the coefficients of `COEFFICIENTS`: short pilots over a grid, log L0 interpolated against log coefficient, then
whole trainings, again until L0 is within 5% or three times.

    python scripts/bench/architectures.py --cache caches/quickstart --speed   # on a quiet core
    python scripts/bench/architectures.py --write docs/results.md             # the tables of what is finished

FVU at an L0 is interpolated: log FVU over log L0, between (or beyond) the two nearest of an architecture's own L0.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import command
import numpy as np
import torch
from methods_report import rewritten
from table import table

import saelab
from saelab.analysis.pareto import plot_pareto
from saelab.errors import SaelabError
from saelab.files import write_json
from saelab.progress import bar
from saelab.runs import folder
from saelab.runs.config import find_config, read_config
from saelab.runs.grid import GridRun, grid
from saelab.runs.job import settings_of

TARGETS, SEEDED, SEEDS = (16, 32, 64), 32, (0, 1, 2)
CE_TOKENS = 32_768
PILOT_TOKENS, TOLERANCE, ROUNDS = 300_000, 0.05, 3
FALLS = 2.0
"""Times that L0 is smaller after a whole training than after a pilot, about: 2.4 for `relu`, 1.7 for `gated`."""
SPEED_STEPS = 100
COEFFICIENT = "sae.sparsity.coefficient"
FROZEN = "frozen decoder"

COEFFICIENTS: dict[str, dict[int, float]] = {
    "relu": {16: 0.307, 32: 0.193, 64: 0.112},
    "gated": {16: 0.436, 32: 0.261, 64: 0.158},
    "relu_tanh": {16: 0.00686, 32: 0.00354, 64: 0.00161},
    "relu_lp": {16: 0.0363, 32: 0.0194, 64: 0.0106},
}
"""Weight of the sparsity loss by L0, found with --tune."""
PILOTS = {
    "relu": (0.1, 0.2, 0.3, 0.45, 0.65),
    "relu_tanh": (0.003, 0.006, 0.01, 0.017, 0.03),
    "relu_lp": (0.02, 0.035, 0.06, 0.1, 0.17),
    "gated": (0.1, 0.2, 0.3, 0.45, 0.65),
}
"""The grid of coefficients of those whose L0 is set by one."""


class Architecture(NamedTuple):
    config: str
    """The shipped config whose `sae` section it has."""
    changes: Sequence[str] = ()
    axis: str = "sae.k"
    """The setting that decides L0."""


ARCHITECTURES = {
    "token_choice": Architecture("topk"),
    "mutual_choice": Architecture("mutual_choice"),
    "feature_choice": Architecture("feature_choice_zipf"),
    "group_max": Architecture("group_max"),
    "multi_topk": Architecture("multi_topk"),
    "gradient": Architecture("gradient_topk"),
    "cosine": Architecture("cosine"),
    "aux_zipf": Architecture("aux_zipf"),
    "matryoshka, token_choice": Architecture("matryoshka", ["sae.allocation=token_choice"]),
    "matryoshka, mutual_choice": Architecture("matryoshka"),
    "tied": Architecture("tied"),
    "aligned": Architecture("aligned"),
    "jumprelu": Architecture("jumprelu", axis="sae.sparsity.target_l0"),
    **{name: Architecture(name, axis=COEFFICIENT) for name in PILOTS},
    FROZEN: Architecture("topk", ["sae.freeze=decoder"]),
}


class Options(NamedTuple):
    out: Path
    cache: Path | None
    only: Sequence[str]
    overrides: Sequence[str]


def config_of(options: Options, name: str) -> dict[str, Any]:
    """The quickstart with the `sae` section of an architecture, of the quickstart's number of features."""
    made = read_config(find_config("quickstart"))
    section = read_config(find_config(ARCHITECTURES[name].config))["sae"]
    made["sae"] = section | {"n_features": made["sae"]["n_features"]}
    made["eval"] = {"ce_tokens": CE_TOKENS}
    if options.cache is not None:
        made["activations"] = {"cache": str(options.cache)}
    return made


def overrides_of(
    options: Options, name: str, part: str, values: Sequence[float], seeds: Sequence[int] = ()
) -> list[str]:
    """Overrides of the sweep `part` of an architecture, over values of its axis and seeds."""
    found, own = ARCHITECTURES[name], name.replace(", ", "-").replace(" ", "-")
    made = [*found.changes, *options.overrides, f"out={options.out / own / part}"]
    made.append(f"sweep.{found.axis}={json.dumps(list(values))}")
    return [*made, f"sweep.sae.seed={json.dumps(list(seeds))}"] if seeds else made


def values_of(name: str) -> Mapping[int, float]:
    """The value of the axis for each L0; none for one whose coefficients are not known."""
    return COEFFICIENTS.get(name, {}) if ARCHITECTURES[name].axis == COEFFICIENT else {l0: l0 for l0 in TARGETS}


def sweeps(options: Options, name: str) -> list[list[str]]:
    """Overrides of the sweeps of an architecture: every L0 with the first seed, and one L0 with the others."""
    values = values_of(name)
    if not values:
        raise SaelabError(f"{name}: its coefficients are not known; --tune finds them")
    first = overrides_of(options, name, "first", list(values.values()))
    return [first, overrides_of(options, name, "seeds", [values[SEEDED]], SEEDS[1:])]


def train(options: Options, name: str, overrides: Sequence[str]) -> None:
    begin = time.monotonic()
    saelab.sweep(config_of(options, name), overrides, track=bar, say=print)
    print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)


def results_of(options: Options, name: str) -> dict[int, list[dict[str, Any]]]:
    """The evaluations of the finished runs of an architecture, by the L0 that they are for; the first seed first."""
    found: dict[int, list[dict[str, Any]]] = {}
    values, config = values_of(name), config_of(options, name)
    runs = [run for overrides in sweeps(options, name) for run in grid(config, overrides)] if values else []
    for run in runs:
        result = finished(run)
        if result is not None:
            l0 = next(l0 for l0, value in values.items() if value == run.varies[ARCHITECTURES[name].axis])
            found.setdefault(l0, []).append(result)
    return found


def finished(run: GridRun) -> dict[str, Any] | None:
    """The evaluation of a run, if it is finished."""
    path = Path(run.settings.out)
    return folder.evaluation(path) if folder.training_record(path).get("complete") else None


# coefficients


def interpolated(x: float, points: Mapping[float, float]) -> float:
    """y at `x` of the points y(x), straight lines between their logarithms, and beyond them the last line."""
    xs, ys = (np.log(np.array(each, dtype=float)) for each in zip(*sorted(points.items()), strict=True))
    if len(xs) == 1:
        return float(np.exp(ys[0]))
    i = int(np.clip(np.searchsorted(xs, np.log(x)), 1, len(xs) - 1))
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    return float(np.exp(ys[i - 1] + slope * (np.log(x) - xs[i - 1])))


def tune(options: Options, name: str) -> None:
    """Find the coefficients of an architecture and print them; its whole trainings are those of the study."""
    short = [f"training.tokens={PILOT_TOKENS}", "eval.tokens=30000", "eval.ce_tokens=1024"]
    points = _l0(options, name, [*overrides_of(options, name, "pilots", PILOTS[name]), *short])
    print(f"{name}: pilots {points}", flush=True)
    guesses = {l0: float(f"{interpolated(l0, {x / FALLS: y for x, y in points.items()}):.3g}") for l0 in TARGETS}
    whole: dict[float, float] = {}
    for _ in range(ROUNDS):
        measured = _l0(options, name, overrides_of(options, name, "first", list(guesses.values())))
        whole |= measured
        print(f"{name}: coefficients {guesses}, L0 {list(measured)}", flush=True)
        of = {value: l0 for l0, value in measured.items()}
        off = [l0 for l0, value in guesses.items() if abs(of[value] / l0 - 1) > TOLERANCE]
        if not off:
            return
        guesses |= {l0: float(f"{interpolated(l0, whole):.3g}") for l0 in off}


def _l0(options: Options, name: str, overrides: Sequence[str]) -> dict[float, float]:
    """Train a sweep over coefficients; returns them by the L0 that they gave."""
    train(options, name, overrides)
    runs = grid(config_of(options, name), overrides)
    return {result["l0"]: run.varies[COEFFICIENT] for run in runs if (result := finished(run)) is not None}


# speed


def speed(options: Options, name: str) -> float:
    """Training tokens per second of processor time, with one thread: the first steps, of L0 32."""
    overrides = overrides_of(options, name, "speed", [values_of(name)[SEEDED]])
    settings = grid(config_of(options, name), overrides)[0].settings
    settings = settings_of(settings, [f"training.tokens={SPEED_STEPS * settings.training.batch}"])
    torch.set_num_threads(1)
    assert options.cache is not None
    cache = saelab.open_cache(options.cache)
    x, g = [], []
    for part in cache.in_order(settings.site, gradients=True):
        x.append(part.values)
        g.append(part.gradients)
        if sum(map(len, x)) >= settings.training.tokens:
            break
    x, g = torch.cat(x).float(), torch.cat(g).float()
    x *= (x.shape[1] / x.square().sum(1).mean()).sqrt()
    sae = saelab.new_autoencoder(settings.sae, x[:32_768], seed=0)
    trainer = saelab.Trainer(sae, settings.training, settings.sae)
    size = settings.training.batch
    begin = time.process_time()
    for step in range(SPEED_STEPS):
        rows = slice(step * size, (step + 1) * size)
        trainer.step(saelab.Batch(x[rows], gradients=g[rows] if settings.sae.needs_gradients else None))
    return SPEED_STEPS * size / (time.process_time() - begin)


# report


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, ± half of the range if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def report(options: Options) -> str:
    """A table for each L0, best first, and a plot `pareto.html`; of what is finished."""
    rates_file = options.out / "speed.json"
    rates = json.loads(rates_file.read_text()) if rates_file.is_file() else {}
    results = {name: found for name in ARCHITECTURES if (found := results_of(options, name))}
    lines = []
    for name, by_l0 in results.items():
        for l0, done in by_l0.items():
            lines.append({"run": f"{name} {l0}", "varies": {"architecture": name}, "site": done[0]["site"], **done[0]})
    plot_pareto(lines).write_html(options.out / "pareto.html", include_plotlyjs=True)
    found = []
    for l0 in TARGETS:
        rows = []
        for name, by_l0 in results.items():
            if l0 not in by_l0:
                continue
            done = by_l0[l0]
            curve = {each[0]["l0"]: each[0]["fvu"] for each in by_l0.values()}
            at = interpolated(l0, curve)
            rate = f"{rates[name]:,.0f}" if name in rates else ""
            column = {key: [result[key] for result in done] for key in done[0]}
            cells = [
                str(len(done)),
                spread(column["l0"], 1),
                spread(column["fvu"], 4),
                f"{at:.4f}",
                spread(column["loss_recovered_mean"], 4),
                spread([100 * share for share in column["never_active_share"]], 2),
                spread([100 * share for share in column["share_below_1e4"]], 1),
            ]
            rows.append((at, [name, *cells, *([rate] if l0 == SEEDED else [])]))
        if rows:
            head = ["", "seeds", "L0", "FVU", f"FVU at L0 {l0}", "loss recovered", "never active (%)", "under-used (%)"]
            head += ["tokens/s"] if l0 == SEEDED else []
            found.append(table(head, [cells for _, cells in sorted(rows, key=lambda row: row[0])]))
    return "\n\n".join(found)


def _names(text: str) -> list[str]:
    """The type of --only."""
    names = text.split(";")
    if unknown := [name for name in names if name not in ARCHITECTURES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {'; '.join(ARCHITECTURES)}")
    return names


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/architectures"))
    parser.add_argument("--cache", type=Path, help="activations of the demo model with gradients")
    parser.add_argument("--only", type=_names, default=(), metavar="NAME;...")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE", help="only put the tables between the marks of FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    a = parser.parse_args()
    options = Options(a.out, a.cache, a.only, a.overrides)
    if a.cache is None and a.write is None:
        parser.error("--cache is needed")
    chosen = options.only or tuple(ARCHITECTURES)
    if a.write is not None:
        made = {"architectures": report(options)}
        a.write.write_text(rewritten(a.write.read_text(encoding="utf-8"), made, str(a.write)), encoding="utf-8")
    elif a.tune:
        for name in (name for name in chosen if name in PILOTS):
            tune(options, name)
    elif a.speed:
        rates = {}
        for name in chosen:
            rates[name] = max(speed(options, name) for _ in range(2))
            print(f"{name}: {rates[name]:,.0f} tokens/s", flush=True)
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(options.out / "speed.json", rates)
    else:
        for part in range(2):  # every L0 of all comes before more seeds
            for name in chosen:
                train(options, name, sweeps(options, name)[part])
        print(report(options))


if __name__ == "__main__":
    command.run(main)
