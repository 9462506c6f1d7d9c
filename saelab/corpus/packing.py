"""Tokens into rows: each row begins with BOS, documents follow one another with EOS between them, nothing is padded."""

from collections.abc import Iterable, Iterator

import numpy as np


def pack(documents: Iterable[list[int]], context: int, *, bos: int | None, eos: int | None) -> Iterator[np.ndarray]:
    """Rows of exactly `context` token ids (int32 ``[context]``), in the order of `documents`.

    The documents form one stream, with `eos` after each (nothing where `eos` is None), cut into pieces of
    ``context - 1`` behind a `bos` (of ``context`` where `bos` is None). The last, incomplete piece is left out.
    A document may go on in the next row; where one begins within a row, the token before it is `eos`.
    Raises ValueError, at the first document, where `context` leaves no room for a token.
    """
    rest: list[int] = []
    for document in documents:
        rows, rest = pack_document(rest, document, context, bos=bos, eos=eos)
        yield from rows


def pack_document(
    before: list[int], document: list[int], context: int, *, bos: int | None, eos: int | None
) -> tuple[np.ndarray, list[int]]:
    """One step of `pack`: the rows that a document completes, int32 ``[rows, context]``, and the tokens left over.

    `before` are the tokens left over of the documents before it; neither list is changed.
    """
    head = [] if bos is None else [bos]
    piece = context - len(head)
    if piece < 1:
        raise ValueError(f"context {context} leaves no room for tokens")
    stream = before + document + ([] if eos is None else [eos])
    n = len(stream) // piece
    rows = np.empty((n, context), dtype=np.int32)
    rows[:, : len(head)] = head
    rows[:, len(head) :] = np.array(stream[: n * piece], dtype=np.int32).reshape(n, piece)
    return rows, stream[n * piece :]
