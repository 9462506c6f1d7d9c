"""Merges the shards of a pass into the arrays of a database (FORMAT.md), a bucket of features at a time.

The shards are sorted, so each entry's place in the result follows from counts and nothing is sorted but by_token, one
shard at a time. Memory (`saelab.features.needs`): a bucket, or a shard, whatever the length of the text.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from saelab.features.activity import Activity
from saelab.features.layout import DTYPES, FORMAT, MANIFEST, SMALLEST_VALUE, VERSION, shapes
from saelab.features.shards import Entries, Shard, Totals
from saelab.files import write_json

BUCKET = 1 << 20
"""Most entries merged at once, counting what else a feature costs as entries (`buckets`)."""


def write_facts(
    folder: Path, shards: Sequence[Shard], totals: Totals, rows: Tensor, inputs: str, extra: Tensor
) -> Iterator[Activity]:
    """Write the arrays and the manifest to the empty `folder`; yields the activations while they are merged.

    They come by feature. A feature with more than `BUCKET` entries comes in several parts, of consecutive rows.
    `rows` are the token ids ``[rows, context]`` on the CPU; `extra`, see `buckets`. Raises OSError.
    """
    entries = int(totals.counts.sum())
    sizes = {"rows": rows.shape[0], "context": rows.shape[1], "n_features": len(totals.counts), "entries": entries}
    with ExitStack() as stack:
        files = {name: stack.enter_context(_ArrayFile(folder, name, shape)) for name, shape in shapes(**sizes).items()}
        for part in rows.split(max(1, BUCKET // rows.shape[1])):
            files["tokens"].append(part)
        files["by_feature.offsets"].append(_offsets(totals.counts))
        files["by_feature.maxima"].append(totals.maxima)
        for first, stop in buckets(totals.counts, extra, len(shards)):
            for activity in _merged(shards, first, stop):
                files["by_feature.places"].append(activity.places)
                files["by_feature.values"].append(relative(activity.values, totals.maxima[activity.features]))
                yield activity
        _write_by_token(files, shards, totals, rows.shape[1])
        records = {f"{name}.npy": file.record() for name, file in files.items()}
    facts = {"format": FORMAT, "version": VERSION, "inputs": inputs, **sizes, "n_tokens": totals.tokens}
    write_json(folder / MANIFEST, facts | {"files": records})


def relative(values: Tensor, maxima: Tensor) -> Tensor:
    """Activations as shares of the maxima of their features, as they are stored: float16 (FORMAT.md, "Values")."""
    return (values / maxima).clamp_min(SMALLEST_VALUE).half()


def buckets(counts: Tensor, extra: Tensor, shards: int) -> Iterator[tuple[int, int]]:
    """Ranges of features, first and stop, that are merged together; each feature is in one, in order.

    A bucket has one feature, or at most `BUCKET` entries, to which `extra` ``[n_features]``, as many entries as the
    other work on a feature takes the memory of, and one for each of `shards` are added.
    """
    costs = (counts + extra + shards).cumsum(0)
    first, before = 0, 0
    while first < len(counts):
        stop = max(first + 1, int(torch.searchsorted(costs, before + BUCKET, right=True)))
        yield first, stop
        first, before = stop, int(costs[stop - 1])


def _merged(shards: Sequence[Shard], first: int, stop: int) -> Iterator[Activity]:
    """The activations of a bucket; in parts of about `BUCKET` entries if it is one feature with more."""
    parts: list[Entries] = []
    entries = 0
    for shard in shards:
        parts.append(shard.entries(first, stop))
        entries += len(parts[-1].values)
        if entries >= BUCKET:
            yield _join(parts, first)
            parts, entries = [], 0
    if entries:
        yield _join(parts, first)


def _join(parts: list[Entries], first: int) -> Activity:
    """The entries of consecutive shards, each sorted by feature and then by place, sorted so together."""
    counts = torch.stack([part.counts for part in parts])  # [shards, features]
    offsets = _offsets(counts.sum(0))
    values, places = torch.empty(int(offsets[-1])), torch.empty(int(offsets[-1]), dtype=torch.int32)
    begins = offsets[:-1] + counts.cumsum(0) - counts  # of each feature's entries from each shard
    for part, begin in zip(parts, begins, strict=True):
        shift = begin - (part.counts.cumsum(0) - part.counts)
        target = torch.arange(len(part.values)) + shift.repeat_interleave(part.counts, output_size=len(part.values))
        values[target], places[target] = part.values, part.places
    return Activity(values, places, offsets, first)


def _write_by_token(files: "dict[str, _ArrayFile]", shards: Sequence[Shard], totals: Totals, context: int) -> None:
    """The transpose of each shard, one after the other: shards are consecutive rows."""
    done, n_features = 0, len(totals.counts)
    files["by_token.offsets"].append(torch.zeros(1, dtype=torch.long))
    for shard in shards:
        part = shard.entries(0, n_features)
        features = Activity(part.values, part.places, _offsets(part.counts)).features
        order = torch.argsort(part.places, stable=True)  # the order by feature stays within a place
        values = relative(part.values, totals.maxima[features])
        files["by_token.features"].append(features.int()[order])
        files["by_token.values"].append(values[order])
        counts = torch.bincount(part.places - shard.first * context, minlength=(shard.stop - shard.first) * context)
        files["by_token.offsets"].append(done + counts.cumsum(0))
        done += len(order)


def _offsets(counts: Tensor) -> Tensor:
    """Where each feature's entries begin, and the end of the last: ``[n + 1]`` int64."""
    return torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])


class _ArrayFile:
    """The file of an array, written part by part. `record` once all parts are there."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...]) -> None:
        header = BytesIO()
        facts = {"descr": DTYPES[name], "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, facts)
        self._dtype, self._digest, self._bytes = np.dtype(DTYPES[name]), hashlib.sha256(), 0
        self._whole = len(header.getvalue()) + self._dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self._handle = os.open(folder / f"{name}.npy", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(header.getbuffer())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)

    def append(self, part: Tensor) -> None:
        """Write the next elements, converted to the array's dtype."""
        self._write(np.ascontiguousarray(part.numpy(), self._dtype).reshape(-1).view(np.uint8).data)

    def record(self) -> dict[str, Any]:
        """Length and checksum of the finished file."""
        assert self._bytes == self._whole, "the parts do not make up the array"
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def _write(self, content: memoryview) -> None:
        self._digest.update(content)
        self._bytes += len(content)
        while content:
            content = content[os.write(self._handle, content) :]
