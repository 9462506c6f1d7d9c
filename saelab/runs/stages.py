"""The stages of a run on its folder: train, evaluate, features; and the demo, which is all three.

Every result in a run folder (`saelab.runs.folder`) records the hash of what it was made from, so that a stage can tell
whether an earlier result still stands.
"""

import json
import math
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.analysis.fidelity import MIN_DEAD_TOKENS, Fidelity, fidelity
from saelab.errors import SaelabError
from saelab.features.index import build_features
from saelab.files import make_folder, replace_folder, translate_errors, write_json, write_whole
from saelab.progress import Track, silent
from saelab.runs import folder
from saelab.runs.config import RunSettings, load_config
from saelab.runs.feed import open_source
from saelab.runs.job import Config, Job, Say, quiet, settings_of
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.checkpoint import load, save_sae
from saelab.sae.model import Batch, SparseAutoencoder, new_autoencoder
from saelab.sae.thresholds import CALIBRATION_TOKENS, calibrate
from saelab.training import trainer


def train(
    config: Config, overrides: Iterable[str] = (), *, force: bool = False, track: Track = silent, say: Say = quiet
) -> Path:
    """Train an autoencoder as `config` says; returns the run folder.

    An existing run folder is never overwritten without `force`. Ctrl-C finishes the step and saves a checkpoint.
    """
    return _train(Job(settings_of(config, overrides), say), force, track)


def _train(job: Job, force: bool, track: Track) -> Path:
    settings, run, say = job.settings, Path(job.settings.out), job.say
    folder.check_free(run, force)
    _check_outside(run, settings)
    inputs, source = job.training_inputs(), open_source(job, track)
    scale, sae = _initialise(settings, source.sample())

    record = {"inputs": inputs, "complete": False, "tokens": 0}
    with translate_errors(run):
        if run.exists():
            shutil.rmtree(run)
        make_folder(run)
        write_whole(run / folder.SETTINGS, settings.to_yaml())
        write_json(run / folder.TRAINING, record)
    begin, seen, learnt = time.monotonic(), 0, {}
    t = settings.training
    bounded = track(islice(source, t.steps), "training", t.steps * t.batch, len)
    complete = False
    with (
        (run / folder.METRICS).open("w", encoding="utf-8") as metrics,
        closing(source),
        interruptible(say) as interrupted,
    ):

        def log(line: dict[str, Any]) -> None:
            metrics.write(json.dumps(folder.jsonable(line)) + "\n")
            metrics.flush()

        def scaled() -> Iterator[trainer.Batch]:
            nonlocal seen
            for batch in bounded:
                x = batch.values.to(job.lm.device).float() * scale
                gradients = None if batch.gradients is None else batch.gradients.to(job.lm.device).float()
                yield Batch(x, gradients=gradients)
                seen += len(batch)  # the next is asked for, so the step on this one is done

        try:
            trained = trainer.train(sae, scaled(), t, settings.sae, log=log, should_stop=interrupted)
            seen, complete = trained.tokens, trained.steps == t.steps
            learnt |= trained.facts
            if trained.densities is not None:
                learnt |= _calibrate(job, sae, scale, trained, track)
        finally:  # also when the data turn out bad: what was learnt so far is kept
            finished = sae.folded(scale)
            finished.metadata |= _metadata(job, scale, inputs, seen, learnt)
            with translate_errors(run), replace_folder(run / folder.CHECKPOINT) as unfinished:
                save_sae(finished, unfinished)
            record |= {
                "complete": complete,
                "tokens": seen,
                "seconds": time.monotonic() - begin,
                "input_scale": scale,
                "python": platform.python_version(),
                "torch": torch.__version__,
            }
            write_json(run / folder.TRAINING, record)
    say(f"{'trained' if complete else 'stopped'} after {seen:,} tokens; checkpoint in {run / folder.CHECKPOINT}")
    return run


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
        _train(job, force or cut_short, track)
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


def _check_outside(run: Path, settings: RunSettings) -> None:
    """What the run reads must not lie in the folder that it replaces."""
    cache = settings.activations.cache
    read = {"model": settings.model.name, "corpus": settings.corpus.source, "activations.cache": cache and cache.path}
    for name, source in read.items():
        path = source and Path(source).expanduser()
        if path and path.exists() and path.resolve().is_relative_to(run.resolve()):
            raise SaelabError(f"out: {run} would be replaced, and {name} {path} lies in it; choose another out=FOLDER")


def _initialise(settings: RunSettings, sample: Tensor) -> tuple[float, SparseAutoencoder]:
    """The input scale, which makes E||x||^2 = d_in over the sample, and the autoencoder that starts from it."""
    scale = math.sqrt(sample.shape[1] / sample.square().sum(1).double().mean().item())
    return scale, new_autoencoder(settings.sae, sample * scale, seed=settings.seed)


def _calibrate(
    job: Job, sae: SparseAutoencoder, scale: float, trained: trainer.Trained, track: Track
) -> dict[str, Any]:
    """Give `sae`, trained on ``scale * x``, the threshold that takes the place of its batch-wide allocation.

    It is set on held-out text behind the rows that evaluation reads. Returns what the checkpoint says of it.
    """
    assert trained.densities is not None
    settings = job.settings
    rows = job.held_out(settings.eval.tokens + CALIBRATION_TOKENS)
    wanted = -(-CALIBRATION_TOKENS // (settings.context - 1))
    if len(rows) * (settings.context - 1) < settings.eval.tokens + CALIBRATION_TOKENS:
        job.say("note: there is so little held-out text that thresholds are set on rows that evaluation also reads")
    blocks = iter(rows[-wanted:].split(settings.eval.rows_per_forward))
    lm, site = job.lm, settings.site

    def activations() -> Iterator[Tensor]:
        for block in track(blocks, "calibration", min(len(rows), wanted) * rows.shape[1], lambda block: block.numel()):
            ids = block.to(lm.device).long()
            yield lm.activations(ids, [site])[site][lm.ordinary(ids)].float() * scale

    calibration = calibrate(sae.pre_activations, activations(), trained.densities, wanted * settings.context)
    sae.threshold = calibration.threshold.to(sae.W_dec).reshape(-1)
    flagged = int(calibration.flagged.sum())
    if flagged:
        job.say(f"note: {flagged:,} features expect fewer than 10 hits in calibration; their thresholds are rough")
    return {"calibration_tokens": calibration.tokens, "rough_thresholds": flagged}


def _metadata(job: Job, scale: float, inputs: str, tokens: int, learnt: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint says of its origin: SAELens' keys, and ours under `saelab`."""
    s, tokenizer = job.settings, job.lm.tokenizer
    return {
        "model_name": job.lm.name,
        "model_class_name": "TransformerBridge",
        "hook_name": s.site,
        "context_size": s.context,
        "prepend_bos": tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None,
        "dataset_path": s.corpus.source,
        "exclude_special_tokens": not s.activations.special_tokens,
        "training_architecture": allocation_of(s.sae).saelens,
        "saelab": {
            "inputs": inputs,
            "tokens": tokens,
            "seed": s.seed,
            "input_scale": scale,
            "model_folded": False,
            "model_fingerprint": job.lm.fingerprint,
            **asdict(s.sae),
            **learnt,
        },
    }


@contextmanager
def interruptible(say: Say) -> Iterator[Callable[[], bool]]:
    """Within, a first Ctrl-C (or SIGTERM) only sets a flag, which the yielded function tells; a second interrupts."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield asked.is_set
        return

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        say("finishing the step, then saving (Ctrl-C again to give up)")

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
