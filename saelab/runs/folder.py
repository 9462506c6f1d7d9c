"""Names and reads the files of a run folder. Imports no torch, so that the explorer opens at once.

A run is a folder: its settings with all defaults, the log and the record of its training, the checkpoint
(`saelab.sae.checkpoint`), the states to resume from, the evaluation and the feature database (`saelab.features`).
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.analysis.result import with_arrays
from saelab.errors import SaelabError, did_you_mean
from saelab.features import layout as database
from saelab.files import current_folder, expanded, read_json, translate_read_errors
from saelab.sae import layout as sae

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = "config.yaml"
METRICS = "metrics.jsonl"
TRAINING = "train.json"
"""Record of the training: inputs, tokens, whether it is complete. A folder with this file is a run."""
CHECKPOINT = sae.FOLDER
STATE = "state"
EVALUATION = sae.EVALUATION
FEATURES = "features"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
WANDB_RUN = "wandb.json"
"""Id, project and name of the run at wandb."""
SWEEP = "sweep.json"
"""The summary of a sweep, in the folder of its runs."""
ANALYSES = "analyses"
"""A folder for each result of `saelab analyse`, by the name of the analysis."""
FIGURES, ARRAYS = "result.json", "arrays.safetensors"
"""The files of such a result."""
AUTOINTERP = "autointerp"
"""The folder of explanations and scores (`saelab.autointerp.store`)."""
CONTROLS = "controls"
"""A run for each control of this run (`saelab.runs.controls`), by its kind."""
RESEED = "reseed"
"""What the names of those controls begin with that are the same training from another seed."""
OWN = (SETTINGS, METRICS, TRAINING, CHECKPOINT, STATE, EVALUATION, FEATURES, ANALYSES, AUTOINTERP, CONTROLS)
OWN += (TENSORBOARD, WANDB, WANDB_RUN)
"""What the stages keep in a run folder; no export goes there."""


@dataclass(frozen=True)
class RunInfo:
    """A run folder and its finished stages."""

    path: Path
    name: str
    """Path of the run below the folder that was searched; the folder's own name if it is the run."""

    @property
    def has_eval(self) -> bool:
        return (self.path / EVALUATION).is_file()

    @property
    def has_features(self) -> bool:
        return has_features(self.path)


def find_runs(folder: Path | str, depth: int = 3) -> list[RunInfo]:
    """The runs in a folder, sorted by name: the folder itself if it has a `train.json`, otherwise the runs below it.

    A run is not searched for further runs, such as its controls (`controls`), which the folder of the controls gives.
    Nothing is searched deeper than `depth` levels. Raises SaelabError if there is no such folder.
    """
    root = Path(expanded(folder))
    if not root.is_dir():
        raise SaelabError(f"There is no folder {root}. Name a run folder, or a folder that holds run folders.")

    def below(path: Path, levels: int) -> list[Path]:
        try:
            if (path / TRAINING).is_file():
                return [path]
            inside = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")] if levels else []
        except PermissionError:  # a folder that the user may not read has no run of theirs
            return []
        return [run for p in inside for run in below(p, levels - 1)]

    def info(path: Path) -> RunInfo:
        name = root.resolve().name if path == root else path.relative_to(root).as_posix()
        return RunInfo(path, name)

    return [info(path) for path in below(root, depth)]


def controls(run: Path | str) -> list[Path]:
    """The finished controls of a run (`saelab controls`), sorted by name; those without a feature database too."""
    found = sorted((Path(run) / CONTROLS).glob(f"*/{TRAINING}"))
    return [path.parent for path in found if training_record(path.parent).get("complete")]


def controlled(run: Path | str) -> Path | None:
    """The run that `run` is a control of; None if it is none."""
    path = Path(run).absolute()
    return path.parents[1] if path.parent.name == CONTROLS and (path.parents[1] / TRAINING).is_file() else None


def shown_files(run: Path) -> list[Path]:
    """The files of a run that the explorer reads, including missing ones."""
    own = [run / SETTINGS, run / METRICS, run / TRAINING, run / EVALUATION, features(run) / database.MANIFEST]
    return [*own, *(analysis_folder(run, name) / FIGURES for name in analyses(run))]


def settings_text(run: Path | str) -> str:
    """The run's settings with all defaults: `config.yaml`, as text. Raises SaelabError if it cannot be read."""
    path = Path(run) / SETTINGS
    with translate_read_errors(path, "the run's settings", "Train the run again."):
        return path.read_text(encoding="utf-8")


def metrics(run: Path | str) -> "pd.DataFrame":
    """Metrics of the training: one line per logged step of `metrics.jsonl`, numeric columns only; empty if none.

    A last line that a kill cut off is left out. Raises SaelabError if another line is damaged.
    """
    import pandas as pd

    path = Path(run) / METRICS
    if not path.is_file():
        return pd.DataFrame()
    todo = "Remove that line, or train the run again."
    with translate_read_errors(path, "training metrics", todo):
        lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is not a JSON object")
            records.append(record)
        except ValueError as error:
            if number == len(lines):
                break
            raise SaelabError(f"{path}, line {number}: this is not a line of training metrics. {todo}") from error
    return pd.DataFrame(records).select_dtypes("number")


def evaluation(run: Path | str) -> dict[str, Any] | None:
    """The evaluation (`eval.json`, `saelab eval`), name to value; None if the run was not evaluated."""
    path = Path(run) / EVALUATION
    return read_json(path, f"`saelab eval {run}` makes it again.") if path.is_file() else None


def evaluations(run: Path) -> list[Path]:
    """The file of the own evaluation of a run, which need not exist, and those of evaluations that differ from it."""
    return [run / EVALUATION, *run.glob(f"{Path(EVALUATION).stem}-*.json")]


def other_evaluation(differs: Mapping[str, Any]) -> str:
    """The name of the evaluation with these settings that differ from training: the same for the same settings."""
    digest = hashlib.sha256(json.dumps(differs, sort_keys=True).encode()).hexdigest()
    return f"{Path(EVALUATION).stem}-{digest[:8]}.json"


def analyses(run: Path | str) -> list[str]:
    """The names of the analyses whose results are in a run, in order."""
    names = {path.parent.name.removesuffix(".old.tmp") for path in (Path(run) / ANALYSES).glob(f"*/{FIGURES}")}
    return sorted(name for name in names if not name.endswith(".tmp"))


def analysis(run: Path | str, name: str) -> dict[str, Any] | None:
    """The result of an analysis (`saelab analyse`): its fields by name, arrays as numpy arrays; None if there is none.

    Beside the fields: `inputs`, the hash of what it was made from, and the `settings` of the analysis. Imports no
    torch. `saelab.runs.analyses.read_analysis` gives the object with its table and plot. Raises SaelabError if it is
    damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = analysis_folder(run, name)
    if not (path / FIGURES).is_file():
        return None
    remedy = f"`saelab analyse {run} {name} --force` makes it again."
    found = read_json(path / FIGURES, remedy)
    with translate_read_errors(path, "a result", remedy, (OSError, ValueError, KeyError, SafetensorError)):
        arrays = load_file(path / ARRAYS) if (path / ARRAYS).is_file() else {}
        return with_arrays(found, arrays)


def analysis_folder(run: Path | str, name: str) -> Path:
    """Where the result of an analysis is; it need not exist."""
    return current_folder(Path(run) / ANALYSES / name)


def unfinished(run: Path | str) -> str | None:
    """How far the training of a run came, in words, if it was stopped before its end; else None."""
    record = training_record(Path(run))
    if record.get("complete", True):
        return None
    done, planned = record.get("tokens"), record.get("planned_tokens")
    share = f"{done:,}" if isinstance(done, int) else "some"
    share += f" of {planned:,}" if isinstance(planned, int) else ""
    return f"this run's training stopped after {share} tokens"


def adopted(run: Path | str) -> dict[str, Any] | None:
    """Where the autoencoder of a run comes from that `saelab adopt` made, by name; None for other runs."""
    found = training_record(Path(run)).get("adopted")
    return found if isinstance(found, dict) else None


def check_trained(run: Path) -> None:
    """Raises SaelabError if the autoencoder in `run` was adopted, so that there is no training to go on with."""
    if (origin := adopted(run)) is not None:
        raise SaelabError(
            f"{run}: was adopted from {origin.get('from')}, so there is no training of it to go on with; "
            f"`sae.init_from={run}` with another `out` starts a training from its weights"
        )


def training_record(run: Path) -> dict[str, Any]:
    """The record in `train.json`: inputs, complete, tokens ...; empty if it is missing or damaged."""
    return _found(run / TRAINING)


def evaluation_inputs(run: Path) -> str | None:
    """Hash of what the evaluation was made from; None if it is missing or damaged."""
    return _found(run / EVALUATION).get("inputs")


def features_inputs(run: Path) -> str | None:
    """Hash of what the feature database was made from; None if it is missing or damaged."""
    return _found(features(run) / database.MANIFEST).get("inputs")


def features(run: Path | str) -> Path:
    """The folder of the feature database, which `saelab.features.database` reads; it need not exist."""
    return current_folder(Path(run) / FEATURES)


def weights(run: Path) -> Path:
    """The file of the checkpoint's weights; it need not exist."""
    return current_folder(run / CHECKPOINT) / sae.WEIGHTS


def bytes_of_states(run: Path) -> int:
    """Bytes on disk of all states of a training."""
    return sum(path.stat().st_size for path in (run / STATE).glob("*/*"))


def has_checkpoint(run: Path) -> bool:
    return (current_folder(run / CHECKPOINT) / sae.CONFIG).is_file()


def has_features(run: Path) -> bool:
    """Whether a run has a feature database."""
    return (features(run) / database.MANIFEST).is_file()


def check_run(run: Path) -> None:
    """Raises SaelabError if `run` is not a run folder with a checkpoint."""
    if (run / SETTINGS).is_file() and unfinished(run) and not has_checkpoint(run):
        raise SaelabError(
            f"{run}: its training has not written a checkpoint yet; wait for it, or, if it was stopped, go on with "
            f"`saelab train --resume {run}`"
        )
    if not (run / SETTINGS).is_file() or not has_checkpoint(run):
        raise SaelabError(f"{run}: not a run folder with a checkpoint{_instead(run)}")


def check_free(run: Path, force: bool) -> None:
    """Raises SaelabError if a new run cannot be written to the folder `run`.

    With `force` an existing run may be replaced; anything else is never replaced.
    """
    if not run.exists() and not run.is_symlink():
        parent = next(folder for folder in run.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise SaelabError(f"out: {run} cannot be made: {parent} is not a folder that you may write to")
        return
    marks = (run / SETTINGS, run / TRAINING)
    if run.is_symlink() or not run.is_dir() or (any(run.iterdir()) and not all(mark.is_file() for mark in marks)):
        raise SaelabError(f"out: {run} exists and is not a run folder; choose another with out=FOLDER")
    if not force and any(run.iterdir()):
        raise SaelabError(f"out: {run} exists; choose another with out=FOLDER, or give --force to replace it")


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with None for NaN and infinite numbers, which JSON cannot represent; also in lists of such values."""

    def plain(value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
            return [jsonable(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: plain(value) for key, value in values.items()}


def _instead(run: Path) -> str:
    """What to do about a path that is no run folder, in words that end a message."""
    if run.exists():
        return " (`saelab train CONFIG` makes one, and `saelab adopt` one of another trainer's checkpoint)"
    beside = run.parent.iterdir() if run.parent.is_dir() else ()
    return f": there is no such folder.{did_you_mean(run.name, (path.name for path in beside if has_checkpoint(path)))}"


def _found(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty if it is missing or damaged."""
    try:
        return read_json(path, "")
    except SaelabError:
        return {}
