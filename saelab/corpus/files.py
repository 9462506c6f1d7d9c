"""Readers of local files, part by part. Pieces of text are cut here; rows are read by json_files, csv_files and
arrow_files."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from saelab.corpus.arrow_files import parquet_tasks
from saelab.corpus.csv_files import read_csv, read_tsv
from saelab.corpus.decoding import decode, is_compressed
from saelab.corpus.documents import Document, Task, split_position
from saelab.corpus.json_files import json_tasks

PIECE = 1 << 15
"""Bytes of one document cut from a long text."""
PART = 1 << 20
"""Bytes in one part of a text or JSON Lines file; in a folder, a text file of at most this size is one document."""
LINES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv"})
"""Suffixes of files of rows that may be compressed."""


def text_parts(path: Path, size: int, name: str | None) -> Iterator[Callable[[], Iterator[Document]]]:
    """Readers of the parts of a text file of `size` bytes. Its `name` decides its side of the split; if None, each
    piece's text."""
    if name is not None and size <= PART:
        piece = PART
    else:
        piece = PIECE if name is not None else max(1024, min(PIECE, size // 64))
    per_part = PART // piece
    pieces = -(-size // piece)
    for first in range(0, pieces, per_part):
        yield partial(_read_text, path, size, name, piece, range(first, min(first + per_part, pieces)))


def _read_text(path: Path, size: int, name: str | None, piece: int, pieces: range) -> Iterator[Document]:
    with path.open("rb") as file:
        start = _cut(file, pieces.start * piece, size, piece)
        for index in pieces:
            stop = _cut(file, (index + 1) * piece, size, piece)
            file.seek(start)
            text = decode(file.read(stop - start), path, start)
            position = split_position(text) if name is None else split_position(name, "surrogateescape")
            yield Document(position, text if text.strip() else None, partial("{}, byte {}".format, path, start))
            start = stop


def _cut(file: BinaryIO, at: int, size: int, piece: int) -> int:
    """The byte to cut a text at: after a blank line, a line's end or a space shortly after byte `at`."""
    if at == 0 or at >= size:
        return min(at, size)
    file.seek(at)
    ahead = file.read(piece // 2)
    for separator in (b"\n\n", b"\n", b" "):
        found = ahead.find(separator)
        if found >= 0:
            return at + found + len(separator)
    within = 0
    while within < len(ahead) and ahead[within] & 0xC0 == 0x80:  # not inside a character
        within += 1
    return at + within


def kind_of(path: Path) -> str:
    """The suffix that says how to read a file, in lower case: of compressed rows, the one before .gz and the like."""
    before = Path(path.stem).suffix.lower()
    return before if is_compressed(path) and before in LINES else path.suffix.lower()


def row_tasks(path: Path) -> list[Task]:
    """Readers of the parts of a dataset file; its suffix decides the format."""
    kind = kind_of(path)
    if kind == ".parquet":
        return parquet_tasks(path)
    if kind in (".csv", ".tsv"):
        return [partial(read_tsv if kind == ".tsv" else read_csv, path)]
    return json_tasks(path, PART)
