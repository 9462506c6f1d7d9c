"""What a source is: documents with a place in the split, drawn from text or from the rows of a dataset."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from saelab.errors import SaelabError, did_you_mean

_IDS_COLUMNS = ("input_ids", "tokens")


class Document(NamedTuple):
    """A text, or a row of token ids."""

    place: float
    """Where its hash falls, in [0, 1): low ones are held out."""
    content: Any
    """The text, or the list of token ids."""
    where: Callable[[], str]
    """File and row or line, for messages; a call, since it may have to count lines."""


class Lane(NamedTuple):
    """One of `of` disjoint streams that the documents are divided into."""

    index: int = 0
    of: int = 1


Cursor = list[Any]
"""Between two documents of a source: the number of a part in the drawn order, and where in it, in the part's own terms.
JSON-able."""
Part = Callable[[Lane, Any], Iterator[tuple[Document, Any]]]
"""Reads the documents of a lane from somewhere in a part on (None: its beginning), each with where it is behind it."""


class Source(NamedTuple):
    """Where documents come from."""

    about: str
    """What is read, in words."""
    identity: dict[str, Any]
    """The facts that decide what the documents are."""
    tokenised: bool
    documents: Callable[[random.Random, Lane, Cursor | None], Iterator[tuple[Document, Cursor]]]
    """All documents of a lane, the parts of the source in an order drawn from the generator, each with where it is
    behind it; from a cursor on, given an equal generator and lane. Parts before the cursor are not read."""


Row = tuple[Callable[[], str], Any]
"""Where it is (as in `Document`), and its values by column; anything else is an error of the corpus."""
Task = Callable[[str | None], Iterator[Row]]
"""Reads a part of a dataset: its rows with one column, or with all of them where that is None."""


def place(name: str) -> float:
    """Where a name or a text falls in [0, 1): as if at random, but always the same."""
    digest = hashlib.blake2b(name.encode(), key=b"saelab held out", digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def in_drawn_order(
    parts: Sequence[Part], rng: random.Random, lane: Lane, start: Cursor | None
) -> Iterator[tuple[Document, Cursor]]:
    """What `Source.documents` promises, of the source that consists of `parts`."""
    return one_after_another(rng.sample(parts, len(parts)), lane, start)


def one_after_another(parts: Sequence[Part], lane: Lane, start: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
    """The documents of a lane, from a cursor on, the parts in the order given."""
    first, entry = start or (0, None)
    for number in range(first, len(parts)):
        # Lanes take turns from part to part too: many parts may be a single document.
        turn = Lane((lane.index - number) % lane.of, lane.of)
        for document, within in parts[number](turn, entry):
            yield document, [number, within]
        entry = None


def part_of(read: Callable[[], Iterator[Document]]) -> Part:
    """The part that consists of what `read` reads from this machine's disk; where it is: how many documents in."""

    def documents(lane: Lane, start: int | None) -> Iterator[tuple[Document, int]]:
        try:
            for index, document in enumerate(read()):
                if index >= (start or 0) and index % lane.of == lane.index:
                    yield document, index + 1
        except OSError as error:
            raise SaelabError(f"corpus: {error.filename} cannot be read: {error.strerror}") from error

    return documents


def source_of_tasks(tasks: list[Task], about: str, identity: dict[str, Any], text_column: str | None) -> Source:
    """The source that reads one column of a dataset in parts."""
    first = next((row for task in tasks for row in task(None)), None)
    column, tokenised = choose_column(first, about, text_column)

    def documents(task: Task) -> Iterator[Document]:
        return documents_of_rows(task(column), column, tokenised)

    parts = [part_of(partial(documents, task)) for task in tasks]
    return Source(about, {**identity, "column": column}, tokenised, partial(in_drawn_order, parts))


def choose_column(first: Row | None, about: str, wanted: str | None) -> tuple[str, bool]:
    """The column to read, judged by the first row, and whether it holds token ids. Raises SaelabError if none does."""
    if first is None:
        raise SaelabError(f"corpus: {about} holds no rows")
    columns = _columns(first)
    ids = [name for name, value in columns.items() if _is_ids(value)]
    if wanted is not None:
        if wanted not in columns:
            raise SaelabError(
                f"corpus: text_column: {about} has no column {wanted!r}; its columns are {', '.join(columns)}."
                + did_you_mean(wanted, columns)
            )
        return wanted, wanted in ids
    if "text" in columns:
        return "text", False
    for name in _IDS_COLUMNS:
        if name in ids:
            return name, True
    raise SaelabError(
        f"corpus: {about} has no column 'text' (nor token ids in 'input_ids' or 'tokens'); its columns are "
        f"{', '.join(columns)}: set `text_column` to the one to read"
    )


def documents_of_rows(rows: Iterable[Row], column: str, tokenised: bool) -> Iterator[Document]:
    """The documents in `column`, blank ones left out. Raises SaelabError at a row that holds something else."""
    for row in rows:
        where, columns = row[0], _columns(row)
        if column not in columns:
            raise SaelabError(f"corpus: {where()} has no column {column!r}; its columns are {', '.join(columns)}")
        value = columns[column]
        if tokenised and isinstance(value, list):
            yield Document(place(repr(value)), value, where)
        elif not tokenised and isinstance(value, str):
            if not value.strip():
                continue
            try:
                yield Document(place(value), value, where)
            except UnicodeEncodeError as error:  # JSON can spell half of a character
                raise SaelabError(
                    f"corpus: {where()}: {column!r} is not Unicode text: a lone surrogate at character {error.start}"
                ) from error
        else:
            wanted = "a list of token ids" if tokenised else "text"
            raise SaelabError(
                f"corpus: {where()}: {column!r} is {_kind(value)}, not {wanted}; repair or remove that row"
            )


def _columns(row: Row) -> dict[str, Any]:
    if not isinstance(row[1], dict):
        raise SaelabError(f'corpus: {row[0]()} is {_kind(row[1])}, not an object with columns such as {{"text": ...}}')
    return row[1]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", str: "text", bytes: "binary data"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
