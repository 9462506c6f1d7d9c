"""Predicates on plain text, as a judge reads it: which characters make up a token is not known there.

The text is divided into pieces: words, parts of names (`nameOf` is two, `name_of` three), numbers, single signs, white
space; one space before a piece belongs to it, as in most tokenizers. The text of a token is found if it begins and ends
with a piece. In a whole window two letters or more are also found at the beginning or the end of a piece, since
tokens may be parts of words; marks, however, lie between tokens. So the answers are those of `Predicate.active` on
windows whose tokens are such pieces, none a part of another, and elsewhere an approximation.
"""

from functools import lru_cache
from itertools import accumulate, pairwise

import regex

from saelab.autointerp.predicates import Predicate, classes_of

_PIECE = regex.compile(
    r" ?(?:\p{Lu}?\p{Ll}+|\p{Lu}+(?!\p{Ll})|\p{L}+|\p{N}+|_+|[^\s\p{L}\p{N}_])|\s+(?= \S)|\s+",
)


@lru_cache(1 << 12)
def pieces(text: str) -> tuple[str, ...]:
    """The text, divided as the head of the file says."""
    return tuple(_PIECE.findall(text))


def fits(predicate: Predicate, text: str) -> bool:
    """Whether a predicate is active somewhere in a text. Raises SaelabError if its `pattern` takes too long."""
    return _fits(predicate, text, 0, len(text), marked=False)


def fits_marked(predicate: Predicate, text: str, first: int, stop: int) -> bool:
    """Whether a predicate is active in ``text[first:stop]``, which begins and ends with a token."""
    return _fits(predicate, text, first, stop, marked=True)


def _fits(predicate: Predicate, text: str, first: int, stop: int, *, marked: bool) -> bool:
    before, part = text[:first], text[first:stop]
    needed = 2 if marked else 1
    if any(_found(token, part, len(part), needed) for token in predicate.tokens):
        return True
    if any(_found(token, part, len(part) - 1, needed) or _ends(token, before) for token in predicate.after):
        return True
    if predicate.classes:
        found = pairwise((before[-1:], *pieces(part)))
        if any(not classes_of(b, piece).isdisjoint(predicate.classes) for b, piece in found):
            return True
    return bool(predicate.pattern) and any(a < stop and first < b for a, b in predicate.matches(text))


def _found(token: str, text: str, last: int, needed: int) -> bool:
    """Whether a token's text is found, ending at `last` or before; `needed`: ends that parts of words must share."""
    if not _part_of_word(token):
        needed = 2
    bounds, at = _bounds(text), text.find(token, 0, last)
    while at >= 0:
        if (at in bounds) + (at + len(token) in bounds) >= needed:
            return True
        at = text.find(token, at + 1, last)
    return False


def _ends(token: str, text: str) -> bool:
    """Whether a text, which ends with a token, ends with this token's text."""
    return text.endswith(token) and (_part_of_word(token) or len(text) - len(token) in _bounds(text))


def _part_of_word(token: str) -> bool:
    """Whether a token may be a part of a word, and is long enough to be told from a letter of it."""
    letters = token.lstrip(" ")
    return len(letters) > 1 and letters.isalpha()


@lru_cache(1 << 12)
def _bounds(text: str) -> frozenset[int]:
    return frozenset(accumulate(map(len, pieces(text)), initial=0))
