"""`saelab export`: what a run holds, in a form that other people or tools can open. Imports no torch."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from saelab.errors import SaelabError, did_you_mean
from saelab.features.database import Database, open_database
from saelab.features.export import circuit_tracer, html, neuronpedia, tables
from saelab.files import expanded, locked, make_folder, translate_errors
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


def export(
    run: str | Path, to: str, features: str | None = None, out: str | Path | None = None, *, force: bool = False
) -> Path:
    """Export features of a run's database in the form `to`, a key of `FORMS`; returns the file or folder written.

    `features` are indices and ranges, such as "1,5-9". `out` is the file or folder, by default in RUN/exports. With
    `force` it may be an earlier export, which is replaced.

    Raises SaelabError if there is no such form, feature or database, if `out` exists, belongs to the run itself or
    cannot be written, and if another process writes into the run.
    """
    if to not in FORMS:
        raise SaelabError(f"--to: there is no {to!r}; choose {', '.join(FORMS)}.{did_you_mean(to, FORMS)}")
    form = FORMS[to]
    run = Path(expanded(run))
    database = open_database(folder.features(run))
    chosen = _features(database, form, features, to)
    path = run / EXPORTS / form.name if out is None else Path(expanded(out, "--out"))
    target = path.resolve()
    inside = target.is_relative_to(run.resolve())
    if any(target.is_relative_to((run / name).resolve()) for name in folder.OWN):
        raise SaelabError(f"--out: {path} belongs to the run itself; choose another")
    with locked(run if inside else path), translate_errors(path.parent, elsewhere="choose another --out"):
        _check_free(path, form, force)
        make_folder(path.parent)
        form.write(database, chosen, path)
    return path


def _features(database: Database, form: Form, text: str | None, to: str) -> list[int]:
    """The features that `text` names, each once, in its order. Raises SaelabError if one does not exist."""
    if text is None:
        if form.all_features:
            return list(range(database.n_features))
        raise SaelabError(f"--features: name the features of the page, for example: --to {to} --features 1,5-9")
    try:
        chosen = database.search(f"id:{text}").features.tolist()
        for index in re.findall(r"\d+", text):  # the search takes a range that ends after the last feature
            database.facts.check(int(index))
    except SaelabError as error:
        raise SaelabError(f"--features: {error}") from error
    return chosen


def _check_free(path: Path, form: Form, force: bool) -> None:
    """Raises SaelabError if `path` exists, unless it is an earlier export and `force` is given."""
    if not path.exists() and not path.is_symlink():
        return
    ours = path.is_file()
    if form.files is not None:
        ours = path.is_dir() and not path.is_symlink()
        ours = ours and all(re.fullmatch(form.files, file.name) for file in path.iterdir())
    if not ours:
        kind = "file" if form.files is None else "folder of such an export"
        raise SaelabError(f"--out: {path} exists and is not a {kind}; choose another")
    if not force:
        raise SaelabError(f"--out: {path} exists; choose another, or give --force to replace it")
