"""Explanations and scores as Parquet, for other tools: three tables beside the JSON lines.

    explanations.parquet    a line per explanation: the fields of `records.Explanation`, its key and settings
    scores.parquet          a line per (feature, explanation, score): type, model, author, value, low, high, unit ...
    judged.parquet          a line per judged example of a score, with the score's key

A score has the text, kind, explainer and author of its explanation; they are null for scores without one. Settings,
programs and figures are JSON.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.autointerp.records import Explanation, Judged
from saelab.autointerp.store import EXPLANATIONS, SCORES, explanations_by_key, judged_of, latest_lines
from saelab.files import replace_file, translate_errors

if TYPE_CHECKING:
    import pyarrow as pa

TABLES = ("explanations.parquet", "scores.parquet", "judged.parquet")
_AT_ONCE = 1 << 14
"""Lines in memory at a time."""


def export(folder: Path, inputs: str) -> None:
    """Write the three tables of what `folder` has for the feature database `inputs`, each file whole.

    Raises SaelabError if a line is damaged or a file cannot be written.
    """
    import pyarrow as pa

    text, number, whole, truth = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    types = {"feature": whole, "key": text, "text": text, "kind": text, "model": text, "author": text, "program": text}
    types |= {"answer": text, "tokens": whole, "note": text, "attempt": whole, "contexts": text}
    with _written(folder / TABLES[0], types) as add:
        for cells in latest_lines(folder / EXPLANATIONS, inputs, _explanation):
            add(cells)
    types = {"feature": whole, "key": text, "explanation": text, "text": text, "kind": text, "explainer": text}
    types |= {"author": text, "type": text, "model": text, "value": number, "low": number, "high": number, "unit": text}
    types |= {"figures": text, "unread": whole, "note": text, "tokens": whole, "contexts": text, "asked": text}
    of_judged = {"feature": whole, "score": text, "row": whole, "position": whole, "start": whole, "length": whole}
    of_judged |= {"quantile": whole, "truth": truth, "said": number, "marked": pa.list_(whole), "answer": text}
    with (
        explanations_by_key(folder, inputs) as by_key,
        _written(folder / TABLES[1], types) as add,
        _written(folder / TABLES[2], of_judged) as add_judged,
    ):
        for cells, judged in latest_lines(folder / SCORES, inputs, partial(_score, by_key)):
            add(cells)
            for each in judged:
                add_judged(each)


def exported(folder: Path) -> bool:
    """Whether the three tables are there and not older than the records: a kill may come between the two."""
    tables = [folder / name for name in TABLES]
    written = [path.stat().st_mtime_ns for name in (EXPLANATIONS, SCORES) if (path := folder / name).is_file()]
    return all(table.is_file() and table.stat().st_mtime_ns >= max(written, default=0) for table in tables)


def _explanation(line: dict[str, Any]) -> list[Any]:
    """The cells of an explanation's line, fields that it lacks as `records.Explanation` has them."""
    program = line.get("program")
    return [
        *(line[name] for name in ("feature", "key", "text", "kind", "model")),
        line.get("author", ""),
        None if program is None else json.dumps(program),
        line.get("answer", ""),
        line.get("tokens", 0),
        line.get("note", ""),
        line.get("attempt", 0),
        json.dumps(line["contexts"]),
    ]


def _score(by_key: Callable[[str], Explanation | None], line: dict[str, Any]) -> tuple[list[Any], list[list[Any]]]:
    """The cells of a score's line, and those of each of its judged examples."""
    of = by_key(line["explanation"])
    cells = [
        *(line[name] for name in ("feature", "key", "explanation")),
        *((of.text, of.kind, of.model, of.author) if of else (None,) * 4),
        line["score"],
        line["model"],
        *(math.nan if each is None else each for each in line["value"]),
        line["unit"],
        json.dumps(line["figures"]),
        *(line[name] for name in ("unread", "note", "tokens")),
        json.dumps(line["contexts"]),
        json.dumps(line["asked"]),
    ]
    judged = [judged_of(each) for each in line["judged"]]
    return cells, [[cells[0], cells[1], *(getattr(each, name) for name in _JUDGED)] for each in judged]


_JUDGED = [each.name for each in fields(Judged)]


@contextmanager
def _written(path: Path, types: "dict[str, pa.DataType]") -> Iterator[Callable[[list[Any]], None]]:
    """Yields a function that adds a line, its cells in the order of `types`, to the Parquet file that is written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, waiting = pa.schema(list(types.items())), list[list[Any]]()

    with translate_errors(path.parent), replace_file(path) as unfinished, pq.ParquetWriter(unfinished, schema) as file:

        def write() -> None:
            columns = zip(types.values(), zip(*waiting, strict=True), strict=True)
            file.write_table(pa.table([_column(cells, kind) for kind, cells in columns], schema=schema))
            waiting.clear()

        def add(line: list[Any]) -> None:
            waiting.append(line)
            if len(waiting) == _AT_ONCE:
                write()

        yield add
        if waiting:
            write()


def _column(cells: Sequence[Any], kind: "pa.DataType") -> "pa.Array":
    import pyarrow as pa

    try:
        return pa.array(cells, kind)
    except UnicodeEncodeError:  # halves of surrogate pairs, which Parquet's UTF-8 does not have
        return pa.array([each and each.encode("utf-8", "backslashreplace").decode() for each in cells], kind)
