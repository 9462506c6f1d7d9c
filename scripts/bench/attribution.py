"""Seconds of each method of `saelab.attribute` on a run's held-out text, and how near the others come to the exact one.

    python scripts/bench/attribution.py RUN [--tokens 20000] [--features 200]

The metric is the loss of the next token. The exact method ablates some features, drawn from those that are active;
ranks are compared on these. Seconds are wall-clock, and of a processor.
"""

import resource
import time
from pathlib import Path

import command
import numpy as np
from table import table

from saelab.analysis.attribution import Attribution, attribute, next_token_loss
from saelab.runs import folder
from saelab.runs.job import Job, settings_of
from saelab.runs.live import open_live

STEPS = (4, 16)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=command.whole(1), default=20_000)
    parser.add_argument("--features", type=command.whole(1), default=200)
    args = parser.parse_args()
    live = open_live(args.run)
    rows = Job(settings_of(args.run / folder.SETTINGS)).held_out(args.tokens)
    found: dict[str, Attribution] = {}
    record: dict[str, dict[str, float]] = {}

    def measure(name: str, **options) -> None:
        began, busy = time.perf_counter(), time.process_time()
        found[name] = attribute(live.lm, live.sae, rows, next_token_loss(live.lm), live.site, **options)
        seconds, processor = time.perf_counter() - began, time.process_time() - busy
        record[name] = {"seconds": seconds, "processor_seconds": processor}

    measure("gradient")
    for steps in STEPS:
        measure(f"integrated, {steps} steps", method="integrated", steps=steps)
    active = np.flatnonzero(found["gradient"].active)
    drawn = np.random.default_rng(0).permutation(active)[: args.features]
    measure("exact", method="exact", features=drawn.tolist())
    lines = []
    for name, each in found.items():
        own = record[name]
        own["rank_correlation"] = _rank_correlation(each.effect[drawn], found["exact"].effect[drawn])
        own["gap"] = float("nan") if each.gap is None else each.gap
        own["error"], own["features"] = each.error, float(each.by_row.sum())
        lines.append([name, *(f"{own[key]:.3g}" for key in own)])
    head = ["method", "seconds", "of a processor", "rank correlation", "gap", "effect of the error", "of the features"]
    print(f"{len(rows)} rows, {found['exact'].tokens:,} tokens, {len(drawn)} features of {len(active)} active ones")
    print(f"loss {found['exact'].metric.sum():.4g} nats in all")
    print(table(head, lines))
    print(f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")
    command.write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, **record})


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


if __name__ == "__main__":
    command.run(main)
