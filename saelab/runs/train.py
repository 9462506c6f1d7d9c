"""The training stage: from a config, or from the last state of a run, to a run folder with a checkpoint."""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from saelab.activations.cache.layout import difference
from saelab.activations.source import Source
from saelab.activations.stream import ActivationBatch, provenance
from saelab.errors import SaelabError
from saelab.files import appended, expanded, locked, translate_errors, write_whole
from saelab.progress import Track, silent
from saelab.runs import folder
from saelab.runs.calibration import calibrate, calibration_rows
from saelab.runs.feed import open_source
from saelab.runs.inputs import Inputs, first_inputs
from saelab.runs.job import Config, Job, Say, quiet, settings_of
from saelab.runs.plan import checked_plan, plan_training
from saelab.runs.resume import Checkpoints, last_state, resumable, resumed_settings, states
from saelab.runs.save import check_out, save_run, write_new_run, write_settings
from saelab.sae.model import bare_autoencoder, new_autoencoder
from saelab.signals import interruptible, stop
from saelab.training.trainer import Trainer


def train(
    config: Config, overrides: Iterable[str] = (), *, force: bool = False, track: Track = silent, say: Say = quiet
) -> Path:
    """Train an autoencoder as `config` says; returns the run folder.

    An existing run folder is never overwritten without `force`. Ctrl-C, SIGTERM and SIGHUP finish the step and save the
    state, from which `resume` continues; then Ctrl-C raises KeyboardInterrupt, and the others SystemExit with 143 and
    129. Raises SaelabError for bad settings, text, models and activations, and if another process writes into the run.
    """
    job = Job(settings_of(config, overrides), say)
    with locked(Path(job.settings.out)):
        return begin(job, force, track)


def resume(
    run: str | Path,
    overrides: Iterable[str] = (),
    *,
    config: Config | None = None,
    track: Track = silent,
    say: Say = quiet,
) -> Path:
    """Continue the training in the folder `run` from its last state, or restart it if there is none; returns `run`.

    On a CPU with as many threads the result equals an uninterrupted training to the bit. `overrides` may raise
    `training.tokens` and change the device, the log and the interval of states. Raises SaelabError for any other
    difference, also in `config`, and if model, text or cache are not those of the run. Signals are as in `train`.
    """
    run = Path(expanded(run, "RUN"))
    if not (run / folder.SETTINGS).is_file() or not (run / folder.TRAINING).is_file():
        raise SaelabError(f"{run}: not a run folder (`saelab train CONFIG` makes one)")
    with locked(run):
        settings = settings_of(run / folder.SETTINGS if config is None else config, overrides)
        return go_on(Job(resumed_settings(run, replace(settings, out=str(run))), say), track)


def begin(job: Job, force: bool, track: Track) -> Path:
    """Train `job` from its beginning. Its run folder must be locked."""
    settings = job.settings
    check_out(settings, force)
    checked_plan(lambda: plan_training(settings, loaded=job.loaded), job.say)
    source = open_source(job, track)
    inputs, sample = first_inputs(source.sample(), job)
    trainer = Trainer(new_autoencoder(settings.sae, sample, seed=settings.seed), settings.training, settings.sae)
    del sample  # the first step needs the memory
    write_new_run(settings, inputs=job.training_inputs(), force=force)
    return _run(job, trainer, source, inputs, 0.0, track)


def go_on(job: Job, track: Track) -> Path:
    """Train `job` from the last state in its run folder, which must be locked."""
    settings, run = job.settings, Path(job.settings.out)
    if not states(run):
        # the weights of a script, or of an earlier version, are not replaced
        if folder.has_checkpoint(run) or folder.training_record(run).get("inputs") is None:
            raise SaelabError(
                f"{run}: has no state to go on from; `saelab train {run / folder.SETTINGS} --force` trains it again"
            )
        job.say(f"{run}: no state was saved so far; training starts again")
        return begin(job, True, track)
    checked_plan(lambda: plan_training(settings, loaded=job.loaded, resumed=True), job.say)
    state = last_state(run, job.lm.device)
    differs = difference(state["provenance"], _provenance(job))
    if differs:
        raise SaelabError(f"{run}: was trained on something else than its settings name now: its {differs}")
    trainer = Trainer(
        bare_autoencoder(settings.sae, job.lm.width(settings.site)).to(job.lm.device), settings.training, settings.sae
    )
    trainer.load_state_dict(state.pop("trainer"))  # frees its copy of the weights
    if trainer.finished:
        if folder.training_record(run).get("complete"):
            job.say(f"{run}: all {trainer.tokens:,} tokens are trained on; training.tokens=N trains on more")
        else:  # it was stopped after the last step
            with resumable(run):
                _finish(job, trainer, Inputs.from_state(state), state["seconds"], track)
        return run
    job.say(f"{run}: training continues after {trainer.tokens:,} tokens")
    with translate_errors(run):
        write_settings(run, settings)
        write_whole(run / folder.METRICS, _lines_before(run / folder.METRICS, trainer.steps))
    source = open_source(job, track, state["source"])
    return _run(job, trainer, source, Inputs.from_state(state), state["seconds"], track)


def _run(job: Job, trainer: Trainer, source: Source, inputs: Inputs, seconds: float, track: Track) -> Path:
    """Train to the end, or until a signal; write states on the way and the checkpoint at the end."""
    settings, run, say, device = job.settings, Path(job.settings.out), job.say, job.lm.device
    checkpoints, began = Checkpoints(run, settings.training.checkpoint), time.monotonic() - seconds
    left = settings.training.tokens - trainer.tokens

    def save() -> Path:
        state = {"trainer": trainer.state_dict(), "source": source.state(), "provenance": _provenance(job)}
        state |= inputs.state() | {"seconds": time.monotonic() - began}
        return checkpoints.save(trainer.steps, trainer.tokens, state)

    def batches() -> Iterator[ActivationBatch]:
        while not (trainer.finished or stopped_by()):
            yield next(source)

    with resumable(run), appended(run / folder.METRICS) as log, interruptible(say) as stopped_by:
        between_steps = True
        try:
            for batch in track(inputs.batches(batches(), device), "training", left, lambda batch: len(batch.x)):
                between_steps = False
                line = trainer.step(batch)
                between_steps = True
                if line is not None:
                    line["tokens_per_second"] = trainer.tokens / (time.monotonic() - began)
                    log(json.dumps(folder.jsonable(line)))
                if checkpoints.due(trainer.tokens) and not trainer.finished:
                    save()
            path = save()
            if not trainer.finished:
                say(f"stopped after {trainer.tokens:,} tokens; `saelab train --resume {run}` goes on (state: {path})")
        except (SaelabError, OSError):  # bad data, a full disk, output that nobody reads: save the weights so far
            if between_steps and trainer.steps:
                save()
            _save(job, trainer, inputs, time.monotonic() - began, {})
            raise
        finally:
            source.close()
        _finish(job, trainer, inputs, time.monotonic() - began, track)
        number = stopped_by()
    if number is not None:
        stop(number)
    return run


def _finish(job: Job, trainer: Trainer, inputs: Inputs, seconds: float, track: Track) -> None:
    """Set the thresholds that inference needs, and write the checkpoint."""
    trainer.release()
    _save(job, trainer, inputs, seconds, _calibrated(job, trainer, inputs, track))
    if inputs.left_out:
        job.say(f"note: {inputs.left_out:,} tokens with larger norms were left out (activations.max_norm)")
    if trainer.finished:
        job.say(f"trained on {trainer.tokens:,} tokens; checkpoint in {Path(job.settings.out) / folder.CHECKPOINT}")
    job.report_empty_documents()


def _save(job: Job, trainer: Trainer, inputs: Inputs, seconds: float, facts: dict[str, Any]) -> None:
    facts = inputs.state() | facts
    save_run(
        job.settings, job.lm, job.corpus, trainer, inputs.scale, facts, inputs=job.training_inputs(), seconds=seconds
    )


def _calibrated(job: Job, trainer: Trainer, inputs: Inputs, track: Track) -> dict[str, Any]:
    """Set thresholds on held-out text after that of evaluation, if inference needs them; returns facts to record."""
    densities, settings = trainer.trained().densities, job.settings
    if densities is None:
        return {}
    rows = calibration_rows(job.corpus, settings.eval.tokens, job.say)
    facts = calibrate(
        trainer.sae,
        job.lm,
        rows,
        settings.site,
        densities,
        scale=inputs.scale,
        largest_norm=inputs.largest_norm,
        rows_per_forward=settings.eval.rows_per_forward,
        track=track,
    )
    if facts["rough_thresholds"]:
        job.say(
            f"note: {facts['rough_thresholds']:,} features expect fewer than 10 hits in calibration; their thresholds "
            "are rough"
        )
    return facts


def _provenance(job: Job) -> dict[str, Any]:
    facts = provenance(job.lm, job.corpus, special_tokens=job.settings.activations.special_tokens)
    return json.loads(json.dumps(facts))


def _lines_before(metrics: Path, steps: int) -> str:
    """The log of the first `steps` steps, without lines that a killed training wrote after its last state."""
    if not metrics.is_file():
        return ""
    kept = []
    for line in metrics.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] >= steps:
                break
        except (ValueError, KeyError, TypeError):  # cut off by the kill, or damaged
            break
        kept.append(line.decode() + "\n")
    return "".join(kept)
