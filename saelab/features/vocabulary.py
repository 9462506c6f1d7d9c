"""The vocabulary of a feature database: the bytes of each token, and tokens as text.

A token is bytes, which alone need not be text: byte-level tokenizers split characters. So a window is decoded as a
whole; each token then gets its characters. A character that several tokens make up belongs to the first of them. A byte
that is no part of a character is shown as ``\\xe6``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saelab.features.arrays import Arrays


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The bytes of every token id."""

    arrays: Arrays

    def __len__(self) -> int:
        return len(self.arrays["vocabulary.counts"])

    @property
    def counts(self) -> np.ndarray:
        """Occurrences of each token id among the ordinary tokens of the text, ``[vocabulary]`` int64."""
        return self.arrays["vocabulary.counts"]

    def bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        first, stop = self.arrays["vocabulary.offsets"][token : token + 2].tolist()
        return self.arrays["vocabulary.bytes"][first:stop].tobytes()

    def text(self, token: int) -> str:
        """A token as text, decoded by itself."""
        return self.window([token])[0]

    def window(self, tokens: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each of consecutive tokens."""
        pieces = [self.bytes(int(token)) for token in tokens]
        starts = np.cumsum([0, *map(len, pieces)])
        shown = [""] * len(pieces)
        begin, owner = 0, 0
        for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
            while starts[owner + 1] <= begin:
                owner += 1
            lone = "\udc80" <= character <= "\udcff"
            shown[owner] += f"\\x{ord(character) - 0xDC00:02x}" if lone else character
            begin += 1 if lone else len(character.encode())
        return shown
