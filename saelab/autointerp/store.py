"""Explanations and scores of a run on disk: two files of JSON lines that only grow.

    explanations.jsonl    {"feature": 7, "key": "9f...", "inputs": "29...", "contexts": {...}, "text": ..., ...}
    scores.jsonl          the same with "asked": {...} and the fields of a score

`inputs` says which feature database a line was made from (`inputs` of its manifest): lines of another one are kept and
not read. `contexts` and `asked` are the settings. Of lines with the same key the last one counts. Numbers that are NaN
are null. Judged examples are lists, their fields in the order of `records.Judged`.

A line is written when its record is finished. A last line that a kill cut off is not read, and the next writer cuts it
off. Reading takes memory for 16 bytes of each line, besides the record that is read. Needs no torch.
"""

import json
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from saelab.analysis.intervals import Interval
from saelab.autointerp.records import Explanation, Judged, Score
from saelab.autointerp.settings import ContextSettings, InterventionSettings, ScoreSettings
from saelab.errors import SaelabError
from saelab.files import appended, locked, make_folder, translate_errors, translate_read_errors

EXPLANATIONS, SCORES = "explanations.jsonl", "scores.jsonl"
ANSWERS = "answers.sqlite"
"""The cache of language models' answers, in the same folder."""
_HEAD = re.compile(rb'\{"feature": (\d+), "key": "([0-9a-f]{16})", "inputs": ("(?:[^"\\]|\\.)*"), ')
_BEFORE_JUDGED = b', "judged": ['
"""Begins the last item of a score's line. Quotes within a text are escaped, so that no text has it."""
T = TypeVar("T")
_REMEDY = "Remove that line, or the file to begin anew."


class Explained(NamedTuple):
    """A stored explanation."""

    explanation: Explanation
    contexts: ContextSettings
    """The windows that it was made from, and is scored on."""


class Scored(NamedTuple):
    """A stored score."""

    score: Score
    contexts: ContextSettings
    asked: ScoreSettings


@dataclass(frozen=True)
class Writer:
    """Appends records; `writing` makes it."""

    inputs: str
    _explanation: Callable[[str], None]
    _score: Callable[[str], None]

    def explanation(self, explanation: Explanation, contexts: ContextSettings) -> None:
        values = {"contexts": asdict(contexts)} | asdict(explanation)
        self._explanation(_line(explanation, self.inputs, values))

    def score(self, score: Score, contexts: ContextSettings, asked: ScoreSettings) -> None:
        values: dict[str, Any] = {"contexts": asdict(contexts), "asked": asdict(asked)}
        values |= {each.name: getattr(score, each.name) for each in fields(score)}
        values["value"] = [_number(each) for each in score.value]
        values["figures"] = {name: _number(each) for name, each in score.figures.items()}
        values["judged"] = [[getattr(each, name) for name in _JUDGED] for each in score.judged]
        self._score(_line(score, self.inputs, values))


@contextmanager
def writing(folder: Path, inputs: str) -> Iterator[Writer]:
    """Yields the writer of the files in `folder`, for the feature database `inputs`; nobody else can write meanwhile.

    Raises SaelabError if another process is writing, or if a file cannot be written.
    """
    with locked(folder):
        with translate_errors(folder):
            make_folder(folder)
            for name in (EXPLANATIONS, SCORES):
                _cut(folder / name)
        with appended(folder / EXPLANATIONS) as explanation, appended(folder / SCORES) as score:
            yield Writer(inputs, explanation, score)


def explanations(folder: Path, inputs: str, feature: int | None = None) -> Iterator[Explained]:
    """The explanations for the feature database `inputs`, of one feature or all, in the order of their writing.

    Raises SaelabError if a line is damaged.
    """
    return _latest(folder / EXPLANATIONS, inputs, feature, _explained)


def scores(folder: Path, inputs: str, feature: int | None = None, *, judged: bool = True) -> Iterator[Scored]:
    """The scores for the feature database `inputs`, of one feature or all, in the order of their writing.

    Without `judged` their judged examples are left out. Raises SaelabError if a line is damaged.
    """
    return _latest(folder / SCORES, inputs, feature, _scored, judged=judged)


def latest_lines(path: Path, inputs: str, build: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """What `build` makes of the fields of the last line of each key for the feature database `inputs`, in their order.

    For those who need no records, which take longer to make. Raises SaelabError if a line is damaged.
    """
    return _latest(path, inputs, None, build)


def lines_from(
    path: Path, inputs: str, start: int = 0, build: Callable[[dict[str, Any]], Any] = dict
) -> Iterator[tuple[int, int, Any]]:
    """The first byte of each line from byte `start` on, the byte after it, and what `build` makes of its fields.

    Judged examples are left out. For readers that keep what they read and continue when the file has grown. Of lines
    with the same key all are yielded, the one that counts last. Raises SaelabError if a line is damaged.
    """
    if not path.is_file():
        return
    own = json.dumps(inputs).encode()
    for _, offset, line, head in _heads(path, start):
        if head[3] == own:
            yield offset, offset + len(line), _read_at(path, offset, line, build, judged=False)


def explanation_at(folder: Path, offset: int) -> Explained:
    """The explanation whose line begins at a byte of the file. Raises SaelabError if it is damaged."""
    return _read_at(folder / EXPLANATIONS, offset, _line_at(folder / EXPLANATIONS, offset), _explained)


@contextmanager
def explanations_by_key(folder: Path, inputs: str) -> Iterator[Callable[[str], Explanation | None]]:
    """Yields a function from a key to the explanation, None if there is none; memory for 16 bytes of each.

    The file is open meanwhile. Raises SaelabError if a line is damaged.
    """
    path, own = folder / EXPLANATIONS, json.dumps(inputs).encode()
    if not path.is_file():
        yield lambda _: None
        return
    found, places = array("Q"), array("Q")
    for _, offset, _, head in _heads(path):
        if head[3] == own:
            found.append(int(head[2], 16))
            places.append(offset)
    keys, last = np.unique(np.array(found, np.uint64)[::-1], return_index=True)
    offsets = np.array(places, np.uint64)[::-1][last]
    with translate_read_errors(path, "lines of explanations or scores", _REMEDY, (OSError,)):
        file = path.open("rb")
    with file:

        def by_key(key: str) -> Explanation | None:
            if not key:
                return None
            i = int(np.searchsorted(keys, np.uint64(int(key, 16))))
            if i == len(keys) or int(keys[i]) != int(key, 16):
                return None
            file.seek(offset := int(offsets[i]))
            return _read_at(path, offset, file.readline(), _explained).explanation

        yield by_key


def score_at(folder: Path, offset: int, *, judged: bool = True) -> Scored:
    """The score whose line begins at a byte of the file. Raises SaelabError if it is damaged."""
    return _read_at(folder / SCORES, offset, _line_at(folder / SCORES, offset), _scored, judged=judged)


def _line_at(path: Path, offset: int) -> bytes:
    with translate_read_errors(path, "lines of explanations or scores", _REMEDY, (OSError,)), path.open("rb") as file:
        file.seek(offset)
        return file.readline()


def _remembered(build: Callable[[dict[str, Any]], T]) -> Callable[[dict[str, Any]], T]:
    """`build`, except that arguments like those before get the same result: most lines have the same settings."""
    last: list[tuple[dict[str, Any], T]] = []

    def made(values: dict[str, Any]) -> T:
        for known, result in last:
            if known == values:
                return result
        result = build(values)
        last[:] = [(values, result)]
        return result

    return made


def _asked(values: dict[str, Any]) -> ScoreSettings:
    steering: Any = InterventionSettings(**values.get("steering", {}))
    return ScoreSettings(**values | {"steering": steering})


contexts_of = _remembered(lambda values: ContextSettings(**values))
"""The settings of windows from the field `contexts` of a line."""
asked_of = _remembered(_asked)
"""The settings of a score from the field `asked` of a line."""


def _explained(found: dict[str, Any]) -> Explained:
    return Explained(Explanation(**_fields(_EXPLANATION, found)), contexts_of(found["contexts"]))


def _scored(found: dict[str, Any]) -> Scored:
    values = _fields(_SCORE, found)
    values["value"] = Interval(*(_nan(each) for each in found["value"]))
    values["figures"] = {name: _nan(each) for name, each in found["figures"].items()}
    values["judged"] = tuple(judged_of(each) for each in found.get("judged", ()))
    return Scored(Score(**values), contexts_of(found["contexts"]), asked_of(found["asked"]))


def _fields(names: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


_EXPLANATION, _SCORE = ([each.name for each in fields(kind)] for kind in (Explanation, Score))
_JUDGED = [each.name for each in fields(Judged)]
_MARKED = _JUDGED.index("marked")


def judged_of(values: list[Any]) -> Judged:
    """A judged example from its list in the field `judged` of a line."""
    values[_MARKED] = tuple(values[_MARKED])
    return Judged(*values)


def _line(record: Explanation | Score, inputs: str, values: Mapping[str, Any]) -> str:
    head = {"feature": record.feature, "key": record.key, "inputs": inputs}
    return json.dumps(head | {name: value for name, value in values.items() if name != "feature"}, allow_nan=False)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _heads(path: Path, start: int = 0) -> Iterator[tuple[int, int, bytes, re.Match[bytes]]]:
    """The number, first byte, content and head of each whole line from byte `start` on; numbers begin with 1 there."""
    with translate_read_errors(path, "lines of explanations or scores", _REMEDY, (OSError,)), path.open("rb") as file:
        file.seek(start)
        offset = start
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # the last one, cut off by a kill, or being written
                break
            head = _HEAD.match(line)
            if head is None:
                where = f"line {number}" if not start else f"line {number} from byte {start:,}"
                raise SaelabError(f"{path}, {where}: is damaged. {_REMEDY}")
            yield number, offset, line, head
            offset += len(line)


def _read_at(path: Path, offset: int, line: bytes, build: Callable[[dict[str, Any]], T], *, judged: bool = True) -> T:
    """What `build` makes of a line; its judged examples, most of its bytes, are not parsed if they are not asked for.

    Raises SaelabError if it is damaged.
    """
    at = -1 if judged else line.find(_BEFORE_JUDGED)
    try:
        return build(json.loads(str(line if at < 0 else line[:at] + b"}", "utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        # only now: entering a block for each of a million lines takes longer than parsing them
        with translate_read_errors(path, f"a line of explanations or scores (byte {offset:,})", _REMEDY, (Exception,)):
            raise error


def _latest(
    path: Path, inputs: str, feature: int | None, build: Callable[[dict[str, Any]], T], *, judged: bool = True
) -> Iterator[T]:
    """What `build` makes of the last line of each key, of lines with these `inputs`."""
    if not path.is_file():
        return
    keys, offsets, own = array("Q"), array("Q"), json.dumps(inputs).encode()
    for _, offset, _, head in _heads(path):
        if head[3] == own and feature in (None, int(head[1])):
            keys.append(int(head[2], 16))
            offsets.append(offset)
    with translate_read_errors(path, "lines of explanations or scores", _REMEDY, (OSError,)), path.open("rb") as file:
        last, at = np.unique(np.array(keys, np.uint64)[::-1], return_index=True)[1], 0
        for offset in np.sort(np.array(offsets, np.uint64)[::-1][last]).tolist():
            if offset != at:  # seeking drops what was read ahead
                file.seek(offset)
            line = file.readline()
            at = offset + len(line)
            yield _read_at(path, offset, line, build, judged=judged)


def _cut(path: Path) -> None:
    """Remove the end of a file after its last whole line. Raises OSError."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        whole = 0
        for stop in range(end, 0, -_AT_ONCE):
            begin = max(0, stop - _AT_ONCE)
            file.seek(begin)
            if (at := file.read(stop - begin).rfind(b"\n")) >= 0:
                whole = begin + at + 1
                break
        if whole < end:
            file.truncate(whole)
            os.fsync(file.fileno())


_AT_ONCE = 1 << 20
"""Bytes read at once."""
