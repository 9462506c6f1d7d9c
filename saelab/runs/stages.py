"""The stages of a run on its folder: train, evaluate, features; and the demo, which is all three.

Every result in a run folder (`saelab.runs.folder`) records the hash of what it was made from, so that a stage can tell
whether an earlier result still stands.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saelab.analysis.fidelity import MIN_DEAD_TOKENS, Fidelity, fidelity
from saelab.errors import SaelabError
from saelab.features.index import build_features
from saelab.files import write_json
from saelab.progress import Track, silent
from saelab.runs import folder
from saelab.runs.config import load_config
from saelab.runs.job import Config, Job, Say, quiet, settings_of
from saelab.runs.train import begin
from saelab.sae.checkpoint import load


def evaluate(run: str | Path, overrides: Iterable[str] = (), *, track: Track = silent, say: Say = quiet) -> Fidelity:
    """Evaluate the autoencoder of a run folder on held-out text; writes eval.json."""
    run, job = _open_run(run, overrides, say)
    return _evaluate(job, run, track)


def _evaluate(job: Job, run: Path, track: Track) -> Fidelity:
    s = job.settings.eval
    sae = load(run, job.lm.device)
    result = fidelity(
        sae,
        job.lm,
        job.held_out(s.tokens),
        job.settings.site,
        ce_tokens=s.ce_tokens,
        rows_per_forward=s.rows_per_forward,
        track=track,
    )
    if result.tokens < MIN_DEAD_TOKENS:
        job.say(
            f"note: never-active is counted on {result.tokens:,} held-out tokens; fewer than {MIN_DEAD_TOKENS:,} say "
            "little about rare features"
        )
    write_json(run / folder.EVALUATION, {"inputs": job.result_inputs(run, s)} | folder.jsonable(result.to_dict()))
    return result


def index(run: str | Path, overrides: Iterable[str] = (), *, track: Track = silent, say: Say = quiet) -> dict[str, Any]:
    """Write the feature database of a run folder from held-out text; returns its summary."""
    run, job = _open_run(run, overrides, say)
    return _index(job, run, track)


def _index(job: Job, run: Path, track: Track) -> dict[str, Any]:
    s = job.settings.features
    sae = load(run, job.lm.device)
    inputs = job.result_inputs(run, s)
    return build_features(
        sae, job.lm, job.held_out(s.tokens), job.settings.site, run / folder.FEATURES, s, inputs, track=track
    )


def demo(
    config: Config, overrides: Iterable[str] = (), *, force: bool = False, track: Track = silent, say: Say = quiet
) -> Path:
    """Train, evaluate and make features, leaving out each stage whose result in the run folder still stands.

    A training that was cut short is done again. A run made from something else is replaced only with `force`.
    """
    job = Job(settings_of(config, overrides), say)
    run = Path(job.settings.out)
    trained = folder.training_record(run)
    if trained.get("complete") and trained.get("inputs") == job.training_inputs() and folder.has_checkpoint(run):
        say(f"training: {run} is up to date")
    else:
        cut_short = not trained.get("complete") and trained.get("inputs") == job.training_inputs()
        begin(job, force or cut_short, track)
        if not folder.training_record(run).get("complete"):
            raise SaelabError(f"{run}: training was interrupted; run the same command again to start over")
    if folder.evaluation_inputs(run) == job.result_inputs(run, job.settings.eval):
        say("evaluation: up to date")
    else:
        _evaluate(job, run, track)
    if folder.features_inputs(run) == job.result_inputs(run, job.settings.features):
        say("features: up to date")
    else:
        _index(job, run, track)
    return run


def _open_run(run: str | Path, overrides: Iterable[str], say: Say) -> tuple[Path, Job]:
    run = Path(run)
    folder.check_run(run)
    return run, Job(load_config(run / folder.SETTINGS, overrides), say)
