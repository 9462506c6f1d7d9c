"""Our activation cache and the plain operations that it is compared with, measured in this process.

child.py calls these functions, cache.py reports them. Each returns seconds and the amount of work done.

caching       `saelab.cache` on the demo model and text, bfloat16 on disk; loading and the first passes left out
model         a bare Hugging Face model on the same rows: sdpa, no_grad, a forward hook that raises at the same layer
end_to_end    as caching, but with float32 on disk, and from the first row to the finished cache
write         the writer on activations in memory; the cache stays in the folder
raw_write     files of the same lengths by os.write, fsync after each
read          an epoch of shuffled batches of the cache in the folder, from files that are not in the page cache
raw_read      the same files, read one after the other into one buffer, not from the page cache either
warm          as read, after an epoch that is not timed
memory        growth of anonymous resident memory (RssAnon), from before the cache is opened to the peak of reading
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from saelab.activations.blocks import Shuffled
from saelab.activations.cache.layout import BLOCK_TOKENS, Manifest, files_of
from saelab.activations.cache.reader import open_cache
from saelab.activations.cache.writer import begin, finish, write_lane
from saelab.activations.stream import Pass

CONFIG = "quickstart"
"""Model, text and site of `caching`, `model` and `end_to_end`: the demo's."""
LAYER = 2
"""The layer of CONFIG's site."""
CONTEXT, ROWS, PASSES = 256, 32, 16
"""Tokens of a row, rows of a pass, passes of a shard."""
PASS_TOKENS = CONTEXT * ROWS
SITE = "made.up"
BATCH, BUFFER = 2048, 131_072
"""Tokens of a batch, and tokens of a group that is shuffled."""
AT_ONCE = 1 << 23
"""Bytes given to one raw write or read."""
T = TypeVar("T")


def identity(tokens: int, d_in: int, dtype: str, **changed: Any) -> dict[str, Any]:
    """The facts of a cache of made-up activations."""
    return {
        "model": "made up",
        "weights": "",
        "model_dtype": dtype,
        "tokenizer": "",
        "corpus": {},
        "sites": {SITE: d_in},
        "context": CONTEXT,
        "bos": None,
        "dtype": dtype,
        "gradients": False,
        "special_tokens": True,
        "seed": 0,
        "rows_per_forward": ROWS,
        "passes_per_shard": PASSES,
        "block_tokens": BLOCK_TOKENS,
        "lanes": 1,
        "nonfinite": "error",
        "tokens": tokens,
    } | changed


class SameRow:
    """The same row again and again, at no cost."""

    def __init__(self, row: np.ndarray) -> None:
        self.row = row

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return self.row

    def state(self) -> dict[str, Any]:
        return {}


def write_made_up(
    folder: Path, facts: dict[str, Any], row: np.ndarray, forward: Callable[[np.ndarray], Pass]
) -> Manifest:
    """Write a cache of `facts` from a corpus of one row and the activations that `forward` returns for each pass."""
    begin(folder, facts)
    for _ in write_lane(folder, facts, 0, lambda lane, start: SameRow(row), forward):
        pass
    return finish(folder, facts)


def write(
    folder: str, tokens: int, d_in: int, dtype: str = "bfloat16", activations: str | None = None
) -> dict[str, float]:
    """Seconds and bytes of writing a cache in `dtype`, of activations that have the dtype `activations`."""
    facts = identity(tokens, d_in, dtype)
    passes = [torch.randn(PASS_TOKENS, d_in).to(getattr(torch, activations or dtype)) for _ in range(4)]
    kept = torch.ones(ROWS, CONTEXT, dtype=torch.bool)
    turns = cycle(passes)
    os.sync()  # or a later fsync would wait for writes of other programs
    began = time.perf_counter()
    row = np.zeros(CONTEXT, dtype=np.int32)
    manifest = write_made_up(Path(folder), facts, row, lambda ids: Pass(kept, {SITE: next(turns)}, {}))
    seconds = time.perf_counter() - began
    size = sum(entry["bytes"] for shard in manifest.shards for entry in shard["files"].values())
    return {"seconds": seconds, "bytes": size, "values": manifest.tokens * d_in * getattr(torch, dtype).itemsize}


def raw_write(folder: str, tokens: int, d_in: int, dtype: str = "bfloat16") -> dict[str, float]:
    """Seconds and bytes of writing files of the same lengths as `write` does, one after the other."""
    tokens = -(-tokens // PASS_TOKENS) * PASS_TOKENS
    shards = [min(PASSES * PASS_TOKENS, tokens - at) for at in range(0, tokens, PASSES * PASS_TOKENS)]
    lengths = [file.size(n) for n in shards for file in files_of(identity(tokens, d_in, dtype))]
    content = memoryview(np.random.default_rng(0).bytes(max(lengths)))
    os.sync()
    began = time.perf_counter()
    Path(folder).mkdir(parents=True)
    for number, length in enumerate(lengths):
        _write_file(Path(folder) / str(number), content[:length])
    return {"seconds": time.perf_counter() - began, "bytes": sum(lengths)}


def read(folder: str, cold: bool = True) -> dict[str, float]:
    """Seconds, bytes and tokens of an epoch: if `cold` the first, including opening the cache, else the second."""
    paths = _files(folder)
    if cold:
        _drop(paths)
    began = time.perf_counter()
    cache = open_cache(Path(folder))
    with cache.batches(SITE, BATCH, seed=0, buffer_tokens=BUFFER) as batches:
        if not cold:
            _epoch(batches)
            began = time.perf_counter()
        tokens = _epoch(batches)
        seconds = time.perf_counter() - began
    assert tokens == cache.tokens
    return {"seconds": seconds, "bytes": sum(path.stat().st_size for path in paths), "tokens": tokens}


def warm(folder: str) -> dict[str, float]:
    """As `read`, from the page cache."""
    return read(folder, cold=False)


def raw_read(folder: str) -> dict[str, float]:
    """Seconds and bytes of reading the same files one after the other into one buffer."""
    paths = _files(folder)
    buffer = memoryview(bytearray(b"\1") * max(path.stat().st_size for path in paths))  # in memory already
    _drop(paths)
    began, size = time.perf_counter(), 0
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        at = 0
        while got := os.preadv(handle, [buffer[at : at + AT_ONCE]], at):
            at += got
        size += at
        os.close(handle)
    return {"seconds": time.perf_counter() - began, "bytes": size}


def memory(folder: str) -> dict[str, float]:
    """`growth` and `buffers`, in bytes, and the cache's `tokens`. An epoch is read, and a group of the next.

    RssAnon is read after every batch, and every millisecond besides.
    """
    before = most = _anonymous()
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.001):
            most = max(most, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        cache = open_cache(Path(folder))
        with cache.batches(SITE, BATCH, seed=0, buffer_tokens=BUFFER) as batches:
            while batches.cursor.epoch == 0 or batches.cursor.group == 0:
                next(batches)
                most = max(most, _anonymous())
                if batches.cursor.epoch == 1 and len(batches.groups(1)) == 1:
                    break
    finally:
        over.set()
        watcher.join()
    buffered = min(BUFFER, sum(-(-shard["tokens"] // BLOCK_TOKENS) for shard in cache.manifest.shards) * BLOCK_TOKENS)
    columns = [column for file in files_of(cache.identity) for column in file.columns]
    buffers = 2 * buffered * sum(column.token_bytes for column in columns)
    return {"growth": most - before, "buffers": buffers, "tokens": cache.tokens}


def caching(folder: str, passes: int, warmup: int) -> dict[str, float]:
    """Positions of the text per second, special tokens counted, while `passes` after `warmup` others are cached.

    This includes the work after the last pass, above all writing the last shard: `tail` seconds.
    """
    times = _times_of_caching(folder, (passes + warmup) * PASS_TOKENS, "bfloat16")
    timed = len(times) - 2 - warmup  # the first time is before all passes, the last after them
    seconds = times[-1] - times[warmup]
    tokens = timed * PASS_TOKENS
    return {"seconds": seconds, "tail": times[-1] - times[-2], "tokens": tokens, "tokens_per_s": tokens / seconds}


def end_to_end(folder: str, tokens: int) -> dict[str, float]:
    """Positions of the text per second, from the first row to the finished cache in float32, as sae-lens writes it."""
    times = _times_of_caching(folder, tokens, "float32")
    done = (len(times) - 2) * PASS_TOKENS
    return {"seconds": times[-1] - times[0], "tokens": done, "tokens_per_s": done / (times[-1] - times[0])}


def _times_of_caching(folder: str, tokens: int, dtype: str) -> list[float]:
    """Times at which caching began, each pass was taken, and the cache was complete."""
    from saelab.runs.cache import cache  # imports transformers, which takes seconds

    times: list[float] = []

    def clock(items: Iterator[T], label: str, total: int, size: Callable[[T], int], note: Any = None) -> Iterator[T]:
        for item in items:
            times.append(time.perf_counter())
            yield item

    os.sync()
    overrides = [f"cache.dtype={dtype}", f"cache.rows_per_forward={ROWS}", f"cache.shard_tokens={PASSES * PASS_TOKENS}"]
    cache(CONFIG, Path(folder), overrides, tokens=tokens, track=clock)
    return [*times, time.perf_counter()]


def model(passes: int, warmup: int) -> dict[str, float]:
    """As `caching`, for the bare model: nothing is kept, written or tokenised."""
    from transformers import AutoModelForCausalLM

    from saelab.demo import MODEL
    from saelab.runs.job import Job, settings_of

    job = Job(settings_of(CONFIG))
    rows = np.stack(list(islice(job.corpus.train_rows(seed=job.settings.seed), ROWS * (passes + warmup))))
    batches = torch.from_numpy(rows).long().split(ROWS)
    bare = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()

    class Stop(Exception):
        pass

    def stop(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        raise Stop

    bare.model.layers[LAYER].register_forward_hook(stop)
    began = 0.0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            if number == warmup:
                began = time.perf_counter()
            with contextlib.suppress(Stop):
                bare(input_ids=batch, use_cache=False)
    seconds, tokens = time.perf_counter() - began, passes * PASS_TOKENS
    return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}


def _epoch(batches: Shuffled) -> int:
    """Read to the end of the epoch; returns the number of tokens."""
    epoch, tokens = batches.cursor.epoch, 0
    while batches.cursor.epoch == epoch:
        tokens += len(next(batches))
    return tokens


def _write_file(path: Path, content: memoryview) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    at = 0
    while at < len(content):
        at += os.write(handle, content[at : at + AT_ONCE])
    os.fsync(handle)
    os.close(handle)


def _files(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*/*.safetensors"))


def _drop(paths: list[Path]) -> None:
    """Ask the system to drop the files from the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _anonymous() -> int:
    """Resident bytes of this process's anonymous memory."""
    with open("/proc/self/status", encoding="ascii") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))
