"""The bytes of every token of a tokenizer: what a feature database stores as its vocabulary.

A tokenizer's own `decode` turns bytes that alone are not UTF-8 into U+FFFD, so a character that is split over tokens is
lost. What a piece of the tokenizer's model stands for is decided by what its pre-tokenizer and decoder do to a probe,
not by its name.
"""

import re
from typing import Any

_LETTER = "a"
_PROBE = "\u65e5"  # no normaliser changes it
_PROBE_IN_BYTES = "\u00e6\u0139\u00a5"  # its three bytes in GPT-2's table
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_BLANK = "\u2581"  # SentencePiece's sign for a space


def token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """The bytes of every token id below `size`, for a fast tokenizer of transformers.

    The bytes of the ids of a text, joined, are the UTF-8 bytes of the text as the tokenizer normalises it, with two
    exceptions. Most SentencePiece tokenizers put a space in front of a text, so its first token has one. WordPiece and
    others that drop spaces do not record where they were: the token of a word has the space that their decoder writes
    in front of it (or after it, if ``</w>`` ends words); tokens that continue a word, such as ``##ing``, have none.

    Special and other added tokens are their content. Ids without a token, such as rows of an unembedding that is larger
    than the tokenizer, are ``<id>``.
    """
    backend = tokenizer.backend_tokenizer
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if i < size}
    of_piece = _reader(backend)

    def read(token: int) -> bytes:
        if token in added:
            content = added[token].content
            # Gemma adds runs of U+2581, to which its normaliser turns runs of spaces.
            runs_of_blanks = not added[token].special and set(content) == {_BLANK}
            return of_piece(content) if runs_of_blanks else content.encode()
        piece = backend.id_to_token(token)
        return f"<{token}>".encode() if piece is None else of_piece(piece)

    return [read(token) for token in range(size)]


def _reader(backend: Any) -> Any:
    """The function from a piece of the tokenizer's model to its bytes."""
    decoder = backend.decoder
    if _PROBE_IN_BYTES in _spelling(backend, _PROBE) or (
        decoder is not None and decoder.decode([_LETTER, _PROBE_IN_BYTES]) == _LETTER + _PROBE
    ):
        return _from_byte_letters
    if decoder is None and " " in _spelling(backend, f"{_LETTER} {_LETTER}"):
        return str.encode  # spaces are in the pieces, and `decode` would add more
    # Without a decoder, `decode` writes spaces between tokens.
    decode = " ".join if decoder is None else decoder.decode
    after = len(decode([_LETTER, _LETTER])) - 1
    byte_fallback = decode([_LETTER, "<0x41>"]) == _LETTER + "A"

    def as_decoded(piece: str) -> bytes:
        """What the decoder writes for the piece between two others."""
        byte = _BYTE.fullmatch(piece) if byte_fallback else None
        if byte:
            return bytes([int(byte[1], 16)])
        whole = decode([_LETTER, piece, _LETTER])
        return whole[1 : len(whole) - after].encode()

    return as_decoded


def _spelling(backend: Any, text: str) -> str:
    """The text as the tokenizer's model gets it."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return text
    return "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))


def _byte_letters() -> dict[str, int]:
    """GPT-2's table: a printable letter for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_BYTE_LETTERS = _byte_letters()


def _from_byte_letters(piece: str) -> bytes:
    try:
        return bytes(_BYTE_LETTERS[letter] for letter in piece)
    except KeyError:  # not spelt in the table, so text; tokenizers' decoder does the same
        return piece.encode()
