"""Shards while they are made: collected in memory, pass by pass, then written whole or not at all."""

import hashlib
import os
import queue
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.activations.cache.layout import TOKENS, UNFINISHED, Column, File, checksum, files_of, spans, with_checksum
from saelab.activations.stream import Pass
from saelab.errors import SaelabError
from saelab.files import PAGE, sync, temporary, translate_errors, write_temporary, write_whole
from saelab.tensors import raw


def translating(folder: Path, size: int) -> AbstractContextManager[None]:
    """`translate_errors` for writing `size` bytes into the cache `folder`."""
    return translate_errors(folder, size, kept="finished shards are kept", elsewhere="choose another --out")


class Shard:
    """A shard in memory, filled pass by pass."""

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
        """Add a pass over `ids` ``[rows, context]``; returns the number of tokens added."""
        with _one_thread():
            return self._add(ids, result)

    def _add(self, ids: np.ndarray, result: Pass) -> int:
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
            for column, new in zip(self.columns[file], values, strict=True):
                column[at].copy_(new)
                if column.is_floating_point():
                    finite &= self._finite(column[at], file, number, position)
        if not finite.all():
            for column in (column for columns in self.columns.values() for column in columns):
                column[at.start : at.start + int(finite.sum())] = column[at][finite]
        added = int(finite.sum())
        self.rows, self.tokens, self.skipped = self.rows + len(ids), at.start + added, self.skipped + len(row) - added
        return added

    def _finite(self, values: Tensor, file: File, row: Tensor, position: Tensor) -> Tensor:
        """True for each finite token, bool ``[tokens]``. Raises SaelabError if one is not, unless they are skipped."""
        if not len(values) or all(bound.isfinite() for bound in torch.aminmax(values)):  # the fastest check
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

    def sha256(self, file: File) -> str:
        """The sha256 that one of its files would have on disk."""
        header, tensors = next((header, tensors) for other, header, tensors in self.contents() if other == file)
        return _digests(file, header, tensors, self.identity["block_tokens"])["sha256"]

    def contents(self) -> Iterator[tuple[File, bytes, list[memoryview]]]:
        """Every file with its header and the bytes of its tensors."""
        for file in self.files:
            yield file, file.header(self.tokens), [raw(column[: self.tokens]) for column in self.columns[file]]


class Shards:
    """Two shards in turn: one is filled while the other is written.

    Writing has two halves, each in a thread of its own. The first passes a shard's bytes to the system while computing
    their sha256, which frees the shard's memory. The second waits until the bytes are on the disk, renames the files
    and records the shard. The second half of one shard runs beside the first half of the next.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], tokens: int) -> None:
        """`tokens` is the number still to come: there is memory for that many, but at most for two shards."""
        self._folder = folder
        pass_tokens = identity["rows_per_forward"] * identity["context"]
        passes = min(identity["passes_per_shard"], -(-tokens // pass_tokens) + 1)
        self._make = lambda: Shard(identity, passes * pass_tokens)
        self._made = 0
        self._free = queue.SimpleQueue[Shard]()
        self._threads = [ThreadPoolExecutor(1, f"saelab cache {what}") for what in ("writer", "sha256", "disk")]
        self._last: Future[Future[dict[str, Any]]] | None = None

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error: object) -> None:
        for thread in self._threads:  # finish what is being written, even if something else has failed
            thread.shutdown(wait=True)
        if error[0] is None:
            self.written()

    def next(self, name: str, lane: int, first_row: int, start: Mapping[str, Any]) -> Shard:
        """An empty shard, once one is free."""
        if self._made < 2:
            self._made += 1
            shard = self._make()
        else:
            shard = self._free.get()
        shard.clear(name, lane, first_row, start)
        return shard

    def write(self, shard: Shard, position: Mapping[str, Any] | None) -> None:
        """Begin to write a shard.

        `position` is the corpus' position after the shard, to be recorded; None records nothing, for a cache that is
        already finished. Raises the error of an earlier shard if there was one.
        """
        if self._last is not None:
            with self._translate_errors():
                self._last.result()
        self._last = self._threads[0].submit(self._hand_over, shard, position, self._last)

    def written(self) -> dict[str, Any] | None:
        """The last shard's entry in the manifest, after it is on the disk. Raises the error if there was one."""
        if self._last is None:
            return None
        with self._translate_errors():
            return self._last.result().result()

    def _hand_over(
        self, shard: Shard, position: Mapping[str, Any] | None, before: "Future[Future[dict[str, Any]]] | None"
    ) -> "Future[dict[str, Any]]":
        handles: list[int] = []
        try:
            with self._whole(shard.name, shard.files, shard.tokens):
                files = {}
                for file, header, tensors in shard.contents():
                    digests = self._threads[1].submit(_digests, file, header, tensors, shard.identity["block_tokens"])
                    path = file.path(shard.name)
                    handles.append(write_temporary(self._folder / path, [memoryview(header), *tensors]))
                    files[path] = {"bytes": file.size(shard.tokens), **digests.result()}
                if before is not None:
                    before.result().result()  # so that shards are recorded in order, with at most two in progress
            record = {
                "name": shard.name,
                "tokens": shard.tokens,
                "rows": shard.rows,
                "skipped": shard.skipped,
                "first_row": shard.first_row,
                "start": shard.start,
                "files": files,
            }
        except BaseException:
            for handle in handles:
                os.close(handle)
            raise
        finally:
            self._free.put(shard)
        return self._threads[2].submit(self._finish, record, shard.files, handles, position)

    def _finish(
        self, record: dict[str, Any], files: list[File], handles: list[int], position: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        with self._whole(record["name"], files, record["tokens"]):
            try:
                for handle in handles:
                    os.fsync(handle)
            finally:
                for handle in handles:
                    os.close(handle)
            for path in record["files"]:
                os.replace(temporary(self._folder / path), self._folder / path)
            for name in dict.fromkeys(file.folder for file in files):
                sync(self._folder / name)
            if position is not None:
                record_path = self._folder / UNFINISHED / f"{record['name']}.json"
                write_whole(record_path, with_checksum(record | {"next": position}))
        return record

    @contextmanager
    def _whole(self, name: str, files: list[File], tokens: int) -> Iterator[None]:
        """Remove the temporary files of a shard that fails: on a full disk they take up room."""
        try:
            yield
        except BaseException as error:
            for file in files:
                temporary(self._folder / file.path(name)).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _Unwritten(sum(file.size(tokens) for file in files)) from error
            raise

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """As `translating`, but after the next shard was removed too, so that the free bytes include its bytes."""
        try:
            yield
        except _Unwritten as error:
            with translating(self._folder, error.size):
                raise error.__cause__ or error from None


class _Unwritten(Exception):
    """A shard of `size` bytes could not be written; `__cause__` is the reason."""

    def __init__(self, size: int) -> None:
        self.size = size


def _digests(file: File, header: bytes, tensors: list[memoryview], block_tokens: int) -> dict[str, Any]:
    digest = hashlib.sha256(header)
    for data in tensors:
        digest.update(data)
    steps = [column.token_bytes for column in file.columns]
    blocks = [
        checksum(data[start * step : end * step] for data, step in zip(tensors, steps, strict=True))
        for start, end in spans(len(tensors[0]) // steps[0], block_tokens)
    ]
    return {"sha256": digest.hexdigest(), "blocks": "".join(blocks)}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute in one thread: several would wait for each other while our other threads use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _empty(column: Column, capacity: int) -> Tensor:
    """A tensor that begins at a page of memory, for `write_temporary`."""
    size = column.token_bytes * capacity
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % PAGE
    return memory[begin : begin + size].view(column.dtype).view(column.shape(capacity))
