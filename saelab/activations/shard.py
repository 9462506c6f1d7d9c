"""Shards in the making: collected in memory, pass by pass, then written, whole or not at all."""

import hashlib
import json
import os
import queue
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.activations.durable import sync_folder, temporary, told, write_temporary, write_whole
from saelab.activations.layout import TOKENS, UNFINISHED, Column, File, checksum, files_of, raw, spans
from saelab.activations.stream import Pass
from saelab.errors import SaelabError


class Shard:
    """A shard in the making: its tensors in memory, filled pass by pass."""

    def __init__(self, identity: Mapping[str, Any], capacity: int) -> None:
        self.identity = identity
        self.files = files_of(identity)
        self.columns = {file: [_empty(column, capacity) for column in file.columns] for file in self.files}
        self.name, self.lane, self.first_row, self.start = "", 0, 0, {}
        self.tokens = self.rows = self.skipped = 0

    def clear(self, name: str, lane: int, first_row: int, start: Mapping[str, Any]) -> None:
        self.name, self.lane, self.first_row, self.start = name, lane, first_row, start
        self.tokens = self.rows = self.skipped = 0

    def add(self, ids: np.ndarray, result: Pass) -> int:
        """Take in a pass over `ids` ``[rows, context]``; returns how many tokens it added."""
        row, position = result.kept.cpu().nonzero(as_tuple=True)
        at = slice(self.tokens, self.tokens + len(row))
        number = self.lane + self.identity["lanes"] * (self.first_row + self.rows + row)
        origin = (torch.from_numpy(ids)[row, position], number, position)
        finite = torch.ones(len(row), dtype=torch.bool)
        for file in self.files:
            values = origin
            if file is not TOKENS:
                of = result.gradients if file.columns[0].name == "gradients" else result.activations
                values = (of[file.folder],)
            for held, new in zip(self.columns[file], values, strict=True):
                held[at].copy_(new)
                if held.is_floating_point():
                    finite &= self._finite(held[at], file, number, position)
        if not finite.all():
            for held in (held for columns in self.columns.values() for held in columns):
                held[at.start : at.start + int(finite.sum())] = held[at][finite]
        added = int(finite.sum())
        self.rows, self.tokens, self.skipped = self.rows + len(ids), at.start + added, self.skipped + len(row) - added
        return added

    def _finite(self, values: Tensor, file: File, row: Tensor, position: Tensor) -> Tensor:
        """Which of the tokens are finite ``[tokens]``; an error where one is not and none may be skipped."""
        if torch.isfinite(values.sum(dtype=torch.float32)):  # one pass over the values; overflow only sends us on
            return torch.ones(len(values), dtype=torch.bool)
        finite = torch.isfinite(values).all(1)
        if not finite.all() and self.identity["nonfinite"] == "error":
            bad = int((~finite).nonzero()[0])
            raise SaelabError(
                f"{file.folder}: {self.identity['model']} gives NaN or infinite {file.columns[0].name} at row "
                f"{int(row[bad])}, position {int(position[bad])}, as {values.dtype} stores them; a wider dtype "
                "(`cache.dtype`, `model.dtype`) may help, and `cache.nonfinite=skip` leaves such tokens out"
            )
        return finite

    def contents(self) -> Iterator[tuple[File, bytes, list[memoryview]]]:
        """Every file: its header, and the bytes of its tensors."""
        for file in self.files:
            yield file, file.header(self.tokens), [raw(held[: self.tokens]) for held in self.columns[file]]


class Shards:
    """Two shards in turn: one is filled while the other is written."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], tokens: int) -> None:
        """`tokens` are still to come; the memory is for that many, at most for two shards."""
        self._folder = folder
        pass_tokens = identity["rows_per_forward"] * identity["context"]
        passes = min(identity["passes_per_shard"], -(-tokens // pass_tokens) + 1)
        self._make = lambda: Shard(identity, passes * pass_tokens)
        self._made = 0
        self._free = queue.SimpleQueue[Shard]()
        self._writer = ThreadPoolExecutor(1, "saelab cache writer")
        self._hasher = ThreadPoolExecutor(1, "saelab cache checksums")
        self._last: Future[dict[str, Any]] | None = None

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error: object) -> None:
        # What is being written is finished even where something else has failed.
        self._writer.shutdown(wait=True)
        self._hasher.shutdown(wait=True)
        if error[0] is None and self._last is not None:
            self._last.result()

    def next(self, name: str, lane: int, first_row: int, start: Mapping[str, Any]) -> Shard:
        """An empty shard, once one is free."""
        if self._made < 2:
            self._made += 1
            shard = self._make()
        else:
            shard = self._free.get()
        shard.clear(name, lane, first_row, start)
        return shard

    def write(self, shard: Shard, position: Mapping[str, Any] | None) -> "Future[dict[str, Any]]":
        """Begin to write a shard, once the one before it is written; the future gives its entry in the manifest.

        `position` is that of the corpus behind it, to be recorded; None: the cache is finished, nothing is recorded.
        Raises what has gone wrong with the one before.
        """
        if self._last is not None:
            self._last.result()
        self._last = self._writer.submit(self._write, shard, position)
        return self._last

    def _write(self, shard: Shard, position: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            with told(self._folder, sum(file.size(shard.tokens) for file in shard.files)):
                try:
                    return _write(self._folder, shard, position, self._hasher)
                except OSError:
                    for file in shard.files:  # in the way where the disk is full, and else counted as not free
                        temporary(self._folder / file.path(shard.name)).unlink(missing_ok=True)
                    raise
        finally:
            self._free.put(shard)


def _write(
    folder: Path, shard: Shard, position: Mapping[str, Any] | None, hasher: ThreadPoolExecutor
) -> dict[str, Any]:
    files = {}
    for file, header, tensors in shard.contents():
        digests = hasher.submit(_digests, file, header, tensors, shard.identity["block_tokens"])
        path = folder / file.path(shard.name)
        size = write_temporary(path, [memoryview(header), *tensors])
        files[file.path(shard.name)] = {"bytes": size, **digests.result()}
    for file in shard.files:
        path = folder / file.path(shard.name)
        os.replace(temporary(path), path)
    for name in dict.fromkeys(file.folder for file in shard.files):
        sync_folder(folder / name)
    record = {
        "name": shard.name, "tokens": shard.tokens, "rows": shard.rows, "skipped": shard.skipped,
        "first_row": shard.first_row, "start": shard.start, "files": files,
    }  # fmt: skip
    if position is not None:
        content = json.dumps(record | {"next": position}).encode()
        write_whole(folder / UNFINISHED / f"{shard.name}.json", content)
    return record


def _digests(file: File, header: bytes, tensors: list[memoryview], block_tokens: int) -> dict[str, Any]:
    digest = hashlib.sha256(header)
    blocks: dict[str, list[str]] = {}
    for column, data in zip(file.columns, tensors, strict=True):
        digest.update(data)
        n, step = len(data) // column.token_bytes, column.token_bytes
        blocks[column.name] = [checksum(data[start * step : end * step]) for start, end in spans(n, block_tokens)]
    return {"sha256": digest.hexdigest(), "blocks": blocks}


def _empty(column: Column, capacity: int) -> Tensor:
    return torch.empty(column.shape(capacity), dtype=column.dtype)
