"""`saelab export`: what a run holds, in a form that other people or tools can open.

Features, from the run's database, without torch (`FORMS`); the autoencoder as the checkpoint of another trainer
(`CHECKPOINTS`); or the evaluation as the result of another benchmark (`SAE_BENCH`).
"""

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from saelab.errors import SaelabError, WriteError, did_you_mean
from saelab.features.database import Database, open_database
from saelab.features.export import circuit_tracer, html, neuronpedia, tables
from saelab.features.indices import indices
from saelab.files import expanded, locked, make_folder, replace_folder, translate_errors, write_whole
from saelab.runs import folder

EXPORTS = "exports"
"""The folder in a run folder where exports go that get no other name."""


class Form(NamedTuple):
    """A form in which features can be exported."""

    write: Callable[[Database, Sequence[int], Path], None]
    name: str
    """Name of the export in `EXPORTS`."""
    files: str | None = None
    """Names of the files in it, as a regular expression; None if it is a file itself."""
    all_features: bool = True
    """Whether it has all features unless some are named."""


FORMS = {
    "html": Form(html.write, "features.html", all_features=False),
    "neuronpedia": Form(neuronpedia.write, "neuronpedia", neuronpedia.FILES),
    "circuit-tracer": Form(circuit_tracer.write, "circuit-tracer", circuit_tracer.FILES),
    "csv": Form(tables.write_csv, "features.csv"),
    "parquet": Form(tables.write_parquet, "features.parquet"),
}


CHECKPOINTS = {
    "saelens": r"cfg\.json|sae_weights\.safetensors",
    "sparsify": r"cfg\.json|sae\.safetensors",
    "dictionary_learning": r"config\.json|ae\.pt",
}
"""By the name of a trainer, the files of its checkpoints, as a regular expression."""
SAE_BENCH = "sae_bench"


def export(
    run: str | Path, to: str, features: str | None = None, out: str | Path | None = None, *, force: bool = False
) -> Path:
    """Export what a run holds in the form `to`; returns the file or folder written.

    `to` is a key of `FORMS`, for features of the run's database, or of `CHECKPOINTS`, for its autoencoder; then `run`
    may be any checkpoint that `saelab.load` reads, and an id on the Hub. `SAE_BENCH` is the run's evaluation.
    `features` is a list, such as "1,5-9". `out` is the file or folder, by default in RUN/exports. With
    `force` it may be an earlier export, which is replaced.

    Raises SaelabError if there is no such form, feature, database or checkpoint, if the other trainer cannot compute
    the autoencoder, if `out` exists, belongs to the run itself or cannot be written, and if another process writes into
    the run.
    """
    run = Path(expanded(run))
    if to in FORMS:
        form = FORMS[to]
        write, name, files = _of_features(run, form, features, to), form.name, form.files
    elif to in CHECKPOINTS:
        write, name, files = _of_autoencoder(run, features, to), to, CHECKPOINTS[to]
    elif to == SAE_BENCH:
        write, name, files = _of_evaluation(run, features), f"{run.resolve().name}_custom_sae_eval_results.json", None
    else:
        forms = [*FORMS, *CHECKPOINTS, SAE_BENCH]
        raise SaelabError(f"--to: there is no {to!r}; choose {', '.join(forms)}.{did_you_mean(to, forms)}")
    if out is None and to in CHECKPOINTS and not folder.has_checkpoint(run):
        raise SaelabError(f"--out: is missing; {run} is no run, so there is no folder for its exports")
    path = run / EXPORTS / name if out is None else Path(expanded(out, "--out"))
    target = path.resolve()
    runs = (each for each in target.parents if (each / folder.SETTINGS).is_file() and folder.has_checkpoint(each))
    if (nearest := next(runs, run.resolve())) != run.resolve():
        raise SaelabError(f"--out: {path} is in another run, {nearest}; choose a place outside of it")
    inside = target.is_relative_to(run.resolve())
    if any(target.is_relative_to((run / name).resolve()) for name in folder.OWN):
        raise SaelabError(f"--out: {path} belongs to the run itself; choose another")
    with locked(run if inside else path), translate_errors(path.parent, elsewhere="choose another --out"):
        _check_free(path, name, files, force)
        make_folder(path.parent)
        write(path)
    return path


def _of_features(run: Path, form: Form, features: str | None, to: str) -> Callable[[Path], None]:
    """Writes features of the run's database to a path."""
    if not folder.has_features(run):
        folder.check_run(run)
    database = open_database(folder.features(run))
    return partial(form.write, database, _features(database, form, features, to))


def _of_autoencoder(run: Path, features: str | None, to: str) -> Callable[[Path], None]:
    """Writes the run's autoencoder to a path, as `to` does."""
    if features is not None:
        raise SaelabError(f"--features: a checkpoint of {to} has all features; leave it out")
    from saelab.runs.from_hub import load
    from saelab.sae.interop.writing import WRITERS

    sae = load(run)

    def write(path: Path) -> None:
        try:
            with replace_folder(path) as unfinished:
                WRITERS[to](sae, unfinished)
        except WriteError:
            raise
        except SaelabError as error:
            raise SaelabError(f"{run}: {error}") from error

    return write


def _of_evaluation(run: Path, features: str | None) -> Callable[[Path], None]:
    """Writes the run's evaluation to a path as sae-bench does, by whose name of the file its plots find the run."""
    if features is not None:
        raise SaelabError(f"--features: --to {SAE_BENCH} is of the whole autoencoder; leave it out")
    from saelab.runs.sae_bench import core

    folder.check_run(run)
    text = json.dumps(core(run), indent=2) + "\n"
    return lambda path: write_whole(path, text)


def _features(database: Database, form: Form, text: str | None, to: str) -> list[int]:
    """The features that `text` names, each once, in its order. Raises SaelabError if one does not exist."""
    if text is None:
        if form.all_features:
            return list(range(database.n_features))
        raise SaelabError(f"--features: name the features of the page, for example: --to {to} --features 1,5-9")
    try:
        return indices(text, database.facts).tolist()
    except SaelabError as error:
        raise SaelabError(f"--features: {error}") from error


def _check_free(path: Path, name: str, files: str | None, force: bool) -> None:
    """Raises SaelabError if `path` exists, unless it is an earlier export and `force` is given."""
    if not path.exists() and not path.is_symlink():
        return
    ours = path.is_file() and path.suffix == Path(name).suffix
    if files is not None:
        ours = path.is_dir() and not path.is_symlink()
        ours = ours and all(re.fullmatch(files, file.name) for file in path.iterdir())
    if not ours:
        kind = f"file like {name}" if files is None else "folder of such an export"
        raise SaelabError(f"--out: {path} exists and is not a {kind}; choose another")
    if not force:
        raise SaelabError(f"--out: {path} exists; choose another, or give --force to replace it")
