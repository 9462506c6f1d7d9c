"""The log of a training: `metrics.jsonl`, and with `training.log` also TensorBoard or wandb.

A logged step is a line of `metrics.jsonl`. The other two get the numbers of every line, against tokens, and now and
then a histogram of the densities. Their libraries are imported only if they are asked for.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from saelab.errors import SaelabError, WriteError, brief
from saelab.features.densities import DensityHistogram, density_histogram
from saelab.files import appended, make_folder, read_json, translate_errors, write_json
from saelab.runs import folder
from saelab.runs.config import RunSettings
from saelab.runs.job import Say
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

HISTOGRAM_STEPS = 100
"""Steps between two histograms."""
LOWEST_DENSITY = 1e-7
"""Lower densities count as this one: the mean of a feature that is active no more falls towards zero."""
HISTOGRAM = "log10_density"
NEVER_ACTIVE = "never_active"
"""Number of features that were not active so far: their densities have no logarithm."""

Log = Callable[[Mapping[str, Any]], None]
_Send = Callable[[int, Mapping[str, float], DensityHistogram | None], None]
"""Sends numbers, and a histogram if one is due, at a number of tokens. Raises WriteError."""


def check_log(settings: TrainingSettings) -> None:
    """Raises SaelabError if what `training.log` names is not installed, or is wandb and cannot be reached."""
    if settings.log is None:
        return
    try:
        if settings.log == "tensorboard":
            import tensorboard.summary.writer.record_writer  # noqa: F401

            return
        import wandb
    except ImportError as error:
        todo = f"`pip install {settings.log}` installs it"
        raise SaelabError(f"training.log: {settings.log} cannot be imported ({brief(error)}); {todo}") from error
    try:
        if wandb.setup().settings.mode == "online":
            wandb.login()
    except (wandb.Error, ValueError) as error:
        todo = "log in with `wandb login`, or set WANDB_MODE=offline"
        raise SaelabError(f"training.log: wandb cannot be used ({brief(error)}); {todo}") from error


@contextmanager
def open_log(settings: RunSettings, trainer: Trainer, say: Say) -> Iterator[Log]:
    """Yields a function that logs a line, with its `step` and `tokens`, of what `trainer` does. Raises WriteError."""
    run, every = Path(settings.out), settings.training.log_every
    with appended(run / folder.METRICS) as write:
        if settings.training.log is None:
            yield lambda line: write(json.dumps(line))
            return
        with _LOGS[settings.training.log](settings, trainer.tokens, say) as send:

            def log(line: Mapping[str, Any]) -> None:
                write(json.dumps(line))
                numbers, histogram = {name: value for name, value in line.items() if value is not None}, None
                tokens, step = numbers.pop("tokens"), numbers["step"]
                if step // HISTOGRAM_STEPS != (step - every) // HISTOGRAM_STEPS or trainer.finished:
                    densities = trainer.usage.densities
                    active = densities[densities > 0].clamp(min=LOWEST_DENSITY)
                    histogram = density_histogram(active.cpu().numpy())
                    numbers[NEVER_ACTIVE] = len(densities) - len(active)
                send(tokens, numbers, histogram)

            yield log


@contextmanager
def _tensorboard(settings: RunSettings, tokens: int, say: Say) -> Iterator[_Send]:
    """Writes a file of events. What an earlier process logged after `tokens` tokens counts no more."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    # protobuf makes these modules' classes when they are imported
    events: Any = import_module("tensorboard.compat.proto.event_pb2")
    summaries: Any = import_module("tensorboard.compat.proto.summary_pb2")
    path = Path(settings.out) / folder.TENSORBOARD
    with translate_errors(path):
        make_folder(path)
    # Readers take files in the order of their names. TensorBoard's own writer reports errors from a thread, and late.
    with appended(path / f"events.out.tfevents.{time.time_ns()}") as write:
        records = RecordWriter(SimpleNamespace(write=write))

        def event(**content: Any) -> None:
            records.write(events.Event(wall_time=time.time(), **content).SerializeToString())

        def send(tokens: int, numbers: Mapping[str, float], histogram: DensityHistogram | None) -> None:
            values = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
            if histogram is not None:
                edges, counts = histogram
                ends = {"min": edges[0], "max": edges[-1], "num": counts.sum()}
                found = summaries.HistogramProto(**ends, bucket_limit=edges[1:], bucket=counts)
                values.append(summaries.Summary.Value(tag=HISTOGRAM, histo=found))
            event(step=tokens, summary=summaries.Summary(value=values))

        event(file_version="brain.Event:2")
        if tokens:
            event(step=tokens + 1, session_log=events.SessionLog(status=events.SessionLog.START))
        yield send


@contextmanager
def _wandb(settings: RunSettings, tokens: int, say: Say) -> Iterator[_Send]:
    """Continues the wandb run that the run folder names, or begins one.

    wandb ignores lines at or before its last step: a resumed training gives the same numbers again.
    """
    import wandb

    run = Path(settings.out)
    named = run / folder.WANDB_RUN
    if named.is_file():
        known = read_json(named, "Remove it to begin another wandb run.")
    else:
        project = os.environ.get("WANDB_PROJECT") or run.absolute().parent.name or "saelab"
        known = {"id": secrets.token_hex(4), "project": re.sub(r"[/\\#?%:]", "_", project), "name": run.name}
        write_json(named, known)

    @contextmanager
    def errors_translated() -> Iterator[None]:
        try:
            yield
        except (wandb.Error, OSError) as error:
            todo = "run again, or with training.log=null"
            raise WriteError(f"{run}: wandb does not take the log ({brief(error)}); {todo}") from error

    with errors_translated():
        found = wandb.init(
            id=known.get("id"),
            project=known.get("project"),
            name=known.get("name"),
            dir=run,
            config=asdict(settings),
            allow_val_change=True,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
    if found.offline:
        say(f"wandb: offline; `wandb sync {Path(found.dir).parent}` uploads the log")
    else:
        say(f"wandb: {found.url or 'disabled by WANDB_MODE'}")

    def send(tokens: int, numbers: Mapping[str, float], histogram: DensityHistogram | None) -> None:
        more = {}
        if histogram is not None:
            more[HISTOGRAM] = wandb.Histogram(np_histogram=(histogram.counts, histogram.edges))
        with errors_translated():
            found.log({**numbers, **more}, step=tokens)

    code = 1
    try:
        yield send
        code = 0
    finally:
        with errors_translated():
            found.finish(exit_code=code)


_LOGS: dict[str, Callable[[RunSettings, int, Say], AbstractContextManager[_Send]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
