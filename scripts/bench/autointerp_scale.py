"""Explanations and scores of a million features, offline: features per second, disk, and memory.

    python scripts/bench/autointerp_scale.py                              # 2^20 features; 15 minutes of a core
    python scripts/bench/autointerp_scale.py --features 65536 --json scale.json

The feature database is made up (ours_features.made_up). Throughput and disk are measured on a part of its features,
with the offline explainer and the default scores. Memory is measured on all: made-up records stand for those of all
features but 64, which are then explained, and scored by `predicate`, beside the others. A made-up score has one judged
example, where real ones have 100. Every measurement has its own process. Memory is the most that it had of its own
(RssAnon), mapped files left out; that of a feature is what remains after subtracting the memory of a process that
explains or scores the same 64 features in an empty folder.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import ours_features
from processes import Processes, add_options, failures, heading
from table import table

from saelab.analysis.intervals import Interval
from saelab.autointerp.records import SHUFFLED, Explanation, Judged, Score
from saelab.autointerp.settings import ContextSettings, ScoreSettings
from saelab.autointerp.store import writing
from saelab.features.database import open_database
from saelab.runs import autointerp, folder

NEW = 64
"""Features that are explained and scored beside those that have been."""
MOST = 64
"""Bytes of memory that a further feature may take."""
FIGURES: tuple[str, ...] = (
    "accuracy",
    "precision",
    "recall",
    "F1",
    "true_positive",
    "false_positive",
    "token_recall",
    "correlation",
)


def measure(*, features: int, part: int, folder: Path | None = None, threads: int | None = None) -> dict[str, Any]:
    """The record that --json writes."""
    work = Path(tempfile.mkdtemp(prefix="saelab-bench-", dir=folder))
    run = str(work / "run")
    try:
        processes = Processes(threads, None, ())
        record = processes.facts("torch", "numpy", "pyarrow") | {"features": features, "part": part}
        sizes = {"tokens": max(100_000, features), "l0": 64, "vocabulary": 50_000}
        record["made_up"] = processes.ours(database, run=run, n_features=features, **sizes)
        record["rates"] = processes.ours(rates, run=run, part=part)
        for name in ("explain", "score"):
            record[f"{name}_few"] = processes.ours(globals()[name], run=run, every=features // NEW)
        processes.ours(fill, run=run, every=features // NEW)
        for name in ("explain", "score"):
            record[f"{name}_all"] = processes.ours(globals()[name], run=run, every=features // NEW)
        return record | processes.outcome()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def database(run: str, **sizes: int) -> dict[str, Any]:
    """Make the feature database of the run."""
    path = Path(run) / folder.FEATURES
    path.mkdir(parents=True)
    return ours_features.made_up(str(path), **sizes)


def rates(run: str, part: int) -> dict[str, float]:
    """Seconds and bytes of a feature, to explain it and to score it."""
    path, found = Path(run) / folder.AUTOINTERP, {}
    before = 0
    for name, stage in (("explain", autointerp.explain), ("score", autointerp.score)):
        began = time.perf_counter()
        stage(run, features=f"random:{part}")
        found[f"{name}_seconds"] = (time.perf_counter() - began) / part
        size = sum(each.stat().st_size for each in path.iterdir())
        found[f"{name}_bytes"] = (size - before) / part
        before = size
    shutil.rmtree(path)
    return found


def fill(run: str, every: int) -> None:
    """Write made-up records of all features but each `every`-th one."""
    opened = open_database(Path(run) / folder.FEATURES)
    shutil.rmtree(Path(run) / folder.AUTOINTERP)
    asked, of, figures = ScoreSettings(), ContextSettings(), dict.fromkeys(FIGURES, 0.5)
    with writing(Path(run) / folder.AUTOINTERP, opened.arrays.manifest["inputs"]) as writer:
        for feature in range(opened.n_features):
            if feature % every == 0:
                continue
            for kind, other in (("lexical", feature), (f"{SHUFFLED}lexical", feature + 1)):
                token = f" token{other}"
                answer = "F1 0.52 over the tokens of the 20 windows that it was made from"
                explanation = Explanation(
                    feature, f'the token "{token}"', kind, "lexical", program={"tokens": [token]}, answer=answer
                )
                judged = (Judged(feature, 7, 0, 32, 3, True, 1.0, (7,)),)
                value = Interval(0.5, 0.4, 0.6)
                writer.explanation(explanation, of)
                score = Score(
                    feature,
                    "predicate",
                    explanation.key,
                    "exact",
                    value,
                    "balanced accuracy",
                    figures,
                    judged=judged,
                )
                writer.score(score, of, asked)


def explain(run: str, every: int) -> dict[str, float]:
    """Seconds and largest memory of explaining all features that have no explanation."""
    n = open_database(Path(run) / folder.FEATURES).n_features
    filled = (Path(run) / folder.AUTOINTERP).is_dir()
    few = ",".join(str(feature) for feature in range(0, n, every))
    return _watched(lambda: autointerp.explain(run, f"0:{n}" if filled else few))


def score(run: str, every: int) -> dict[str, float]:
    """The same of scoring by `predicate`."""
    return _watched(lambda: autointerp.score(run, ["predicate"]))


def _watched(act: Callable[[], object]) -> dict[str, float]:
    done, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, ours_features.own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    try:
        act()
        return {"seconds": time.perf_counter() - began, "memory": max(most, ours_features.own_memory())}
    finally:
        done.set()
        thread.join()


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    rates, n = record["rates"], record["features"]
    rows = []
    for name in ("explain", "score"):
        few, every = record[f"{name}_few"], record[f"{name}_all"]
        rows += [
            [f"{name}, features/s", f"{1 / rates[f'{name}_seconds']:,.0f}"],
            [f"{name}, bytes on disk of a feature", f"{rates[f'{name}_bytes']:,.0f}"],
            [f"{name} {NEW} features beside {n:,}, s", f"{every['seconds']:,.0f}"],
            [f"{name} {NEW} features beside {n:,}, memory in MB", f"{every['memory'] / 1e6:,.0f}"],
            [
                f"{name}, bytes of memory of a feature (target {MOST})",
                f"{(every['memory'] - few['memory']) / n:,.0f}",
            ],
        ]
    size = f"rates on {record['part']:,} of {n:,} features"
    return "\n\n".join(filter(None, [heading(record, size), table(["", ""], rows), failures(record)]))


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--features", type=command.whole(NEW), default=1 << 20, help="of the database (1,048,576)")
    parser.add_argument(
        "--part", type=command.whole(1), default=1000, help="features that rates are measured on (1000)"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for 6 GB of files (default: the system's)")
    add_options(parser)
    args = parser.parse_args()
    record = measure(features=args.features, part=args.part, folder=args.folder, threads=args.threads)
    command.write_json(args.json, record)
    print(report(record))


if __name__ == "__main__":
    command.run(main)
