"""Where a pattern matches the text of a feature database: the first and last token of each match.

The text is decoded in chunks of rows, so memory does not grow with it. A match lies within a stretch of ordinary
tokens of one row, and overlaps a token if it has one of its bytes: all tokens of a split character, and no empty token.
"""

import math
import re
import time
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import regex

from saelab.errors import SaelabError
from saelab.features.facts import Facts
from saelab.features.ordering import ranges
from saelab.features.vocabulary import Vocabulary, character_starts

CHUNK = 1 << 16
"""Tokens whose text is decoded at once."""
SECONDS = 10.0
"""Longest time on a core for all matches of a regular expression."""
SECONDS_PER_STRETCH = 1.0
"""Longest time for one stretch of text; a regular expression that needs more may need years."""
MOST_COPIES = 10**6
"""Most copies of a part that counts such as ``{100}`` may ask for; the regex package stores each, in 300 bytes."""


class Matches(NamedTuple):
    """The tokens that matches overlap, in the order of the text."""

    first: np.ndarray
    """Place of the first token of each match, ``[n]`` int32; matches of the same tokens are one."""
    last: np.ndarray
    """Place of its last token."""
    n: int
    """Matches in the text."""


class _Chunk(NamedTuple):
    """The text of some rows."""

    stretches: list[str]
    """Text between special tokens or ends of rows; a byte that is no part of a character is a lone surrogate."""
    begins: np.ndarray
    """First byte of each token, ``[tokens]``; special tokens have no bytes."""
    ends: np.ndarray


def text_pattern(text: str) -> regex.Pattern:
    """The pattern that matches `text` in any case: text of the same case folding. A dotted capital I is an i, too."""
    return regex.compile(regex.escape(text), regex.IGNORECASE | regex.FULLCASE)


def regex_pattern(source: str) -> regex.Pattern:
    """The pattern of a regular expression. Raises SaelabError if it cannot be read."""
    if math.prod(int(n) for n in re.findall(r"\{(\d{1,99})[,\d]*\}", source)) > MOST_COPIES:
        raise SaelabError(f"/{source}/: its counts repeat more than {MOST_COPIES:,} times; use smaller counts")
    try:
        return regex.compile(source)
    except (regex.error, ValueError, RecursionError, MemoryError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError | MemoryError) else str(error)
        raise SaelabError(
            f"/{source}/ is not a regular expression: {what}. Correct it; \\ in front of a sign such as ( makes it text"
        ) from error


def find_matches(facts: Facts, vocabulary: Vocabulary, pattern: regex.Pattern, literal: bool) -> Matches:
    """The matches of a pattern in the text that have a character.

    Those of a `literal`, a plain text, may overlap; each match of a regular expression begins after the last one ends.
    Raises SaelabError if a regular expression takes too long, or if the text is damaged.
    """
    n_rows, context = facts.rows.shape
    step = max(1, CHUNK // context)
    deadline = math.inf if literal else time.thread_time() + SECONDS
    found, n = [], 0
    for row in range(0, n_rows, step):
        chunk = _decoded(facts, vocabulary, row, row + step)
        spans = _spans(chunk, pattern, literal, deadline)
        n += len(spans)
        # The first token that ends after the first byte, and the last one that begins before the end.
        first = np.searchsorted(chunk.ends, spans[:, 0], "right")
        last = np.searchsorted(chunk.begins, spans[:, 1], "left") - 1
        different = np.ones(len(first), bool)
        different[1:] = (np.diff(first) != 0) | (np.diff(last) != 0)
        found.append(np.stack([first, last])[:, different].astype(np.int32) + np.int32(row * context))
    first, last = np.concatenate(found, axis=1) if found else np.zeros((2, 0), np.int32)
    return Matches(first, last, n)


def _decoded(facts: Facts, vocabulary: Vocabulary, row: int, stop: int) -> _Chunk:
    facts.arrays.read_ahead("tokens", row, stop)
    ids = np.asarray(facts.rows[row:stop])
    context = ids.shape[1]
    ids = ids.reshape(-1)
    if len(ids) and not (ids.min() >= 0 and ids.max() < len(vocabulary)):
        raise facts.arrays.damaged("tokens", "has a token that the vocabulary lacks")
    offsets = np.asarray(facts.arrays["vocabulary.offsets"])
    content = np.asarray(facts.arrays["vocabulary.bytes"])
    special = np.asarray(vocabulary.counts)[ids] == 0  # it is in the text, and not among the ordinary tokens
    starts = offsets[ids]
    lengths = np.where(special, 0, offsets[ids + 1] - starts)
    if len(ids) and not (lengths.min() >= 0 and starts.min() >= 0 and (starts + lengths).max() <= len(content)):
        raise facts.arrays.damaged("vocabulary.offsets", "does not rise from 0 to the number of bytes")
    ends = np.cumsum(lengths)
    begins = ends - lengths
    text = content[ranges(starts, lengths)].tobytes()
    breaks = special.copy()
    breaks[::context] = True
    cuts = np.unique(np.append(begins[breaks], len(text))).tolist()
    return _Chunk([text[a:b].decode("utf-8", "surrogateescape") for a, b in pairwise(cuts)], begins, ends)


def _spans(chunk: _Chunk, pattern: regex.Pattern, overlapping: bool, deadline: float) -> np.ndarray:
    """First byte and end of each match with a character, ``[n, 2]``, in the order of the text."""
    spans: list[tuple[int, int]] = []
    counts = []
    try:
        for stretch in chunk.stretches:
            if time.thread_time() > deadline:
                raise TimeoutError
            before = len(spans)
            matches = pattern.finditer(stretch, overlapped=overlapping, timeout=SECONDS_PER_STRETCH)
            spans += [match.span() for match in matches]
            counts.append(len(spans) - before)
    except (TimeoutError, MemoryError) as error:
        raise SaelabError(
            f"/{pattern.pattern}/ takes too long: it has very many matches, or a repeat inside a repeat, such as "
            "(a+)+. Write a narrower pattern."
        ) from error
    found = np.fromiter(chain.from_iterable(spans), np.int64, 2 * len(spans)).reshape(-1, 2)
    lengths = np.array([len(stretch) for stretch in chunk.stretches], np.int64)
    found += np.repeat(np.cumsum(lengths) - lengths, counts)[:, None]
    found = found[found[:, 1] > found[:, 0]]
    if len(found) and lengths.sum() < chunk.ends[-1]:  # not all of it is ASCII
        found = character_starts("".join(chunk.stretches))[found]
    return found[np.argsort(found[:, 0], kind="stable")]  # a pattern with (?r) finds the last match first
