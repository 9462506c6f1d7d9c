"""What brings dead features back: each remedy goes on from the same half-trained autoencoder of the demo model.

An autoencoder is trained for a while without an auxiliary loss and with too large a learning rate, --lr-before, so
that features die. From that state each remedy, and none, trains on the same further batches with --lr. `back` is the
share of the features that were dead (not active for --dead-after tokens) that are active in the last --dead-after
tokens; `back, held out` the share that is active on tokens that nothing was trained on, in inference. Mean ± standard
deviation over seeds. A second table divides them by the reason for which `saelab.analysis.dead` finds them dead on the
last --dead-after tokens before the remedies; those that it finds alive there are left out of it.

    saelab cache quickstart --out caches/quickstart --tokens 1.3e6 cache.gradients=true
    python scripts/bench/revive.py --cache caches/quickstart          # 13 minutes on one busy core
"""

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

import command
import torch
from table import table
from torch import Tensor

from saelab import AuxSettings, Batch, SaeSettings, Trainer, TrainingSettings, new_autoencoder, open_cache
from saelab.analysis.dead import REASONS, dead
from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder
from saelab.sae.new import bare_autoencoder

SAMPLE = 32_768
RESAMPLE = 245_760
"""Tokens between two resamplings: one, after 40 steps with the remedy, in the defaults."""
REMEDIES: dict[str, tuple[AuxSettings, int | None]] = {
    "none": (AuxSettings("none"), None),
    "aux_k": (AuxSettings("aux_k"), None),
    "aux_k, lift": (AuxSettings("aux_k", lift=True), None),
    "aux_zipf": (AuxSettings("aux_zipf"), None),
    "aux_zipf, lift": (AuxSettings("aux_zipf", lift=True), None),
    "resampling": (AuxSettings("none"), RESAMPLE),
}
COLUMNS = {
    "back": ("back (%)", 100, 1),
    "back_held_out": ("back, held out (%)", 100, 1),
    "dead": ("dead at the end", 1, 0),
    "newly_dead": ("of them newly dead", 1, 0),
    "fvu": ("FVU, held out", 1, 4),
}


def batches(x: Tensor, seed: int, first: int, steps: int, size: int) -> Iterator[Batch]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for step in range(first, first + steps):
        yield Batch(x[order[step * size : (step + 1) * size]].float())


def fvu_and_counts(sae: SparseAutoencoder, x: Tensor) -> tuple[float, Tensor]:
    """FVU on x ``[tokens, d_in]``, and the number of tokens on which each feature is active."""
    error, counts, mean = 0.0, torch.zeros(sae.n_features, dtype=torch.long), x.double().mean(0)
    for part in x.split(4096):
        codes = sae.encode(part.float())
        counts += codes.firing_counts()
        error += (part.double() - sae.decode(codes).double()).square().sum().item()
    return error / (x.double() - mean).square().sum().item(), counts


def reasons(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Why each feature is dead on x ``[tokens, d_in]``: its index in REASONS, or -1, ``[n_features]``."""
    row = 256

    def blocks() -> Iterator[Block]:
        for start in range(0, len(x), 16 * row):
            part = x[start : start + 16 * row].float()
            rows = torch.zeros(-(-len(part) // row), row, dtype=torch.long)
            yield Block(rows, start // row, start + torch.arange(len(part)), part, sae.encode(part))

    found, reason = dead(sae, blocks(), -(-len(x) // row)), torch.full((sae.n_features,), -1)
    reason[torch.from_numpy(found.dead_features)] = torch.from_numpy(found.reason).long()
    return reason


def study(x: Tensor, held_out: Tensor, args: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """The figures of each remedy for one seed."""
    steps = args.before + args.after
    training = TrainingSettings(tokens=steps * args.batch, batch=args.batch, lr=args.lr, log_every=10**9)
    settings = SaeSettings(args.n_features, args.k, aux=AuxSettings("none"))
    begun = dataclasses.replace(training, lr=args.lr_before)
    base = Trainer(new_autoencoder(settings, x[:SAMPLE].float(), seed=seed), begun, settings)
    base.usage.dead_after = args.dead_after
    for batch in batches(x, seed, 0, args.before, args.batch):
        base.step(batch)
    died = base.usage.dead()
    until = args.before * args.batch
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:until][-args.dead_after :]
    reason = torch.where(died, reasons(base.sae, x[order]), -1)
    print(f"seed {seed}: {int(died.sum())} of {args.n_features} dead after {base.tokens:,} tokens", flush=True)
    found = {}
    for name, (aux, resample) in REMEDIES.items():
        if args.only and name not in args.only:
            continue
        changed = dataclasses.replace(settings, aux=aux)
        trainer = Trainer(
            bare_autoencoder(changed, x.shape[1]), dataclasses.replace(training, resample=resample), changed
        )
        trainer.load_state_dict(copy.deepcopy(base.state_dict()))
        trainer.usage.dead_after = args.dead_after
        for batch in batches(x, seed, args.before, args.after, args.batch):
            trainer.step(batch)
        silent = trainer.usage.dead()
        fvu, counts = fvu_and_counts(trainer.sae, held_out)
        of_reason = {name: reason == number for number, name in enumerate(REASONS)}
        found[name] = {
            "died": int(died.sum()),
            "back": (died & ~silent).sum().item() / max(1, int(died.sum())),
            "back_held_out": (died & (counts > 0)).sum().item() / max(1, int(died.sum())),
            "dead": int(silent.sum()),
            "newly_dead": int((silent & ~died).sum()),
            "fvu": fvu,
            **{f"died: {name}": int(which.sum()) for name, which in of_reason.items()},
            **{f"back: {name}": int((which & ~silent).sum()) for name, which in of_reason.items()},
        }
        print(f"  {name:15}" + "  ".join(f"{key} {found[name][key]:.4g}" for key in ("died", *COLUMNS)), flush=True)
    return found


def by_reason(seeds: list[dict[str, dict[str, float]]]) -> str:
    """A table: the share of the features dead for each reason that each remedy brings back, all seeds together."""
    lines = []
    for reason in REASONS:
        total = sum(next(iter(found.values()))[f"died: {reason}"] for found in seeds)
        back = {name: sum(found[name][f"back: {reason}"] for found in seeds) for name in seeds[0]}
        lines.append([reason, f"{total}", *(f"{100 * n / total:.0f}" if total else "" for n in back.values())])
    return table(["reason", "features", *(f"{name} (%)" for name in seeds[0])], lines)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--n-features", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--before", type=int, default=80, help="steps until the remedies begin")
    parser.add_argument("--after", type=int, default=150, help="steps with a remedy")
    parser.add_argument("--dead-after", type=int, default=40_960)
    parser.add_argument("--lr-before", type=float, default=3e-2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=100_000)
    parser.add_argument("--only", nargs="*", choices=REMEDIES, help="these remedies")
    args = parser.parse_args()
    cache = open_cache(args.cache)
    (site,) = cache.sites
    x = torch.cat([part.values for part in cache.in_order(site)])
    x = x * (x.shape[1] / x[:SAMPLE].float().square().sum(1).mean()).sqrt().to(x.dtype)
    held_out, x = x[-args.held_out :], x[: -args.held_out]
    if len(x) < (needed := (args.before + args.after) * args.batch):
        raise SaelabError(f"--cache {args.cache}: has too few tokens; {needed + args.held_out:,} are needed")
    seeds = []
    for seed in range(args.seeds):
        seeds.append(study(x, held_out, args, seed))
        command.write_json(args.json, {"settings": {k: str(v) for k, v in vars(args).items()}, "seeds": seeds})
    died = [next(iter(found.values()))["died"] for found in seeds]
    print(f"\ndead when the remedies begin: {', '.join(f'{number:.0f}' for number in died)} of {args.n_features:,}\n")
    lines = []
    for name in seeds[0]:
        lines.append([name])
        for key, (_, factor, digits) in COLUMNS.items():
            values = [factor * found[name][key] for found in seeds]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            lines[-1].append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
    print(table(["remedy", *(title for title, _, _ in COLUMNS.values())], lines))
    print(f"\n{by_reason(seeds)}")


if __name__ == "__main__":
    command.run(main)
