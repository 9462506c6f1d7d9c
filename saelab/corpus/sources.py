"""The kinds of corpora, and what one document is in each:

- ``demo`` is the Python standard library. A document is a file or a help topic; saelab.demo.stdlib makes the split.
- A .parquet, .jsonl, .ndjson, .json, .csv or .tsv file: a document is a row.
- Any other file is text: a document is a piece of some 32 KiB, cut at a blank line or a line's end. In a file below
  2 MiB it is about a 64th of the file, at least 1 KiB, so that a part of the file can be held out.
- A folder written by ``Dataset.save_to_disk``: a document is a row.
- Any other folder: all files below it of the first kind that is there, in the order .parquet; .jsonl and .ndjson; text
  (the suffixes in `TEXT`); .json; .csv and .tsv. In a folder of texts a document is a file; a file above 1 MiB is
  several, cut as above, all on the same side of the split. Names that begin with a dot are skipped.
- Anything else is the id of a dataset on the Hugging Face Hub, which is streamed: a document is a row.

Rows hold text, or token ids (lists of int) that are taken as they are. Whether a document is held out depends on a hash
of its name (for a file among several) or of its content. So order does not matter, and equal rows are on the same side.

Documents come in parts: a MiB of a text or JSON Lines file, a row group, some rows of a saved dataset, a file of a Hub
dataset; files of other kinds are one part. A seed decides the order of the parts, and each is read when its documents
are needed. Resuming within a part reads that part from its beginning. saelab unpickles nothing, runs no code of a
dataset and writes nothing here.
"""

import hashlib
import json
import os
import re
from collections import Counter
from functools import cache, partial
from pathlib import Path

from saelab.corpus.documents import Document, Source, in_drawn_order, part_of, source_of_tasks
from saelab.corpus.files import row_tasks, saved_dataset_tasks, text_parts
from saelab.corpus.settings import CorpusSettings
from saelab.errors import SaelabError, did_you_mean

TEXT = frozenset(
    "." + name
    for names in (
        "txt text md markdown rst adoc org tex htm html xml",
        "py pyi c h cc cpp hpp cu rs go java kt scala js jsx ts tsx cs swift rb php pl lua jl r hs ml sh sql el lisp",
    )
    for name in names.split()
)
"""Suffixes of text files in a folder."""
_KINDS = [
    frozenset({".parquet"}),
    frozenset({".jsonl", ".ndjson"}),
    TEXT,
    frozenset({".json"}),
    frozenset({".csv", ".tsv"}),
]
HASHED_WHOLE = 1 << 30
"""Up to this many bytes a corpus is identified by its whole content; a larger one by the length and a sample of each
file. Paths and times do not matter."""
SAMPLED = 1 << 16
"""Bytes sampled at the beginning, in the middle and at the end of a file."""
_SUFFIXES = frozenset().union(*_KINDS)
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def open_source(settings: CorpusSettings) -> Source:
    """The source that `settings` name. Raises SaelabError if it is missing, empty, or of an unknown kind."""
    if settings.source == "demo":
        return _demo()
    path = Path(settings.source).expanduser()
    try:
        if path.is_dir():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return _saved_dataset(path, settings)
            return _files(path, _files_below(path), settings)
        if path.is_file():
            return _files(path, [path], settings)
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        raise SaelabError(f"corpus: {error.filename or path} cannot be read: {error.strerror}") from error
    nearest = did_you_mean(path.name, [*beside, "demo"])
    if path.suffix.lower() in _SUFFIXES or not _HUB_ID.fullmatch(settings.source):
        raise SaelabError(f"corpus: there is no file or folder {path}.{nearest}")
    from saelab.corpus.hub import open_hub_dataset

    return open_hub_dataset(
        settings.source, settings.subset, settings.split, settings.text_column, nearest, settings.revision
    )


def _demo() -> Source:
    train, held_out = _demo_documents()
    digest = hashlib.blake2b(digest_size=16)
    for document in train + held_out:
        digest.update(f"{document.where()}\0{document.split_position}\0{document.content}\0".encode())
    parts = [part_of(partial(iter, [document])) for document in train + held_out]
    about = f"the Python standard library ({len(train)} texts, {len(held_out)} held out)"
    identity = {"source": "demo", "text": digest.hexdigest(), "held_out": "by file"}
    return Source(about, identity, False, partial(in_drawn_order, parts))


@cache  # reading and comparing the library takes seconds, and a process may open it once per stage
def _demo_documents() -> tuple[list[Document], list[Document]]:
    from saelab.demo.stdlib import read_stdlib

    library = read_stdlib()
    train = [Document(1.0, text, partial(str, name)) for name, text in library.train.items()]
    return train, [Document(0.0, text, partial(str, name)) for name, text in library.held_out.items()]


def _files_below(folder: Path) -> list[Path]:
    """The files below `folder` of the first kind in `_KINDS` that is there, sorted by name."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    for kind in _KINDS:
        chosen = sorted(path for path in found if path.suffix.lower() in kind)
        if chosen:
            return chosen
    there = ", ".join(
        f"{n} {suffix or 'without a suffix'}" for suffix, n in Counter(p.suffix for p in found).most_common(5)
    )
    raise SaelabError(
        f"corpus: {folder} has no file that can be read as a corpus ({there or 'it is empty'}); a corpus is .parquet, "
        ".jsonl, .json or .csv files, or texts such as .txt and .md"
    )


def _files(source: Path, paths: list[Path], settings: CorpusSettings) -> Source:
    """The source that reads `paths`: files of one kind, which are `source` itself or lie below it."""
    stats = [path.stat() for path in paths]
    if not any(stat.st_size for stat in stats):
        raise SaelabError(f"corpus: {source} is empty (0 bytes)")
    whole = sum(stat.st_size for stat in stats) <= HASHED_WHOLE
    # A single file is split by its pieces, several files by their names.
    names = [None if len(paths) == 1 else path.relative_to(source).as_posix() for path in paths]
    facts = [
        [name or path.suffix.lower(), stat.st_size, _content(path, stat.st_size, whole)]
        for name, path, stat in zip(names, paths, stats, strict=True)
    ]
    identity = {"source": "files", "text": hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()}
    suffix = paths[0].suffix.lower()
    about = str(source) if paths == [source] else f"{source} (files found below it: {len(paths)} {suffix})"
    if suffix in _SUFFIXES - TEXT:
        tasks = [task for path in paths for task in row_tasks(path)]
        return source_of_tasks(tasks, about, identity, settings.text_column)
    parts = [part_of(read) for path, name in zip(paths, names, strict=True) for read in text_parts(path, name)]
    return Source(about, identity, False, partial(in_drawn_order, parts))


def _content(path: Path, size: int, whole: bool) -> str:
    """A hash of a file: of all of it if `whole`, else of pieces at its beginning, middle and end."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if whole:
            return hashlib.file_digest(file, lambda: digest).hexdigest()
        for at in (0, size // 2, max(0, size - SAMPLED)):
            file.seek(at)
            digest.update(file.read(SAMPLED))
    return digest.hexdigest()


def _saved_dataset(folder: Path, settings: CorpusSettings) -> Source:
    tasks, fingerprint = saved_dataset_tasks(folder, settings.split)
    identity = {"source": "saved dataset", "text": fingerprint}
    return source_of_tasks(tasks, str(folder), identity, settings.text_column)
