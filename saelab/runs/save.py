"""Writes a run folder around a training: the settings before it, the checkpoint and the record after it."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from saelab.activations.array.rows import Array
from saelab.activations.stream import provenance
from saelab.corpus import Corpus
from saelab.errors import SaelabError
from saelab.files import locked, remove_folder, replace_folder, translate_errors, write_json, write_whole
from saelab.lm.model import LanguageModel
from saelab.runs import folder
from saelab.runs.config import RunSettings, located
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.checkpoint import save_sae
from saelab.sae.input_map import InputMap
from saelab.sae.model import SparseAutoencoder
from saelab.sae.side_by_side import SideBySide
from saelab.training.trainer import Trainer


@contextmanager
def create_run(settings: RunSettings, *, force: bool = False) -> Iterator[Path]:
    """Yields the folder of a new run, written by `write_new_run`, and keeps other writers out of it in the block.

    Raises SaelabError as `write_new_run` does, and if another process writes into the folder.
    """
    with locked(Path(settings.out)):
        yield write_new_run(settings, force=force)


def write_new_run(
    settings: RunSettings, *, inputs: str | None = None, start: str | None = None, force: bool = False
) -> Path:
    """The folder of a new run, with its settings and the record of a training that has not begun.

    `inputs` is the hash of what the weights will depend on; None: unknown, so that no later stage takes the run for
    up to date. `start` is the hash of the checkpoint that it starts with. Raises SaelabError as `check_out` does, or
    if the folder cannot be written.
    """
    check_out(settings, force)
    run = Path(settings.out)
    known = None if start is None else {"checkpoint": settings.sae.init_from, "sha256": start}
    with translate_errors(run), replace_folder(run) as unfinished:
        write_settings(unfinished, settings)
        write_json(unfinished / folder.TRAINING, _record(settings, inputs, complete=False, tokens=0, start=known))
    return run


def write_settings(run: Path, settings: RunSettings) -> None:
    """Write `settings` to the run folder `run`, with absolute paths. Raises OSError."""
    absolute = replace(located(settings), out=str(Path(settings.out).absolute()))
    write_whole(run / folder.SETTINGS, absolute.to_yaml())


def _record(
    settings: RunSettings, inputs: str | None, *, complete: bool, tokens: int, start: Any = None
) -> dict[str, Any]:
    record = {"inputs": inputs, "complete": complete, "tokens": tokens, "planned_tokens": settings.training.tokens}
    return record if start is None else {**record, "start": start}


def check_out(settings: RunSettings, force: bool) -> None:
    """Raises SaelabError if `settings.out` exists or cannot be made, or if something that the run reads lies in it.

    With `force` it may be an earlier run, which is replaced.
    """
    run, cache, array = Path(settings.out), settings.activations.cache, settings.activations.array
    folder.check_free(run, force)
    second = settings.second_model and settings.second_model.name
    read = {
        "model": settings.model.name,
        "second_model": second,
        "corpus": settings.corpus.source,
        "activations.cache": cache and cache.path,
    }
    read |= {"activations.array": array.path, "activations.array.labels": array.labels} if array else {}
    for name, source in read.items():
        path = source and Path(source)
        if path and path.exists() and path.resolve().is_relative_to(run.resolve()):
            raise SaelabError(f"out: {run} would be replaced, and {name} {path} lies in it; choose another out=FOLDER")


def save_run(
    settings: RunSettings,
    lm: LanguageModel | Array,
    corpus: Corpus | None,
    trainer: Trainer,
    inputs_of: InputMap | SideBySide,
    facts: Mapping[str, Any] | None = None,
    *,
    sae: SparseAutoencoder | None = None,
    target_scale: float | None = None,
    inputs: str | None = None,
    seconds: float | None = None,
) -> None:
    """Write the checkpoint of `trainer`, and the record of its training on `corpus`, to the run folder of `settings`.

    An array stands for model and text: `lm` is the array, and `corpus` is None. `sae` is the whole autoencoder of
    `trainer`, if other processes have a part of it.

    The trainer saw `inputs_of` the activations of `corpus`, and `target_scale` times those at the target site if there
    is one; the checkpoint applies to activations as the model gives them. `facts` (such as those of `calibrate`) are
    recorded in both; `inputs` is as in `write_new_run`; `seconds` is the time of the training. Evaluation, feature
    database, analyses, explanations, scores and controls of an earlier checkpoint are removed. Raises SaelabError if
    the files cannot be written; an earlier checkpoint is kept then.
    """
    trained, own = trainer.trained(), facts or {}
    sae = inputs_of.folded(sae or trainer.sae, 1.0 if target_scale is None else target_scale)
    start = folder.training_record(Path(settings.out)).get("start")
    record = _record(settings, inputs, complete=trainer.finished, tokens=trained.tokens, start=start)
    record |= {**own, "seconds": seconds, "input_scale": inputs_of.scale}
    read = {"input_scale": inputs_of.scale, "inputs_of": settings.activations.inputs}
    read |= {} if target_scale is None else {"target_scale": target_scale}
    _save(settings, lm, corpus, sae, record, {**read, **trained.facts, **own})


def save_control(
    settings: RunSettings,
    lm: LanguageModel | Array,
    corpus: Corpus | None,
    sae: SparseAutoencoder,
    kind: str,
    inputs: str,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint of `sae`, a control that was not trained, and its record, to the run folder of `settings`.

    `sae` applies to activations as the model gives them. `inputs` and `facts` are as in `save_run`. Raises SaelabError
    as it does.
    """
    own = {"control": kind, **(facts or {})}
    record = _record(settings, inputs, complete=True, tokens=0) | {"planned_tokens": 0}
    _save(settings, lm, corpus, sae, record | own, own)


def save_adopted(
    settings: RunSettings,
    lm: LanguageModel,
    corpus: Corpus,
    sae: SparseAutoencoder,
    facts: Mapping[str, Any],
    *,
    force: bool = False,
) -> None:
    """Write a whole run folder of `sae`, which another trainer trained; `facts` say where it comes from.

    Raises SaelabError as `write_new_run` does, and then nothing of an earlier run is lost.
    """
    check_out(settings, force)
    run, theirs = Path(settings.out), sae.metadata.get("saelab")
    own = {"inputs": f"adopted {facts['sha256']}", "tokens": 0}
    kept = {name: value for name, value in sae.metadata.items() if name == "training_architecture"}
    sae.metadata |= _metadata(located(settings), lm, corpus) | {"training_architecture": None} | kept
    sae.metadata["saelab"] = {
        **(theirs if isinstance(theirs, Mapping) else {}),
        **own,
        **_origin(lm, corpus),
        "adopted": dict(facts),
    }
    with translate_errors(run), replace_folder(run) as unfinished:
        write_settings(unfinished, settings)
        save_sae(sae, unfinished / folder.CHECKPOINT)
        write_json(unfinished / folder.TRAINING, {**own, "complete": True, "adopted": dict(facts), **_versions()})


def _save(
    settings: RunSettings,
    lm: LanguageModel | Array,
    corpus: Corpus | None,
    sae: SparseAutoencoder,
    record: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write the checkpoint of `sae` with these `facts`, remove the results of an earlier one, write the `record`."""
    run = Path(settings.out)
    sae.metadata |= _metadata(located(settings), lm, corpus) | {
        "saelab": {
            "inputs": record["inputs"],
            "tokens": record["tokens"],
            **_origin(lm, corpus),
            **asdict(settings.sae),
            "seed": settings.seed,
            "weights_seed": settings.weights_seed,
            **facts,
        }
    }
    with translate_errors(run), replace_folder(run / folder.CHECKPOINT) as unfinished:
        save_sae(sae, unfinished)
    _remove_results(run)
    write_json(run / folder.TRAINING, {**record, **_versions()})


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


def _remove_results(run: Path) -> None:
    """Remove what was measured on earlier weights: the explorer and `saelab.load` would show it as if of these."""
    with translate_errors(run):
        for evaluation in folder.evaluations(run):
            evaluation.unlink(missing_ok=True)
        if (features := folder.features(run)).exists():
            remove_folder(features)
        for name in folder.analyses(run):
            remove_folder(folder.analysis_folder(run, name))
        for name in (folder.AUTOINTERP, folder.CONTROLS):
            if (run / name).exists():
                remove_folder(run / name)


def _origin(lm: LanguageModel | Array, corpus: Corpus | None) -> dict[str, Any]:
    """What identifies the activations of the training (`saelab.runs.reopen` compares it)."""
    if isinstance(lm, Array):
        return {"array": lm.identity}
    assert corpus is not None, "a language model reads text"
    found = provenance(lm, corpus)["corpus"]
    names = ("model_fingerprint", "second_model_fingerprint")
    prints = dict(zip(names, (each.fingerprint for each in lm.models), strict=False))
    return {"model_folded": False, **prints, "corpus": found}


def _metadata(settings: RunSettings, lm: LanguageModel | Array, corpus: Corpus | None) -> dict[str, Any]:
    """Where the checkpoint comes from, under SAELens' keys."""
    if corpus is None or isinstance(lm, Array):
        own = {"model_name": lm.name, "hook_name": settings.site}
        return own | {"training_architecture": allocation_of(settings.sae).saelens}
    return {
        "model_name": lm.models[0].name,
        "model_class_name": "TransformerBridge",
        "hook_name": settings.site,
        **({} if settings.target is None else {"hook_name_out": settings.target}),
        **({"hook_names": list(settings.sites.inputs)} if settings.more_sites else {}),
        **({} if settings.second_model is None else {"second_model_name": settings.second_model.name}),
        "context_size": settings.context,
        "prepend_bos": corpus.begins_with_bos,
        "dataset_path": settings.corpus.source,
        "exclude_special_tokens": not settings.activations.special_tokens,
        "training_architecture": allocation_of(settings.sae).saelens,
    }
