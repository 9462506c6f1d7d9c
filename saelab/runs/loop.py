"""The training loop: runs in training on the batches of one source, each with a trainer, inputs and files of its own.

One run is the ordinary case. Several share the source, and with it the language model, and nothing else that a number
could depend on: each ends as it would alone, bit for bit on a CPU with as many threads.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.activations.source import Source
from saelab.activations.stream import ActivationBatch, joined
from saelab.errors import SaelabError, WriteError
from saelab.progress import Track
from saelab.runs import folder
from saelab.runs.calibration import calibrate, rows_to_calibrate_on
from saelab.runs.feed import sites_of
from saelab.runs.inputs import Inputs
from saelab.runs.job import Job, Say, quiet
from saelab.runs.log import Log, open_log
from saelab.runs.resume import Checkpoints, resumable, resuming
from saelab.runs.save import save_run
from saelab.sae.model import SparseAutoencoder
from saelab.signals import interruptible, stop
from saelab.torchrun import everywhere
from saelab.training.trainer import Trainer

Failures = dict[Path, SaelabError]
"""The errors of runs that ended by themselves, by run folder."""


@dataclass(eq=False)
class Training:
    """A run in training."""

    job: Job
    trainer: Trainer
    inputs: Inputs
    rng: Tensor
    """torch's random state when the next step begins."""
    seconds: float = 0.0
    """Time of the training before this process."""

    def __post_init__(self) -> None:
        self.run = Path(self.job.settings.out)
        self.checkpoints = Checkpoints(self.run, self.job.settings.training.checkpoint)
        self.ranks = self.job.ranks
        self._began = time.monotonic() - self.seconds
        self.line: Mapping[str, Any] = {}
        """The last line for the log in this process."""
        self._level = True
        """Whether every batch that the source gave is trained on, so that a state can be saved."""

    def expect(self) -> None:
        """The source has given a batch, which `step` must train on before a state can be saved."""
        self._level = False

    def step(self, parts: Mapping[str, ActivationBatch]) -> Mapping[str, Any] | None:
        """Train on a batch of the source, given by site; returns a line for the log, if there is one.

        Raises as `Trainer.step`.
        """
        self._level, line = True, None  # a batch of which too little is left for a step counts as trained on
        sites = self.job.settings.sites
        target = None if sites.target is None else parts[sites.target].values
        inputs = self.inputs.batch(joined([parts[site] for site in sites.inputs]), self.job.model.device, target)
        if inputs is not None:
            self._level = False
            torch.set_rng_state(self.rng)
            line = self.trainer.step(inputs)
            self.rng = torch.get_rng_state()
            self._level = True
        if line is None:
            return None
        line["tokens_per_second"] = self.trainer.tokens / self.elapsed()
        self.line = folder.jsonable(line)
        return self.line

    def elapsed(self) -> float:
        """Seconds of training, those of earlier processes included."""
        return time.monotonic() - self._began

    def save(self, position: Mapping[str, Any]) -> Path:
        """Write the state, with the source at `position`; returns its folder."""
        state = {"trainer": self.trainer.state_dict(), "source": position, "provenance": self.job.provenance()}
        state |= self.inputs.state() | {"seconds": self.elapsed(), "rng": self.rng}
        return self.checkpoints.save(self.trainer.steps, self.trainer.tokens, state, self.ranks)

    def give_up(self, position: Mapping[str, Any], error: Exception) -> None:
        """After an error (bad data, a full disk, output that nobody reads), save the weights so far.

        Of several processes each has to take part, so nothing is saved after an error that not all raise.
        """
        if self.ranks.every.size > 1 and not everywhere(error):
            return
        if self._level and self.trainer.steps:
            self.save(position)
        self.trainer.release()
        self._write(lambda sae: {})

    def finish(self, track: Track) -> None:
        """Set the thresholds that inference needs, and write the checkpoint."""
        job, trainer = self.job, self.trainer
        trainer.release()
        self._write(lambda sae: self._calibrated(sae, track))
        if self.inputs.left_out:
            job.say(f"note: {self.inputs.left_out:,} tokens with larger norms were left out (activations.max_norm)")
        if trainer.finished:
            job.say(f"trained on {trainer.tokens:,} tokens; checkpoint in {self.run / folder.CHECKPOINT}")

    def _write(self, facts_of: Callable[[SparseAutoencoder], dict[str, Any]]) -> None:
        """Write the checkpoint, in the first process; `facts_of` gives facts about the autoencoder for the record."""
        job, sae = self.job, self.trainer.sae.whole()

        def write() -> None:
            if sae is not None:
                facts, inputs = self.inputs.record() | facts_of(sae), job.training_inputs()
                of = {"sae": sae, "inputs": inputs, "seconds": self.elapsed()}
                of["target_scale"] = self.inputs.target_scale
                save_run(job.settings, *job.origin, self.trainer, self.inputs.map, facts, **of)

        self.ranks.every.together(write)

    def _calibrated(self, sae: SparseAutoencoder, track: Track) -> dict[str, Any]:
        """Set thresholds of `sae` on text that evaluation does not read, if inference needs them; returns facts for the
        record."""
        job, settings, densities = self.job, self.job.settings, self.trainer.trained().densities
        if densities is None:
            return {}
        rows = rows_to_calibrate_on(job)
        facts = calibrate(
            sae,
            job.model,
            rows,
            settings.sites,
            densities,
            inputs=self.inputs.map,
            within=self.inputs.within if self.inputs.largest_norms else None,
            rows_per_forward=job.rows_at_once(settings.eval.rows_per_forward),
            track=track,
        )
        if facts["rough_thresholds"]:
            job.say(
                f"note: {facts['rough_thresholds']:,} features expect fewer than 10 hits in calibration; their "
                "thresholds are rough"
            )
        return facts


def train_all(
    trainings: Sequence[Training], columns: Mapping[str, tuple[int, int]], source: Source, track: Track, say: Say
) -> Failures:
    """Train each run on the batches of `source` to its end, or until a signal; returns the runs that failed.

    `columns` are those of each site in a batch (`site_columns`), and `say` speaks for all runs. States are written on
    the way and checkpoints at the end, all states at the same batch. A run whose gradient is not finite fails, and the
    others go on. If the source fails or nothing can be written, every state is saved and the error is raised. After a
    signal, `stop` raises once all is saved.

    The processes of a job agree before every batch whether to save or to stop, because any of them may get the signal.
    """
    failed: Failures = {}
    ranks = trainings[0].ranks
    active = list(trainings)
    for other in trainings[1:]:
        other.trainer.sae.share_buffers(trainings[0].trainer.sae)

    @contextmanager
    def on_its_own(training: Training) -> Iterator[None]:
        """In this block an error that is not one of writing ends this run only, if other processes have no part in
        it."""
        try:
            yield
        except SaelabError as error:
            if isinstance(error, WriteError) or ranks.every.size > 1:
                raise
            failed[training.run] = error
            if len(trainings) > 1:
                training.job.say(f"error: {error}")

    def batches() -> Iterator[int]:
        """Takes a batch and trains all on it; yields its tokens."""
        while active:
            due = ranks.first and any(training.checkpoints.due(training.trainer.tokens) for training in active)
            number, due = ranks.every.largest(stopped_by() or 0, due)
            if number:
                break  # a state is saved at the end
            for training in active if due else ():
                training.save(source.state())
            batch = next(source)
            for training in active:
                training.expect()
            sites = {site for training in active for site in training.job.settings.sites.all}
            parts = {site: batch.columns(*columns[site]) for site in sites}
            for training in active:
                with on_its_own(training):
                    line = training.step(parts)
                    if line is not None:
                        logs[training.run](line)
            for training in [each for each in active if each.run in failed]:
                active.remove(training)
                training.give_up(source.state(), failed[training.run])
            for training in [each for each in active if each.trainer.finished]:
                active.remove(training)
                training.save(source.state())
            yield len(batch)

    left = max(training.job.settings.training.tokens - training.trainer.tokens for training in trainings)
    # one of several processes that gets a signal may be ended by torchrun, since another has ended: it says nothing
    ask = say if ranks.every.size == 1 else quiet
    with _resumable(trainings), ExitStack() as files, interruptible(ask) as stopped_by:
        logs = {each.run: files.enter_context(_log(each)) for each in trainings}
        try:
            for _ in track(batches(), "training", left, int, lambda: _figures(active or trainings)):
                pass
            for training in active:
                path, tokens = training.save(source.state()), f"{training.trainer.tokens:,} tokens"
                training.job.say(f"stopped after {tokens}; `{resuming(training.run, ranks)}` goes on (state: {path})")
        except (SaelabError, OSError) as error:
            for training in active:
                training.give_up(source.state(), error)
            raise
        finally:
            source.close()
        going = [training for training in trainings if training.run not in failed]
        for training in going:
            training.trainer.release()  # calibration needs the memory
        for training in going:
            with on_its_own(training):
                training.finish(track)
        trainings[0].job.report_empty_documents()
        number = ranks.every.largest(stopped_by() or 0)[0]
    if number:
        stop(number)
    return failed


def _log(training: Training) -> AbstractContextManager[Log]:
    """Yields a function that logs a line of a run; the first process has the log."""
    if not training.ranks.first:
        return nullcontext(lambda line: None)
    return open_log(training.job.settings, training.trainer, training.job.say)


def _figures(trainings: Sequence[Training]) -> str:
    """The last logged figures of some runs, in a few words."""
    found = [training.line["fvu"] for training in trainings if training.line.get("fvu") is not None]
    if not found:
        return ""
    if len(trainings) > 1:
        return f"{len(trainings)} runs, FVU {min(found):.3f} to {max(found):.3f}"
    line = trainings[0].line
    return f"FVU {line['fvu']:.3f}, L0 {line['l0']:.1f}, {line['dead']:,} dead"


@contextmanager
def _resumable(trainings: Sequence[Training]) -> Iterator[None]:
    """Add to the message of a WriteError how a training goes on; of several the caller knows."""
    if len(trainings) > 1:
        yield
        return
    with resumable(trainings[0].run, trainings[0].ranks):
        yield


def site_columns(jobs: Sequence[Job]) -> dict[str, tuple[int, int]]:
    """First and last column, exclusive, of each site of `jobs` in the batches of a source that they share."""
    columns: dict[str, tuple[int, int]] = {}
    stop = 0
    for site in sites_of(jobs):
        start, stop = stop, stop + jobs[0].model.width(site)
        columns[site] = start, stop
    return columns
