"""The table of features as CSV or Parquet: a line per feature, every column of FORMAT.md, and the text of its tokens.

Lists keep their length, with -1 and 0 in empty places as FORMAT.md says. Parquet stores them as lists, CSV as JSON.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saelab.features.database import Database
from saelab.features.layout import COLUMNS
from saelab.features.table import SORTABLE
from saelab.files import replace_file

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 1 << 14
"""Features in memory at a time."""
_TOKENS = ("top_tokens", "top_logit_tokens", "bottom_logit_tokens")
_LISTS = [name for name, (_, *width) in COLUMNS.items() if width]
_TEXTS = {f"{name}_text": name for name in _TOKENS}


def write_csv(database: Database, features: Sequence[int], path: Path) -> None:
    """Write the lines of `features`, in this order, to the file `path`. Raises OSError."""
    with replace_file(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow([*SORTABLE, *_LISTS, *_TEXTS])
        for part in _parts(features):
            scalars = [database.table[name][part].tolist() for name in SORTABLE]
            lists = [map(json.dumps, database.table[name][part].tolist()) for name in _LISTS]
            texts = [map(json.dumps, _text(database, of, part)) for of in _TEXTS.values()]
            lines.writerows(zip(*scalars, *lists, *texts, strict=True))


def write_parquet(database: Database, features: Sequence[int], path: Path) -> None:
    """Write the lines of `features`, in this order, to the file `path`. Raises OSError."""
    import pyarrow.parquet as pq

    with replace_file(path) as unfinished:
        # At least one part, so that the file has its columns.
        parts = (_part(database, part) for part in _parts(features))
        first = next(parts)
        with pq.ParquetWriter(unfinished, first.schema, compression="zstd") as file:
            for part in (first, *parts):
                file.write_table(part)


def _parts(features: Sequence[int]) -> Iterator[np.ndarray]:
    for first in range(0, max(1, len(features)), AT_ONCE):
        yield np.asarray(features[first : first + AT_ONCE], np.int64)


def _part(database: Database, part: np.ndarray) -> "pa.Table":
    import pyarrow as pa

    columns = {name: pa.array(database.table[name][part]) for name in SORTABLE}
    for name in _LISTS:
        values = database.table[name][part]
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    for name, of in _TEXTS.items():
        columns[name] = pa.array(_text(database, of, part), pa.list_(pa.string()))
    return pa.table(columns)


def _text(database: Database, column: str, part: np.ndarray) -> list[list[str]]:
    """The text of the tokens in a column of token ids; "" in empty places."""
    ids = database.table[column][part]
    unique, inverse = np.unique(ids, return_inverse=True)
    texts = np.array([database.vocabulary.text(token) if token >= 0 else "" for token in unique.tolist()], object)
    return texts[inverse].reshape(ids.shape).tolist()
