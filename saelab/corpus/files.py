"""Readers of local files, part by part: text, JSON, JSON Lines, CSV, Parquet, and datasets saved in Arrow files."""

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from saelab.corpus.documents import Document, Row, Task, split_position
from saelab.errors import SaelabError, brief, did_you_mean

PIECE = 1 << 15
"""Bytes of one document cut from a long text."""
PART = 1 << 20
"""Bytes in one part of a text or JSON Lines file; in a folder, a text file of at most this size is one document."""
ROWS = 256
"""Rows of a Parquet or Arrow file that are read at once."""


def text_parts(path: Path, name: str | None) -> Iterator[Callable[[], Iterator[Document]]]:
    """Readers of the parts of a text file. Its `name` decides its side of the split; if None, each piece's text."""
    size = path.stat().st_size
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
            text = _decode(file.read(stop - start), path, start)
            if text.strip():
                position = split_position(text if name is None else name)
                yield Document(position, text, partial("{}, byte {}".format, path, start))
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


def _decode(data: bytes, path: Path, at: int) -> str:
    """`data`, read at byte `at` of `path`, as text. Raises SaelabError if it is not UTF-8."""
    advice = "a corpus is UTF-8 text, or JSON Lines, JSON, CSV or Parquet with the usual suffix"
    zero = data.find(b"\0")
    if zero >= 0:
        raise SaelabError(f"corpus: {path} is a binary file (a zero at byte {at + zero}); {advice}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SaelabError(
            f"corpus: {path} is not UTF-8 text: 0x{data[error.start]:02x} at byte {at + error.start}; {advice} "
            "(`iconv` converts from other encodings)"
        ) from error
    return text.removeprefix("\ufeff") if at == 0 else text


def row_tasks(path: Path) -> list[Task]:
    """Readers of the parts of a dataset file; its suffix decides the format."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return [partial(_read_parquet, path, group, first) for group, first in _row_groups(path)]
    if suffix in (".csv", ".tsv"):
        return [partial(_read_csv, path, "\t" if suffix == ".tsv" else ",")]
    if suffix == ".json" and _is_json_list(path):
        return [partial(_read_json_list, path)]
    return [partial(_read_json_lines, path, start) for start in range(0, path.stat().st_size, PART)]


def _read_json_lines(path: Path, part: int, column: str | None) -> Iterator[Row]:
    """The lines that begin in [part, part + PART)."""
    with path.open("rb") as file:
        at = part
        if part:  # skip the rest of the line that began in the part before
            file.seek(part - 1)
            at += len(file.readline()) - 1
        while at < part + PART and (line := file.readline()):
            where = partial(_line_number, path, at)
            text = _decode(line, path, at)
            at += len(line)
            if not text.strip():
                continue
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise SaelabError(
                    f"corpus: {where()} does not parse as JSON: {reason}; write one object per line, or a .json file "
                    "with one list of objects"
                ) from error


def _line_number(path: Path, at: int) -> str:
    """`path` and the number of its line that begins at byte `at`, for messages."""
    line = 1
    with path.open("rb") as file:
        while at > 0 and (block := file.read(min(at, PART))):
            line += block.count(b"\n")
            at -= len(block)
    return f"{path}, line {line}"


def _is_json_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_json_list(path: Path, column: str | None) -> Iterator[Row]:
    try:
        rows = json.loads(_decode(path.read_bytes(), path, 0))
    except json.JSONDecodeError as error:
        raise SaelabError(f"corpus: {path}, line {error.lineno} does not parse as JSON: {error.msg}") from error
    except RecursionError as error:
        raise SaelabError(f"corpus: {path} does not parse as JSON: too many nested lists") from error
    for index, row in enumerate(rows):
        yield partial("{}, row {}".format, path, index), row


def _read_csv(path: Path, delimiter: str, column: str | None) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than 128 KiB, csv's default limit
    with path.open("rb") as file:
        rows = csv.DictReader(_text_lines(file, path), restkey="?", delimiter=delimiter)
        try:
            for row in rows:
                yield partial("{}, line {}".format, path, rows.line_num), row
        except csv.Error as error:
            raise SaelabError(f"corpus: {path}, line {rows.line_num} does not parse as CSV: {error}") from error


def _text_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    at = 0
    for line in file:
        yield _decode(line, path, at)
        at += len(line)


def _row_groups(path: Path) -> list[tuple[int, int]]:
    """The row groups of a Parquet file, each with the index of its first row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise SaelabError(f"corpus: {path} is not a readable Parquet file: {brief(error)}") from error
    groups, first = [], 0
    for group in range(metadata.num_row_groups):
        groups.append((group, first))
        first += metadata.row_group(group).num_rows
    return groups


def _read_parquet(path: Path, group: int, index: int, column: str | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=PART) as file:
            names = file.schema_arrow.names
            columns = [column] if column in names else None  # if it is missing, documents_of_rows reports that
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    yield partial("{}, row {}".format, path, index), row
                    index += 1
    except (pa.ArrowException, OSError) as error:
        raise SaelabError(f"corpus: {path} is damaged: {brief(error)}") from error


def saved_dataset_tasks(folder: Path, split: str) -> tuple[list[Task], str]:
    """Readers of a folder written by ``Dataset.save_to_disk`` (or DatasetDict), and its fingerprint."""
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds for damaged files
        raise SaelabError(f"corpus: {folder} is not a readable saved dataset: {brief(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        splits = [str(name) for name in saved]
        if split not in splits:
            raise SaelabError(
                f"corpus: split: {folder} has no {split!r}; its splits are {', '.join(splits)}."
                + did_you_mean(split, splits)
            )
        saved = saved[split]
    table = saved.with_format("arrow")  # plain values; the dataset may have been saved with another format
    return [partial(_read_saved, table, folder, first) for first in range(0, len(table), ROWS)], saved._fingerprint


def _read_saved(table: Any, folder: Path, first: int, column: str | None) -> Iterator[Row]:
    rows = (table if column is None else table.select_columns(column))[first : first + ROWS]
    for index, row in enumerate(rows.to_pylist(), first):
        yield partial("{}, row {}".format, folder, index), row
