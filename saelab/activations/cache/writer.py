"""Writes a cache (FORMAT.md) so that a kill at any time loses only the shards that were not finished.

The caller's thread runs the model and collects a shard in memory. Other threads write the shards before it (shard.py)
and, if asked, read rows ahead.
"""

import hashlib
import json
import math
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from saelab.activations.cache.layout import (
    IDENTITY,
    MANIFEST,
    TOKENS,
    UNFINISHED,
    Manifest,
    difference,
    files_of,
    is_intact,
    read_manifest,
    shard_name,
    with_checksum,
)
from saelab.activations.cache.shard import Shards, translating
from saelab.activations.stream import BARREN_ROWS, Pass, barren_rows
from saelab.errors import SaelabError
from saelab.files import sync, write_whole


class Rows(Protocol):
    """Rows of token ids, int32 ``[context]``, that can be resumed (saelab.corpus.rows.Rows)."""

    def __iter__(self) -> Iterator[np.ndarray]: ...
    def __next__(self) -> np.ndarray: ...
    def state(self) -> dict[str, Any]: ...


OpenRows = Callable[[int, Mapping[str, Any] | None], Rows]
"""Opens the rows of a lane, at a state of theirs or at the beginning."""
Forward = Callable[[np.ndarray], Pass]
"""Runs the model on ids ``[rows, context]``."""


def begin(folder: Path, identity: Mapping[str, Any]) -> Manifest | None:
    """Prepare `folder` for a cache of `identity`. Returns the manifest if the cache is already finished, else None.

    Raises SaelabError if the folder holds a cache of something else, naming what differs, or is not a cache.
    """
    finished = read_manifest(folder) if (folder / MANIFEST).exists() else None
    unfinished = folder / UNFINISHED
    there = finished.identity if finished else _read_json(unfinished / IDENTITY, "delete the folder and write it again")
    # `weights` and `second_weights` identify the models; their names do not matter.
    facts = [key for key in {**(there or {}), **identity} if key not in ("model", "second_model")]
    differs = there and difference(there, {key: identity.get(key) for key in facts})
    if differs and (finished or any(unfinished.glob("*-[0-9]*.json"))):
        raise SaelabError(
            f"{folder}: holds a cache of something else: its {differs}; choose another --out, or delete the folder"
        )
    if differs and there:  # no shard was finished, so nothing is lost
        ours = {file.folder for file in files_of(there)} | {UNFINISHED}
        for path in [path for path in folder.iterdir() if path.name in ours]:
            shutil.rmtree(path, ignore_errors=True)
        there = None
    elif there is None and folder.is_dir() and any(path.name != UNFINISHED for path in folder.iterdir()):
        raise SaelabError(f"{folder}: exists and is not an activation cache; choose another --out")
    content = with_checksum(identity)
    with translating(folder, len(content)):
        if finished:
            _remove_leftovers(folder, finished.identity)
        else:
            unfinished.mkdir(parents=True, exist_ok=True)
            if there is None:
                write_whole(unfinished / IDENTITY, content)
        for file in files_of(identity):  # in a finished cache too: repair may have to write a lost site again
            (folder / file.folder).mkdir(exist_ok=True)
        sync(folder)
    return finished


def write_lane(
    folder: Path, identity: Mapping[str, Any], lane: int, open_rows: OpenRows, forward: Forward, *, ahead: int = 0
) -> Generator[int, None, None]:
    """Write the missing shards of a lane; yields the number of tokens of each pass.

    A thread reads the rows of up to `ahead` passes in advance. Use this only for a model on another device: on a CPU,
    that thread and the model's threads would wait for each other.

    Raises SaelabError if activations are not finite (unless the identity says to skip their tokens), if `BARREN_ROWS`
    rows one after the other give no token, and if the disk is full; shards finished before stay.
    """
    records = _records(folder, lane)
    quota = math.ceil(identity["tokens"] / identity["lanes"])
    done = sum(record["tokens"] for record in records)
    if done >= quota or _has_ended(folder, lane, records):
        return
    start = records[-1]["next"] if records else None
    first_row = records[-1]["first_row"] + records[-1]["rows"] if records else 0
    rows = open_rows(lane, start)
    index = len(records)
    position, more, barren = rows.state(), True, 0
    with Shards(folder, identity, quota - done) as shards, closing(_read_rows(rows, identity, ahead)) as blocks:
        while more and done < quota:
            shard = shards.next(shard_name(lane, index), lane, first_row, position)
            more = False
            for block, after in islice(blocks, identity["passes_per_shard"]):
                result = forward(block)
                added = shard.add(block, result)
                position, done, more = after, done + added, True
                yield added
                if barren + len(block) >= BARREN_ROWS and not added and result.kept.any():
                    raise _all_nonfinite(folder, f"tokens of {BARREN_ROWS:,} rows one after the other")
                barren = barren_rows(barren, len(block), added, gradients=identity["gradients"])
                if done >= quota:
                    break
            if shard.rows:
                shards.write(shard, position)
                first_row, index = first_row + shard.rows, index + 1
    if done < quota:
        content = with_checksum({"shards": index})
        with translating(folder, len(content)):
            write_whole(_ended(folder, lane), content)


def written(folder: Path, lane: int) -> int:
    """Number of tokens in the finished shards of a lane of an unfinished cache."""
    return sum(record["tokens"] for record in _records(folder, lane))


def _ended(folder: Path, lane: int) -> Path:
    """The file that records that the text of a lane has ended, and after how many shards."""
    return folder / UNFINISHED / f"{lane:02d}-ended.json"


def _has_ended(folder: Path, lane: int, records: list[dict[str, Any]]) -> bool:
    """Whether `records` are all shards that the text of a lane gives."""
    ended = _read_json(_ended(folder, lane), "delete it and run again")
    return ended is not None and ended["shards"] == len(records)


def finish(folder: Path, identity: Mapping[str, Any]) -> Manifest:
    """Write the manifest of the finished shards and remove leftovers.

    Raises SaelabError if a lane is not finished or if no token is stored.
    """
    quota = math.ceil(identity["tokens"] / identity["lanes"])
    shards: list[dict[str, Any]] = []
    for lane in range(identity["lanes"]):
        records = _records(folder, lane)
        if sum(record["tokens"] for record in records) < quota and not _has_ended(folder, lane, records):
            raise SaelabError(
                f"{folder}: lane {lane} is not finished; run again, with all processes writing into the same folder"
            )
        shards += records
    for shard in shards:
        del shard["next"]
    manifest = Manifest(dict(identity), shards)
    if not manifest.tokens:
        skipped = sum(shard["skipped"] for shard in shards)
        if skipped:
            raise _all_nonfinite(folder, f"{skipped:,} tokens")
        raise SaelabError(f"{folder}: the text holds no token to store; use another corpus or other limits on length")
    _write_manifest(folder, manifest)
    with translating(folder, 0):
        _remove_leftovers(folder, identity)
    return manifest


def _all_nonfinite(folder: Path, what: str) -> SaelabError:
    return SaelabError(
        f"{folder}: nothing to store: all {what} are NaN or infinite at some site; a wider `cache.dtype` or "
        "`model.dtype` may help"
    )


def check(folder: Path, manifest: Manifest, *, contents: bool) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each shard's entry with a description of its first damaged or missing file, or None if all are as written.

    With `contents` the sha256 of every file is compared, else only its length.
    """
    for shard in manifest.shards:
        yield shard, next((f"{folder / path}: {what}" for path, what in _faults(folder, shard, contents)), None)


def rewrite(
    folder: Path, manifest: Manifest, name: str, open_rows: OpenRows, forward: Forward
) -> Generator[int, None, None]:
    """Write one shard of a finished cache again; yields the number of tokens of each pass.

    Raises SaelabError, and changes nothing, if the text no longer gives the shard's rows.
    """
    at = next(i for i, shard in enumerate(manifest.shards) if shard["name"] == name)
    old, identity = manifest.shards[at], manifest.identity
    lane, passes = int(name.split("-")[0]), -(-old["rows"] // identity["rows_per_forward"])
    rows = open_rows(lane, old["start"])
    with (
        Shards(folder, identity, old["rows"] * identity["context"]) as shards,
        closing(_read_rows(rows, identity, 0)) as blocks,
    ):
        shard = shards.next(name, lane, old["first_row"], old["start"])
        for block, _ in islice(blocks, passes):
            yield shard.add(block, forward(block))
        # Which tokens are skipped may depend on the machine's arithmetic; if none are, the tokens must be the same.
        same = shard.skipped or old["skipped"] or shard.sha256(TOKENS) == old["files"][TOKENS.path(name)]["sha256"]
        if shard.rows != old["rows"] or not same:
            raise SaelabError(
                f"{folder}: the text has changed: shard {name} cannot be written again from it; restore the text, or "
                "write a new cache"
            )
        shards.write(shard, None)
        record = shards.written()
    assert record is not None
    if record != old:  # another machine's arithmetic may differ
        _write_manifest(folder, Manifest(identity, [*manifest.shards[:at], record, *manifest.shards[at + 1 :]]))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    content = manifest.to_bytes()
    with translating(folder, len(content)):
        write_whole(folder / MANIFEST, content)


def _read_rows(
    rows: Rows, identity: Mapping[str, Any], ahead: int
) -> Generator[tuple[np.ndarray, dict[str, Any]], None, None]:
    """The rows of each pass ``[rows, context]`` and the corpus' position after them."""

    def read() -> tuple[np.ndarray, dict[str, Any]] | None:
        block = list(islice(rows, identity["rows_per_forward"]))
        return (np.stack(block), rows.state()) if block else None

    if not ahead:
        while (block := read()) is not None:
            yield block
        return
    reader = ThreadPoolExecutor(1, "saelab cache rows")
    try:
        reading = deque(reader.submit(read) for _ in range(ahead))
        while (block := reading.popleft().result()) is not None:
            reading.append(reader.submit(read))
            yield block
    finally:
        reader.shutdown(wait=True, cancel_futures=True)


def _records(folder: Path, lane: int) -> list[dict[str, Any]]:
    """The records of the finished shards of a lane of an unfinished cache."""
    advice, records = "delete it and run again: its shard and the later shards of its lane are then written again", []
    while record := _read_json(folder / UNFINISHED / f"{shard_name(lane, len(records))}.json", advice):
        records.append(record)
    return records


def _faults(folder: Path, shard: Mapping[str, Any], contents: bool) -> Iterator[tuple[str, str]]:
    """Each damaged or missing file of a shard, and what is wrong with it."""
    for path, facts in shard["files"].items():
        try:
            size = (folder / path).stat().st_size
            if size != facts["bytes"]:
                yield path, f"{size:,} bytes long instead of {facts['bytes']:,}"
            elif contents:
                with (folder / path).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                        yield path, "does not match its sha256"
        except FileNotFoundError:
            yield path, "missing"
        except OSError as error:
            yield path, f"cannot be read ({error.strerror})"


def _read_json(path: Path, advice: str) -> dict[str, Any] | None:
    """The content of a file from `with_checksum`; None if it is missing. Raises SaelabError, with `advice`, if it is
    damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SaelabError(f"{path}: cannot be read ({error.strerror})") from error
    if not is_intact(data):
        raise SaelabError(f"{path}: damaged; {advice}")
    content = json.loads(data)
    del content["checksum"]
    return content


def _remove_leftovers(folder: Path, identity: Mapping[str, Any]) -> None:
    """Remove the records of the writing and any temporary files that a kill left: a finished cache needs neither."""
    for name in {file.folder for file in files_of(identity)} | {"."}:
        for path in (folder / name).glob("*.tmp"):
            path.unlink()
    if (folder / UNFINISHED).is_dir():
        shutil.rmtree(folder / UNFINISHED)
