"""Explanations and verdicts without a language model. The model is `lexical` wherever they are shown.

explain       the predicate (predicates.py) that fits a feature's windows best
LexicalJudge  answers detection, fuzzing and intruder questions by looking for a description's words in the windows

Both see tokens and words, no meaning, and no context besides the token before. A lexical judge on lexical explanations
checks that the pipeline works; it says nothing of what a language model would make of the feature.

`explain` chooses among the texts of the tokens on which the feature is active, those of the tokens before them, and the
classes of `predicates.CLASSES`: a union of few, with the best F1 over the tokens of `Contexts.explain` and nothing
else, less `PRICE` for each part after the first. In this F1 recall is weighted with the activation; precision is the
share of the tokens in the union on which the feature is active. Every token has one before it, so that tokens before,
and classes, are used only if the feature is active on them in two windows or more.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import regex

from saelab.autointerp.contexts import Contexts
from saelab.autointerp.llm.protocol import Reply, Request
from saelab.autointerp.on_text import fits, fits_marked, pieces
from saelab.autointerp.predicates import CLASSES, Predicate, classes_of, parse
from saelab.autointerp.prompts import window
from saelab.autointerp.records import Explanation
from saelab.autointerp.scorers import detection, fuzzing, intruder
from saelab.errors import SaelabError

NAME = "lexical"
PRICE = 0.03
"""F1 that each part of a union must add."""
MOST = 8
"""Parts of a union."""

_FIELDS = ("tokens", "classes", "after")
Part = tuple[str, str]
"""A field of `Predicate`, and an entry of it."""


def explain(contexts: Contexts) -> Explanation:
    """The explanation by the best predicate; `answer` has its F1. The text is "" if there are no windows."""
    f1, parts = _best(contexts)
    if not parts:
        return Explanation(contexts.feature, "", NAME, NAME, answer="There are no windows to explain the feature from.")
    tokens, classes, after = (tuple(value for name, value in parts if name == field) for field in _FIELDS)
    found = Predicate(tokens, classes, after)
    answer = f"F1 {f1:.2f} over the tokens of the {len(contexts.explain)} windows that it was made from"
    return Explanation(contexts.feature, found.text(), NAME, NAME, program=found.to_program(), answer=answer)


def _best(contexts: Contexts) -> tuple[float, list[Part]]:
    """The best union and its F1."""
    if not contexts.explain:
        return 0.0, []
    pairs = [
        pair
        for each in contexts.explain
        for pair in zip(["", *each.example.tokens[:-1]], each.example.tokens, strict=True)
    ]
    z = np.concatenate([each.example.activations for each in contexts.explain]).astype(np.float64)
    number = np.repeat(np.arange(len(contexts.explain)), [len(each.example.tokens) for each in contexts.explain])
    mass, seen = defaultdict[Part, float](float), defaultdict[Part, set[int]](set)
    for i in np.flatnonzero(z).tolist():
        for part in _parts(*pairs[i]):
            mass[part] += z[i]
            seen[part].add(int(number[i]))
    usable = [part for part, windows in seen.items() if part[0] == "tokens" or len(windows) > 1]
    usable.sort(key=lambda part: (-mass[part], part))  # of equal ones the heaviest is chosen
    rows, fit = {part: row for row, part in enumerate(usable)}, np.zeros((len(usable), len(z)))
    for i, pair in enumerate(pairs):
        fit[[rows[part] for part in _parts(*pair) if part in rows], i] = 1
    fields = np.array([field for field, _ in usable], str)
    # a class that comes first may keep better tokens out, so that each field is also tried without the others
    allowed = [fields == field for field in _FIELDS] + [np.ones(len(usable), bool)]
    unions = [_union(fit, each, z) for each in allowed]
    f1, chosen = max(unions, key=lambda each: each[0] - PRICE * max(0, len(each[1]) - 1))
    return f1, [usable[i] for i in sorted(chosen)]


def _parts(before: str, token: str) -> Iterable[Part]:
    """The candidates that fit a token."""
    if token:
        yield "tokens", token
    if before:
        yield "after", before
    yield from (("classes", name) for name in classes_of(before, token))


def _union(fit: np.ndarray, allowed: np.ndarray, z: np.ndarray) -> tuple[float, list[int]]:
    """A union of allowed rows of `fit` ``[candidates, tokens]``, each the best beside those before, and its F1."""
    covered, chosen, best = np.zeros(len(z), bool), [], 0.0
    active, whole = (z > 0).astype(float), z.sum()
    while len(chosen) < MOST and allowed.any():
        new = ~covered
        recall = (z @ covered + fit @ (z * new)) / whole
        precision = (active @ covered + fit @ (active * new)) / np.maximum(1, covered.sum() + fit @ new)
        f1 = np.where(allowed, 2 * precision * recall / np.maximum(1e-12, precision + recall), 0)
        pick = int(f1.argmax())
        if f1[pick] <= best + PRICE * bool(chosen):
            break
        best = float(f1[pick])
        chosen.append(pick)
        covered |= fit[pick] > 0
    return best, chosen


class LexicalJudge:
    """A `Client` that finds a description's words in the windows of a prompt. Costs nothing and counts no tokens.

    Its answer is the same every time. What a window says is text to it, whatever it asks for. detection: a window fits
    if the description does somewhere in it. fuzzing: if it does in most runs of marked tokens. intruder: the odd one is
    the window whose marked tokens share least with those of the others.
    """

    name = NAME
    concurrency = 1

    def ask(self, request: Request) -> Reply:
        """The answer. Raises SaelabError if the request is of another kind, or a regular expression takes too long."""
        task, user = request.messages[0][1], request.messages[-1][1]
        if task not in (detection.TASK, fuzzing.TASK, intruder.TASK):
            raise SaelabError(
                "lexical judges detection, fuzzing and intruder only; name a language model for other scores"
            )
        # windows are JSON on one line each, so that the last two empty lines are the prompt's own
        *head, block, _ = user.rsplit("\n\n", 2)
        windows = [_marks(json.loads(line.partition(": ")[2])) for line in block.split("\n")[1:]]
        if task == intruder.TASK:
            return Reply(json.dumps({"odd": 1 + _odd(windows)}))
        run = description(head[0].partition(": ")[2])
        if run is None:
            said = [False] * len(windows)
        elif task == detection.TASK:
            said = [fits(run, text) for text, _ in windows]
        else:
            said = [2 * sum(fits_marked(run, text, *run_) for run_ in runs) > len(runs) for text, runs in windows]
        return Reply(json.dumps({"verdicts": [int(each) for each in said]}))

    def count(self, text: str) -> int:
        """0: there is no model that reads the text."""
        return 0


def _marks(shown: str) -> tuple[str, list[tuple[int, int]]]:
    """A window's text without << and >>, and the first character and the end of each part between them."""
    text, runs = "", []
    for i, part in enumerate(re.split("<<|>>", shown)):
        if i % 2:
            runs.append((len(text), len(text) + len(part)))
        text += part
    return text, runs


def _odd(windows: Sequence[tuple[str, list[tuple[int, int]]]]) -> int:
    """Index of the window whose marks are least similar to those of the others, by the Jaccard index of their facts."""
    facts = [set(_facts(text, runs)) for text, runs in windows]
    shared = [sum(len(a & b) / max(1, len(a | b)) for b in facts if b is not a) for a in facts]
    return int(np.argmin(shared))


def _facts(text: str, runs: Sequence[tuple[int, int]]) -> Iterable[Part]:
    for first, stop in runs:
        before = text[:first]
        if before:
            yield "after", pieces(before)[-1]
        previous = before[-1:]
        for piece in pieces(text[first:stop]):
            yield "tokens", piece.strip(" ").lower()
            yield from (("classes", name) for name in classes_of(previous, piece))
            previous = piece


_QUOTES = re.compile(r'"([^"\n]+)"|“([^”\n]+)”|`([^`\n]+)`|(?<!\w)\'([^\'\n]+)\'(?!\w)')
_WORD = re.compile(r"[^\W\d_]{3,}")
_ANY_DESCRIPTION = """
active activates all also and any appear appearing appears are before both code common contain containing contains
context contexts different each especially etc feature features fires first following follows for from has have how into
its known language like many model more most name names near not occur occurrences occurs often one only other part
particularly parts phrase phrases precedes preceding related second several sign signs some such term terms text texts
than that the their them then there these they things this those token tokens two type types used uses using usually
various what when where which while with within word words
"""
_NO_CONTENT = frozenset(_ANY_DESCRIPTION.split())


@lru_cache(1 << 10)
def description(text: str) -> Predicate | None:
    """What a description is taken for: the predicate that it says in words, if it says one.

    Otherwise any of its quoted texts; if it has none, the classes that it names and its words in either case, singular
    or plural, without those that any description has. None if nothing is left.
    """
    found = parse(text)
    if found is None and (quoted := [next(filter(None, each)) for each in _QUOTES.findall(text)]):
        # a space before belongs to a token
        tokens = [variant for each in map(_unescaped, quoted) for variant in (each, " " + each)]
        return Predicate(tokens=tuple(map(_shown, tokens)))
    if found is None:
        lower = text.lower()
        classes = tuple(name for name in CLASSES if name in lower)
        for name in classes:
            lower = lower.replace(name, " ")
        words = sorted({word for word in _WORD.findall(lower) if word not in _NO_CONTENT})
        stems = "|".join(regex.escape(word.removesuffix("s")) for word in words)
        pattern = rf"(?i)(?<!\p{{L}})(?:{stems})s?(?!\p{{L}})" if words else ""
        return Predicate(classes=classes, pattern=pattern) if classes or pattern else None
    return Predicate(tuple(map(_shown, found.tokens)), found.classes, tuple(map(_shown, found.after)), found.pattern)


def _unescaped(quoted: str) -> str:
    try:
        return str(json.loads(f'"{quoted}"')) or quoted
    except ValueError:
        return quoted


def _shown(token: str) -> str:
    """A token's text as windows show it."""
    return json.loads(window([token])) or token
