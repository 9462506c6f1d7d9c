"""Tokens into rows: each row begins with BOS, documents follow one another with EOS between them, nothing is padded."""

from collections.abc import Iterable, Iterator

import numpy as np


def pack(documents: Iterable[list[int]], context: int, *, bos: int | None, eos: int | None) -> Iterator[np.ndarray]:
    """Rows of exactly `context` token ids (int32 ``[context]``), in the order of `documents`.

    The documents form one stream, with `eos` after each (nothing where `eos` is None), cut into pieces of
    ``context - 1`` behind a `bos` (of ``context`` where `bos` is None). The last, incomplete piece is left out.
    A document may go on in the next row; where one begins within a row, the token before it is `eos`.
    Raises ValueError, at the first row, where `context` leaves no room for a token.
    """
    head = [] if bos is None else [bos]
    tail = [] if eos is None else [eos]
    piece = context - len(head)
    if piece < 1:
        raise ValueError(f"context {context} leaves no room for tokens")
    stream: list[int] = []
    for document in documents:
        stream += document
        stream += tail
        whole = len(stream) // piece * piece
        for start in range(0, whole, piece):
            yield np.array(head + stream[start : start + piece], dtype=np.int32)
        stream = stream[whole:]
