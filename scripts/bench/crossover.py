"""The density of codes from which the dense products are faster than the sparse ones, on this machine's CPU.

    python scripts/bench/crossover.py                # minutes
    python scripts/bench/crossover.py --threads 2 --shape 2048,256,4096

The result is `saelab.kernels.products.CROSSOVER`. It times a training step's products, forward and backward, on codes
whose entries are drawn at random; sparse and dense alternate, and each ratio is of two consecutive runs.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import command
import torch
from processes import Processes, heading
from table import table

from saelab.codes import Codes
from saelab.kernels import sddmm, spmm
from saelab.kernels.products import accumulate_in_place

SHAPES = [(2048, 256, 4096), (1024, 768, 24576)]
DENSITIES = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]


def products(shape: Iterable[int], density: float, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repetition, by ``sparse`` and ``dense``."""
    tokens, d, n_features = shape
    torch.manual_seed(0)
    mask = torch.rand(tokens, n_features) < density
    drawn = Codes.from_mask(mask, mask.float())
    x, grad, bias, centre = torch.randn(tokens, d), torch.randn(tokens, d), torch.zeros(n_features), torch.zeros(d)
    W_enc, W_dec = torch.randn(n_features, d).requires_grad_(), torch.randn(n_features, d).requires_grad_()
    accumulate_in_place(W_enc)
    accumulate_in_place(W_dec)
    bias.requires_grad_()
    centre.requires_grad_()

    def step() -> float:
        began = time.perf_counter()
        codes = Codes(drawn.values, drawn.features, drawn.offsets, n_features)  # without cached facts
        pre = sddmm(codes, x, W_enc, bias, centre=centre, known=codes.values)
        spmm(codes.with_values(pre), W_dec).backward(grad)
        return 1000 * (time.perf_counter() - began)

    found: dict[str, list[float]] = {"sparse": [], "dense": []}
    for turn in range(repeats + 1):
        for way, backend in (("sparse", "cpu"), ("dense", "dense")):
            os.environ["SAELAB_KERNELS"] = backend
            ms = step()
            if turn:
                found[way].append(ms)
    return found


def crossover(points: Sequence[tuple[float, float]]) -> float | None:
    """Density at which the ratio sparse / dense passes 1, between two (density, ratio) points; None if it does not."""
    for (low, below), (high, above) in pairwise(points):
        if below < 1 <= above:
            share = math.log(below) / (math.log(below) - math.log(above))
            return low * (high / low) ** share
    return None


def measure(shapes: Sequence[Sequence[int]], repeats: int, threads: int | None) -> dict[str, Any]:
    """The record that --json writes."""
    run = Processes(threads, None, ())
    rows = []
    for shape in shapes:
        for density in DENSITIES:
            run.label = f"density {density:.3f}"
            ms = run.ours(products, shape=shape, density=density, repeats=repeats)
            ratio = statistics.median(a / b for a, b in zip(ms["sparse"], ms["dense"], strict=True))
            medians = {way: statistics.median(values) for way, values in ms.items()}
            rows.append({"shape": list(shape), "density": density, **medians, "ratio": ratio})
    found = [
        crossover([(row["density"], row["ratio"]) for row in rows if row["shape"] == list(shape)]) for shape in shapes
    ]
    record = {**run.facts("torch"), "rows": rows, "crossovers": found, "repeats": repeats}
    return record | run.outcome()


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    rows = [
        [
            ", ".join(map(str, row["shape"])),
            f"{row['density']:.3f}",
            *(f"{row[way]:.0f}" for way in ("sparse", "dense")),
            f"{row['ratio']:.2f}",
        ]
        for row in record["rows"]
    ]
    found = ", ".join("none" if density is None else f"{density:.3f}" for density in record["crossovers"])
    return "\n\n".join(
        [
            heading(record, f"medians of {record['repeats']} repetitions"),
            table(["batch, d, n_features", "density", "sparse ms", "dense ms", "sparse / dense"], rows),
            f"As fast at density: {found}.",
        ]
    )


def _shape(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not three positive integers, batch,d,n_features")
    return numbers


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--shape", type=_shape, action="append", metavar="BATCH,D,N_FEATURES", help="may be repeated")
    parser.add_argument("--repeats", type=command.whole(1), default=5, help="repetitions of each product (5)")
    parser.add_argument("--threads", type=command.whole(1), help="of every process (default: all processors)")
    options = parser.parse_args()
    record = measure(options.shape or SHAPES, options.repeats, options.threads)
    json_file: Path | None = options.json
    command.write_json(json_file, record)
    print(report(record))


if __name__ == "__main__":
    command.run(main)
