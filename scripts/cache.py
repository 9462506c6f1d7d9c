"""The steps of `saelab cache` as a script to copy and change: the demo model's activations into caches/script.

Killed and started again, it goes on where it was.

    python scripts/cache.py
"""

from pathlib import Path

import numpy as np
import torch

from saelab import CorpusSettings, ModelSettings, load_language_model, open_cache, open_corpus
from saelab.activations.cache.layout import BLOCK_TOKENS
from saelab.activations.cache.writer import begin, finish, write_lane
from saelab.activations.stream import Pass, provenance, run_model
from saelab.files import locked
from saelab.progress import bar

OUT = Path("caches/script")
SITES, CONTEXT, TOKENS, SEED = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"], 256, 1_000_000, 0


def main() -> None:
    lm = load_language_model(ModelSettings("demo"), device="auto")
    corpus = open_corpus(CorpusSettings("demo"), lm.tokenizer, CONTEXT)
    identity = {  # what the cache is of; all of it is compared when writing goes on (the cache's FORMAT.md)
        "model": lm.name,
        **provenance(lm, corpus),
        "sites": {site: lm.width(site) for site in SITES},
        "dtype": "bfloat16",
        "gradients": False,
        "seed": SEED,
        "rows_per_forward": 32,
        "passes_per_shard": 16,
        "block_tokens": BLOCK_TOKENS,
        "lanes": 1,
        "nonfinite": "error",
        "tokens": TOKENS,
    }

    def forward(ids: np.ndarray) -> Pass:
        return run_model(lm, torch.from_numpy(ids), SITES)

    def rows(lane: int, start: dict | None):
        return corpus.train_rows(seed=SEED, start=start)

    with locked(OUT):
        if begin(OUT, identity) is None:
            for _ in bar(write_lane(OUT, identity, 0, rows, forward), "caching", TOKENS, int):
                pass
            finish(OUT, identity)

    cache = open_cache(OUT)
    with cache.batches(SITES[1], 2048, seed=SEED) as batches:
        batch = next(batches)
        print(f"{cache.tokens:,} tokens; a batch: {tuple(batch.values.shape)} {batch.values.dtype}, {batches.cursor}")


if __name__ == "__main__":
    main()
