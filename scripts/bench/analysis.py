"""Seconds and memory of each analysis, each in a process of its own; loading and made-up data are outside the clock.

Wall-clock seconds, and seconds of processor time, which other programs on the machine change little. Pure statistics
are given activations and codes (for direct attribution also the pattern and values of a layer of 4 heads), which are
made up. Iterative ones run on --few tokens or --features features; those that need a language model use the demo one.

    python scripts/bench/analysis.py            # 1 M tokens, d_in 256, 4096 features, 32 active per token
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import command
import numpy as np
import torch
from table import table

from saelab.analysis.attention.ablation import FeatureAt, ablated_logits
from saelab.analysis.attention.families import FamilyShares
from saelab.analysis.attention.heads import head_shares
from saelab.analysis.attention.overview import RESAMPLES
from saelab.analysis.attention.scores import HeadScores
from saelab.analysis.cka import PairedCodes
from saelab.analysis.dead import dead
from saelab.analysis.decomposition import decompose
from saelab.analysis.gradient_pursuit import gradient_pursuit
from saelab.analysis.intervals import draws
from saelab.analysis.meta_structure import meta_structure
from saelab.analysis.parts import split_rows
from saelab.analysis.settings import AttentionSettings, SteeringSettings
from saelab.analysis.similarity import compare_decoders
from saelab.analysis.stability import stability
from saelab.analysis.steering_effects import steering_effects
from saelab.codes import Codes
from saelab.encoded import Block
from saelab.lm.attention import Heads
from saelab.lm.load import load_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.settings import ModelSettings
from saelab.sae.initial import initialise
from saelab.sae.model import SparseAutoencoder

CONTEXT, ROWS, HEADS = 256, 16, 4


class Case:
    """What an analysis is given, and the clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, args.tokens // CONTEXT
        torch.manual_seed(0)
        self.sae = self.autoencoder(torch.randn(4096, args.d_in))
        self.outside = np.zeros(2)
        """Seconds and processor seconds that do not count."""

    def autoencoder(self, x: torch.Tensor) -> SparseAutoencoder:
        """An autoencoder that is only initialised, for activations x ``[tokens, d_in]``."""
        sae = SparseAutoencoder(x.shape[1], self.args.n_features, self.args.k)
        initialise(sae, x)
        return sae.requires_grad_(False)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the clock."""
        began = np.array([time.perf_counter(), time.process_time()])
        yield
        self.outside += np.array([time.perf_counter(), time.process_time()]) - began

    def blocks(self, rows: int, seed: int = 0) -> Iterator[Block]:
        """Blocks of random activations and codes, of the first rows."""
        a, generator = self.args, torch.Generator().manual_seed(seed)
        for first in range(0, rows, ROWS):
            with self.stopped():
                here = min(ROWS, rows - first)
                n = here * CONTEXT
                x = torch.randn(n, a.d_in, generator=generator)
                # squares of uniform numbers: low features are dense, high ones rare
                features = (torch.rand(n, a.k, generator=generator).square() * a.n_features).long()
                codes = Codes.from_topk(torch.rand(n, a.k, generator=generator) + 0.1, features, a.n_features)
                positions = torch.arange(first * CONTEXT, first * CONTEXT + n)
                block = Block(torch.zeros(here, CONTEXT, dtype=torch.long), first, positions, x, codes)
            yield block

    def heads(self) -> Heads:
        """A random pattern, and values, of one row."""
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(1, HEADS, CONTEXT, CONTEXT, generator=generator)
        later = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1)
        values = torch.randn(1, HEADS, CONTEXT, self.args.d_in // HEADS, generator=generator)
        return Heads(scores.masked_fill(later, -torch.inf).softmax(-1), values)

    def language_model(self, site: str, rows: int) -> tuple[LanguageModel, torch.Tensor, SparseAutoencoder]:
        """The demo model, rows of random tokens of half the context, and an autoencoder of a site."""
        lm = load_language_model(ModelSettings("demo"))
        ids = torch.randint(1000, (rows, CONTEXT // 2), generator=torch.Generator().manual_seed(0))
        x = lm.activations(ids[:8], [site])[site][lm.ordinary(ids[:8])].float()
        return lm, ids, self.autoencoder(x)


def _dead(case: Case) -> None:
    dead(case.sae, case.blocks(case.rows), case.rows)


def _decomposition(case: Case) -> None:
    decompose(case.sae, lambda numbers: case.blocks(len(numbers)), split_rows(case.rows))


def _decoders(case: Case, n: int) -> list[np.ndarray]:
    with case.stopped():
        return list(np.random.default_rng(0).standard_normal((n, case.args.n_features, case.args.d_in), np.float32))


def _similarity(case: Case) -> None:
    a, b = _decoders(case, 2)
    compare_decoders(a, b)


def _stability(case: Case) -> None:
    stability(_decoders(case, 3))


def _cka(case: Case) -> None:
    codes = PairedCodes()
    for a, b in zip(case.blocks(case.rows), case.blocks(case.rows, seed=1), strict=True):
        codes.add(a.codes, b.codes, a.row_of_token().numpy())
    codes.cka()


def _head_shares(case: Case) -> None:
    head_shares(case.sae.W_dec, HEADS)


def _direct(case: Case) -> None:
    with case.stopped():
        heads, at = case.heads(), torch.arange(CONTEXT)
    often = draws(case.rows, RESAMPLES, np.random.default_rng(0))
    found = FamilyShares.empty(case.args.n_features, HEADS, often, AttentionSettings().per_feature)
    for block in case.blocks(case.rows):
        for i, ids in enumerate(block.rows):
            codes = block.codes[i * CONTEXT : (i + 1) * CONTEXT]
            found.add(case.sae, ids, at, codes, heads, block.first_row + i)


def _head_scores(case: Case) -> None:
    with case.stopped():
        heads = case.heads()
        heads = Heads(*(part.repeat(ROWS, 1, 1, 1) for part in heads))
    scores = HeadScores.empty(case.rows, [0], HEADS)
    for block in case.blocks(case.rows):
        scores.add(block.rows, torch.ones_like(block.rows, dtype=torch.bool), 0, heads, block.first_row)


def _gradient_pursuit(case: Case) -> None:
    with case.stopped():
        x = torch.randn(case.args.few, case.args.d_in, generator=torch.Generator().manual_seed(0))
    gradient_pursuit(x, case.sae.W_dec, torch.full((len(x),), case.args.k))


def _meta_structure(case: Case) -> None:
    meta_structure(case.sae.W_dec, rows_seen=case.args.tokens)


def _steering(case: Case) -> None:
    site = "blocks.2.hook_resid_post"
    with case.stopped():
        lm, ids, sae = case.language_model(site, max(8, case.args.few // (CONTEXT // 2)))
    steering_effects(sae, lm, ids, site, SteeringSettings(features=case.args.features))


def _ablation(case: Case) -> None:
    with case.stopped():
        lm, ids, sae = case.language_model("blocks.2.attn.hook_z", 8)
    for i in range(case.args.features):
        row, position = ids[i % 8], len(ids[0]) - 1
        ablated_logits({2: sae}, lm, row, [FeatureAt(2, position, i % sae.n_features)])


PURE: dict[str, Callable[[Case], None]] = {
    "dead": _dead,
    "decomposition": _decomposition,
    "similarity of decoders": _similarity,
    "stability, 3 runs": _stability,
    "CKA of codes": _cka,
    "head shares of decoder rows": _head_shares,
    "direct attribution by distance and head": _direct,
    "scores of a layer's heads": _head_scores,
}
ITERATIVE: dict[str, Callable[[Case], None]] = {
    "gradient pursuit": _gradient_pursuit,
    "meta-structure": _meta_structure,
    "steering": _steering,
    "ablation of heads' features": _ablation,
}
ANALYSES = PURE | ITERATIVE


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds, processor seconds and the peak of this process in bytes, of one analysis."""
    case, began = Case(args), np.array([time.perf_counter(), time.process_time()])
    ANALYSES[name](case)
    seconds, processor = np.array([time.perf_counter(), time.process_time()]) - began - case.outside
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "processor_seconds": processor, "peak_bytes": peak}


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--tokens", type=command.whole(CONTEXT * ROWS), default=1_048_576)
    parser.add_argument("--d-in", type=command.whole(HEADS), default=256)
    parser.add_argument("--n-features", type=command.whole(2), default=4096)
    parser.add_argument("--k", type=command.whole(1), default=32)
    parser.add_argument("--few", type=command.whole(1), default=20_480, help="tokens of the iterative analyses")
    parser.add_argument("--features", type=command.whole(1), default=200, help="features that are steered or ablated")
    parser.add_argument("--only", nargs="*", choices=ANALYSES, help="these analyses")
    args = parser.parse_args()
    record, lines = {}, []
    for name in args.only or ANALYSES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = record[name] = process.submit(measure, name, args).result()
        cells = [found["seconds"], found["processor_seconds"], found["peak_bytes"] / 1e9]
        lines.append([name, *(f"{cell:.2f}" for cell in cells)])
        print(*lines[-1], flush=True)
        command.write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, **record})
    print(table(["analysis", "seconds", "of a processor", "peak (GB)"], lines))


if __name__ == "__main__":
    command.run(main)
