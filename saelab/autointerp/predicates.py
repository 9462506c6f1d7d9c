"""Explanations that can be run: they say of every token of a window whether the feature should be active on it.

A predicate is a union of parts. In words they are separated by semicolons, and texts are JSON strings:

    the tokens " def", " class"; numbers; what follows "("; what matches "0x[a-f]+"

`parse` reads these words, so that a person can write or edit a predicate as text. What follows a token that lies before
the window is not found: a window is all that a predicate sees.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from saelab.errors import SaelabError
from saelab.features.matching import regex_pattern

SECONDS = 1.0
"""Longest time for a regular expression on one window."""

_LETTER = r"[^\W\d_]"
_SIGN = r"[^\w\s]"
CLASSES: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "numbers": r"\s*\d[\d.,_]*",
        "words in lower case": r"\s?[a-z]+",
        "capitalised words": r"\s?[A-Z][a-z]+",
        "words in capitals": r"\s?[A-Z]{2,}",
        "later parts of words": rf"(?<={_LETTER}){_LETTER}+",
        "names with an underscore": r"\s*\w*_\w*|(?<=_)\w+",
        "punctuation": rf"\s*{_SIGN}+\s*",
        "opening brackets": rf"\s*{_SIGN}*[(\[{{]",
        "closing brackets": rf"\s*[)\]}}]{_SIGN}*\s*",
        "quotation marks": rf"\s*{_SIGN}*[\"'`“”‘’]{_SIGN}*",
        "operators": r"\s*[-+*/%=<>!&|^~]+",
        "line breaks": r"[^\S\n]*\n\s*",
        "indentation": r"\n?[^\S\n]{2,}|\n?\t+",
    }.items()
}
"""Syntax labels: what the whole token must match; a look-behind of the pattern sees the token before it."""

_NAMES = {"the token": "tokens", "the tokens": "tokens", "what follows": "after", "what matches": "pattern"}
_TEXT = r'"(?:[^"\\]|\\.)*"'
_PART = re.compile(
    rf"(?:(?P<of>{'|'.join(sorted(_NAMES, reverse=True))})\s+(?P<texts>{_TEXT}(?:\s*,\s*{_TEXT})*)"
    rf"|(?P<class>{'|'.join(CLASSES)}))\s*(?:;\s*(?=\S)|$)",
    re.DOTALL,
)
"""A part in words, to the next."""


@lru_cache(1 << 16)
def classes_of(before: str, token: str) -> frozenset[str]:
    """Names of the classes that a token belongs to; `before` is the token before it, "" at the start of a window."""
    both = before + token
    return frozenset(name for name, pattern in CLASSES.items() if pattern.fullmatch(both, len(before)))


@dataclass(frozen=True)
class Predicate:
    """A union of parts, at least one. Raises SaelabError if a part is no such part."""

    tokens: tuple[str, ...] = ()
    """Texts of tokens, exact."""
    classes: tuple[str, ...] = ()
    """Names in `CLASSES`."""
    after: tuple[str, ...] = ()
    """Texts of the token before."""
    pattern: str = ""
    """A regular expression on the text of the window: tokens are active that its matches overlap; "" for none."""

    def __post_init__(self) -> None:
        if not (self.tokens or self.classes or self.after or self.pattern):
            raise SaelabError("A predicate has no part; give it tokens, classes, after or pattern")
        if "" in self.tokens or "" in self.after:
            raise SaelabError("A predicate names a token without text; leave it out")
        unknown = [name for name in self.classes if name not in CLASSES]
        if unknown:
            raise SaelabError(f"A predicate names no known class by {unknown[0]!r}; they are {', '.join(CLASSES)}")
        if self.pattern:
            regex_pattern(self.pattern)

    def active(self, tokens: Sequence[str]) -> np.ndarray:
        """Whether each token of a window fits, ``[window]`` bool. Raises SaelabError if `pattern` takes too long."""
        texts, previous, classes = self._sets
        before = ["", *tokens[:-1]]
        found = np.fromiter(
            (
                token in texts or b in previous or not classes.isdisjoint(classes_of(b, token) if classes else ())
                for b, token in zip(before, tokens, strict=True)
            ),
            bool,
            len(tokens),
        )
        if self.pattern:
            inside = np.zeros(sum(map(len, tokens)) + 1, np.int64)  # characters of matches up to each
            for first, stop in self.matches("".join(tokens)):
                inside[first + 1 : stop + 1] = 1
            ends = np.cumsum(inside)[list(accumulate(map(len, tokens), initial=0))]
            found |= np.diff(ends) > 0
        return found

    @cached_property
    def _sets(self) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
        return frozenset(self.tokens), frozenset(self.after), frozenset(self.classes)

    def matches(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of each match of `pattern` that has a character. Raises SaelabError if it takes too long."""
        try:
            for match in regex_pattern(self.pattern).finditer(text, timeout=SECONDS):
                if match.end() > match.start():
                    yield match.span()
        except TimeoutError:
            raise SaelabError(
                f"/{self.pattern}/ takes more than {SECONDS:g} s on a window of text; write it without nested repeats"
            ) from None

    def text(self) -> str:
        """The predicate in words; `parse` reads them."""
        parts = [f"the token{'s' * (len(self.tokens) > 1)} {_quoted(self.tokens)}"] if self.tokens else []
        parts += self.classes
        parts += [f"what follows {_quoted(self.after)}"] if self.after else []
        parts += [f"what matches {_quoted([self.pattern])}"] if self.pattern else []
        return "; ".join(parts)

    def to_program(self) -> dict[str, Any]:
        """The predicate as JSON values, for `Explanation.program`."""
        lists = {"tokens": list(self.tokens), "classes": list(self.classes), "after": list(self.after)}
        return {name: value for name, value in (lists | {"pattern": self.pattern}).items() if value}


def from_program(program: Mapping[str, Any]) -> Predicate:
    """The predicate of `Predicate.to_program`. Raises SaelabError if `program` is not one."""
    if not isinstance(program, Mapping):
        raise SaelabError(f"A program is a mapping, not {type(program).__name__}")
    found: dict[str, Any] = {}
    for name, value in program.items():
        if name not in ("tokens", "classes", "after", "pattern"):
            raise SaelabError(f"A program has a part {name!r}; its parts are tokens, classes, after and pattern")
        if name == "pattern":
            if not isinstance(value, str):
                raise SaelabError(f"pattern: {value!r} is not a text")
            found[name] = value
        elif isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            found[name] = tuple(value)
        else:
            raise SaelabError(f"{name}: {value!r} is not a list of texts")
    return Predicate(**found)


def parse(text: str) -> Predicate | None:
    """The predicate that a text says in the words of `Predicate.text`; None if it is another text."""
    found: dict[str, list[str]] = {}
    rest = text.strip()
    while rest:
        part = _PART.match(rest)
        if part is None:
            return None
        try:
            values = [part["class"]] if part["class"] else json.loads(f"[{part['texts']}]")
        except ValueError:  # an escape that is none
            return None
        found.setdefault(_NAMES.get(part["of"], "classes"), []).extend(values)
        rest = rest[part.end() :]
    patterns = found.pop("pattern", [""])
    if len(patterns) > 1:
        return None
    try:
        return Predicate(**{name: tuple(values) for name, values in found.items()}, pattern=patterns[0])
    except SaelabError:
        return None


def _quoted(texts: Sequence[str]) -> str:
    return ", ".join(json.dumps(text, ensure_ascii=False) for text in texts)
