"""Tokens and numbers as short plain text: white space and invisible characters get marks, so that a reader sees them.

Nothing here is HTML. Tokens come from a corpus and are untrusted: what shows them escapes them.
"""

import re
import unicodedata
from functools import lru_cache

LONGEST = 200
"""Most characters that are shown of a token; a corpus may have tokens of any length."""

_MARKS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_WHITESPACE = re.compile(r"[\n\r\t]| {2,}")
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp")  # categories of Unicode
_PRINTED = " \u200d"  # exceptions: the space, and the character that joins emoji


@lru_cache(maxsize=100_000)  # tables show the same few thousand tokens repeatedly
def visible(token: str) -> str:
    """A token as plain text with visible white space: "␣def", "↵", "␣×8", and "∅" for an empty token."""
    text = "".join(shown for shown, _ in pieces(token))
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    if before == len(text):
        return "␣" * before or "∅"
    return "␣" * before + text.strip(" ") + "␣" * after


def typed(text: str) -> str:
    """Search text with the marks of `visible` turned back into white space: "↵" becomes a line break."""
    text = re.sub(r"␣×(\d{1,3})", lambda match: " " * int(match[1]), text).replace("␣", " ")
    for character, mark in _MARKS.items():
        text = text.replace(mark, character)
    return text


def number(value: float) -> str:
    """Three significant digits: "12.3", "0.0450", "1,234", "0"."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def cut(token: str) -> str:
    """The token, or if it is longer than `LONGEST` its beginning and the number of its characters."""
    return token if len(token) <= LONGEST else f"{token[:LONGEST]}… ({len(token):,} characters)"


def pieces(token: str, breaks: bool = False) -> list[tuple[str, bool]]:
    """The token in pieces: (text to show, whether it is a mark for something invisible).

    `breaks` keeps line breaks and indents.
    """
    found: list[tuple[str, bool]] = []
    position = 0
    for match in _WHITESPACE.finditer(token):
        found += _printable(token[position : match.start()])
        position = match.end()
        run = match[0]
        if breaks and run != "\r":
            found += [("↵", True), ("\n", False)] if run == "\n" else [(run, False)]
        else:
            found.append((_MARKS.get(run) or f"␣×{len(run)}", True))
    return found + _printable(token[position:])


def _printable(text: str) -> list[tuple[str, bool]]:
    """Text with invisible characters as codes: some would change the page, such as the direction of its text."""
    found: list[tuple[str, bool]] = []
    plain = ""
    for character in text:
        if unicodedata.category(character) in _INVISIBLE and character not in _PRINTED:
            found += [(plain, False)] * bool(plain) + [(f"\\u{ord(character):04x}", True)]
            plain = ""
        else:
            bare = not plain and unicodedata.combining(character)  # it would strike through what stands before it
            plain += f"◌{character}" if bare else character
    return found + [(plain, False)] * bool(plain)
