"""What the auxiliary losses do to under-used features: on the demo model's activations.

Forms of the loss, with token choice:

none        no auxiliary loss
aux_k       dead features explain the error together
together    aux_zipf as it was: under-used and dead features explain the error together
aux_zipf    each under-used feature explains the error alone, dead ones together

The figures are of tokens that nothing was trained on. `under-used` counts ranks whose density is less than half of what
one curve gives them, the Zipf fit of the seed's first autoencoder, and below k / n_features. planted.py has aux_k and
aux_zipf on planted features.

The first seed's autoencoders are also followed: those features that are under-used and alive when aux_zipf first ranks
them, each on its 32 best of 8192 tokens, found anew each time. `won` is the share of these places at which the feature
is among the k strongest. The pulls are those on the entries that the loss first chooses: d . e - z for a feature alone,
d . (e - ehat) together; the loss raises a pre-activation whose pull is above 0, and lowers the others.

    saelab cache quickstart --out caches/quickstart --tokens 1.2e6
    python scripts/bench/under_used.py --cache caches/quickstart
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import torch
from revive import SAMPLE, batches, fvu_and_counts
from table import table
from torch import Tensor

from saelab import AuxSettings, SaeSettings, Trainer, TrainingSettings, new_autoencoder, open_cache
from saelab.errors import SaelabError
from saelab.kernels import sddmm, spmm
from saelab.sae.allocation.capacity import expected_densities, fit_zipf
from saelab.sae.allocation.selection import Selection
from saelab.sae.losses import Forward, auxiliary, under_used
from saelab.sae.model import SparseAutoencoder
from saelab.training.usage import REFRESH

FORMS = {"none": "none", "aux_k": "aux_k", "together": "aux_zipf", "aux_zipf": "aux_zipf"}
"""The setting of each form."""
BEST, FOLLOWED, EVERY = 32, 8192, 48
COLUMNS = {
    "never_active": ("never active", 1),
    "under_used": ("under-used", 0),
    "fvu": ("FVU", 4),
}
PLACES = {
    "pre": ("mean pre-activation", 2),
    "rank": ("median rank", 0),
    "won": ("won (%)", 0),
    "encoder": ("length of the encoder row", 2),
    "bias": ("b_enc", 3),
}


def places(sae: SparseAutoencoder, x: Tensor, features: Tensor) -> dict[str, float]:
    """Figures of `features` on their best tokens among x ``[tokens, d_in]``, and of their encoder rows."""
    pre = sae.pre_activations(x)
    values, tokens = (each.T for each in pre[:, features].topk(BEST, dim=0))
    ranks = torch.stack([1 + (pre[row] > z[:, None]).sum(1) for z, row in zip(values, tokens, strict=True)])
    return {
        "pre": values.mean().item(),
        "rank": ranks.median().item(),
        "won": 100 * (ranks <= sae.k).double().mean().item(),
        "encoder": torch.linalg.vector_norm(sae.W_enc[features], dim=1).mean().item(),
        "bias": sae.b_enc[features].mean().item(),
    }


def pulls(forward: Forward, chosen: Selection) -> dict[str, float]:
    """How the auxiliary loss pulls on the chosen pre-activations above zero, alone and together; means over entries."""
    error, z = (forward.target - forward.reconstruction).detach(), chosen.pattern.values.relu()
    pattern, W_dec = chosen.pattern.with_values(z), forward.W_dec.detach()
    explained = spmm(pattern, W_dec)
    alone, together = sddmm(pattern, error, W_dec) - z, sddmm(pattern, error - explained, W_dec)
    used = z > 0
    return {
        "entries of a token": used.sum().item() / len(error),
        "|ehat| / |e|": (explained.norm() / error.norm()).item(),
        "z": z[used].mean().item(),
        "d . e": (alone + z)[used].mean().item(),
        "d . ehat of the others": (alone - together)[used].mean().item(),
        "lowered alone (%)": 100 * (alone < 0)[used].double().mean().item(),
        "lowered together (%)": 100 * (together < 0)[used].double().mean().item(),
    }


def train(
    x: Tensor, form: str, args: argparse.Namespace, seed: int, watch: Callable[[Trainer], None] | None
) -> tuple[SparseAutoencoder, dict[str, float]]:
    """The autoencoder of a form and a seed, and the pulls on the entries first chosen; `watch` sees every step."""
    training = TrainingSettings(tokens=args.tokens, batch=args.batch, lr=args.lr, log_every=10**9)
    settings = SaeSettings(args.n_features, args.k, aux=AuxSettings(FORMS[form]))
    trainer = Trainer(new_autoencoder(settings, x[:SAMPLE].float(), seed=seed), training, settings)
    first: dict[str, float] = {}

    def together(forward: Forward, chosen: Selection | None, *_: Any) -> Tensor:
        if chosen is not None and not first and trainer.steps >= REFRESH:
            first.update(pulls(forward, chosen))
        return auxiliary(forward, chosen)

    if form == "together":
        trainer.terms = [term._replace(value=together) if term.name == "aux" else term for term in trainer.terms]
    for batch in batches(x, seed, 0, training.steps, args.batch):
        if watch is not None:
            watch(trainer)
        trainer.step(batch)
    if watch is not None:
        watch(trainer)
    trainer.release()
    return trainer.sae, first


def study(x: Tensor, held_out: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of each form and seed, those of the features that are followed, and the first pulls."""
    found: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(args).items()}, "figures": {}, "followed": {}}
    for seed in args.seeds:
        curve: Tensor | None = None
        for form in args.only or FORMS:
            lines: list[dict[str, float]] = []
            features = torch.empty(0)

            def watch(trainer: Trainer, lines: list = lines) -> None:
                nonlocal features
                if trainer.steps == REFRESH:
                    usage = trainer.usage
                    features = (usage.under_used_or_dead(args.batch) & ~usage.dead()).nonzero().squeeze(1)
                since = trainer.steps - REFRESH
                if since >= 0 and (since % EVERY == 0 or trainer.finished):
                    step = {"step": trainer.steps, "features": len(features)}
                    lines.append(step | places(trainer.sae, held_out[:FOLLOWED].float(), features))

            sae, first = train(x, form, args, seed, watch if seed == args.seeds[0] else None)
            fvu, counts = fvu_and_counts(sae, held_out)
            densities = counts.double() / len(held_out)
            if curve is None:
                fit = fit_zipf(densities)
                curve = expected_densities(args.n_features, args.k, args.batch, fit.exponent, fit.shift)
            below = under_used(densities.sort(descending=True).values, curve, 0.5, args.k / args.n_features)
            line = {"never_active": int((counts == 0).sum()), "under_used": int(below.sum()), "fvu": fvu}
            found["figures"].setdefault(form, []).append(line)
            if lines:
                found["followed"][form] = lines
            if first and "pulls" not in found:
                found["pulls"] = first
            print(f"seed {seed}: {form:9}" + "  ".join(f"{k} {v:.5g}" for k, v in line.items()), flush=True)
            command.write_json(args.json, found)
    return found


def report(found: dict[str, Any]) -> str:
    """All tables as Markdown: mean ± standard deviation over seeds; the followed features; the pulls."""
    rows = []
    for form, seeds in found["figures"].items():
        rows.append([form])
        for key, (_, digits) in COLUMNS.items():
            values = [line[key] for line in seeds]
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            rows[-1].append(f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}")
    parts = [table(["form", *(title for title, _ in COLUMNS.values())], rows)]
    followed = [
        [form, f"{line['step']:.0f}", *(f"{line[key]:.{digits}f}" for key, (_, digits) in PLACES.items())]
        for form, lines in found["followed"].items()
        for line in lines
    ]
    parts.append(table(["form", "step", *(title for title, _ in PLACES.values())], followed))
    if "pulls" in found:
        parts.append(table(["first pulls", "mean"], [[name, f"{value:.3g}"] for name, value in found["pulls"].items()]))
    return "\n\n".join(parts)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--n-features", type=command.whole(1), default=4096)
    parser.add_argument("--k", type=command.whole(1), default=32)
    parser.add_argument("--tokens", type=command.whole(1), default=300_000)
    parser.add_argument("--batch", type=command.whole(1), default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=command.whole(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=command.whole(FOLLOWED), default=150_000)
    parser.add_argument("--only", nargs="+", choices=FORMS, help="these forms")
    args = parser.parse_args()
    cache = open_cache(args.cache)
    (site,) = cache.sites
    x = torch.cat([part.values for part in cache.in_order(site)])
    x = x * (x.shape[1] / x[:SAMPLE].float().square().sum(1).mean()).sqrt().to(x.dtype)
    held_out, x = x[-args.held_out :], x[: -args.held_out]
    if len(x) < args.tokens:
        raise SaelabError(f"--cache {args.cache}: has too few tokens; {args.tokens + args.held_out:,} are needed")
    print("\n" + report(study(x, held_out, args)))


if __name__ == "__main__":
    command.run(main)
