"""Rows of Parquet files and of datasets saved in Arrow files."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from saelab.corpus.documents import Row, Task
from saelab.errors import SaelabError, brief, did_you_mean

ROWS = 256
"""Rows of a Parquet or Arrow file that are read at once."""
_BUFFER = 1 << 20


def parquet_tasks(path: Path) -> list[Task]:
    """Readers of the row groups of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pa.OSFile(os.fsencode(path)) as file:  # a name need not be UTF-8
            metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # Arrow does not check that names are UTF-8
        raise SaelabError(f"corpus: {path} is not a readable Parquet file: {brief(error)}") from error
    tasks: list[Task] = []
    first = 0
    for group in range(metadata.num_row_groups):
        tasks.append(partial(_read_parquet, path, group, first))
        first += metadata.row_group(group).num_rows
    return tasks


def _read_parquet(path: Path, group: int, index: int, column: str | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(pa.OSFile(os.fsencode(path)), pre_buffer=False, buffer_size=_BUFFER) as file:
            names = file.schema_arrow.names
            columns = [column] if column in names else None  # if it is missing, documents_of_rows says so
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    yield partial("{}, row {}".format, path, index), row
                    index += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # Arrow does not check that text is UTF-8
        raise SaelabError(f"corpus: {path} is damaged: {brief(error)}") from error


def saved_dataset_tasks(folder: Path, split: str) -> tuple[list[Task], str]:
    """Readers of a folder written by ``Dataset.save_to_disk`` (or DatasetDict), and its fingerprint."""
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many kinds for damaged files
        raise SaelabError(f"corpus: {folder} is not a readable saved dataset: {brief(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        splits = [str(name) for name in saved]
        if split not in splits:
            raise SaelabError(
                f"corpus: split: {folder} has no {split!r}; its splits are {', '.join(splits)}."
                + did_you_mean(split, splits)
            )
        saved = saved[split]
    elif split != "train" and split != str(saved.split):
        raise SaelabError(
            f"corpus: split: {folder} is a dataset without splits, so there is no {split!r}; remove that setting"
        )
    table = saved.with_format("arrow")  # plain values; the dataset may have been saved with another format
    return [partial(_read_saved, table, folder, first) for first in range(0, len(table), ROWS)], saved._fingerprint


def _read_saved(table: Any, folder: Path, first: int, column: str | None) -> Iterator[Row]:
    rows = (table if column is None else table.select_columns(column))[first : first + ROWS]
    try:
        columns = rows.to_pylist()
    except UnicodeDecodeError as error:
        raise SaelabError(f"corpus: {folder} is damaged: {brief(error)}") from error
    for index, row in enumerate(columns, first):
        yield partial("{}, row {}".format, folder, index), row
