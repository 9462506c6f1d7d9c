"""The vocabulary of a feature database: the bytes of each token, and tokens as text.

A token is bytes, which alone need not be text: byte-level tokenizers split characters. So a window is decoded as a
whole; each token then gets its characters. A character that several tokens make up belongs to the first of them. A byte
that is no part of a character is shown as ``\\xe6``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from saelab.errors import SaelabError
from saelab.features.arrays import Arrays

_LONE_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The bytes of every token id. Methods raise SaelabError if there is no such token."""

    arrays: Arrays

    def __len__(self) -> int:
        return len(self.arrays["vocabulary.counts"])

    @property
    def counts(self) -> np.ndarray:
        """Occurrences of each token id among the ordinary tokens of the text, ``[vocabulary]`` int64."""
        return self.arrays["vocabulary.counts"]

    @cached_property
    def texts(self) -> list[str]:
        """Every token as text, each decoded by itself."""
        content = self._content
        offsets = self.arrays["vocabulary.offsets"].tolist()
        return [_alone(content[first:stop]) for first, stop in pairwise(offsets)]

    def bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        return self._pieces([token])[0].tobytes()

    def text(self, token: int) -> str:
        """A token as text, decoded by itself."""
        return _alone(self._pieces([token])[0])

    def window(self, tokens: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each of consecutive tokens."""
        return as_text(self._pieces(tokens))

    def _pieces(self, tokens: Sequence[int] | np.ndarray) -> list[memoryview]:
        ids = np.asarray(tokens, np.int64)
        wrong = ids[(ids < 0) | (ids >= len(self))]
        if len(wrong):
            raise SaelabError(
                f"There is no token {wrong[0]} in {self.arrays.folder}: its tokens are 0 to {len(self) - 1}. "
                f"{self.arrays.remedy}"
            )
        offsets = np.asarray(self.arrays["vocabulary.offsets"])  # without memmap's cost per operation
        content = self._content
        return [content[a:b] for a, b in zip(offsets[ids].tolist(), offsets[ids + 1].tolist(), strict=True)]

    @property
    def _content(self) -> memoryview:
        return np.asarray(self.arrays["vocabulary.bytes"]).data


def as_text(pieces: Sequence[bytes | memoryview]) -> list[str]:
    """The text of each of consecutive tokens, from their bytes."""
    try:  # where no token splits a character, each is text by itself
        return [str(piece, "utf-8") for piece in pieces]
    except UnicodeDecodeError:
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
    starts = np.cumsum([0, *map(len, pieces)])
    cuts = np.searchsorted(character_starts(text), starts).tolist()
    return [show_lone_bytes(text[first:stop]) for first, stop in pairwise(cuts)]


def character_starts(text: str) -> np.ndarray:
    """The byte at which each character of `text` starts, and the number of bytes, ``[characters + 1]`` int64.

    `text` is UTF-8 that was decoded with "surrogateescape": a lone byte is a character.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    lengths = np.ones(len(codes) + 1, np.int64)
    lengths[0] = 0
    for smallest in (0x80, 0x800, 0x10000):
        lengths[1:] += codes >= smallest
    lengths[1:][(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
    return np.cumsum(lengths)


def show_lone_bytes(text: str) -> str:
    """`text` with each byte that "surrogateescape" kept as a character shown as ``\\xe6``."""
    return _LONE_BYTE.sub(lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)


def _alone(piece: memoryview) -> str:
    return show_lone_bytes(str(piece, "utf-8", "surrogateescape"))
