"""The stages of a run on its folder: train, evaluate and index; and `run`, which brings all three up to date.

Every result in a run folder (`saelab.runs.folder`) records the hash of what it was made from, so that a stage can tell
whether an earlier result is still valid.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.analysis.fidelity import MIN_DEAD_TOKENS, Evaluation, Fidelity
from saelab.encoded import Block, Reader, read_all, read_together
from saelab.features.index import open_index
from saelab.features.layout import VERSION
from saelab.files import expanded, locked, write_json
from saelab.progress import Track, silent
from saelab.runs import folder
from saelab.runs.job import Config, Job, Say, quiet, settings_of
from saelab.runs.reopen import in_words, reopen
from saelab.runs.train import begin, go_on
from saelab.sae.checkpoint import load
from saelab.sae.model import SparseAutoencoder


def evaluate(run: str | Path, overrides: Iterable[str] = (), *, track: Track = silent, say: Say = quiet) -> Fidelity:
    """Evaluate the autoencoder of a run folder on held-out text; writes eval.json.

    `overrides` may set `eval.*` and the device. They may also name another model, text, site or context: the result is
    then written to a file of its own, `eval-*.json`, that records what differs from training.

    Raises SaelabError if `run` has no checkpoint, for any other setting, if model or text cannot be read or are not
    those of the training, and if another process writes into the run.
    """
    run = _run_folder(run)
    with locked(run):
        opened = reopen(run, "eval", overrides, say)
        stage = partial(_evaluation, differs=opened.differs)
        return _read_held_out(opened.job, run, opened.sae, [stage], track)[0]


def index(run: str | Path, overrides: Iterable[str] = (), *, track: Track = silent, say: Say = quiet) -> dict[str, Any]:
    """Write the feature database of a run folder from held-out text; returns its manifest.

    `overrides` may set `features.*` and the device. Raises SaelabError as `evaluate` does, and for another text.
    """
    run = _run_folder(run)
    with locked(run):
        opened = reopen(run, "index", overrides, say)
        return _read_held_out(opened.job, run, opened.sae, [_database], track)[0]


def index_together(jobs: Sequence[Job], track: Track) -> None:
    """Write the feature databases of runs that lack them, or have those of other weights, in one pass over the text.

    The jobs share model and text and may differ in autoencoder and site. Their run folders must be locked.
    """
    paths = [(job, Path(job.settings.out)) for job in jobs]
    missing = [(job, path) for job, path in paths if folder.features_inputs(path) != _database_inputs(job, path)]
    if not missing:
        return
    lm, held_out = jobs[0].model, cache(jobs[0].held_out)
    saes = [load(path, lm.device) for _, path in missing]
    results = [_database(job, path, sae, held_out, track) for (job, path), sae in zip(missing, saes, strict=True)]
    readings = [
        (sae, job.settings.sites, [Reader(each.add, len(each.rows), each.rows_per_forward, each.first_row)])
        for (job, _), sae, each in zip(missing, saes, results, strict=True)
    ]
    read_all(lm, max((each.rows for each in results), key=len), readings, track=track)
    for each in results:
        each.finish()


def run(
    config: Config, overrides: Iterable[str] = (), *, force: bool = False, track: Track = silent, say: Say = quiet
) -> Path:
    """Bring all stages of `config` up to date, each unless its result is still valid; returns the run folder.

    The stages are training, evaluation and the feature database; the last two share their pass over the held-out text.
    A training that was stopped continues. A run made from something else is replaced only with `force`. A signal stops
    it as it stops `train`.
    """
    job = Job(settings_of(config, overrides), say)
    path = Path(job.settings.out)
    with locked(path):
        job.check_losses()  # evaluation needs them: better an error now than after the training
        if job.array is not None:
            job.array.words(job.held_out(1).numpy())  # the database needs labels that can be read
        _bring_up_to_date(job, path, force, track)
    return path


def _bring_up_to_date(job: Job, path: Path, force: bool, track: Track) -> None:
    say = job.say
    if not force:
        folder.check_trained(path)
    trained = folder.training_record(path)
    same = trained.get("inputs") == job.training_inputs()
    if trained.get("complete") and same and folder.has_checkpoint(path):
        say(f"training: {path} is up to date")
    else:
        if same and not trained.get("complete"):
            go_on(job, track)
        else:
            begin(job, force, track)
    missing: list[_Stage] = []
    for name, stage, made_from, inputs in (
        ("evaluation", _evaluation, folder.evaluation_inputs(path), job.result_inputs(path, job.settings.eval)),
        ("features", _database, folder.features_inputs(path), _database_inputs(job, path)),
    ):
        if made_from == inputs:
            say(f"{name}: up to date")
        else:
            missing.append(stage)
    if missing:
        _read_held_out(job, path, load(path, job.model.device), missing, track)


@dataclass(frozen=True)
class _Result:
    """A result being made: its part of the pass over held-out text, and the function that writes the result."""

    rows: Tensor
    """The rows of held-out text that it is made from; the pass gives those from `first_row` on to `add`."""
    rows_per_forward: int
    add: Callable[[Block], None]
    finish: Callable[[], Any]
    """Writes the result and returns it."""
    first_row: int = 0


_HeldOut = Callable[[int], Tensor]
"""The held-out rows for a number of tokens. The rows for fewer are the first of the rows for more."""
_Stage = Callable[[Job, Path, SparseAutoencoder, _HeldOut, Track], _Result]


def _read_held_out(job: Job, run: Path, sae: SparseAutoencoder, stages: list[_Stage], track: Track) -> list[Any]:
    """The results of `stages`, each written to the run folder, from one pass over the held-out text."""
    held_out = cache(job.held_out)
    results = [stage(job, run, sae, held_out, track) for stage in stages]
    rows = max((result.rows for result in results), key=len)
    readers = [Reader(each.add, len(each.rows), each.rows_per_forward, each.first_row) for each in results]
    read_together(sae, job.model, rows, job.settings.sites, readers, track=track)
    job.report_empty_documents()
    return [result.finish() for result in results]


def _evaluation(
    job: Job,
    run: Path,
    sae: SparseAutoencoder,
    held_out: _HeldOut,
    track: Track,
    differs: Mapping[str, Any] | None = None,
) -> _Result:
    s = job.settings.eval
    inputs = job.result_inputs(run, s)
    evaluation = Evaluation(sae, job.model, job.settings.sites, ce_tokens=job.ce_tokens)

    def finish() -> Fidelity:
        result = evaluation.result(track)
        write_evaluation(job, run, inputs, result, differs)
        return result

    return _Result(held_out(s.tokens), job.rows_at_once(s.rows_per_forward), evaluation.add, finish)


def write_evaluation(
    job: Job, run: Path, inputs: str, result: Fidelity, differs: Mapping[str, Any] | None = None
) -> None:
    """Write the evaluation `result`, which was made from `inputs` (`Job.result_inputs`), to the run folder `run`."""
    if result.tokens < MIN_DEAD_TOKENS:
        job.say(
            f"note: never-active is counted on {result.tokens:,} held-out tokens; fewer than {MIN_DEAD_TOKENS:,} "
            "say little about rare features"
        )
    trained = folder.training_record(run)
    record: dict[str, Any] = {"inputs": inputs}
    if folder.adopted(run) is None:
        record |= {"trained_tokens": trained.get("tokens"), "training_complete": trained.get("complete")}
    path = run / folder.EVALUATION
    if differs:
        path = run / folder.other_evaluation(differs)
        record["differs"] = differs
        job.say(f"note: not as in training: {in_words(differs)}; written to {path}, and not to {folder.EVALUATION}")
    write_json(path, record | folder.jsonable(result.to_dict()))


def _database(job: Job, run: Path, sae: SparseAutoencoder, held_out: _HeldOut, track: Track) -> _Result:
    s, path = job.settings.features, run / folder.FEATURES
    rows = held_out(s.tokens)
    at_once = job.rows_at_once(s.rows_per_forward)
    index = open_index(sae, job.model, rows, job.settings.sites, path, at_once, _database_inputs(job, run))
    if index.first_row:
        job.say(f"features: {index.first_row:,} of {len(rows):,} rows are encoded already")
    return _Result(rows, at_once, index.add, index.finish, index.first_row)


def _database_inputs(job: Job, run: Path) -> str:
    """Hash of everything that the feature database depends on, with the version of its format."""
    return f"{job.result_inputs(run, job.settings.features)}-{VERSION}"


def _run_folder(run: str | Path) -> Path:
    """The run folder `run`. Raises SaelabError if it is none, or has no checkpoint."""
    path = Path(expanded(run, "RUN"))
    folder.check_run(path)
    return path
