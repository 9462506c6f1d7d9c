"""How well reading a cache shuffles, at the sizes that ship: 5 M made-up tokens, 1024 a block, 128 blocks a group.

Prints, for each seed: how often two neighbours of a row share a batch, the rank correlation between where a token was
written and when it is read, and from how many rows the tokens of a batch come. Takes some 20 seconds and 80 MB of disk.

    python scripts/measure_shuffle.py
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab import open_cache
from saelab.activations.cache.layout import BLOCK_TOKENS
from saelab.activations.cache.reader import Cache
from saelab.activations.cache.writer import begin, finish, write_lane
from saelab.activations.stream import Pass

CONTEXT, TOKENS, BATCH, SITE = 256, 5_000_000, 2048, "made.up"
IDENTITY = {
    "model": "",
    "weights": "",
    "model_dtype": "float32",
    "tokenizer": "",
    "corpus": {},
    "sites": {SITE: 1},
    "context": CONTEXT,
    "bos": 0,
    "dtype": "float32",
    "gradients": False,
    "special_tokens": False,
    "seed": 0,
    "rows_per_forward": 32,
    "passes_per_shard": 16,
    "block_tokens": BLOCK_TOKENS,
    "lanes": 1,
    "nonfinite": "error",
    "tokens": TOKENS,
}


class Rows:
    """BOS and ordinary tokens, without end."""

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return np.arange(CONTEXT, dtype=np.int32)

    def state(self) -> dict[str, Any]:
        return {}


def rows(lane: int, start: Mapping[str, Any] | None) -> Rows:
    return Rows()


def forward(ids: np.ndarray) -> Pass:
    kept = torch.from_numpy(ids) != 0
    return Pass(kept, {SITE: torch.zeros(int(kept.sum()), 1)}, {})


def measure(cache: Cache, seed: int) -> tuple[float, float, float]:
    """Share of neighbours in one batch, rank correlation, rows of a batch; of the first epoch."""
    when, batch_of = np.empty(cache.tokens, np.int64), np.empty(cache.tokens, np.int64)
    read, sources = 0, []
    with cache.batches(SITE, BATCH, seed=seed) as batches:
        while batches.cursor.epoch == 0:
            batch = next(batches)
            at = (batch.rows * (CONTEXT - 1) + batch.positions - 1).numpy()
            when[at], batch_of[at] = np.arange(read, read + len(at)), len(sources)
            read += len(at)
            sources.append(len(batch.rows.unique()))
    by_row = batch_of.reshape(-1, CONTEXT - 1)
    together = float((by_row[:, 1:] == by_row[:, :-1]).mean())
    return together, float(np.corrcoef(np.arange(read), when)[0, 1]), float(np.mean(sources))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="saelab-") as name:
        folder = Path(name) / "cache"
        begin(folder, IDENTITY)
        for _ in write_lane(folder, IDENTITY, 0, rows, forward):
            pass
        finish(folder, IDENTITY)
        cache = open_cache(folder)
        print(f"{cache.tokens:,} tokens in {cache.n_blocks:,} blocks; chance of rank correlation: sd 1 / sqrt(blocks)")
        for seed in range(5):
            together, correlation, sources = measure(cache, seed)
            print(
                f"seed {seed}: {together:.2%} of neighbours in one batch of {BATCH:,}, rank correlation "
                f"{correlation:+.4f}, {sources:.0f} rows a batch"
            )


if __name__ == "__main__":
    main()
