"""The demo study of explanations: a run and its controls, explained and scored offline; docs/results.md.

    python scripts/bench/autointerp.py [--out FOLDER] [section.key=value ...]     # trains the quickstart
    python scripts/bench/autointerp.py --run RUN                                  # of a run that has a feature database
    python scripts/bench/autointerp.py [--run RUN] --write docs/results.md        # only from what is finished

1. `saelab run` trains, evaluates and indexes the quickstart, unless --run names a run.
2. `saelab controls` makes the controls of the run, and trains some of them.
3. lexical, which is no language model, explains features of the run, and those nearest in density of each control.
4. The offline scores of each, then the slow scores (`SLOW`) of the run on fewer features.
5. The table (autointerp_report.py) goes to the terminal and to FOLDER/autointerp.md.

The same command goes on after a kill; finished steps are not repeated. seconds.json has the time of each step, by a
clock and of the processor, over all commands that worked on it. Settings are of the training, as for `saelab run`; with
--run those that `saelab controls` takes. --write makes nothing: it puts the table between `<!-- autointerp -->` and
`<!-- /autointerp -->` of a file, and changes nothing else in it.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import command
from autointerp_report import SLOW, Study, report
from methods_report import rewritten

import saelab
from saelab.autointerp.plan import stored
from saelab.autointerp.scoring import DEFAULT
from saelab.errors import SaelabError
from saelab.files import write_json
from saelab.progress import bar
from saelab.runs import folder
from saelab.runs.controls import controls
from saelab.runs.explained import Opened, table

MARK = "autointerp"
SLOW_FEATURES = 20
"""Features of `SLOW`, which are scored without other runs."""


class Options(NamedTuple):
    run: Path | None = None
    """The run, which has a feature database; None: the quickstart, trained in `out`."""
    overrides: Sequence[str] = ()
    out: Path = Path("runs/autointerp")
    features: int = 220
    """Features of the run that are explained; some of 200 have too few windows for a score."""

    @property
    def subject(self) -> Path:
        return self.out / "run" if self.run is None else self.run


def main(options: Options) -> str:
    """Make all that is missing; returns the report, which is also in `autointerp.md`."""
    run, times = options.subject, Times(options.out / "seconds.json")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.run is None:
        saelab.run("quickstart", [*options.overrides, f"out={run}"], track=bar, say=print)
    controls(run, [] if options.run is None else options.overrides, track=bar, say=print)
    own = folder.controls(run)
    for path in (run, *own):
        features = f"random:{options.features}" if path == run else None
        with times.of(path.name, "explain"):
            saelab.explain(path, features, track=partial(bar, unit="features"))
        for name in DEFAULT:
            with times.of(path.name, name):
                saelab.score(path, [name], controls=(), track=partial(bar, unit="scores"))
    some = ",".join(map(str, spread(explained(run), SLOW_FEATURES)))
    with times.of(run.name, "explain effects"):
        saelab.explain(run, some, about="effect", track=partial(bar, unit="features"))
    for name in SLOW:
        with times.of(run.name, name):
            saelab.score(run, [name], some, controls=(), track=partial(bar, unit="scores"))
    text = report(found(options))
    (options.out / "autointerp.md").write_text(text + "\n", encoding="utf-8")
    return text


def found(options: Options) -> Study:
    """What is finished of the study. Raises SaelabError if nothing is scored."""
    run = options.subject
    scores = table(run) if folder.has_features(run) else None
    if scores is None or not scores.lines:
        raise SaelabError(f"{run}: has no scores yet; run the command without --write")
    settings = saelab.settings_of(run / folder.SETTINGS)
    trained = {path.name: folder.training_record(path)["tokens"] for path in (run, *folder.controls(run))}
    return Study(run.name, settings, scores, trained, Times(options.out / "seconds.json").read())


def explained(run: Path) -> list[int]:
    """The features of a run that have an explanation."""
    opened = Opened(run)
    latest, _ = stored(opened.folder, opened.inputs)
    return latest.features[latest.explained].tolist()


def spread(features: Sequence[int], n: int) -> list[int]:
    """At most `n` of the features, evenly spread."""
    n = min(n, len(features))
    return [features[i * len(features) // n] for i in range(n)]


class Times:
    """Seconds of each step of each run, by a clock and of the processor, added up over commands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, list[float]]]:
        """By run and step."""
        return json.loads(self.path.read_text()) if self.path.is_file() else {}

    @contextmanager
    def of(self, run: str, step: str) -> Iterator[None]:
        """Add the time of the block, also of one that is stopped; not if the step was finished before."""
        there = self.read()
        done = there.setdefault(run, {}).setdefault(step, [0.0, 0.0, 0.0])
        clock, processor, finished = time.monotonic(), time.process_time(), 0.0
        try:
            yield
            finished = 1.0
        finally:
            if not done[2]:
                passed = time.monotonic() - clock, time.process_time() - processor
                there[run][step] = [done[0] + passed[0], done[1] + passed[1], finished]
                write_json(self.path, there)


def write(options: Options, file: Path) -> None:
    """Put the table of what is finished between the marks of `file`."""
    text = rewritten(file.read_text(encoding="utf-8"), {MARK: report(found(options))}, str(file))
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run with a feature database; by default the quickstart is trained")
    parser.add_argument("--out", type=Path, default=Options().out, help="folder of the study (runs/autointerp)")
    parser.add_argument("--features", type=command.whole(1), default=Options().features, help="features to explain")
    parser.add_argument("--write", type=Path, metavar="FILE", help="only write the finished figures into FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    a = parser.parse_args()
    chosen = Options(a.run, a.overrides, a.out, a.features)
    command.run(lambda: print(main(chosen)) if a.write is None else write(chosen, a.write))
