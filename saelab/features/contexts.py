"""The strongest contexts of each feature, written to Parquet bucket by bucket."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saelab.features.activity import Activity
from saelab.features.settings import FeatureSettings
from saelab.features.statistics import lists

_SCHEMA = pa.schema(
    {
        "feature": pa.int32(),
        "rank": pa.int16(),
        "row": pa.int32(),
        "position": pa.int32(),
        "activation": pa.float32(),
        "peak": pa.int16(),
        "tokens": pa.list_(pa.string()),
        "activations": pa.list_(pa.float32()),
    }
)


class ContextsFile:
    """The file contexts.parquet: `add` takes the activations of all features, in order; `close` at the end.

    A feature may come in several parts of consecutive rows, one after the other. The settings' window is at most a row.
    """

    def __init__(self, path: Path, rows: Tensor, settings: FeatureSettings, vocabulary: list[str]) -> None:
        self._rows, self._settings, self._vocabulary = rows, settings, pa.array(vocabulary, pa.string())
        self._file = pq.ParquetWriter(path, _SCHEMA, compression="zstd")
        self._first, self._table = -1, _SCHEMA.empty_table()
        """The features added last, which are not written yet."""

    def add(self, activity: Activity) -> None:
        """Add activations."""
        table = contexts_table(activity, self._rows, self._settings, self._vocabulary)
        if activity.first == self._first:
            self._table = _strongest(pa.concat_tables([self._table, table]), self._settings.contexts)
        else:
            self._write()
            self._first, self._table = activity.first, table

    def close(self) -> None:
        self._write()
        self._file.close()

    def _write(self) -> None:
        # A reader of one feature decodes one row group, so those are small.
        self._file.write_table(self._table, row_group_size=256 * self._settings.contexts)


def strongest_entries(activity: Activity, context: int, per_feature: int) -> tuple[Tensor, Tensor]:
    """Each feature's strongest activations, one per row: (entry ``[m]``, rank within the feature ``[m]``), int64.

    Sorted by feature, then by falling activation; ties go to the earlier row and position.
    """
    values, features, row = activity.values, activity.features, activity.places // context
    begins = torch.ones(len(values), dtype=torch.bool)  # of the entries of one feature in one row
    begins[1:] = (features[1:] != features[:-1]) | (row[1:] != row[:-1])
    group = begins.cumsum(0) - 1
    largest = torch.zeros(int(begins.sum())).scatter_reduce_(0, group, values, "amax")
    peaks = (values == largest[group]).nonzero().squeeze(1)
    is_first = torch.ones(len(peaks), dtype=torch.bool)
    is_first[1:] = group[peaks[1:]] != group[peaks[:-1]]
    peaks = peaks[is_first]
    peaks = peaks[torch.argsort(values[peaks], descending=True, stable=True)]
    peaks = peaks[torch.argsort(features[peaks], stable=True)]
    owner = features[peaks] - activity.first
    counts = torch.bincount(owner, minlength=activity.stop - activity.first)
    rank = torch.arange(len(peaks)) - (counts.cumsum(0) - counts)[owner]
    return peaks[rank < per_feature], rank[rank < per_feature]


def contexts_table(activity: Activity, rows: Tensor, settings: FeatureSettings, vocabulary: pa.Array) -> pa.Table:
    """The strongest contexts of the features of `activity`: a line for each, with a window of text around its peak."""
    context = rows.shape[1]
    window = settings.window
    peaks, rank = strongest_entries(activity, context, settings.contexts)
    feature, place = activity.features[peaks], activity.places[peaks].long()
    row, position = place // context, place % context
    start = window_start(position, window, context)
    shown = (row * context + start)[:, None] + torch.arange(window)

    size = rows.numel()
    keys = activity.features * size + activity.places  # sorted, as activity is
    shown_keys = (feature[:, None] * size + shown).flatten()
    found = torch.searchsorted(keys, shown_keys).clamp_max(max(0, len(keys) - 1))
    activations = torch.where(keys[found] == shown_keys, activity.values[found], 0.0) if len(keys) else torch.empty(0)

    strings = vocabulary.take(pa.array(rows.flatten()[shown.flatten()].numpy()))
    columns = {
        "feature": feature,
        "rank": rank,
        "row": row,
        "position": position,
        "activation": activity.values[peaks],
        "peak": position - start,
    }
    arrays = [pa.array(column.numpy()).cast(_SCHEMA.field(name).type) for name, column in columns.items()]
    arrays += [lists(strings, window, len(peaks)), lists(pa.array(activations.numpy()), window, len(peaks))]
    return pa.table(arrays, _SCHEMA)


def window_start(position: Tensor, window: int, context: int) -> Tensor:
    """The first position of a window around `position` within a row; text before a peak explains more."""
    return (position - window * 2 // 3).clamp(0, context - window)


def _strongest(table: pa.Table, n: int) -> pa.Table:
    """The n strongest contexts of one feature; ties go to the earlier line."""
    order = np.argsort(-table["activation"].to_numpy(), kind="stable")[:n]
    rank = pa.array(range(len(order)), pa.int16())
    return table.take(pa.array(order)).set_column(1, "rank", rank)
