"""The stages of a run on its folder: train, evaluate and index; and `run`, which brings all three up to date.

Every result in a run folder (`saelab.runs.folder`) records the hash of what it was made from, so that a stage can tell
whether an earlier result is still valid.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.activations.stream import check_losses
from saelab.analysis.fidelity import MIN_DEAD_TOKENS, Evaluation, Fidelity
from saelab.encoded import Block, Reader, read_together
from saelab.errors import SaelabError
from saelab.features.activity import ActivityBuilder
from saelab.features.index import check_replaceable, write_features
from saelab.files import write_json
from saelab.progress import Track, silent
from saelab.runs import folder
from saelab.runs.config import load_config
from saelab.runs.job import Config, Job, Say, quiet, settings_of
from saelab.runs.train import begin, go_on
from saelab.sae.checkpoint import load
from saelab.sae.model import SparseAutoencoder


def evaluate(run: str | Path, overrides: Iterable[str] = (), *, track: Track = silent, say: Say = quiet) -> Fidelity:
    """Evaluate the autoencoder of a run folder on held-out text; writes eval.json.

    Raises SaelabError if `run` has no checkpoint, or if the text or the model cannot be read.
    """
    run, job = _open_run(run, overrides, say)
    return _read_held_out(job, run, [_evaluation], track)[0]


def index(run: str | Path, overrides: Iterable[str] = (), *, track: Track = silent, say: Say = quiet) -> dict[str, Any]:
    """Write the feature database of a run folder from held-out text; returns its summary.

    Raises SaelabError as `evaluate` does.
    """
    run, job = _open_run(run, overrides, say)
    return _read_held_out(job, run, [_database], track)[0]


def run(
    config: Config, overrides: Iterable[str] = (), *, force: bool = False, track: Track = silent, say: Say = quiet
) -> Path:
    """Bring all stages of `config` up to date, each unless its result is still valid; returns the run folder.

    The stages are training, evaluation and the feature database; the last two share their pass over the held-out text.
    A training that was stopped continues. A run made from something else is replaced only with `force`.
    """
    job = Job(settings_of(config, overrides), say)
    path = Path(job.settings.out)
    check_losses(job.corpus)  # evaluation needs them: better an error now than after the training
    trained = folder.training_record(path)
    same = trained.get("inputs") == job.training_inputs()
    if trained.get("complete") and same and folder.has_checkpoint(path):
        say(f"training: {path} is up to date")
    else:
        if same and not trained.get("complete"):
            go_on(job, track)
        else:
            begin(job, force, track)
        if not folder.training_record(path).get("complete"):
            raise SaelabError(f"{path}: training was stopped; run the same command again to continue")
    missing: list[_Stage] = []
    for name, stage, made_from, settings in (
        ("evaluation", _evaluation, folder.evaluation_inputs(path), job.settings.eval),
        ("features", _database, folder.features_inputs(path), job.settings.features),
    ):
        if made_from == job.result_inputs(path, settings):
            say(f"{name}: up to date")
        else:
            missing.append(stage)
    if missing:
        _read_held_out(job, path, missing, track)
    return path


@dataclass(frozen=True)
class _Result:
    """A result being made: its part of the pass over held-out text, and the function that writes the result."""

    tokens: int
    rows_per_forward: int
    add: Callable[[Block], None]
    finish: Callable[[Tensor], Any]
    """Takes the rows of the pass, writes the result and returns it."""


_Stage = Callable[[Job, Path, SparseAutoencoder, Track], _Result]


def _read_held_out(job: Job, run: Path, stages: list[_Stage], track: Track) -> list[Any]:
    """The results of `stages`, each written to the run folder, from one pass over the held-out text."""
    sae = load(run, job.lm.device)
    results = [stage(job, run, sae, track) for stage in stages]
    # The held-out rows for fewer tokens are the first of the rows for more.
    rows = {tokens: job.held_out(tokens) for tokens in {result.tokens for result in results}}
    readers = [Reader(result.add, len(rows[result.tokens]), result.rows_per_forward) for result in results]
    read_together(sae, job.lm, max(rows.values(), key=len), job.settings.site, readers, track=track)
    job.report_empty_documents()
    return [result.finish(rows[result.tokens]) for result in results]


def _evaluation(job: Job, run: Path, sae: SparseAutoencoder, track: Track) -> _Result:
    s = job.settings.eval
    inputs = job.result_inputs(run, s)
    evaluation = Evaluation(sae, job.lm, job.settings.site, ce_tokens=s.ce_tokens)

    def finish(_: Tensor) -> Fidelity:
        result = evaluation.result(track)
        if result.tokens < MIN_DEAD_TOKENS:
            job.say(
                f"note: never-active is counted on {result.tokens:,} held-out tokens; fewer than {MIN_DEAD_TOKENS:,} "
                "say little about rare features"
            )
        write_json(run / folder.EVALUATION, {"inputs": inputs} | folder.jsonable(result.to_dict()))
        return result

    return _Result(s.tokens, s.rows_per_forward, evaluation.add, finish)


def _database(job: Job, run: Path, sae: SparseAutoencoder, track: Track) -> _Result:
    s = job.settings.features
    inputs = job.result_inputs(run, s)
    check_replaceable(run / folder.FEATURES)
    activity = ActivityBuilder(sae.n_features)

    def finish(rows: Tensor) -> dict[str, Any]:
        path = run / folder.FEATURES
        return write_features(activity.build(), sae, job.lm, rows, job.settings.site, path, s, inputs)

    return _Result(s.tokens, s.rows_per_forward, activity.add, finish)


def _open_run(run: str | Path, overrides: Iterable[str], say: Say) -> tuple[Path, Job]:
    run = Path(run)
    folder.check_run(run)
    return run, Job(load_config(run / folder.SETTINGS, overrides), say)
