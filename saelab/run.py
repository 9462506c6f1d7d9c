"""The stages of a run on its folder: train, evaluate, features; and the demo, which is all three.

A run folder holds config.yaml, metrics.jsonl, train.json, sae/ (the checkpoint), eval.json and features/. Every
result records the hash of what it was made from, so that a stage can tell whether an earlier result still stands.
"""

import hashlib
import json
import math
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.activations.stream import ActivationBatch, read_activations, shuffled_batches
from saelab.analysis.fidelity import MIN_DEAD_TOKENS, Fidelity, fidelity
from saelab.config import RunSettings, find_config, load_config, settings_from
from saelab.corpus import Corpus, open_corpus
from saelab.errors import SaelabError
from saelab.features.index import build_features
from saelab.lm import LanguageModel, load_language_model
from saelab.progress import Track, silent
from saelab.sae.checkpoint import CONFIG, WEIGHTS, load, save_sae
from saelab.sae.model import SparseAutoencoder
from saelab.training import trainer

SAMPLE_TOKENS = 32_768
"""Activations that b_dec, the input scale and the encoder's first scale are set from."""

Config = str | Path | Mapping[str, Any] | RunSettings
Say = Callable[[str], None]


def _quiet(message: str) -> None:
    """A Say that says nothing."""


@dataclass(frozen=True)
class Job:
    """Settings with the model and the text they name, each loaded when first needed."""

    settings: RunSettings

    @cached_property
    def lm(self) -> LanguageModel:
        lm = load_language_model(self.settings.model, self.settings.device)
        lm.site(self.settings.site)
        if lm.max_context is not None and self.settings.context > lm.max_context:
            raise SaelabError(f"context: {lm.name} takes at most {lm.max_context} tokens, not {self.settings.context}")
        return lm

    @cached_property
    def corpus(self) -> Corpus:
        return open_corpus(self.settings.corpus, self.lm.tokenizer, self.settings.context)

    def held_out(self, tokens: int) -> Tensor:
        return torch.from_numpy(self.corpus.held_out_rows(tokens))

    def training_inputs(self) -> str:
        """Hash of everything the trained weights depend on."""
        settings = asdict(self.settings)
        parts = {name: settings[name] for name in ("site", "seed", "context", "activations", "sae", "training")}
        parts |= {"dtype": self.settings.model.dtype, "model": self.lm.fingerprint, "corpus": self.corpus.fingerprint}
        return _hash(parts)

    def result_inputs(self, run: Path, section: Any) -> str:
        """Hash of everything a result on held-out text depends on."""
        weights = hashlib.sha256((run / "sae" / WEIGHTS).read_bytes()).hexdigest()
        return _hash({
            "weights": weights, "settings": asdict(section), "model": self.lm.fingerprint,
            "dtype": self.settings.model.dtype, "corpus": self.corpus.fingerprint, "site": self.settings.site,
        })  # fmt: skip


def settings_of(config: Config, overrides: Iterable[str] = ()) -> RunSettings:
    """Settings from a file, a shipped config's name, a mapping, or settings as they are."""
    if isinstance(config, RunSettings):
        return settings_from(asdict(config), overrides)
    if isinstance(config, Mapping):
        return settings_from(config, overrides)
    return load_config(find_config(config), overrides)


def train(
    config: Config, overrides: Iterable[str] = (), *, force: bool = False, track: Track = silent, say: Say = _quiet
) -> Path:
    """Train an autoencoder as `config` says; returns the run folder.

    An existing run folder is never overwritten without `force`. Ctrl-C finishes the step and saves a checkpoint.
    """
    return _train(Job(settings_of(config, overrides)), force, track, say)


def _train(job: Job, force: bool, track: Track, say: Say) -> Path:
    settings, run = job.settings, Path(job.settings.out)
    _check_free(run, force)
    lm, inputs = job.lm, job.training_inputs()
    read = read_activations(
        lm, _rows(job.corpus, settings.seed, say), settings.site, settings.activations.rows_per_forward
    )
    head, scale, sae = _initialise(settings, lm, read)

    if run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    record = {"inputs": inputs, "complete": False, "tokens": 0}
    _write_json(run / "train.json", record)
    begin, seen = time.monotonic(), 0
    t = settings.training
    batches = shuffled_batches(chain(head, read), t.batch, settings.activations.buffer_tokens, settings.seed)
    bounded = track(islice(batches, t.steps), "training", t.steps * t.batch, len)
    complete = False
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as metrics, interruptible(say) as interrupted:

        def log(line: dict[str, Any]) -> None:
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()

        def scaled() -> Iterator[Tensor]:
            nonlocal seen
            for batch in bounded:
                yield batch.values * scale
                seen += len(batch)  # the next is asked for, so the step on this one is done

        try:
            seen = trainer.train(sae, scaled(), t, settings.sae, log=log, should_stop=interrupted)
            complete = seen >= t.steps * t.batch
        finally:  # also when the data turn out bad: what was learnt so far is kept
            finished = sae.folded(scale)
            finished.metadata |= _metadata(job, scale, inputs, seen)
            save_sae(finished, run / "sae")
            record |= {
                "complete": complete, "tokens": seen, "seconds": time.monotonic() - begin, "input_scale": scale,
                "python": platform.python_version(), "torch": torch.__version__,
            }  # fmt: skip
            _write_json(run / "train.json", record)
    say(f"{'trained' if complete else 'stopped'} after {seen:,} tokens; checkpoint in {run / 'sae'}")
    return run


def evaluate(run: str | Path, overrides: Iterable[str] = (), *, track: Track = silent, say: Say = _quiet) -> Fidelity:
    """Evaluate the autoencoder of a run folder on held-out text; writes eval.json."""
    run, job = _open_run(run, overrides)
    return _evaluate(job, run, track, say)


def _evaluate(job: Job, run: Path, track: Track, say: Say) -> Fidelity:
    s = job.settings.eval
    sae = load(run, job.lm.device)
    result = fidelity(
        sae, job.lm, job.held_out(s.tokens), job.settings.site,
        ce_tokens=s.ce_tokens, rows_per_forward=s.rows_per_forward, track=track,
    )  # fmt: skip
    if result.tokens < MIN_DEAD_TOKENS:
        say(
            f"note: never-active is counted on {result.tokens:,} held-out tokens; fewer than {MIN_DEAD_TOKENS:,} say "
            "little about rare features"
        )
    _write_json(run / "eval.json", {"inputs": job.result_inputs(run, s)} | _jsonable(result.to_dict()))
    return result


def features(
    run: str | Path, overrides: Iterable[str] = (), *, track: Track = silent, say: Say = _quiet
) -> dict[str, Any]:
    """Write the feature database of a run folder from held-out text; returns its summary."""
    run, job = _open_run(run, overrides)
    return _features(job, run, track)


def _features(job: Job, run: Path, track: Track) -> dict[str, Any]:
    s = job.settings.features
    sae = load(run, job.lm.device)
    inputs = job.result_inputs(run, s)
    return build_features(
        sae, job.lm, job.held_out(s.tokens), job.settings.site, run / "features", s, inputs, track=track
    )


def demo(
    config: Config, overrides: Iterable[str] = (), *, force: bool = False, track: Track = silent, say: Say = _quiet
) -> Path:
    """Train, evaluate and make features, leaving out each stage whose result in the run folder still stands.

    A training that was cut short is done again. A run made from something else is replaced only with `force`.
    """
    job = Job(settings_of(config, overrides))
    run = Path(job.settings.out)
    trained = _read_json(run / "train.json")
    if trained.get("complete") and trained.get("inputs") == job.training_inputs() and (run / "sae" / CONFIG).is_file():
        say(f"training: {run} is up to date")
    else:
        cut_short = not trained.get("complete") and trained.get("inputs") == job.training_inputs()
        _train(job, force or cut_short, track, say)
        if not _read_json(run / "train.json").get("complete"):
            raise SaelabError(f"{run}: training was interrupted; run the same command again to start over")
    if _read_json(run / "eval.json").get("inputs") == job.result_inputs(run, job.settings.eval):
        say("evaluation: up to date")
    else:
        _evaluate(job, run, track, say)
    if _read_json(run / "features" / "summary.json").get("inputs") == job.result_inputs(run, job.settings.features):
        say("features: up to date")
    else:
        _features(job, run, track)
    return run


def _open_run(run: str | Path, overrides: Iterable[str]) -> tuple[Path, Job]:
    run = Path(run)
    if not (run / "config.yaml").is_file() or not (run / "sae" / CONFIG).is_file():
        raise SaelabError(f"{run}: not a run folder with a checkpoint (`saelab train CONFIG` makes one)")
    return run, Job(load_config(run / "config.yaml", overrides))


def _check_free(run: Path, force: bool) -> None:
    """A run folder may be replaced if asked; anything else is left alone, whatever was asked."""
    if not run.exists():
        return
    if not run.is_dir() or (any(run.iterdir()) and not (run / "config.yaml").is_file()):
        raise SaelabError(f"out: {run} exists and is no run folder; choose another with out=FOLDER")
    if not force and any(run.iterdir()):
        raise SaelabError(f"out: {run} exists; choose another with out=FOLDER, or give --force to replace it")


def _rows(corpus: Corpus, seed: int, say: Say) -> Iterator[np.ndarray]:
    """Rows without end: epoch after epoch, each in an order of its own."""
    epoch = 0
    while True:
        yield from corpus.train_rows(seed=seed, epoch=epoch)
        epoch += 1
        say(f"the corpus came to its end: epoch {epoch + 1} begins")


def _initialise(
    settings: RunSettings, lm: LanguageModel, read: Iterator[ActivationBatch]
) -> tuple[list[ActivationBatch], float, SparseAutoencoder]:
    """The first activations (they are trained on too), the input scale, and the autoencoder started from them.

    The scale makes E||x||^2 = d_in over the sample.
    """
    head: list[ActivationBatch] = []
    while sum(map(len, head)) < min(SAMPLE_TOKENS, settings.training.tokens):
        head.append(next(read))
    sample = torch.cat([batch.values for batch in head])
    d_in = sample.shape[1]
    scale = math.sqrt(d_in / sample.square().sum(1).double().mean().item())
    torch.manual_seed(settings.seed)
    sae = SparseAutoencoder(d_in, settings.sae.n_features, settings.sae.k).to(lm.device)
    sae.initialise(sample * scale, settings.sae.b_dec_init)
    return head, scale, sae


def _metadata(job: Job, scale: float, inputs: str, tokens: int) -> dict[str, Any]:
    """What the checkpoint says of its origin: SAELens' keys, and ours under `saelab`."""
    s, tokenizer = job.settings, job.lm.tokenizer
    return {
        "model_name": job.lm.name,
        "model_class_name": "TransformerBridge",
        "hook_name": s.site,
        "context_size": s.context,
        "prepend_bos": tokenizer.bos_token_id is not None,
        "dataset_path": s.corpus.source,
        "exclude_special_tokens": True,
        "training_architecture": "topk",
        "saelab": {
            "inputs": inputs, "tokens": tokens, "seed": s.seed, "input_scale": scale, "folded": False,
            "model_fingerprint": job.lm.fingerprint, "aux": s.sae.aux,
        },
    }  # fmt: skip


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


def _hash(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """NaN is no JSON: None stands for it."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _read_json(path: Path) -> dict[str, Any]:
    """What `path` holds, nothing where it is missing or damaged: then its stage is simply done again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
