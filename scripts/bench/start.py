"""The encoder's first scale, and the text that thresholds are set on: token, mutual and feature choice alike.

Scale. Each method trains on the same activations with every rate of --lr and every scale of --scale: a multiple of the
one that `new_autoencoder` sets. FVU is of every other held-out row, in inference; thresholds are set on the rows
between, so that L0 is equal.

Thresholds. L0 on the first --evaluated held-out tokens, with thresholds set on the held-out text that follows, and on
that and training text, as `saelab train` does.

    saelab cache quickstart --out caches/quickstart --tokens 1.3e6
    python scripts/bench/start.py --cache caches/quickstart          # half an hour on one core
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import command
import torch
from table import table
from torch import Tensor

from saelab import (
    CorpusSettings,
    ModelSettings,
    SaeSettings,
    TrainingSettings,
    calibrate,
    calibration_rows,
    load_language_model,
    new_autoencoder,
    open_cache,
    open_corpus,
)
from saelab.corpus import Corpus
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.sae.input_map import InputMap
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.settings import AllocationSettings
from saelab.sae.thresholds import calibrate as thresholds_for
from saelab.training.trainer import Trained, train

SAMPLE, PART, BATCH = 32_768, 8192, 2048
METHODS = {"TopK": "token_choice", "mutual choice": "mutual_choice", "feature choice, Zipf": "feature_choice"}


class Data(NamedTuple):
    x: Tensor
    """Training activations, ``[tokens, d_in]``."""
    scale: float
    """What makes E||x||^2 = d_in."""
    lm: LanguageModel
    corpus: Corpus
    site: str

    def of(self, rows: Tensor) -> Tensor:
        """The scaled activations of rows of token ids, ``[tokens, d_in]``."""
        found = []
        for part in rows.long().split(32):
            found.append(self.lm.activations(part, [self.site])[self.site][self.lm.ordinary(part)].float())
        return torch.cat(found) * self.scale


def run(
    data: Data, method: str, lr: float, factor: float, seed: int, args: argparse.Namespace
) -> tuple[SparseAutoencoder, Trained]:
    """An autoencoder for scaled activations, and the results of its training besides the weights."""
    settings = SaeSettings(args.n_features, args.k, allocation=AllocationSettings(METHODS[method]))
    training = TrainingSettings(tokens=args.tokens, batch=BATCH, lr=lr, log_every=10**9)
    order = torch.randperm(args.tokens, generator=torch.Generator().manual_seed(seed))

    def batches() -> Iterator[Batch]:
        for chosen in order.split(BATCH):
            yield Batch(data.x[chosen].float() * data.scale)

    sae = new_autoencoder(settings, data.x[order[:SAMPLE]].float() * data.scale, seed=seed)
    sae.W_enc.data.mul_(factor)
    return sae, train(sae, batches(), training, settings)


def fvu_and_l0(sae: SparseAutoencoder, x: Tensor) -> tuple[float, float]:
    """FVU and L0 on x ``[tokens, d_in]``, in inference."""
    error, active = 0.0, 0
    for part in x.split(PART):
        codes = sae.encode(part)
        active += len(codes.values)
        error += (part - sae.decode(codes)).double().square().sum().item()
    return error / (x.double() - x.double().mean(0)).square().sum().item(), active / len(x)


def scales(data: Data, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of every method, rate, scale and seed."""
    rows = torch.from_numpy(data.corpus.held_out_rows(10**9))
    between, x = data.of(rows[::2]), data.of(rows[1::2])
    found, lines = [], []
    for method in METHODS:
        for lr in args.lr:
            lines.append([method, f"{lr:g}"])
            for factor in args.scale:
                values = []
                for seed in range(args.seeds):
                    sae, trained = run(data, method, lr, factor, seed, args)
                    if trained.densities is not None:
                        of = thresholds_for(sae.pre_activations, between.split(PART), trained.densities, len(between))
                        sae.threshold = of.threshold.to(sae.W_dec).reshape(-1)
                    fvu, l0 = fvu_and_l0(sae, x)
                    values.append(fvu)
                    found.append({"method": method, "lr": lr, "scale": factor, "seed": seed, "fvu": fvu, "l0": l0})
                    print("  ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
                lines[-1].append(f"{sum(values) / len(values):.4f}")
    print("\n" + table(["method", "lr", *(f"{factor:g}" for factor in args.scale)], lines) + "\n", flush=True)
    return found


def thresholds(data: Data, args: argparse.Namespace) -> list[dict[str, Any]]:
    """L0 of every batch-wide method and seed by both ways of setting thresholds."""
    x = data.of(torch.from_numpy(data.corpus.held_out_rows(args.evaluated)))
    found = []
    for method in [method for method in METHODS if method != "TopK"]:
        for seed in range(args.seeds):
            sae, trained = run(data, method, args.threshold_lr, 1.0, seed, args)
            rows = calibration_rows(data.corpus, args.evaluated, print)
            line: dict[str, Any] = {"method": method, "seed": seed}
            alone = rows._replace(training=rows.held_out)
            for name, text in {"held-out text": alone, "saelab.calibrate": rows}.items():
                calibrate(sae, data.lm, text, data.site, trained.densities, inputs=InputMap(data.scale))
                line[name] = fvu_and_l0(sae, x)[1]
            print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)
            found.append(line)
    lines = [[str(v) if isinstance(v, int | str) else f"{v:.2f}" for v in line.values()] for line in found]
    print("\n" + table(list(found[0]), lines))
    return found


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--n-features", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--scale", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.3])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threshold-lr", type=float, default=8e-3)
    parser.add_argument("--evaluated", type=int, default=300_000)
    parser.add_argument("--only", choices=["scale", "thresholds"])
    args = parser.parse_args()
    cache = open_cache(args.cache)
    (site,) = cache.sites
    if cache.tokens < args.tokens:
        raise SaelabError(f"--cache {args.cache}: has {cache.tokens:,} tokens; {args.tokens:,} are needed")
    x = torch.cat([part.values for part in cache.in_order(site)])
    scale = math.sqrt(x.shape[1] / x[:SAMPLE].float().square().sum(1).mean().item())
    lm = load_language_model(ModelSettings("demo"), device="cpu")
    data = Data(x, scale, lm, open_corpus(CorpusSettings("demo"), lm.tokenizer, 256), site)
    record: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(args).items()}}
    for name, study in {"scale": scales, "thresholds": thresholds}.items():
        if args.only in (None, name):
            record[name] = study(data, args)
            command.write_json(args.json, record)


if __name__ == "__main__":
    command.run(main)
