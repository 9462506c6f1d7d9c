"""The documents of a source that rows can be made of. Empty ones are left out. Reading a stream, which may never end,
gives up when no usable document is to be expected."""

from collections.abc import Callable, Iterable, Iterator

from saelab.corpus.documents import Cursor, Document
from saelab.errors import SaelabError

PATIENCE = 100_000
"""A stream is given up if so many documents in a row, and more than all before them, are of no use."""


def patience(held_out: float) -> float:
    """`PATIENCE`, or more where a run of documents on one side is probable: so long a one has a chance of e^-30."""
    return max(PATIENCE, 30 / min(held_out, 1 - held_out))


def with_content(
    documents: Iterable[tuple[Document, Cursor]],
    patience: float,
    about: str,
    count: Callable[[int, int], None] = lambda read, empty: None,
) -> Iterator[tuple[Document, Cursor]]:
    """The documents that are not empty. `count` gets the numbers of documents and of empty ones as they are read.

    Raises SaelabError if so many in a row are empty that all may be.
    """
    empty = idle = 0
    for read, (document, at) in enumerate(documents, 1):
        idle = idle + 1 if document.content is None else 0
        empty += document.content is None
        count(read, empty)
        if not idle:
            yield document, at
        elif idle > patience + read - idle:
            raise SaelabError(
                f"corpus: {about} has {idle:,} empty documents in a row (null, missing or blank), up to "
                f"{document.where()}; use another `text_column` or other text"
            )


def one_side(
    documents: Iterable[tuple[Document, Cursor]], boundary: float, held_out: bool, patience: float, about: str
) -> Iterator[tuple[Document, Cursor]]:
    """The documents of one side of `boundary`.

    Raises SaelabError if so many in a row are on the other side that all may be.
    """
    idle = 0
    for read, (document, at) in enumerate(documents, 1):
        idle += 1
        if (document.split_position < boundary) == held_out:
            idle = 0
            yield document, at
        elif idle > patience + read - idle:
            raise SaelabError(
                f"corpus: none of the last {idle:,} documents of {about} is {'' if held_out else 'not '}held out; they "
                "may be the same few, repeated: use other text or another `held_out`"
            )
