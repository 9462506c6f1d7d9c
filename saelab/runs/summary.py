"""A run in a few figures, for a list of runs, and the runs of a sweep. Imports no torch."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab.activations.sites import Sites
from saelab.errors import SaelabError
from saelab.files import read_json, translate_read_errors
from saelab.lm.settings import models_in_words
from saelab.runs import folder, yaml12
from saelab.sae.layout import CONFIG

CURVE_POINTS = 60


@dataclass(frozen=True)
class RunSummary:
    """Figures of a run; None for what is not known yet."""

    model: str | None
    """Name of the model, or names of two; of an array its file's."""
    site: str | None
    """All sites in words, so that runs with the same text read and write the same."""
    n_features: int | None
    tokens: int | None
    """N: evaluated tokens."""
    fvu: float | None
    delta_ce: float | None
    """nats per token"""
    loss_recovered_zero: float | None
    loss_recovered_mean: float | None
    l0: float | None
    """features per token"""
    never_active: int | None
    """Features that are active on none of the N tokens."""
    bytes: int
    """Size of all files of the run."""
    trained: float
    """When the record of the training was last written, in seconds since 1970; 0 without one."""
    unfinished: str | None
    """How far the training came, if it is not complete."""
    curve: tuple[float, ...]
    """FVU of the batch over training, at most `CURVE_POINTS` values."""
    problem: str | None
    """What is wrong with one of the run's files, and what to do."""
    adopted: bool = False
    """Whether another trainer trained it (`saelab adopt`)."""
    fingerprint: str | None = None
    """Fingerprint of the model's files, or of two models', as the checkpoint has it."""
    of_array: bool = False
    """Whether the activations come from an array, so that there is no language model."""
    kind: str = "autoencoder"
    """autoencoder, transcoder or crosscoder."""

    def only_at(self, end: str) -> bool:
        """Whether the run reads and reconstructs one site only, whose name ends in `end`."""
        return self.site is not None and " " not in self.site and self.site.endswith(end)

    def same_model(self, other: "RunSummary") -> bool:
        """Whether both runs are of one model, wherever it lies: by its files, or by name if one does not know these."""
        if self.fingerprint and other.fingerprint:
            return self.fingerprint == other.fingerprint
        return self.model == other.model


def summarise(run: Path | str) -> RunSummary:
    """The figures of a run. A damaged file is the summary's `problem`; the other files still count."""
    run = Path(run)
    problems: list[str] = []

    def tried(reader: Any) -> Any:
        try:
            return reader(run)
        except SaelabError as error:
            problems.append(str(error))

    settings = tried(_settings) or {}
    figures = tried(folder.evaluation) or {}
    metrics = tried(folder.metrics)
    sae, array = settings.get("sae"), _text(_at(_at(settings.get("activations"), "array"), "path"))
    record = run / folder.TRAINING
    return RunSummary(
        model=Path(array).name if array else _model(settings),
        site=_sites(settings),
        n_features=_whole(figures.get("n_features")) or _whole(_at(sae, "n_features")),
        tokens=_whole(figures.get("tokens")),
        fvu=_number(figures.get("fvu")),
        delta_ce=_number(figures.get("delta_ce")),
        loss_recovered_zero=_number(figures.get("loss_recovered_zero")),
        loss_recovered_mean=_number(figures.get("loss_recovered_mean")),
        l0=_number(figures.get("l0")),
        never_active=_whole(figures.get("never_active")),
        bytes=bytes_on_disk(run),
        trained=record.stat().st_mtime if record.is_file() else 0.0,
        unfinished=folder.unfinished(run),
        adopted=folder.adopted(run) is not None,
        curve=_curve(metrics["fvu"].dropna().tolist()) if metrics is not None and "fvu" in metrics else (),
        fingerprint=_fingerprint(tried(_checkpoint)),
        problem=" ".join(problems) or None,
        of_array=array is not None,
        kind="transcoder" if settings.get("target") else "crosscoder" if settings.get("more_sites") else "autoencoder",
    )


@dataclass(frozen=True, eq=False)
class SweepRun:
    """A run of a sweep."""

    name: str
    """Name of its folder, which lies in that of the sweep; a run that failed early has none."""
    varies: dict[str, Any]
    """The settings that vary, with the values of this run."""
    failed: str | None
    """Why it failed, if it did."""


def read_sweep(sweep: Path | str) -> tuple[SweepRun, ...]:
    """The runs of a finished sweep, whose folder is `sweep`. Raises SaelabError if its summary is damaged."""
    path = Path(sweep) / folder.SWEEP
    remedy = "`saelab sweep` with the same config makes it again."
    found = read_json(path, remedy)
    with translate_read_errors(path, "the summary of a sweep", remedy, (KeyError, TypeError, AttributeError)):
        return tuple(
            SweepRun(str(run["run"]), dict(run["varies"].items()), _text(run.get("failed"))) for run in found["runs"]
        )


def bytes_on_disk(run: Path) -> int:
    """Bytes of all files in a run folder."""
    total = 0
    for parent, _, names in os.walk(run):
        for name in names:
            with suppress(OSError):  # removed meanwhile, as a training does with its temporary files
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _settings(run: Path) -> Mapping[str, Any]:
    found = yaml12.parse(folder.settings_text(run), str(run / folder.SETTINGS))
    return found if isinstance(found, dict) else {}


def _sites(settings: Mapping[str, Any]) -> str | None:
    """The sites of a run as one text; that of several has blanks in it."""
    site, more = _text(settings.get("site")), settings.get("more_sites")
    more = tuple(map(str, more)) if isinstance(more, list) else ()
    return None if site is None else str(Sites(site, _text(settings.get("target")), more))


def _model(settings: Mapping[str, Any]) -> str | None:
    name = _text(_at(settings.get("model"), "name"))
    return name and models_in_words(name, _text(_at(settings.get("second_model"), "name")))


def _fingerprint(checkpoint: object) -> str | None:
    ours = _at(_at(checkpoint, "metadata"), "saelab")
    found = (_text(_at(ours, name)) for name in ("model_fingerprint", "second_model_fingerprint"))
    return " ".join(filter(None, found)) or None


def _checkpoint(run: Path) -> Mapping[str, Any]:
    """What the checkpoint says about itself; empty without one."""
    path = folder.weights(run).with_name(CONFIG)
    return read_json(path, "Train the run again.") if path.is_file() else {}


def _curve(values: list[float]) -> tuple[float, ...]:
    """At most `CURVE_POINTS` of the values, at equal distances, the first and the last among them."""
    if len(values) <= CURVE_POINTS:
        return tuple(values)
    step = (len(values) - 1) / (CURVE_POINTS - 1)
    return tuple(values[round(step * point)] for point in range(CURVE_POINTS))


def _at(mapping: object, key: str) -> object:
    return mapping.get(key) if isinstance(mapping, dict) else mapping


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
