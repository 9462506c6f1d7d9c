"""Seconds and memory of each pure analysis on made-up activations and codes, which are made outside the clock.

Wall-clock seconds, and seconds of processor time, which other programs on the machine change little.

python scripts/bench/analysis.py                # 1 M tokens, d_in 256, 4096 features, 32 active per token
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator

import command
import torch
from table import table

from saelab.analysis.dead import dead
from saelab.analysis.decomposition import decompose
from saelab.analysis.parts import split_rows
from saelab.codes import Codes
from saelab.encoded import Block
from saelab.sae.model import SparseAutoencoder

CONTEXT, ROWS = 256, 16


class MadeUp:
    """Blocks of random activations and codes; `seconds` and `processor` are the time that it took to make them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows, self.seconds, self.processor = args, args.tokens // CONTEXT, 0.0, 0.0

    def __iter__(self) -> Iterator[Block]:
        yield from self.of(self.rows)

    def of(self, rows: int) -> Iterator[Block]:
        """Blocks of the first rows."""
        a, generator = self.args, torch.Generator().manual_seed(0)
        for first in range(0, rows, ROWS):
            began, busy, here = time.perf_counter(), time.process_time(), min(ROWS, rows - first)
            n = here * CONTEXT
            x = torch.randn(n, a.d_in, generator=generator)
            # squares of uniform numbers: low features are dense, high ones rare
            features = (torch.rand(n, a.k, generator=generator).square() * a.n_features).long()
            codes = Codes.from_topk(torch.rand(n, a.k, generator=generator) + 0.1, features, a.n_features)
            positions = torch.arange(first * CONTEXT, first * CONTEXT + n)
            block = Block(torch.zeros(here, CONTEXT, dtype=torch.long), first, positions, x, codes)
            self.seconds += time.perf_counter() - began
            self.processor += time.process_time() - busy
            yield block


def _dead(sae: SparseAutoencoder, blocks: MadeUp) -> None:
    dead(sae, blocks, blocks.rows)


def _decomposition(sae: SparseAutoencoder, blocks: MadeUp) -> None:
    decompose(sae, lambda numbers: blocks.of(len(numbers)), split_rows(blocks.rows))


ANALYSES: dict[str, Callable[[SparseAutoencoder, MadeUp], None]] = {"dead": _dead, "decomposition": _decomposition}


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--tokens", type=command.whole(CONTEXT * ROWS), default=1_048_576)
    parser.add_argument("--d-in", type=command.whole(1), default=256)
    parser.add_argument("--n-features", type=command.whole(2), default=4096)
    parser.add_argument("--k", type=command.whole(1), default=32)
    parser.add_argument("--only", nargs="*", choices=ANALYSES, help="these analyses")
    args = parser.parse_args()
    torch.manual_seed(0)
    sae = SparseAutoencoder(args.d_in, args.n_features, args.k)
    sae.initialise(torch.randn(4096, args.d_in))
    record, lines = {}, []
    for name in args.only or ANALYSES:
        blocks, began, busy = MadeUp(args), time.perf_counter(), time.process_time()
        ANALYSES[name](sae, blocks)
        seconds = time.perf_counter() - began - blocks.seconds
        processor = time.process_time() - busy - blocks.processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record[name] = {"seconds": seconds, "processor_seconds": processor, "peak_bytes": peak}
        lines.append([name, f"{seconds:.1f}", f"{processor:.1f}", f"{peak / 1e9:.2f}"])
        command.write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, **record})
    print(table(["analysis", "seconds", "of a processor", "peak of the process so far (GB)"], lines))


if __name__ == "__main__":
    command.run(main)
