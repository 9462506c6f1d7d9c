"""Tokens as text: a window is a decoded stream of bytes, cut at its tokens."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from saelab.errors import SaelabError
from saelab.features.arrays import Arrays
from saelab.features.vocabulary import Vocabulary

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


def vocabulary(tokens: list[bytes]) -> Vocabulary:
    found = {
        "vocabulary.bytes": np.frombuffer(b"".join(tokens), np.uint8),
        "vocabulary.offsets": np.cumsum([0, *map(len, tokens)]),
        "vocabulary.counts": np.ones(len(tokens), np.int64),
    }
    return Vocabulary(Arrays(Path("run/features"), {}, found))


def stream(tokens: list[bytes]) -> str:
    """The whole text: lone bytes as \\xe6."""
    characters = b"".join(tokens).decode("utf-8", "surrogateescape")
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in characters)


@given(st.lists(st.binary(max_size=5) | st.text(max_size=3).map(str.encode)))
@example([b"\xe6", b"\x97", b"\xa5"])
@example([b"", b"\xf0\x9f", b"", b"\xa6\x8a!", b""])
@example([b"\xe6", b"a", b"\xed\xa0\x80", b"\xc0\x80", b"\xff"])
def test_the_pieces_of_a_window_are_the_decoded_stream(tokens: list[bytes]) -> None:
    v = vocabulary(tokens)
    shown = v.window(range(len(tokens)))
    assert len(shown) == len(tokens)
    assert "".join(shown) == stream(tokens)
    assert v.texts == [v.text(i) for i in range(len(tokens))] == [stream([token]) for token in tokens]
    assert [v.bytes(i) for i in range(len(tokens))] == tokens


@given(st.text(min_size=1), st.data())
def test_a_split_character_belongs_to_the_token_in_which_it_starts(text: str, data: st.DataObject) -> None:
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    bounds = [0, *cuts, len(whole)]
    tokens = [whole[a:b] for a, b in pairwise(bounds)]
    expected = [""] * len(tokens)
    begin = 0
    for character in text:
        owner = max(i for i, token in enumerate(tokens) if bounds[i] <= begin < bounds[i] + len(token))
        expected[owner] += character
        begin += len(character.encode())
    assert vocabulary(tokens).window(range(len(tokens))) == expected


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ([b"\xe6\x97", b"\xa5", b"\xe6\x9c\xac"], ["\u65e5", "", "\u672c"]),
        ([b"\xf0", b"\x9f", b"\xa6", b"\x8a"], ["\U0001f98a", "", "", ""]),
        ([b"caf\xc3", b"\xa9 "], ["caf\u00e9", " "]),
        ([b"\xa5", b"\xe6\x97", b"x"], ["\\xa5", "\\xe6\\x97", "x"]),
        ([rb"\xe6", b"\xe6"], [r"\xe6", r"\xe6"]),
        ([b"", b"\0", b"\n"], ["", "\0", "\n"]),
        ([FAMILY.encode()[:5], FAMILY.encode()[5:], "\u05e9".encode()], [FAMILY[:2], FAMILY[2:], "\u05e9"]),
        ([b"x" * 10_000, b"\x97"], ["x" * 10_000, "\\x97"]),
    ],
)
def test_windows(tokens: list[bytes], shown: list[str]) -> None:
    assert vocabulary(tokens).window(range(len(tokens))) == shown


def test_a_token_that_does_not_exist_is_an_error() -> None:
    for token in (-1, 2, 2**40):
        with pytest.raises(SaelabError, match=rf"no token {token} in run/features: its tokens are 0 to 1"):
            vocabulary([b"a", b"b"]).window([0, token])
