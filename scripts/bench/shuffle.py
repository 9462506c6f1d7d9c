"""How well reading a cache shuffles, at the sizes that ship: 5 M made-up tokens, 1024 a block, 128 blocks a group.

    python scripts/bench/shuffle.py

prints, for each seed, how often two neighbours of a row share a batch, the rank correlation between the order written
and the order read, and the number of rows in a batch. Takes some 20 seconds and 80 MB of disk.
"""

import tempfile
from pathlib import Path

import command
import numpy as np
import torch
from ours_cache import BATCH, CONTEXT, SITE, identity, write_made_up
from table import table

from saelab import open_cache
from saelab.activations.cache.reader import Cache
from saelab.activations.stream import Pass

TOKENS, SEEDS = 5_000_000, 5


def forward(ids: np.ndarray) -> Pass:
    """A pass that keeps all tokens of the rows but BOS, with activations 0."""
    kept = torch.from_numpy(ids) != 0
    return Pass(kept, {SITE: torch.zeros(int(kept.sum()), 1)}, {})


def measure(cache: Cache, seed: int) -> tuple[float, float, float]:
    """Share of neighbours in one batch, rank correlation, and rows per batch in the first epoch."""
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
    shared = float((by_row[:, 1:] == by_row[:, :-1]).mean())
    return shared, float(np.corrcoef(np.arange(read), when)[0, 1]), float(np.mean(sources))


def main() -> None:
    facts = identity(TOKENS, 1, "float32", special_tokens=False, bos=0)
    with tempfile.TemporaryDirectory(prefix="saelab-") as name:
        write_made_up(Path(name) / "cache", facts, np.arange(CONTEXT, dtype=np.int32), forward)
        cache = open_cache(Path(name) / "cache")
        print(f"{cache.tokens:,} tokens in {cache.n_blocks:,} blocks; a chance correlation has sd 1 / sqrt(blocks)\n")
        found = [measure(cache, seed) for seed in range(SEEDS)]
    rows = [[str(seed), f"{a:.2%}", f"{b:+.4f}", f"{c:.0f}"] for seed, (a, b, c) in enumerate(found)]
    print(table(["seed", f"neighbours in one batch of {BATCH:,}", "rank correlation", "rows per batch"], rows))


if __name__ == "__main__":
    command.run(main)
