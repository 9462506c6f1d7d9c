"""Reopens a run for a later stage: the settings that may be given, and whether model and text are those of training.

A stage measures what the record of the run says, and refuses a setting that cannot change its result. Model and text
are compared by fingerprint, so they may lie elsewhere than in training. If one of them is not the same, that is an
error, unless the user named another: then the result is not the run's own, and says so.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from saelab.activations.cache.layout import difference
from saelab.errors import SaelabError
from saelab.runs import folder
from saelab.runs.config import leaves
from saelab.runs.job import Job, Say, settings_of
from saelab.sae.checkpoint import load
from saelab.sae.model import SparseAutoencoder

Stage = Literal["eval", "index", "analyse", "controls"]
_TAKES = {
    "eval": (
        "eval.",
        "device",
        "model.",
        "corpus.",
        "second_model.",
        "activations.array.path",
        "site",
        "target",
        "more_sites",
        "context",
    ),
    "index": (
        "features.",
        "device",
        "model.",
        "corpus.",
        "second_model.",
        "activations.array.path",
        "activations.array.labels",
    ),
    "analyse": ("analysis.", "device", "model.", "corpus.", "second_model."),
    "controls": (
        "training.",
        "activations.",
        "features.rows_per_forward",
        "device",
        "model.",
        "corpus.",
        "second_model.",
    ),
}
"""Settings that a stage takes; those that end in a dot are sections."""
_IS = {"index": "the feature database is that", "analyse": "an analysis is", "controls": "a control is"}
_NAMES = {
    "model": "model.name",
    "second_model": "second_model.name",
    "corpus": "corpus.source",
    "activations": "activations.array.path",
}
"""What `model=NAME`, `corpus=NAME` and `activations=PATH` set here: the rest of the section, such as the share held
out, stays."""
_OF_TEXT = (("model", "model_fingerprint", "weights", "model.name"), ("corpus", "corpus", "corpus", "corpus."))
_OF_SECOND = (("second_model", "second_model_fingerprint", "second_weights", "second_model.name"),)
_OF_ARRAY = (("activations", "array", "array", "activations.array.path"),)
"""What a result is of, its names in the checkpoint and in `Job.provenance`, and the setting that gives another."""


@dataclass(frozen=True)
class Reopened:
    job: Job
    sae: SparseAutoencoder
    differs: dict[str, Any]
    """Settings by which model, text or site differ from training, each with its value in training and here."""


def reopen(run: Path, stage: Stage, overrides: Iterable[str], say: Say) -> Reopened:
    """The run in the folder `run` with `overrides`, before anything is encoded.

    Raises SaelabError if an override cannot change the result of `stage` or would evaluate on text of the training, if
    model or text of the run are not what they were, and if the site has another width than the autoencoder.
    """
    before = settings_of(run / folder.SETTINGS)
    settings = settings_of(before, map(_by_name, overrides))
    old, new = leaves(asdict(before)), leaves(asdict(settings))
    changed = {
        name: {"training": old.get(name), "here": new.get(name)}
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }
    _check_taken(run, stage, changed)
    unfinished = folder.unfinished(run)
    if not folder.training_record(run):
        say(f"note: {run / folder.TRAINING} is missing or damaged, so whether the training was complete is not known")
    elif unfinished:
        say(f"note: {unfinished}; `saelab train --resume {run}` goes on with it")
    job = Job(settings, say)
    if stage in ("analyse", "controls"):
        _ = job.lm  # raises SaelabError if there is none: both read text
    sae = load(run, job.model.device)
    differs = _differences(run, job, sae, changed)
    check_width(run, job, sae)
    if differs and stage != "eval":
        raise SaelabError(
            f"{run}: {_IS[stage]} of the run's own model and text, but {in_words(differs)}; `saelab eval` takes such "
            "settings"
        )
    return Reopened(job, sae, differs)


def _by_name(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{_NAMES[key]}={value}" if key in _NAMES and not value.lstrip().startswith("{") else override


def check_width(run: Path, job: Job, sae: SparseAutoencoder) -> None:
    """Raises SaelabError if a site has another width than the autoencoder."""
    sites = job.settings.sites
    if (sites.target is not None) != sae.transcodes:
        kind = "a transcoder, which needs one" if sae.transcodes else "an autoencoder, which has none"
        raise SaelabError(f"target: is {sites.target or 'null'}, and in {run} is {kind}")
    if len(sites.inputs) != (len(sae.site_widths) if not sae.transcodes else 1):
        raise SaelabError(
            f"more_sites: the autoencoder in {run} has {len(sae.site_widths)} sites, not {len(sites.inputs)}"
        )
    read = sae.site_widths if sites.target is None else (sae.d_in,)
    names = ("site", *["more_sites"] * len(sites.more))
    own = [
        *zip(names, sites.inputs, ["takes"] * len(read), read, strict=True),
        ("target", sites.target, "gives", sae.d_out),
    ]
    for name, site, takes, width in own:
        if site is not None and (found := job.model.width(site)) != width:
            raise SaelabError(
                f"{name}: {site} of {job.model.name} is {found:,} wide, and the autoencoder in {run} {takes} {width:,}"
            )


def in_words(differs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} is {value['here']}, in training {value['training']}" for name, value in differs.items())


def _check_taken(run: Path, stage: Stage, changed: dict[str, Any]) -> None:
    wrong = {name: value for name, value in changed.items() if not name.startswith(_TAKES[stage])}
    if wrong:
        taken = ", ".join(f"{name}*" if name.endswith(".") else name for name in _TAKES[stage])
        raise SaelabError(f"{run}: {in_words(wrong)}; `saelab {stage}` takes only {taken}")
    if "corpus.held_out" in changed:
        raise SaelabError(
            f"{run}: {in_words({'corpus.held_out': changed['corpus.held_out']})}; with another share, text "
            "that the run was trained on would count as held out"
        )


def _differences(run: Path, job: Job, sae: SparseAutoencoder, changed: dict[str, Any]) -> dict[str, Any]:
    """The part of `changed` that makes the result another than the run's own."""
    recorded = sae.metadata.get("saelab") or {}
    now = job.provenance()
    how = (f"{model}.{name}" for model in ("model", "second_model") for name in ("dtype", "attention"))
    named = ("site", "target", "more_sites", "context", *how)
    found = [name for name in changed if name in named]
    facts = _OF_ARRAY if job.array is not None else _OF_TEXT + _OF_SECOND * (job.settings.second_model is not None)
    for what, name, fact, section in facts:
        trained = recorded.get(name)
        given = [name for name in changed if name.startswith(section)]
        if trained is None:
            job.say(f"note: {run} does not record its {what}, so nothing checks that it is still the same")
            found += given
        elif trained != now[fact] and given:
            found += given
        elif trained != now[fact]:
            path = job.settings.corpus.source if what == "corpus" else job.model.name
            if what in ("model", "second_model"):
                path = job.lm.models[what == "second_model"].name
            raise SaelabError(
                f"{run}: the {what} {path} is not what it was in training: its "
                f"{difference({fact: now[fact]}, {fact: trained})}; restore it, or name a copy of it with {what}=PATH"
            )
    return {name: changed[name] for name in found}
