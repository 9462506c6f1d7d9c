"""Rows of .csv and .tsv files.

A .csv follows RFC 4180: a field in quotes may hold commas, line ends and doubled quotes. The separator is the comma, or
the semicolon or tab if the first line has no comma (Excel writes semicolons in many countries). Where a quote is out of
place, a row on one line is read as Python's csv module reads it. A row over several lines is then an error, because the
quote may have swallowed other rows.

A .tsv is read line by line, and a quote is an ordinary character: most .tsv files are written so, and a field may begin
with a quote that nothing closes (pandas and the datasets library let it swallow the lines after it). What csv or pandas
wrote with a tab as separator is recognised row by row. A field in quotes with doubled quotes in it is unquoted. If a
line, or the line after it, has another number of fields than the first line, a field in quotes may go over lines and
hold tabs, provided that the number of fields is then right. If all names in the first line are in quotes, so are all
fields, and the file is read as a .csv.

In both, the first line names the columns; of columns with the same name, the first one keeps it. A row with too few
fields lacks its last columns; a row with too many is an error.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, takewhile
from pathlib import Path

from saelab.corpus.decoding import open_binary, text_lines
from saelab.corpus.documents import Row
from saelab.errors import SaelabError

LONGEST = 1 << 26
"""Most characters of one field of a .csv: beyond this, a quote was not closed."""
_LINES = 10_000
"""Most lines of one row of a .tsv."""
_Record = tuple[int, list[str]]
"""The number of a row's first line, and its fields."""


def read_csv(path: Path, column: str | None) -> Iterator[Row]:
    """The rows of a .csv file, with all columns."""
    with open_binary(path) as file:
        lines = text_lines(file, path)
        first = next(lines, "")
        separator = next((mark for mark in ",;\t" if mark in first), ",")
        yield from _rows(_quoted(chain([first], lines), separator, path), path)


def read_tsv(path: Path, column: str | None) -> Iterator[Row]:
    """The rows of a .tsv file, with all columns."""
    with open_binary(path) as file:
        lines = text_lines(file, path)
        first = next(lines, "")
        names, every = _fields(first), chain([first], lines)
        quoted = all(len(name) > 1 and name[0] == name[-1] == '"' for name in names)
        yield from _rows(_quoted(every, "\t", path) if quoted else _by_line(every, len(names)), path)


def _rows(records: Iterator[_Record], path: Path) -> Iterator[Row]:
    """The rows of all records but the first, which names the columns."""
    columns: list[str] = []
    seen: Counter[str] = Counter()
    for name in next(records, (1, []))[1]:
        columns.append(f"{name}.{seen[name]}" if seen[name] else name)  # as pandas names them
        seen[name] += 1
    for line, fields in records:
        if len(fields) > len(columns):
            raise SaelabError(
                f"corpus: {path}, line {line} has {len(fields)} fields and the first line has {len(columns)}; put a "
                "field that has the separator in it in quotes"
            )
        missing = [None] * (len(columns) - len(fields))
        yield partial("{}, line {}".format, path, line), dict(zip(columns, [*fields, *missing], strict=True))


def _quoted(lines: Iterator[str], separator: str, path: Path) -> Iterator[_Record]:
    """The records of a file whose fields may be in quotes, without blank lines."""
    csv.field_size_limit(LONGEST)
    record: list[str] = []  # the lines of the current record
    number = 1

    def read() -> Iterator[str]:
        for line in lines:
            record.append(line)
            yield line

    reader = csv.reader(read(), delimiter=separator, strict=True)
    while True:
        record.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = _fault(path, number, len(record), str(error))
            if len(record) != 1 or "expected after" not in str(error):
                raise SaelabError(message) from error
            fields = next(csv.reader(record, delimiter=separator))
            if fields[-1].endswith("\n"):  # another field of that line opens a quote
                raise SaelabError(message) from error
            reader = csv.reader(read(), delimiter=separator, strict=True)  # the other one is inside that field
        if fields:
            yield number, fields
        number += len(record)


def _fault(path: Path, line: int, lines: int, error: str) -> str:
    where = f"corpus: {path}, line {line}"
    if "new-line character" in error:
        return f"{where} has a carriage return outside quotes; put that field in quotes, or remove the carriage return"
    end = "the end of the file" if "end of data" in error else f"line {line + lines - 1}"
    return (
        f"{where} opens a quote that is not closed properly up to {end}; close it, and write a quote inside a field "
        'twice ("")'
    )


def _by_line(lines: Iterator[str], n: int) -> Iterator[_Record]:
    """The records of a file of `n` columns in which a line is a row, except as the head of this file says."""
    ahead: list[str] = []
    number = 1

    def line_ahead(index: int) -> str | None:
        ahead.extend(islice(lines, max(0, index + 1 - len(ahead))))
        return ahead[index] if index < len(ahead) else None

    while (line := line_ahead(0)) is not None:
        fields, used = _fields(line), 1
        record = [_unquoted(field) for field in fields]
        if n > 1 and any(field.startswith('"') for field in fields):
            after = line_ahead(1)
            if len(fields) != n or (after is not None and len(_fields(after)) != n):
                record, used = _over_lines(line_ahead, n) or (record, 1)
        if line.strip():
            yield number, record
        number += used
        del ahead[:used]


def _fields(line: str) -> list[str]:
    return line.rstrip("\r\n").split("\t")


def _over_lines(line_ahead: Callable[[int], str | None], n: int) -> tuple[list[str], int] | None:
    """A record of `n` fields with fields in quotes, and the number of its lines; None if there is none.

    If it is a single line, a quoted field in it holds a tab.
    """
    read = takewhile(lambda line: line is not None, map(line_ahead, range(_LINES)))
    lines: list[str] = []
    try:
        fields = next(csv.reader((lines.append(line) or line for line in read if line), delimiter="\t", strict=True))
    except csv.Error:
        return None
    first = _fields(lines[0])
    return (fields, len(lines)) if len(fields) == n and (len(lines) > 1 or len(first) != n) else None


def _unquoted(field: str) -> str:
    """`field`, without quotes if csv or pandas wrote it: in quotes, and with doubled quotes in it."""
    inner = field[1:-1]
    if field[:1] == field[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return field
