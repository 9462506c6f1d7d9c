"""One measurement of our activation cache in this process, or of the plain thing that it is held against.

    python -m saelab.bench.ours_cache --measure write --folder DIR --tokens 655360 --d-in 768

prints one line of JSON. What is measured:

caching       `saelab.cache` on the demo model and text, bfloat16 on disk; loading and the first passes left out
model         a bare Hugging Face model on the same rows: sdpa, no_grad, a forward hook that raises at the same layer
end_to_end    as caching, but for float32 on disk, and from the first row to the finished cache
write         the writer on activations that are there already; the cache stays in the folder
raw_write     files of the same lengths by os.write, fsync after each
read          an epoch of shuffled batches of the cache in the folder, from files that are not in the page cache
raw_read      the same files, read one after the other into one buffer, neither in the page cache
warm          as read, after an epoch that nobody timed
memory        growth of anonymous resident memory (RssAnon) from before the cache is opened to the most while it is read
"""

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from saelab.activations.cache.layout import BLOCK_TOKENS, files_of
from saelab.activations.cache.reader import Shuffled, open_cache
from saelab.activations.cache.writer import begin, finish, write_lane
from saelab.activations.stream import Pass

CONFIG = "quickstart"
"""Model, text and site of `caching`, `model` and `end_to_end`: the demo's."""
LAYER = 2
"""Of the site of CONFIG."""
CONTEXT, ROWS, PASSES = 256, 32, 16
"""Of a row, of a pass, of a shard."""
PASS_TOKENS = CONTEXT * ROWS
SITE = "made.up"
BATCH, BUFFER = 2048, 131_072
"""Tokens of a batch, and that are shuffled together."""
AT_ONCE = 1 << 23
"""Bytes given to one raw write or read."""
T = TypeVar("T")


def identity(tokens: int, d_in: int, dtype: str) -> dict[str, Any]:
    """Of a cache of made-up activations."""
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
    }


class SameRow:
    """A row that comes again and again, and costs nothing."""

    row = np.zeros(CONTEXT, dtype=np.int32)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return self.row

    def state(self) -> dict[str, Any]:
        return {}


def write(folder: Path, tokens: int, d_in: int, dtype: str, given: str) -> dict[str, float]:
    """Seconds and bytes of writing a cache in `dtype` of activations that come in the dtype `given`."""
    facts = identity(tokens, d_in, dtype)
    passes = [torch.randn(PASS_TOKENS, d_in).to(getattr(torch, given)) for _ in range(4)]
    kept = torch.ones(ROWS, CONTEXT, dtype=torch.bool)
    turn = 0

    def rows(lane: int, start: Mapping[str, Any] | None) -> SameRow:
        return SameRow()

    def forward(ids: np.ndarray) -> Pass:
        nonlocal turn
        turn += 1
        return Pass(kept, {SITE: passes[turn % len(passes)]}, {})

    os.sync()  # what others have not written yet is not to be waited for later
    began = time.perf_counter()
    begin(folder, facts)
    for _ in write_lane(folder, facts, 0, rows, forward):
        pass
    manifest = finish(folder, facts)
    seconds = time.perf_counter() - began
    size = sum(entry["bytes"] for shard in manifest.shards for entry in shard["files"].values())
    return {"seconds": seconds, "bytes": size, "values": manifest.tokens * d_in * getattr(torch, dtype).itemsize}


def raw_write(folder: Path, tokens: int, d_in: int, dtype: str) -> dict[str, float]:
    """Seconds and bytes of writing, one after the other, files as long as those of `write`."""
    tokens = -(-tokens // PASS_TOKENS) * PASS_TOKENS
    shards = [min(PASSES * PASS_TOKENS, tokens - at) for at in range(0, tokens, PASSES * PASS_TOKENS)]
    lengths = [file.size(n) for n in shards for file in files_of(identity(tokens, d_in, dtype))]
    content = memoryview(np.random.default_rng(0).bytes(max(lengths)))
    os.sync()
    began = time.perf_counter()
    folder.mkdir(parents=True)
    for number, length in enumerate(lengths):
        _write_file(folder / str(number), content[:length])
    return {"seconds": time.perf_counter() - began, "bytes": sum(lengths)}


def read(folder: Path, *, cold: bool) -> dict[str, float]:
    """Seconds, bytes and tokens of an epoch: the first, from opening the cache on, if `cold`, else the second."""
    paths = _files(folder)
    if cold:
        _drop(paths)
    began = time.perf_counter()
    cache = open_cache(folder)
    with cache.batches(SITE, BATCH, seed=0, buffer_tokens=BUFFER) as batches:
        if not cold:
            _epoch(batches)
            began = time.perf_counter()
        tokens = _epoch(batches)
        seconds = time.perf_counter() - began
    assert tokens == cache.tokens
    return {"seconds": seconds, "bytes": sum(path.stat().st_size for path in paths), "tokens": tokens}


def raw_read(folder: Path) -> dict[str, float]:
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


def memory(folder: Path) -> dict[str, float]:
    """`growth` and `buffers`, in bytes, and the cache's `tokens`. An epoch is read, and what follows for a group.

    RssAnon is looked at after every batch, and every millisecond beside.
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
        cache = open_cache(folder)
        with cache.batches(SITE, BATCH, seed=0, buffer_tokens=BUFFER) as batches:
            while batches.cursor.epoch == 0 or batches.cursor.group == 0:
                next(batches)
                most = max(most, _anonymous())
                if batches.cursor.epoch == 1 and len(batches.groups(1)) == 1:
                    break
    finally:
        over.set()
        watcher.join()
    held = min(BUFFER, sum(-(-shard["tokens"] // BLOCK_TOKENS) for shard in cache.manifest.shards) * BLOCK_TOKENS)
    columns = [column for file in files_of(cache.identity) for column in file.columns]
    buffers = 2 * held * sum(column.token_bytes for column in columns)
    return {"growth": most - before, "buffers": buffers, "tokens": cache.tokens}


def caching(folder: Path, passes: int, warmup: int) -> dict[str, float]:
    """Positions of the text per second, special tokens counted, while `passes` after `warmup` others are cached.

    What comes behind the last pass and overlaps nothing, the last shard's writing above all, is in it: `tail` seconds.
    """
    times = _times_of_caching(folder, (passes + warmup) * PASS_TOKENS, "bfloat16")
    timed = len(times) - 2 - warmup  # the first time is before all passes, the last behind them
    seconds = times[-1] - times[warmup]
    tokens = timed * PASS_TOKENS
    return {"seconds": seconds, "tail": times[-1] - times[-2], "tokens": tokens, "tokens_per_s": tokens / seconds}


def end_to_end(folder: Path, tokens: int) -> dict[str, float]:
    """Positions of the text per second, from the first row to the finished cache in float32, as sae-lens has it."""
    times = _times_of_caching(folder, tokens, "float32")
    done = (len(times) - 2) * PASS_TOKENS
    return {"seconds": times[-1] - times[0], "tokens": done, "tokens_per_s": done / (times[-1] - times[0])}


def _times_of_caching(folder: Path, tokens: int, dtype: str) -> list[float]:
    """When caching began, when each pass was taken in, and when the cache was whole."""
    from saelab.runs.cache import cache  # transformers and all that: several seconds that other measurements do without

    times: list[float] = []

    def clock(items: Iterator[T], label: str, total: int, size: Callable[[T], int]) -> Iterator[T]:
        for item in items:
            times.append(time.perf_counter())
            yield item

    os.sync()
    overrides = [f"cache.dtype={dtype}", f"cache.rows_per_forward={ROWS}", f"cache.shard_tokens={PASSES * PASS_TOKENS}"]
    cache(CONFIG, folder, overrides, tokens=tokens, track=clock)
    return [*times, time.perf_counter()]


def model(passes: int, warmup: int) -> dict[str, float]:
    """As `caching`, of the bare model: nothing is kept, written or tokenised."""
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
    """Read to the end of the epoch; how many tokens."""
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


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def _drop(paths: list[Path]) -> None:
    """Ask the system to forget what it has of the files in memory."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _anonymous() -> int:
    """Bytes of this process's anonymous memory that are resident."""
    with open("/proc/self/status", encoding="ascii") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {
        "caching": lambda: caching(args.folder, args.passes, args.warmup),
        "model": lambda: model(args.passes, args.warmup),
        "end_to_end": lambda: end_to_end(args.folder, args.tokens),
        "write": lambda: write(args.folder, args.tokens, args.d_in, args.dtype, args.given or args.dtype),
        "raw_write": lambda: raw_write(args.folder, args.tokens, args.d_in, args.dtype),
        "read": lambda: read(args.folder, cold=True),
        "raw_read": lambda: raw_read(args.folder),
        "warm": lambda: read(args.folder, cold=False),
        "memory": lambda: memory(args.folder),
    }
    parser.add_argument("--measure", choices=measures, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=655_360)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--dtype", default="bfloat16", help="on disk")
    parser.add_argument("--given", help="of the activations before they are written (default: --dtype)")
    parser.add_argument("--passes", type=int, default=44)
    parser.add_argument("--warmup", type=int, default=4, help="passes before the timed ones")
    args = parser.parse_args()
    sys.stdout.write(json.dumps(measures[args.measure]()) + "\n")


if __name__ == "__main__":
    main()
