"""Gradient-aware TopK: the normalisation of g, beta, and planted features of small magnitude and large effect.

    python scripts/bench/gradient.py planted

Planted features as in planted_truth.py, some of them of small magnitude; half of these move the readout's logits far.
`recovered` (one-to-one at cosine above 0.9) is given for these, for the other small ones and for the rest.

    saelab cache quickstart --out caches/quickstart --tokens 1.3e6 cache.gradients=true
    python scripts/bench/gradient.py demo --cache caches/quickstart

The demo model, trained from a cache and evaluated in inference mode on held-out text.

    saelab train quickstart activations.cache=caches/quickstart
    python scripts/bench/gradient.py selection --cache caches/quickstart --run runs/quickstart

Share of TopK's entries that the gradient replaces in one autoencoder, by the length of a token's g.

batch      g over its root mean square over the batch
token      g of each token over the token's own root mean square
shuffled   g of another token, normalised over the batch: the control, whose gain must vanish

Mean ± standard deviation over seeds; a seed sets the initial weights, and the planted dictionary or the order of the
cached tokens. `difference` is from TopK of the same seed.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import command
import torch
from methods_claims import COLUMNS
from planted_truth import (
    RECOVERED,
    Planted,
    Sample,
    Small,
    cosine_similarity,
    draw,
    largest_matching,
    learn,
    plant,
    score,
    set_l0,
)
from table import table
from torch import Tensor

from saelab import (
    AffinitySettings,
    Batch,
    CorpusSettings,
    ModelSettings,
    SaeSettings,
    SparseAutoencoder,
    TrainingSettings,
    fidelity,
    load,
    load_language_model,
    new_autoencoder,
    open_cache,
    open_corpus,
)
from saelab.errors import SaelabError
from saelab.sae.fold import fold
from saelab.training.trainer import train

SITE, CONTEXT = "blocks.2.hook_resid_post", 256
BETAS = (0.03, 0.1, 0.3, 1.0)
TOPK = "TopK"
SAMPLE = 32_768
HELD_OUT, CE_TOKENS = 60_000, 16_384

Figures = dict[str, float]


def _per_token(g: Tensor) -> Tensor:
    """g ``[tokens, d_in]`` over each token's root mean square; the affinity's own division then changes nothing."""
    g = g.float()
    return g / g.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(g.dtype).tiny)


def _of_another(g: Tensor) -> Tensor:
    return g[torch.randperm(len(g), generator=torch.Generator().manual_seed(0))]


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {"batch": lambda g: g, "token": _per_token, "shuffled": _of_another}
"""The gradients of a normalisation, from those of the data; the affinity divides them by their RMS over the batch."""


def methods(betas: Sequence[float]) -> dict[str, tuple[str, float]]:
    """Normalisation and beta of each method by its name; TopK is beta 0."""
    return {TOPK: ("batch", 0.0)} | {f"{each}, beta {beta:g}": (each, beta) for each in GRADIENTS for beta in betas}


def settings_of(n_features: int, k: int, beta: float) -> SaeSettings:
    return SaeSettings(n_features, k, affinity=AffinitySettings("gradient", beta))


# planted features

D_IN, N_TRUE, L0, BATCH, PLANTED_HELD_OUT = 128, 256, 4, 256, 65_536


def found(planted: Planted, sae: SparseAutoencoder) -> Tensor:
    """The planted features that have a decoder row of their own at a cosine above 0.9, bool ``[n_true]``."""
    pairs = largest_matching(cosine_similarity(planted.directions, sae.W_dec) > RECOVERED)
    mask = torch.zeros(len(planted.directions), dtype=torch.bool)
    mask[list(pairs)] = True
    return mask


def strength(planted: Planted, data: Sample) -> tuple[float, float]:
    """Mean |d . g| of the effective features on tokens on which they are active, and on the others; g has RMS 1."""
    own = planted.directions[planted.effective]
    # nothing but noise shares their directions, and the smallest magnitude is half of the mean
    active = data.x @ own.T > planted.scale * planted.magnitudes[planted.effective] / 4
    aligned = (data.gradients @ own.T).abs() / data.gradients.square().mean().sqrt()
    return aligned[active].mean().item(), aligned[~active].mean().item()


def planted_seed(args: argparse.Namespace, seed: int) -> dict[str, Figures]:
    """The figures of each method on the dictionary of one seed."""
    small = Small(args.every, args.magnitude, args.effect)
    planted = plant(D_IN, N_TRUE, L0, exponent=1.0, shift=10.0, noise=args.noise, seed=seed, small=small)
    data, calibration, held_out = (
        draw(planted, n, 10 * seed + part) for part, n in enumerate((args.tokens, 16_384, PLANTED_HELD_OUT), start=1)
    )
    active, inactive = strength(planted, held_out)
    report(seed, "|d . g| of effective", {"active": active, "inactive": inactive})
    training = TrainingSettings(args.tokens, BATCH, args.lr, log_every=10**9)
    control, figures = (planted.magnitudes < 1) & ~planted.effective, {}
    for name, (normalise, beta) in chosen(args).items():
        changed = dataclasses.replace(data, gradients=GRADIENTS[normalise](data.gradients))
        sae, _, _ = learn(settings_of(N_TRUE, args.k, beta), training, changed, seed)
        result, mask = score(sae, planted, held_out, set_l0(sae, None, args.k, calibration.x)), found(planted, sae)
        figures[name] = {
            "effective": mask[planted.effective].double().mean().item(),
            "control": mask[control].double().mean().item(),
            "rest": mask[planted.magnitudes == 1].double().mean().item(),
            "fvu": result.fvu,
            "delta_ce": result.delta_ce,
            "never_active": result.dead,
            "l0": result.l0,
        }
        report(seed, name, figures[name])
    return figures


# the demo model


def read(cache: Path, tokens: int) -> tuple[Tensor, Tensor]:
    """The first `tokens` activations of a cache and their gradients. Raises SaelabError if it has fewer."""
    parts, n = [], 0
    for batch in open_cache(cache).in_order(SITE, gradients=True):
        parts.append(batch)
        n += len(batch)
        if n >= tokens:
            break
    if n < tokens:
        raise SaelabError(f"--cache {cache}: has only {n:,} tokens; {tokens:,} are needed")
    x, g = ([getattr(part, name) for part in parts] for name in ("values", "gradients"))
    return torch.cat(x)[:tokens], torch.cat(g)[:tokens]


class Demo:
    """Cached activations with gradients, and held-out rows of the same text to evaluate on."""

    def __init__(self, cache: Path, tokens: int, held_out: int) -> None:
        self.x, self.gradients = read(cache, tokens)
        self.scale = math.sqrt(self.x.shape[1] / self.x[:SAMPLE].float().square().sum(1).double().mean().item())
        self.lm = load_language_model(ModelSettings("demo"), device="cpu")
        corpus = open_corpus(CorpusSettings("demo"), self.lm.tokenizer, CONTEXT)
        self.rows = torch.from_numpy(corpus.held_out_rows(held_out)).long()

    def batches(self, normalise: str, seed: int, size: int) -> Iterator[Batch]:
        g, order = self.gradients, torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        g = GRADIENTS[normalise](g)
        for which in order.split(size):
            yield Batch(self.x[which].float() * self.scale, gradients=g[which].float())


def demo_seed(args: argparse.Namespace, demo: Demo, seed: int) -> dict[str, Figures]:
    """The figures of each method for one order of the tokens and one start."""
    training = TrainingSettings(args.tokens, args.batch, args.lr, log_every=10**9)
    figures = {}
    for name, (normalise, beta) in chosen(args).items():
        settings = settings_of(args.n_features, args.k, beta)
        sae = new_autoencoder(settings, demo.x[:SAMPLE].float() * demo.scale, seed=seed)
        train(sae, demo.batches(normalise, seed, args.batch), training, settings)
        folded = fold(sae, demo.scale).requires_grad_(False)
        result = fidelity(folded, demo.lm, demo.rows, SITE, ce_tokens=CE_TOKENS)
        figures[name] = {key: getattr(result, f"{key}_share" if key == "never_active" else key) for key in DEMO}
        report(seed, name, figures[name])
    return figures


QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
SELECTION_TOKENS = 8192


def replaced(sae: SparseAutoencoder, x: Tensor, g: Tensor, betas: Sequence[float]) -> str:
    """A table of the share of the entries of plain selection that each method does not select."""
    lengths = torch.linalg.vector_norm(g, dim=1)
    groups = torch.bucketize(lengths, torch.quantile(lengths, torch.tensor(QUANTILES)))
    plain = sae.encode(x).to_dense() > 0
    lines = []
    for name, (normalise, sae.beta) in methods(betas).items():
        kept = plain & (sae.encode(x, GRADIENTS[normalise](g)).to_dense() > 0)
        share = 1 - kept.sum(1) / plain.sum(1)
        parts = [share[groups == group].mean().item() for group in range(len(QUANTILES) + 1)]
        lines.append([name, *(f"{100 * each:.1f}" for each in (share.mean().item(), *parts))])
    titles = [f"{low:.0%} to {high:.0%}" for low, high in itertools.pairwise((0, *QUANTILES, 1))]
    return table(["replaced (%)", "all tokens", *titles], lines)


# what the trainings have in common

PLANTED = {
    "effective": ("recovered: small, effective", 3, 1),
    "control": ("recovered: small", 3, 1),
    "rest": ("recovered: rest", 3, 1),
    "fvu": ("FVU", 4, 1),
    "delta_ce": ("delta CE (nats)", 4, 1),
    "never_active": ("dead (%)", 1, 100),
    "l0": ("L0", 2, 1),
}
DEMO = {name: COLUMNS[name] for name in ("fvu", "delta_ce", "loss_recovered_mean", "l0", "never_active")}


def chosen(args: argparse.Namespace) -> dict[str, tuple[str, float]]:
    """The methods of the options --betas and --only; TopK always, since the others are compared with it."""
    everything = methods(args.betas)
    wanted = tuple(args.only or everything)
    return {name: method for name, method in everything.items() if name == TOPK or name.startswith(wanted)}


def report(seed: int, name: str, figures: Figures) -> None:
    line = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"seed {seed}  {name:20} {line}", file=sys.stderr, flush=True)


def spread(values: list[float], digits: int, sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"


def summary(seeds: list[dict[str, Figures]], columns: dict[str, tuple[str, int, int]], compared: str) -> str:
    """A table with a line per method; the last column is the difference in the figure `compared` from TopK."""
    lines = []
    for name in seeds[0]:
        lines.append([name])
        for key, (_, digits, factor) in columns.items():
            lines[-1].append(spread([factor * figures[name][key] for figures in seeds], digits))
        title, digits, factor = columns[compared]
        differences = [factor * (figures[name][compared] - figures[TOPK][compared]) for figures in seeds]
        lines[-1].append(spread(differences, digits, "+"))
    return table(["method", *(title for title, _, _ in columns.values()), f"{title}, difference"], lines)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("on", choices=("planted", "demo", "selection"))
    parser.add_argument("--cache", type=Path, help="activations of the demo model with gradients")
    parser.add_argument("--run", type=Path, help="selection: the run of an autoencoder of the demo model")
    parser.add_argument("--tokens", type=command.whole(1), default=400_000, help="training tokens (400,000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--only", nargs="*", help="methods whose name begins with one of these, and TopK")
    parser.add_argument("--n-features", type=int, default=4096, help="demo (4096)")
    parser.add_argument("--batch", type=int, default=1024, help="demo (1024)")
    parser.add_argument("--k", type=int, help="default: 32 on the demo model, 4 on planted features")
    parser.add_argument("--lr", type=float, help="default: 2e-3 on the demo model, 5e-3 on planted features")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="demo (60,000)")
    parser.add_argument("--every", type=int, default=8, help="planted: one feature in so many is small (8)")
    parser.add_argument("--magnitude", type=float, default=0.5, help="planted: magnitude of the small ones (0.5)")
    parser.add_argument("--effect", type=float, default=3.0, help="planted: logits that an effective one adds (3)")
    parser.add_argument("--noise", type=float, default=0.02, help="planted: noise over signal (0.02)")
    args = parser.parse_args()
    on_demo = args.on == "demo"
    args.k, args.lr = args.k or (32 if on_demo else L0), args.lr or (2e-3 if on_demo else 5e-3)
    if args.on != "planted" and args.cache is None:
        parser.error(f"{args.on} needs --cache")
    if args.on == "selection":
        if args.run is None:
            parser.error("selection needs --run")
        x, g = read(args.cache, SELECTION_TOKENS)
        print(replaced(load(args.run), x.float(), g.float(), args.betas))
        return
    demo, seeds = Demo(args.cache, args.tokens, args.held_out) if on_demo else None, []
    for seed in args.seeds:
        seeds.append(planted_seed(args, seed) if demo is None else demo_seed(args, demo, seed))
        settings = {key: str(value) for key, value in vars(args).items()}
        command.write_json(args.json, {"settings": settings, "seeds": seeds})
    print(summary(seeds, DEMO, "delta_ce") if on_demo else summary(seeds, PLANTED, "effective"))


if __name__ == "__main__":
    command.run(main)
