"""Explanations and scores as Parquet, for other tools: three tables beside the JSON lines.

    explanations.parquet    a line per explanation: the fields of `records.Explanation`, its key and settings
    scores.parquet          a line per (feature, explanation, score): type, model, author, value, low, high, unit ...
    judged.parquet          a line per judged example of a score, with the score's key

A score has the text, kind, explainer and author of its explanation; they are null for scores without one. Settings,
programs and figures are JSON.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.autointerp.records import Judged
from saelab.autointerp.store import EXPLANATIONS, SCORES, explanations, explanations_by_key, scores
from saelab.files import replace_file, translate_errors

if TYPE_CHECKING:
    import pyarrow as pa

TABLES = ("explanations.parquet", "scores.parquet", "judged.parquet")
_AT_ONCE = 1 << 14
"""Lines in memory at a time."""


def export(folder: Path, inputs: str) -> None:
    """Write the three tables of what `folder` has for the feature database `inputs`, each file whole.

    Raises SaelabError if a line is damaged or a file cannot be
    written.
    """
    import pyarrow as pa

    text, number, whole, truth = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    types = {"feature": whole, "key": text, "text": text, "kind": text, "model": text, "author": text, "program": text}
    types |= {"answer": text, "tokens": whole, "note": text, "attempt": whole, "contexts": text}
    _write(folder / TABLES[0], types, _explanations(folder, inputs))
    types = {"feature": whole, "key": text, "explanation": text, "text": text, "kind": text, "explainer": text}
    types |= {"author": text, "type": text, "model": text, "value": number, "low": number, "high": number, "unit": text}
    types |= {"figures": text, "unread": whole, "note": text, "tokens": whole, "contexts": text, "asked": text}
    _write(folder / TABLES[1], types, _scores(folder, inputs))
    types = {"feature": whole, "score": text, "row": whole, "position": whole, "start": whole, "length": whole}
    types |= {"quantile": whole, "truth": truth, "said": number, "marked": pa.list_(whole), "answer": text}
    _write(folder / TABLES[2], types, _judged(folder, inputs))


def exported(folder: Path) -> bool:
    """Whether the three tables are there and not older than the records: a kill may come between the two."""
    tables = [folder / name for name in TABLES]
    written = [path.stat().st_mtime_ns for name in (EXPLANATIONS, SCORES) if (path := folder / name).is_file()]
    return all(table.is_file() and table.stat().st_mtime_ns >= max(written, default=0) for table in tables)


def _explanations(folder: Path, inputs: str) -> Iterator[dict[str, Any]]:
    for explanation, contexts in explanations(folder, inputs):
        line = asdict(explanation) | {"key": explanation.key, "contexts": json.dumps(asdict(contexts))}
        yield line | {"program": None if explanation.program is None else json.dumps(explanation.program)}


def _scores(folder: Path, inputs: str) -> Iterator[dict[str, Any]]:
    of = explanations_by_key(folder, inputs)
    for score, contexts, asked in scores(folder, inputs, judged=False):
        explained = of(score.explanation)
        found = {"text": explained.text, "kind": explained.kind, "author": explained.author} if explained else {}
        yield found | {
            "feature": score.feature,
            "key": score.key,
            "explanation": score.explanation,
            "explainer": explained.model if explained else None,
            "type": score.score,
            "model": score.model,
            "value": score.value.value,
            "low": score.value.low,
            "high": score.value.high,
            "unit": score.unit,
            "figures": json.dumps({name: None if math.isnan(each) else each for name, each in score.figures.items()}),
            "unread": score.unread,
            "note": score.note,
            "tokens": score.tokens,
            "contexts": json.dumps(asdict(contexts)),
            "asked": json.dumps(asdict(asked)),
        }


def _judged(folder: Path, inputs: str) -> Iterator[dict[str, Any]]:
    names = [each.name for each in fields(Judged)]
    for score, _, _ in scores(folder, inputs):
        key = score.key
        for each in score.judged:
            yield {"feature": score.feature, "score": key} | {name: getattr(each, name) for name in names}


def _write(path: Path, types: "dict[str, pa.DataType]", lines: Iterable[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, lines = pa.schema(list(types.items())), iter(lines)
    with translate_errors(path.parent), replace_file(path) as unfinished, pq.ParquetWriter(unfinished, schema) as file:
        while part := list(islice(lines, _AT_ONCE)):
            columns = {name: [_encodable(line.get(name)) for line in part] for name in types}
            file.write_table(pa.table(columns, schema))


def _encodable(value: Any) -> Any:
    """Text without halves of surrogate pairs, which Parquet's UTF-8 does not have."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
