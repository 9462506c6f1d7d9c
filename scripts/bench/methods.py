"""The ways of training side by side on the demo language model: one cache, one table, and the claims; docs/results.md.

    python scripts/bench/methods.py [--out FOLDER] [section.key=value ...]     # about an hour on one core
    python scripts/bench/methods.py --write docs/results.md                    # only from what is finished

1. `saelab cache` writes activations with gradients, unless --cache names some.
2. For each method `saelab sweep` trains and evaluates its seeds on the same batches of the cache.
3. One pass over the held-out text for all runs: number of features and error of every token (adaptive.py).
4. What the claims need besides: budgets dealt to other tokens, steering, selection by the gradient.
5. Tables (methods_claims.py, methods_report.py) go to the terminal and to FOLDER/methods.md.

The same command goes on after a kill; finished steps are not repeated. A step is made again if its weights, text or
settings have changed. Several commands with --only and different methods may train at the same time, from one --cache.
--write trains and measures nothing: it puts the tables of the finished methods between the marks of a file,
`<!-- methods -->` and `<!-- /methods -->`, and the same with `methods: gradient`, and changes nothing else in it.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import command
import numpy as np
import torch
from methods_claims import FEATURE, FROZEN, GRADIENT, MUTUAL, TITLES, TOPK, Found, Run
from methods_report import report, rewritten

import saelab
from saelab.analysis.adaptive import PerToken, deal, rank_correlation, spread_over_features, spread_over_tokens
from saelab.analysis.intervals import add_by_row, interval
from saelab.analysis.steering_effects import steerable_features, steering_effects
from saelab.encoded import Reader, encoded, read_all
from saelab.files import write_json
from saelab.progress import bar
from saelab.runs import folder
from saelab.runs.config import find_config, read_config
from saelab.runs.job import Job, settings_of

CE_TOKENS = 32_768
ORACLE_TOKENS = 32_640


class Options(NamedTuple):
    config: str | Mapping[str, Any] = "quickstart"
    overrides: Sequence[str] = ()
    out: Path = Path("runs/methods")
    cache: Path | None = None
    seeds: int = 3
    steered: int = 100
    """Features of each autoencoder that are steered."""
    only: Sequence[str] = ()
    """Methods to train; then nothing is measured. () for all."""


def methods() -> dict[str, list[str]]:
    """The settings of each method, by the name of its folder; gradient-aware TopK is that of its shipped config."""
    gradient = read_config(find_config("gradient_topk"))["sae"]["affinity"]
    main = {
        TOPK: [],
        MUTUAL: ["sae.allocation=mutual_choice"],
        FEATURE: ["sae.allocation={name: feature_choice, capacity: zipf}"],
        GRADIENT: [f"sae.affinity={json.dumps(gradient)}"],
    }
    found = {
        f"{TOPK}-none": ["sae.aux=none"],
        f"{TOPK}-zipf": ["sae.aux=aux_zipf"],
        f"{MUTUAL}-zipf": [*main[MUTUAL], "sae.aux=aux_zipf"],
    }
    frozen = {f"{name}{FROZEN}": [*settings, "sae.freeze=decoder"] for name, settings in main.items()}
    made = main | found | frozen
    return {name: ["sae.aux=aux_k", *made[name]] for name in TITLES}


def runs_of(options: Options, name: str) -> list[Path]:
    """The runs of a method: its seeds, one for a control."""
    return [options.out / name / f"seed{seed}" for seed in range(1 if name.endswith(FROZEN) else options.seeds)]


def main(options: Options) -> str:
    """Train and measure all that is missing; returns the report, which is also in `methods.md`; "" with `only`."""
    cache, begin = options.cache or options.out / "cache", time.monotonic()
    overrides = [f"eval.ce_tokens={CE_TOKENS}", *options.overrides]
    if options.cache is None:
        saelab.cache(options.config, cache, [*overrides, "cache.gradients=true"], track=bar, say=print)
    for name, settings in methods().items():
        if options.only and name not in options.only:
            continue
        seeds = [seed_of(run) for run in runs_of(options, name)]
        made = [f"out={options.out / name}", f"activations.cache={cache}", f"sweep.sae.seed={seeds}"]
        saelab.sweep(options.config, [*overrides, *settings, *made], track=bar, say=print)
        print(f"{TITLES[name]}: {time.monotonic() - begin:.0f} s so far", flush=True)
    if options.only:
        return ""
    text = "\n\n".join(report(found(options, measure=True)).values())
    (options.out / "methods.md").write_text(text + "\n", encoding="utf-8")
    print(f"{time.monotonic() - begin:.0f} s in all")
    return text


def found(options: Options, *, measure: bool) -> Found:
    """What is finished of the study; with `measure` what is missing is measured first."""
    finished = {name: [run for run in runs_of(options, name) if finished_run(run)] for name in TITLES}
    finished = {name: runs for name, runs in finished.items() if runs}
    study = _Study(options, measure)
    if measure:
        study.per_token([run for paths in finished.values() for run in paths])
    runs: dict[str, list[Run]] = {}
    for name, paths in finished.items():
        read = [(path, study.arrays(path)) for path in paths]
        runs[name] = [
            Run(seed_of(path), folder.evaluation(path) or {}, arrays) for path, arrays in read if arrays is not None
        ]
    runs = {name: each for name, each in runs.items() if each}
    first = {name: paths[0] for name, paths in finished.items() if name in runs}
    experiments = {
        "spreads": study.kept("spreads", [first.get(TOPK), first.get(MUTUAL)], _spreads),
        "dealt": study.kept("dealt", [first.get(MUTUAL)], _dealt),
        "crossed": study.kept("crossed", [first.get(TOPK)], _dealt),
        "steering": study.kept("steering", [first.get(TOPK), first.get(GRADIENT)], _steering),
        "oracle": study.kept("oracle", [first.get(GRADIENT)], _oracle),
    }
    settings = settings_of(next(iter(first.values())) / folder.SETTINGS) if first else None
    return Found(runs, {name: each for name, each in experiments.items() if each is not None}, settings)


def seed_of(run: Path) -> int:
    return int(run.name.removeprefix("seed"))


def finished_run(run: Path) -> bool:
    return bool(folder.training_record(run).get("complete")) and (run / folder.EVALUATION).is_file()


class _Study:
    """The measurements in the folder `measured` of the study, each with the hash of what it was made from."""

    def __init__(self, options: Options, measure: bool) -> None:
        self.options, self.measure = options, measure
        self.folder = options.out / "measured"
        self.job: Job | None = None

    def opened(self, run: Path) -> Job:
        """The job of a run; all share one model and text."""
        if self.job is None:
            self.job = Job(settings_of(run / folder.SETTINGS))
        return self.job

    def file(self, run: Path) -> Path:
        return self.folder / f"{run.parent.name}-{run.name}-{inputs_of([run])}.npz"

    def arrays(self, run: Path) -> dict[str, np.ndarray] | None:
        path = self.file(run)
        return dict(np.load(path, allow_pickle=False)) if path.is_file() else None

    def per_token(self, runs: Sequence[Path]) -> None:
        """Measure the tokens of those `runs` that have no file yet, in one pass over the text."""
        runs = [run for run in runs if not self.file(run).is_file()]
        if not runs:
            return
        job = self.opened(runs[0])
        rows, s = job.held_out(job.settings.eval.tokens), job.settings.eval
        saes = [saelab.load(run, job.lm.device) for run in runs]
        tokens = [PerToken(sae, len(rows)) for sae in saes]
        readings = [
            (sae, job.settings.site, [Reader(each.add, len(rows), s.rows_per_forward)])
            for sae, each in zip(saes, tokens, strict=True)
        ]
        print(f"{len(runs)} runs: every token", flush=True)
        read_all(job.lm, rows, readings, track=bar)
        self.folder.mkdir(parents=True, exist_ok=True)
        for run, each in zip(runs, tokens, strict=True):
            unfinished = self.file(run).with_suffix(".tmp.npz")
            np.savez(unfinished, allow_pickle=False, **each.arrays())
            unfinished.replace(self.file(run))

    def kept(
        self, name: str, runs: Sequence[Path | None], make: "Callable[[_Study, list[Path]], dict[str, Any]]"
    ) -> dict[str, Any] | None:
        """The result of `make` for these weights and settings: read, or made and written; None if it is missing."""
        there = [run for run in runs if run is not None]
        if len(there) < len(runs):
            return None
        path, inputs = self.folder / f"{name}.json", inputs_of(there) + f" {self.options.steered}"
        if path.is_file() and (record := json.loads(path.read_text()))["inputs"] == inputs:
            return record["result"]
        if not self.measure:
            return None
        print(f"{name}: {', '.join(map(str, there))}", flush=True)
        begin = time.monotonic()
        made = make(self, there) | {"seconds": time.monotonic() - begin}
        write_json(path, {"inputs": inputs, "result": made})
        return made


def inputs_of(runs: Sequence[Path]) -> str:
    """A hash of the weights of `runs` and of how they are evaluated."""
    digest = hashlib.sha256()
    for run in runs:
        digest.update(folder.weights(run).read_bytes())
        digest.update(str(folder.evaluation_inputs(run)).encode())
    return digest.hexdigest()[:16]


def _spreads(study: _Study, runs: list[Path]) -> dict[str, Any]:
    """M1, M3, M4 and the correlation of M9: errors of TopK, budgets of mutual choice."""
    topk, mutual = (study.arrays(run) for run in runs)
    assert topk is not None and mutual is not None
    rows, row = int(topk["rows"]), topk["row"]
    spreads = {
        "error": spread_over_tokens("error per token, TopK", topk["error"], row, rows),
        "l0": spread_over_tokens("features per token, mutual choice", mutual["l0"], row, rows),
        "features": spread_over_features("tokens per feature, mutual choice", mutual["counts"], mutual["drawn"]),
        "features of TopK": spread_over_features("tokens per feature, TopK", topk["counts"], topk["drawn"]),
    }
    for name, each in spreads.items():
        each.plot().write_html(study.folder / f"spread-{name.replace(' ', '-')}.html", include_plotlyjs=True)
    numbers = {name: dict(each.figures()) for name, each in spreads.items()}
    return numbers | {"correlation": rank_correlation(mutual["l0"], topk["error"], row, rows)}


def _dealt(study: _Study, runs: list[Path]) -> dict[str, Any]:
    (run,), job = runs, study.opened(runs[0])
    s, site, arrays = job.settings.eval, job.settings.site, study.arrays(run)
    assert arrays is not None
    rows, sae = job.held_out(s.tokens), saelab.load(run, job.lm.device)
    blocks = encoded(sae, job.lm, rows, site, s.rows_per_forward, track=bar)
    result = deal(sae, blocks, len(rows), arrays["l0"])
    result.plot().write_html(study.folder / f"dealt-{run.parent.name}.html", include_plotlyjs=True)
    return {"l0": result.l0, "fvu": result.fvu, "gain": result.gain, "gain_dealt": result.gain_dealt}


def _steering(study: _Study, runs: list[Path]) -> dict[str, Any]:
    """G4, G5. Features of TopK are matched to random ones of gradient-aware TopK by density, one to one."""
    job, numbers = study.opened(runs[0]), np.random.default_rng(0)
    settings = job.settings.analysis.steering
    rows, site = job.held_out(settings.tokens), job.settings.site
    saes = [saelab.load(run, job.lm.device) for run in runs]
    counts = [study.arrays(run) for run in runs]
    assert counts[0] is not None and counts[1] is not None
    log_count = [np.log(each["counts"] + 1.0) for each in counts if each is not None]
    enough = [steerable_features(sae, job.lm, rows, site, settings) for sae in saes]
    pairs = matched(log_count[0], enough[0], log_count[1], numbers.permutation(enough[1]), study.options.steered)
    made = [
        steering_effects(sae, job.lm, rows, site, settings, features=features.tolist(), track=bar)
        for sae, features in zip(saes, pairs.T, strict=True)
    ]
    for run, each in zip(runs, made, strict=True):
        each.plot().write_html(study.folder / f"steering-{run.parent.name}.html", include_plotlyjs=True)
    return {
        "features": len(pairs),
        "contexts": settings.contexts,
        "score": [each.score.tolist() for each in made],
        "share_against_effect": [each.share_against_effect() for each in made],
    }


def matched(a: np.ndarray, of_a: np.ndarray, b: np.ndarray, of_b: np.ndarray, most: int) -> np.ndarray:
    """Pairs ``[pairs, 2]`` of a feature of `of_a` and one of `of_b`, at most `most`, none in two pairs.

    Each of `of_b`, in order, gets the one left of `of_a` whose value in `a` is nearest to its own in `b`.
    """
    left, pairs = list(of_a), []
    for feature in of_b[: min(most, len(left))]:
        nearest = int(np.abs(a[left] - b[feature]).argmin())
        pairs.append((left.pop(nearest), feature))
    return np.array(pairs).reshape(-1, 2)


def _oracle(study: _Study, runs: list[Path]) -> dict[str, Any]:
    """G2: the share of the entries selected with the gradient that activations alone select too, and its fidelity."""
    (run,), job = runs, study.opened(runs[0])
    s, site = job.settings.eval, job.settings.site
    rows, sae = job.held_out(min(ORACLE_TOKENS, s.tokens)), saelab.load(run, job.lm.device)
    sums = np.zeros((len(rows), 2))
    for block in encoded(sae, job.lm, rows, site, s.rows_per_forward, gradients=True, track=bar):
        both = [
            codes.row_of_entry() * codes.n_features + codes.features for codes in (block.codes, sae.encode(block.x))
        ]
        row = block.row_of_token()[block.codes.row_of_entry().cpu()]
        add_by_row(sums, row, torch.stack([torch.isin(*both).double().cpu(), torch.ones(len(row)).double()], 1))
    modes = [saelab.fidelity(sae, job.lm, rows, site, ce_tokens=s.ce_tokens, oracle=oracle) for oracle in (False, True)]
    figures = {name: [getattr(mode, name) for mode in modes] for name in ("fvu", "delta_ce", "l0")}
    return figures | {"tokens": modes[0].tokens, "shared": interval(sums)}


def write(options: Options, file: Path) -> None:
    """Put the tables of what is finished between the marks of `file`."""
    text = rewritten(file.read_text(encoding="utf-8"), report(found(options, measure=False)), str(file))
    file.write_text(text, encoding="utf-8")


def _methods(text: str) -> list[str]:
    """The type of --only."""
    names = text.split(",")
    if unknown := [name for name in names if name not in TITLES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(TITLES)}")
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=Options().config, help="a file, or the name of a shipped config")
    parser.add_argument("--out", type=Path, default=Options().out, help="folder of the runs (runs/methods)")
    parser.add_argument("--cache", type=Path, help="a cache with gradients; by default FOLDER/cache is written")
    parser.add_argument("--seeds", type=command.whole(1), default=Options().seeds)
    parser.add_argument("--steered", type=command.whole(1), default=Options().steered, help="features to steer")
    parser.add_argument("--only", type=_methods, default=(), metavar="NAME,...", help="only train these methods")
    parser.add_argument("--write", type=Path, metavar="FILE", help="only write the finished figures into FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    a = parser.parse_args()
    chosen = Options(a.config, a.overrides, a.out, a.cache, a.seeds, a.steered, a.only)
    command.run(lambda: print(main(chosen)) if a.write is None else write(chosen, a.write))
