"""The kinds of corpora, and what one document is in each:

- ``demo`` is the Python standard library. A document is a file or a help topic; saelab.demo.stdlib makes the split.
- A .parquet, .jsonl, .ndjson, .json, .csv or .tsv file, also compressed (all but .parquet; .gz, .zst, .bz2, .xz): a
  document is a row.
- Any other file is text: a document is a piece of some 32 KiB, cut at a blank line or a line's end. In a file below
  2 MiB it is about a 64th of the file, at least 1 KiB, so that a part of the file can be held out.
- A folder written by ``Dataset.save_to_disk``: a document is a row.
- Any other folder: its files of one kind, in one split and subset if it has any (folders.py says which). In a folder of
  texts a document is a file; a file above 1 MiB is several, cut as above, all on the same side of the split.
- Anything else is the id of a dataset on the Hugging Face Hub, which is streamed: a document is a row.

Rows hold text, or token ids (lists of int) that are taken as they are. Empty documents (null, missing, NaN, blank, no
ids) are left out and counted; another kind of value is an error. Whether a document is held out depends on a hash of
its name (for a file among several) or of its content. So order does not matter; equal rows are on the same side.

Documents come in parts: a MiB of a text or JSON Lines file, a row group, some rows of a saved dataset, a file of a Hub
dataset; files of other kinds are one part. A seed decides the order of the parts, and each is read when its documents
are needed. Resuming within a part reads that part from its beginning. saelab unpickles nothing, runs no code of a
dataset and writes nothing here.
"""

import hashlib
import json
import re
import stat
from functools import cache, partial
from pathlib import Path

from saelab.corpus.arrow_files import saved_dataset_tasks
from saelab.corpus.decoding import is_compressed, unchanged
from saelab.corpus.documents import Document, Source, Task, in_drawn_order, part_of, source_of_tasks
from saelab.corpus.files import LINES, kind_of, row_tasks, text_parts
from saelab.corpus.folders import SUFFIXES, TEXT, choose_files
from saelab.corpus.settings import CorpusSettings
from saelab.corpus.splits import Files
from saelab.errors import SaelabError, did_you_mean

HASHED_WHOLE = 1 << 30
"""Up to this many bytes a corpus is identified by its whole content; a larger one by the length and a sample of each
file. Paths and times do not matter."""
SAMPLED = 1 << 16
"""Bytes sampled at the beginning, in the middle and at the end of a file."""
_POINTER_SIZE = 200
"""Most bytes of the pointer that `git clone` without Git LFS leaves in place of a file."""
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def open_source(settings: CorpusSettings) -> Source:
    """The source that `settings` name.

    Raises SaelabError if it is missing, empty, or of an unknown kind, or has no such split, subset, revision or column.
    """
    if settings.source == "demo":
        _refuse(settings, "the demo", "split", "subset", "revision", "text_column")
        return _demo()
    if "://" in settings.source:
        raise SaelabError(
            f"corpus: source: {settings.source} is a URL; download it, or name a Hub dataset by its id (someone/texts)"
        )
    path = Path(settings.source)
    try:
        if path.is_dir():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return _saved_dataset(path, settings)
            _refuse(settings, f"the folder {path}", "revision")
            chosen = choose_files(path, settings.split, settings.subset)
            return _files(path, chosen.files, chosen.about, chosen.named, settings)
        if path.exists():
            _refuse(settings, f"the file {path}", "split", "subset", "revision")
            return _files(path, {path.name: path}, str(path), {}, settings)
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        name = str(error.filename or path)
        name = name if len(name) <= 300 else f"{name[:300]}..."
        raise SaelabError(f"corpus: {name} cannot be read: {error.strerror}") from error
    nearest = did_you_mean(path.name, [*beside, "demo"])
    if path.suffix.lower() in SUFFIXES or not _HUB_ID.fullmatch(settings.source):
        raise SaelabError(f"corpus: there is no file or folder {path}.{nearest}")
    from saelab.corpus.hub import open_hub_dataset

    return open_hub_dataset(
        settings.source, settings.subset, settings.split, settings.text_column, nearest, settings.revision
    )


def _refuse(settings: CorpusSettings, what: str, *names: str) -> None:
    """Raises SaelabError if one of the settings `names`, which mean nothing for this source, is not the default."""
    for name in names:
        value = getattr(settings, name)
        if value != getattr(CorpusSettings, name):
            has = "columns" if name == "text_column" else f"{name}s"
            raise SaelabError(f"corpus: {name}: {what} has no {has}, so {value!r} means nothing; remove that setting")


def _demo() -> Source:
    train, held_out = _demo_documents()
    digest = hashlib.blake2b(digest_size=16)
    for document in train + held_out:
        digest.update(f"{document.where()}\0{document.split_position}\0{document.content}\0".encode())
    parts = [part_of(partial(iter, [document])) for document in train + held_out]
    about = f"the Python standard library ({len(train)} texts, {len(held_out)} held out)"
    identity = {"source": "demo", "text": digest.hexdigest(), "held_out": "by file"}
    return Source(about, identity, False, partial(in_drawn_order, parts), endless=False)


@cache  # reading and comparing the library takes seconds, and a process may open it once per stage
def _demo_documents() -> tuple[list[Document], list[Document]]:
    from saelab.demo.stdlib import read_stdlib

    library = read_stdlib()
    train = [Document(1.0, text, partial(str, name)) for name, text in library.train.items()]
    return train, [Document(0.0, text, partial(str, name)) for name, text in library.held_out.items()]


def _files(source: Path, files: Files, about: str, named: dict[str, str], settings: CorpusSettings) -> Source:
    """The source that reads `files` of one kind: `source` itself, or files below it in the `named` split and subset."""
    paths = list(files.values())
    sizes = [_size(path) for path in paths]
    if not any(sizes):
        raise SaelabError(f"corpus: {source} is empty (0 bytes)")
    for path, size in zip(paths, sizes, strict=True):
        if size <= _POINTER_SIZE and path.read_bytes().startswith(b"version https://git-lfs.github.com/spec/"):
            raise SaelabError(f"corpus: {path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    whole = sum(sizes) <= HASHED_WHOLE
    # A single file is split by its pieces, several files by their names.
    names = [None if len(paths) == 1 else name for name in files]
    facts = [
        [name or path.suffix.lower(), size, _content(path, size, whole)]
        for name, path, size in zip(names, paths, sizes, strict=True)
    ]
    text = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    identity = {"source": "files", "text": text, **named}
    if kind_of(paths[0]) == ".tsv":
        identity["tsv"] = "by line"  # quotes joined lines in earlier versions
    if kind_of(paths[0]) in SUFFIXES - TEXT:
        tasks: list[Task] = []
        for path, size in zip(paths, sizes, strict=True):
            tasks += [partial(unchanged, path, size, task) for task in unchanged(path, size, row_tasks, path)]
        return source_of_tasks(tasks, about, identity, settings.text_column)
    _refuse(settings, f"{source}, which is text,", "text_column")
    if is_compressed(source):
        raise SaelabError(
            f"corpus: {source} is compressed, which saelab reads only in {', '.join(sorted(LINES))}; decompress it"
        )
    parts = [
        part_of(partial(unchanged, path, size, read))
        for name, path, size in zip(names, paths, sizes, strict=True)
        for read in text_parts(path, size, name)
    ]
    return Source(about, identity, False, partial(in_drawn_order, parts), endless=False)


def _size(path: Path) -> int:
    """The size of a file in bytes. Raises SaelabError if it is a pipe, a device or the like."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise SaelabError(
            f"corpus: {path} is a pipe, a socket or a device; a corpus is read several times: copy it to a file"
        )
    return facts.st_size


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
    _refuse(settings, f"the saved dataset {folder}", "subset", "revision")
    tasks, fingerprint = saved_dataset_tasks(folder, settings.split)
    identity = {"source": "saved dataset", "text": fingerprint}
    return source_of_tasks(tasks, str(folder), identity, settings.text_column)
