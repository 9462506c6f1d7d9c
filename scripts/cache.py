"""Caches the activations of two sites in one pass of the model, then trains an autoencoder on each. To copy and change.

Stop it at any time and start it again: the cache and the trainings continue where they stopped.

    python scripts/cache.py
    saelab app runs/script_cache
"""

import saelab

SITES, CACHE = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"], "caches/script"
CONFIG = {
    "out": "runs/script_cache/blocks.1.hook_resid_post",
    "site": SITES[0],
    "model": "demo",
    "corpus": "demo",
    "cache": {"sites": SITES},
    "sae": {"n_features": 4096, "k": 32},
    "training": {"tokens": 1_000_000, "batch": 1024, "lr": 2e-3},
}


def main(config: dict = CONFIG, path: str = CACHE) -> None:
    saelab.cache(config, path, track=saelab.bar, say=print)

    cache = saelab.open_cache(path)
    with cache.batches(SITES[0], 1024, seed=0) as batches:  # shuffled; cache.in_order(site) reads as it was written
        batch = next(batches)
        print(f"{cache.tokens:,} tokens; a batch: {tuple(batch.values.shape)} {batch.values.dtype}, {batches.cursor}")

    for site in SITES:
        overrides = [f"site={site}", f"out=runs/script_cache/{site}", f"activations.cache={path}"]
        saelab.run(config, overrides, track=saelab.bar, say=print)


if __name__ == "__main__":
    main()
