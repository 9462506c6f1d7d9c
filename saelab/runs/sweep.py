"""Sweeps: the runs of a grid, trained on the batches of one pass over the activations, then evaluated together.

Each run has an ordinary folder below that of the sweep and ends as it would alone. All runs at the same place in the
same source share a pass, as many as fit into memory at once. `sweep.json` and `sweep.html` compare the results.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from saelab.analysis.fidelity import Evaluation, results
from saelab.encoded import Block, Reader, read_all
from saelab.errors import SaelabError, WriteError
from saelab.files import locked, translate_errors, write_json, write_whole
from saelab.memory import give_back
from saelab.progress import Track, silent
from saelab.runs import folder
from saelab.runs.grid import GridRun, grid, sweep_folder
from saelab.runs.job import Config, Job, Say, quiet
from saelab.runs.log import check_log
from saelab.runs.loop import Failures
from saelab.runs.plan import Plan, fitting, plan_evaluation, plan_training
from saelab.runs.resume import last_position, states
from saelab.runs.save import check_out
from saelab.runs.stages import write_evaluation
from saelab.runs.train import begin_all, go_on_all
from saelab.runs.unread import note_unread
from saelab.sae.checkpoint import load

Show = Callable[[Path, Sequence[Mapping[str, Any]]], None]
PLOT = "sweep.html"
FIGURES = ("l0", "fvu", "delta_ce", "loss_recovered_zero", "loss_recovered_mean", "never_active", "n_features")
"""The figures of each run in the summary, by their names in an evaluation."""


def sweep(
    config: Config,
    overrides: Iterable[str] = (),
    *,
    force: bool = False,
    track: Track = silent,
    say: Say = quiet,
    show: Show = lambda out, summary: None,
) -> Path:
    """Train and evaluate every combination of the values in `sweep:`; returns the folder of the run folders.

    `show` gets that folder and the lines of the summary, also if some run failed.
    Called again, it goes on where it was stopped or killed: finished runs stay. Runs made from something else are
    replaced only with `force`. A signal stops it as it stops `train`. Raises SaelabError for bad settings, text and
    models; a run that fails does not stop the others, and an error at the end names it.
    """
    runs = grid(config, overrides)
    if not runs[0].name:
        raise SaelabError("sweep: the config has none; for example: saelab sweep quickstart sweep.sae.k=[16,32]")
    out = sweep_folder(runs)
    if (out / folder.TRAINING).exists():
        raise SaelabError(f"out: {out} is a run, and a sweep is a folder of runs; choose another with out=FOLDER")
    with ExitStack() as locks:
        for path in (out, *(Path(run.settings.out) for run in runs)):
            locks.enter_context(locked(path))
        first = Job(runs[0].settings, say)
        jobs = [first.beside(run.settings, partial(_named, say, run.name)) for run in runs]
        note_unread([run.settings for run in runs], say)
        check_log(first.settings.training)
        first.check_losses()  # evaluation needs them: better an error now than after the training
        try:
            failed = train_together(jobs, force, track, say)
            failed |= _evaluate([job for job in jobs if _path(job) not in failed], track)
        except (KeyboardInterrupt, SystemExit):
            say(f"{out}: the same command goes on with the sweep")
            raise
        except WriteError as error:
            raise WriteError(f"{error}: the same command goes on with the sweep") from error
        show(out, _summarise(out, runs, failed))
    if failed:
        listed = "; ".join(f"{path.name}: {error}" for path, error in failed.items())
        raise SaelabError(f"{out}: {len(failed)} of {len(runs)} runs failed, the others are finished; {listed}")
    return out


def _named(say: Say, name: str, message: str) -> None:
    say(f"{name}: {message}")


def _path(job: Job) -> Path:
    return Path(job.settings.out)


def train_together(jobs: Sequence[Job], force: bool, track: Track, say: Say) -> Failures:
    """Bring the training of every run to its end, on the same batches; returns those that failed.

    The jobs may differ in autoencoder and site. Their run folders must be locked.
    """
    failed: Failures = {}
    groups: dict[tuple[str | None, bool], list[Job]] = {}
    for job in jobs:
        run = _path(job)
        record = folder.training_record(run)
        same = record.get("inputs") == job.training_inputs()
        if same and record.get("complete") and folder.has_checkpoint(run):
            job.say("is trained already")
            continue
        position = None
        try:
            if not same:
                check_out(job.settings, force)
            elif states(run):
                position = json.dumps(last_position(run), sort_keys=True)
        except SaelabError as error:
            if not same:
                raise
            failed[run] = error
            continue
        # Positions without a gradient are left out of passes with gradients; a cache has the same tokens for both.
        apart = job.settings.activations.cache is None and job.settings.sae.needs_gradients
        groups.setdefault((position, apart), []).append(job)
    if len(groups) > 1:
        say(f"note: {len(groups)} passes: runs differ in how far they are trained, or in whether they need gradients")
    for (position, _), group in groups.items():
        resumed = position is not None
        loaded = group[0].loaded
        for turn in turns(group, partial(plan_training, loaded=loaded, resumed=resumed)):
            if len(turn) < len(group):
                say(f"{len(turn)} of {len(group)} autoencoders at once, as memory allows")
            try:
                failed |= go_on_all(turn, track, say) if resumed else begin_all(turn, True, track, say)
            except WriteError:
                raise
            except SaelabError as error:  # the source failed
                failed |= dict.fromkeys(map(_path, turn), error)
    return failed


def turns(jobs: Sequence[Job], plan_of: Callable[..., Plan]) -> Iterator[Sequence[Job]]:
    """`jobs` in parts, in their order, each of as many as fit into memory together by `plan_of`, at least one."""
    left = list(jobs)
    while left:
        n = fitting([job.settings for job in left], plan_of)
        yield left[:n]
        left = left[n:]


def _evaluate(jobs: Sequence[Job], track: Track) -> Failures:
    """Evaluate the runs whose evaluation is missing or of other weights; returns those that failed."""
    missing = [
        job for job in jobs if folder.evaluation_inputs(_path(job)) != job.result_inputs(_path(job), job.settings.eval)
    ]
    failed: Failures = {}
    give_back()  # what the training used
    for turn in turns(missing, partial(plan_evaluation, loaded=True)):
        failed |= _evaluate_together(turn, track)
    return failed


def _evaluate_together(jobs: Sequence[Job], track: Track) -> Failures:
    """Evaluate runs in one pass over the held-out text. They also share the runs of the model that replace nothing by
    a reconstruction, if they are at the same sites."""
    failed: Failures = {}
    lm, s = jobs[0].model, jobs[0].settings.eval
    rows, at_once = jobs[0].held_out(s.tokens), jobs[0].rows_at_once(s.rows_per_forward)
    evaluations, readings = {}, []

    def add(run: Path, block: Block) -> None:
        if run not in failed:
            try:
                evaluations[run].add(block)
            except SaelabError as error:
                failed[run] = error

    for job in jobs:
        run, sites = _path(job), job.settings.sites
        sae = load(run, lm.device)
        evaluations[run] = Evaluation(sae, lm, sites, ce_tokens=job.ce_tokens)
        readings.append((sae, sites, [Reader(partial(add, run), len(rows), at_once)]))
    read_all(lm, rows, readings, track=track)
    for sites in dict.fromkeys(job.settings.sites for job in jobs):
        here = [job for job in jobs if job.settings.sites == sites and _path(job) not in failed]
        found = results([evaluations[_path(job)] for job in here], track) if here else []
        for job, result in zip(here, found, strict=True):
            write_evaluation(job, _path(job), job.result_inputs(_path(job), s), result)
    return failed


def _summarise(out: Path, runs: Sequence[GridRun], failed: Failures) -> list[dict[str, Any]]:
    """Write the summary of the sweep and its plot; returns the summary, a line for each run."""
    from saelab.analysis.pareto import plot_pareto

    found = []
    for run in runs:
        path = Path(run.settings.out)
        figures = {} if path in failed else folder.evaluation(path) or {}
        line = {"run": run.name, "varies": run.varies, "site": str(run.settings.sites)}
        line |= {name: figures.get(name) for name in FIGURES}
        found.append(line | ({"failed": str(failed[path])} if path in failed else {}))
    write_json(out / folder.SWEEP, {"runs": found})
    page = plot_pareto(found).to_html(include_plotlyjs=True)
    with translate_errors(out, len(page)):
        write_whole(out / PLOT, page)
    return found
