"""Rows of JSON Lines and JSON files.

JSON Lines has one object per line. A .json file may be that too, or a list of objects, an object with such a list as
its only value or as ``data``, an object whose values are columns of equal length (pandas writes lists or objects), or
one row. Those are read whole, and so is a .jsonl that is a list. A key that an object lacks is null.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from saelab.corpus.decoding import decode, is_compressed, open_binary
from saelab.corpus.documents import Row, Task
from saelab.errors import SaelabError

_BLOCK = 1 << 20
_ADVICE = "write one object per line, or a .json file with one list of objects"


def json_tasks(path: Path, part: int) -> list[Task]:
    """Readers of the parts of a JSON or JSON Lines file: `part` bytes of lines, or all of it."""
    if _is_whole(path):
        return [partial(_read_whole, path)]
    if is_compressed(path):
        return [partial(_read_json_lines, path, 0, math.inf)]
    return [partial(_read_json_lines, path, start, start + part) for start in range(0, path.stat().st_size, part)]


def _is_whole(path: Path) -> bool:
    """Whether the file is one value rather than one object per line."""
    with open_binary(path) as file:
        first = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
        while not first and (line := file.readline()):
            first = line.strip()
        if first[:1] == b"[" or ".json" not in (suffix.lower() for suffix in path.suffixes):
            return first[:1] == b"["
        return first[:1] == b"{" and (not first.endswith(b"}") or not file.read(_BLOCK).strip())


def _read_json_lines(path: Path, start: int, stop: float, column: str | None) -> Iterator[Row]:
    """The rows of the lines that begin in [start, stop)."""
    with open_binary(path) as file:
        at = start
        if start:  # skip the rest of the line that began in the part before
            file.seek(start - 1)
            at += len(file.readline()) - 1
        while at < stop and (line := file.readline()):
            where = partial(_line_number, path, at)
            text = decode(line, path, at)
            at += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                if reason == "Extra data":
                    reason = f"{text[error.pos : error.pos + 20].strip()!r} follows the object"  # pyright: ignore
                raise SaelabError(f"corpus: {where()} does not parse as JSON: {reason}; {_ADVICE}") from error
            yield where, _with_column(row, column)


def _line_number(path: Path, at: int) -> str:
    """`path` and the number of its line that begins at byte `at`, for messages."""
    line = 1
    with open_binary(path) as file:
        while at > 0 and (block := file.read(min(at, _BLOCK))):
            line += block.count(b"\n")
            at -= len(block)
    return f"{path}, line {line}"


def _read_whole(path: Path, column: str | None) -> Iterator[Row]:
    with open_binary(path) as file:
        text = decode(file.read(), path, 0)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SaelabError(
            f"corpus: {path}, line {error.lineno} does not parse as JSON: {error.msg}; {_ADVICE}"
        ) from error
    except RecursionError as error:
        raise SaelabError(f"corpus: {path} does not parse as JSON: too many nested lists") from error
    for index, row in enumerate(_rows_of(value)):
        yield partial("{}, row {}".format, path, index), _with_column(row, column)


def _rows_of(value: Any) -> list[Any]:
    """The rows of a whole JSON file."""
    if not isinstance(value, dict):
        return value
    inner = next(iter(value.values())) if len(value) == 1 else value.get("data")
    if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
        return inner
    columns = [list(v.values()) if isinstance(v, dict) else v for v in value.values()]
    if all(isinstance(v, list) for v in columns) and len({len(v) for v in columns}) == 1:
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value]


def _with_column(row: Any, column: str | None) -> Any:
    """The row, with null for a column that it lacks."""
    if column is not None and isinstance(row, dict):
        row.setdefault(column)
    return row
