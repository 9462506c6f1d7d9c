"""Writes the facts of a database, and the statistics of its activations, from the shards of a pass (FORMAT.md).

Nothing is in memory whole but the token ids: features are merged a bucket at a time, by_token is sorted a shard at a
time, and the pairs of by_vocabulary go through files of their own, sorted by token id.
"""

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from saelab.features import merge
from saelab.features.array_files import ArrayWriter
from saelab.features.layout import SMALLEST_VALUE
from saelab.features.merge import buckets, merged
from saelab.features.ordering import offsets_of, stable_order
from saelab.features.quantiles import Read
from saelab.features.shards import Shard, SortedFile, Totals, write_sorted
from saelab.features.statistics import COLUMNS, Pairs, statistics

FEATURE_ENTRIES = 8
"""A feature's statistics take about as much memory as so many entries."""
PAIRS = 1 << 21
"""Pairs of feature and token id after which they are sorted and written to a file."""


def write_text(writer: ArrayWriter, rows: np.ndarray, ordinary: np.ndarray, vocabulary: Sequence[bytes]) -> None:
    """Write the token ids `rows` ``[rows, context]`` and the vocabulary, with `ordinary` occurrences of each token."""
    with writer.open(["tokens"]) as files:
        at_once = max(1, merge.BUCKET // rows.shape[1])
        for first in range(0, len(rows), at_once):
            files["tokens"].append(rows[first : first + at_once])
    writer.write("vocabulary.offsets", offsets_of(np.array([len(token) for token in vocabulary])))
    writer.write("vocabulary.bytes", np.frombuffer(b"".join(vocabulary), np.uint8))
    writer.write("vocabulary.counts", ordinary)


def write_activations(writer: ArrayWriter, shards: Sequence[Shard], totals: Totals, rows: np.ndarray) -> None:
    """Write by_feature, by_token, by_vocabulary and the statistics; sets the size `pairs` of `writer`."""
    folder = writer.folder / "pairs"
    folder.mkdir()
    pairs = _PairFiles(folder, writer.sizes["vocabulary"])
    writer.write_columns(COLUMNS, _write_by_feature(writer, shards, totals, rows, pairs))
    _write_by_token(writer, shards, totals, rows.shape[1])
    files = pairs.finish()
    writer.sizes["pairs"] = int(pairs.counts.sum())
    _write_by_vocabulary(writer, files, pairs.counts)
    shutil.rmtree(folder)


def relative(values: np.ndarray, maxima: np.ndarray) -> np.ndarray:
    """Activations as shares of the maxima of their features, as they are stored: float16 (FORMAT.md, "Values")."""
    return np.maximum(values / maxima, np.float32(SMALLEST_VALUE)).astype(np.float16)


def _write_by_feature(
    writer: ArrayWriter, shards: Sequence[Shard], totals: Totals, rows: np.ndarray, pairs: "_PairFiles"
) -> Iterator[dict[str, np.ndarray]]:
    """Write by_feature; yields the statistics of each bucket of features meanwhile."""
    writer.write("by_feature.offsets", offsets_of(totals.counts))
    writer.write("by_feature.maxima", totals.maxima)
    with writer.open(["by_feature.places", "by_feature.values"]) as files:
        for first, stop in buckets(totals.counts, FEATURE_ENTRIES + len(shards)):
            maxima = totals.maxima[first:stop]
            read = _reader(shards, first, stop, int(totals.counts[first:stop].sum()))
            for part in read():
                files["by_feature.places"].append(part.indices)
                files["by_feature.values"].append(relative(part.values, np.repeat(maxima, part.counts)))
            columns, found = statistics(read, maxima, rows, totals.tokens)
            pairs.add(first, found)
            yield columns


def _reader(shards: Sequence[Shard], first: int, stop: int, entries: int) -> Read:
    """Reads the activations of a bucket; keeps them if they are one part."""
    if entries > merge.BUCKET:
        return partial(merged, shards, first, stop)
    whole = list(merged(shards, first, stop))
    return lambda: whole


def _write_by_token(writer: ArrayWriter, shards: Sequence[Shard], totals: Totals, context: int) -> None:
    """Write the transpose of each shard, one after the other: shards are consecutive rows."""
    n_features = len(totals.counts)
    with writer.open(f"by_token.{name}" for name in ("offsets", "features", "values")) as files:
        files["by_token.offsets"].append(np.zeros(1, np.int64))
        done = 0
        for shard in shards:
            part = shard.entries(0, n_features)
            features, places = part.owners(), part.indices - shard.first * context
            order = stable_order(places)  # the order by feature stays within a place
            values = relative(part.values, totals.maxima[features])
            files["by_token.features"].append(features[order])
            files["by_token.values"].append(values[order])
            counts = np.bincount(places, minlength=(shard.stop - shard.first) * context)
            files["by_token.offsets"].append(done + np.cumsum(counts))
            done += len(order)


def _write_by_vocabulary(writer: ArrayWriter, files: Sequence[SortedFile], counts: np.ndarray) -> None:
    """Write by_vocabulary from files of pairs; `counts` are the pairs of each token id."""
    writer.write("by_vocabulary.offsets", offsets_of(counts))
    with writer.open(["by_vocabulary.features", "by_vocabulary.mass"]) as arrays:
        for first, stop in buckets(counts, len(files)):
            for part in merged(files, first, stop):
                arrays["by_vocabulary.features"].append(part.indices)
                arrays["by_vocabulary.mass"].append(part.values)


class _PairFiles:
    """Sorts pairs of feature and token id by token id, `PAIRS` at a time, each into a file in `folder`."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self._folder, self._files = folder, list[SortedFile]()
        self._pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.counts = np.zeros(vocabulary, np.int64)
        """Pairs of each token id in the files."""

    def add(self, first: int, pairs: Pairs) -> None:
        """Add the pairs of the features from `first` on; features come in order."""
        self._pairs.append(
            (pairs.tokens.astype(np.int32), (pairs.owners + first).astype(np.int32), pairs.mass.astype(np.float32))
        )
        if sum(len(tokens) for tokens, _, _ in self._pairs) >= PAIRS:
            self._write()

    def finish(self) -> list[SortedFile]:
        """All files, after the last pairs."""
        if self._pairs:
            self._write()
        return self._files

    def _write(self) -> None:
        path = self._folder / f"{len(self._files):05d}.safetensors"
        tokens, features, mass = (np.concatenate(parts) for parts in zip(*self._pairs, strict=True))
        self._pairs.clear()
        self.counts += write_sorted(path, tokens, features, mass, len(self.counts), {}, {})
        self._files.append(SortedFile(path))
