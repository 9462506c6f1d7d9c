"""Sources of documents: pieces of text or rows of a dataset, each with its position in the split."""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from saelab.errors import SaelabError, did_you_mean

_IDS_COLUMNS = ("input_ids", "tokens")
_FIRST_ROWS = 1000
"""Most rows that are searched for a value in the column to read."""


class Document(NamedTuple):
    """A text, or a row of token ids."""

    split_position: float
    """Its hash scaled to [0, 1); documents below a boundary are held out."""
    content: Any
    """The text, or the list of token ids; None if it is empty: null, missing, NaN, blank, or no ids."""
    where: Callable[[], str]
    """File and row or line, for messages; a function because it may have to count lines."""


class Lane(NamedTuple):
    """One of `of` disjoint streams that the documents are divided into."""

    index: int = 0
    of: int = 1


Cursor = list[Any]
"""A position between two documents of a source: the number of a part in the shuffled order, and a position within that
part in the part's own terms. JSON-able."""
Part = Callable[[Lane, Any], Iterator[tuple[Document, Any]]]
"""Reads a lane's documents in one part, starting at a position within it (None: its beginning). Yields each document
with the position after it."""


class Source(NamedTuple):
    """Where documents come from."""

    about: str
    """A description for messages."""
    identity: dict[str, Any]
    """The facts that decide what the documents are."""
    tokenised: bool
    """Whether documents are token ids rather than text."""
    documents: Callable[[random.Random, Lane, Cursor | None], Iterator[tuple[Document, Cursor]]]
    """Yields all documents of a lane, each with the cursor after it; the generator decides the order of the parts.

    Given a cursor, it starts there and reads no part before it; generator and lane must equal those that gave it."""
    endless: bool = True
    """Whether the documents may never end, as those of a stream; local files end."""


Row = tuple[Callable[[], str], Any]
"""A row's location (as in `Document`) and its values by column; anything but a dict is an error in the corpus."""
Task = Callable[[str | None], Iterator[Row]]
"""Reads the rows of a part of a dataset, with one column, or with all columns if given None."""


def split_position(text: str, errors: str = "strict") -> float:
    """A number in [0, 1) from a hash of `text`: pseudorandom, and the same on every machine.

    Raises UnicodeEncodeError if `text` has a lone surrogate; in a file's name one stands for a byte, and `errors` is
    "surrogateescape".
    """
    digest = hashlib.blake2b(text.encode(errors=errors), key=b"saelab held out", digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def in_drawn_order(
    parts: Sequence[Part], rng: random.Random, lane: Lane, start: Cursor | None
) -> Iterator[tuple[Document, Cursor]]:
    """`Source.documents` for a source that consists of `parts`."""
    return one_after_another(rng.sample(parts, len(parts)), lane, start)


def one_after_another(parts: Sequence[Part], lane: Lane, start: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
    """The documents of a lane from a cursor on, with the parts in the order given."""
    first, entry = start or (0, None)
    for number in range(first, len(parts)):
        # Lanes take turns across parts as well, because many parts may be a single document.
        turn = Lane((lane.index - number) % lane.of, lane.of)
        for document, within in parts[number](turn, entry):
            yield document, [number, within]
        entry = None


def part_of(read: Callable[[], Iterator[Document]]) -> Part:
    """The part that `read` reads from this machine's disk; a position in it: the number of documents with content."""

    def documents(lane: Lane, start: int | None) -> Iterator[tuple[Document, int]]:
        index = 0
        for document in read():
            of_lane = index >= (start or 0) and index % lane.of == lane.index
            index += document.content is not None
            if of_lane:
                yield document, index

    return documents


def source_of_tasks(tasks: list[Task], about: str, identity: dict[str, Any], text_column: str | None) -> Source:
    """The source that reads one column of a dataset in parts."""
    column, tokenised = choose_column((row for task in tasks for row in task(None)), about, text_column)

    def documents(task: Task) -> Iterator[Document]:
        return documents_of_rows(task(column), column, tokenised)

    parts = [part_of(partial(documents, task)) for task in tasks]
    return Source(about, {**identity, "column": column}, tokenised, partial(in_drawn_order, parts), endless=False)


def choose_column(rows: Iterator[Row], about: str, requested: str | None) -> tuple[str, bool]:
    """The column to read and whether it holds token ids, judged by the first of `rows` that has a value there.

    Raises SaelabError if there is no row, no column `requested`, or no column with text or token ids.
    """
    columns: dict[str, Any] = {}
    for row in islice(rows, _FIRST_ROWS):
        columns |= {name: value for name, value in _columns(row).items() if _is_empty(columns.get(name))}
        column = requested or next((name for name in ("text", *_IDS_COLUMNS) if name in columns), None)
        if column is not None and not _is_empty(columns.get(column)):
            break
    if not columns:
        raise SaelabError(f"corpus: {about} holds no rows")
    ids = [name for name, value in columns.items() if _is_ids(value)]
    names = ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in islice(columns, 20))
    if requested is not None:
        if requested not in columns:
            raise SaelabError(
                f"corpus: text_column: {about} has no column {requested!r}; its columns are {names}."
                + did_you_mean(requested, columns)
            )
        return requested, requested in ids
    if "text" in columns:
        return "text", False
    for name in _IDS_COLUMNS:
        if name in ids:
            return name, True
    raise SaelabError(
        f"corpus: {about} has no column 'text', and no token ids in 'input_ids' or 'tokens'; its columns are "
        f"{names}: set `text_column` to the one to read"
    )


def documents_of_rows(rows: Iterable[Row], column: str, tokenised: bool) -> Iterator[Document]:
    """The documents in `column`. Raises SaelabError at a row with another kind of value."""
    for row in rows:
        where, columns = row[0], _columns(row)
        if column not in columns:
            raise SaelabError(f"corpus: {where()} has no column {column!r}; its columns are {', '.join(columns)}")
        value = columns[column]
        if _is_empty(value):
            yield Document(0.0, None, where)
        elif tokenised and isinstance(value, list):
            yield Document(split_position(repr(value)), value, where)
        elif not tokenised and isinstance(value, str):
            try:
                yield Document(split_position(value), value, where)
            except UnicodeEncodeError as error:  # JSON can spell half of a character
                raise SaelabError(
                    f"corpus: {where()}: {column!r} is not Unicode text: a lone surrogate at character {error.start}"
                ) from error
        else:
            expected = "a list of token ids" if tokenised else "text"
            raise SaelabError(
                f"corpus: {where()}: {column!r} is {_kind(value)}, not {expected}; repair or remove that row, or read "
                "another column (`text_column`)"
            )


def _is_empty(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value)


def _columns(row: Row) -> dict[str, Any]:
    if not isinstance(row[1], dict):
        raise SaelabError(f'corpus: {row[0]()} is {_kind(row[1])}, not an object with columns such as {{"text": ...}}')
    return row[1]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "text", bytes: "binary data"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
