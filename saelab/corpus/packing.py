"""Packing tokens into rows: BOS at the beginning of each row, EOS between documents, no padding."""

from collections.abc import Iterable, Iterator

import numpy as np


def pack(documents: Iterable[list[int]], context: int, *, bos: int | None, eos: int | None) -> Iterator[np.ndarray]:
    """Rows of exactly `context` token ids (int32 ``[context]``), in the order of `documents`.

    The documents form one stream with `eos` after each (nothing if `eos` is None). The stream is cut into pieces of
    ``context - 1`` tokens, each after a `bos` (of ``context`` tokens if `bos` is None). The last, incomplete piece is
    left out. A document may continue in the next row; if it begins within a row, the token before it is `eos`.
    Raises ValueError, at the first document, if `context` leaves no room for a token.
    """
    rest: list[int] = []
    for document in documents:
        rows, rest = pack_document(rest, document, context, bos=bos, eos=eos)
        yield from rows


def pack_document(
    before: list[int], document: list[int], context: int, *, bos: int | None, eos: int | None
) -> tuple[np.ndarray, list[int]]:
    """One step of `pack`: the rows that a document completes, int32 ``[rows, context]``, and the tokens left over.

    `before` holds the tokens left over from earlier documents. Neither list is changed.
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
