"""Every affinity, allocation and auxiliary loss on the demo language model: one table, equal tokens, several seeds.

All autoencoders see the same activations, read once; a seed sets their order and the initial weights. Each is then
evaluated in inference mode on held-out text: allocations over a batch by their calibrated thresholds, the gradient
affinity by plain activations. Rows labelled "oracle" select by the gradient, which has seen the next token.

under half the curve   share of ranks whose density is below half of one reference curve, the Zipf fit of the first
                       seed's TopK, the same for all
median density         over all features, including never active ones

    python scripts/bench/demo_methods.py --json results.json          # some half an hour on two cores
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import command
import torch
from table import table
from torch import Tensor

from saelab import CorpusSettings, ModelSettings, SparseAutoencoder, fidelity, load_language_model, open_corpus
from saelab.activations.stream import read_activations
from saelab.analysis.fidelity import Fidelity
from saelab.corpus import Corpus
from saelab.lm.model import LanguageModel
from saelab.progress import bar
from saelab.sae.allocation.capacity import ZipfFit, expected_densities, fit_zipf
from saelab.sae.model import Batch
from saelab.sae.settings import AffinitySettings, AllocationSettings, AuxSettings, SaeSettings
from saelab.sae.thresholds import calibrate
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import train

SITE, CONTEXT = "blocks.2.hook_resid_post", 256
HELD_OUT, CE_TOKENS, CALIBRATION = 300_000, 32_768, 80_000
SAMPLE = 32_768


def methods(n_features: int, k: int) -> dict[str, SaeSettings]:
    """Every method by its name."""

    def made(
        allocation: str = "token_choice", capacity: str = "zipf", aux: str = "aux_k", **changed: Any
    ) -> SaeSettings:
        settings = AllocationSettings(allocation, capacity)
        return SaeSettings(n_features, k, allocation=settings, aux=AuxSettings(aux), **changed)

    found = {
        "TopK (token choice)": made(),
        "TopK, bf16 selection": made(selection="bfloat16"),
        "TopK, aux_zipf": made(aux="aux_zipf"),
        "mutual choice": made("mutual_choice"),
        "feature choice, uniform": made("feature_choice", "uniform"),
        "feature choice, Zipf": made("feature_choice"),
    }
    betas = {f"gradient TopK, beta {beta:g}": AffinitySettings("gradient", beta) for beta in (0.3, 1.0, 3.0)}
    return found | {name: made(affinity=affinity) for name, affinity in betas.items()}


class Remembering(LanguageModel):
    """The same model, which computes activations and clean logits of held-out rows only once."""

    def __init__(self, lm: LanguageModel) -> None:
        self.__dict__ = dict(lm.__dict__)
        self._activations: dict[int, dict[str, Tensor]] = {}
        self._logits: dict[int, Tensor] = {}

    def activations(self, rows: Tensor, sites: Iterable[str]) -> dict[str, Tensor]:
        key = rows.data_ptr()  # fidelity passes views of one tensor of rows
        if key not in self._activations:
            self._activations[key] = super().activations(rows, sites)
        return self._activations[key]

    def logits(self, rows: Tensor) -> Tensor:
        key = rows.data_ptr()
        if key not in self._logits:
            self._logits[key] = super().logits(rows)
        return self._logits[key]


class Data:
    """Training activations with gradients, held-out rows to calibrate on and others to evaluate on."""

    def __init__(self, lm: LanguageModel, corpus: Corpus, tokens: int) -> None:
        batches, n = [], 0
        read = read_activations(lm, corpus.train_rows(seed=0), SITE, rows_per_forward=32, gradients=True)
        for batch in bar(read, "activations and gradients", tokens, len):
            batches.append(batch)
            n += len(batch)
            if n >= tokens:
                break
        self.x = torch.cat([batch.values for batch in batches])[:tokens]
        self.gradients = torch.cat([batch.gradients for batch in batches if batch.gradients is not None])[:tokens]
        self.scale = math.sqrt(self.x.shape[1] / self.x[:SAMPLE].square().sum(1).double().mean().item())
        rows = torch.from_numpy(corpus.held_out_rows(HELD_OUT + CALIBRATION))
        split = -(-HELD_OUT // (CONTEXT - 1))
        self.rows, calibration = rows[:split], rows[split:]
        ids = calibration.long().split(32)
        self.calibration = [lm.activations(i, [SITE])[SITE][lm.ordinary(i)].float() * self.scale for i in ids]

    def batches(self, seed: int, size: int, gradients: bool) -> Iterator[Batch]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        for chosen in order.split(size):
            yield Batch(self.x[chosen] * self.scale, gradients=self.gradients[chosen] if gradients else None)


def run(data: Data, settings: SaeSettings, training: TrainingSettings, seed: int) -> tuple[SparseAutoencoder, float]:
    """A trained autoencoder for unscaled activations, and the seconds its training took."""
    torch.manual_seed(seed)
    sae = SparseAutoencoder(data.x.shape[1], settings.n_features, settings.k)
    sae.initialise(data.x[:SAMPLE] * data.scale)
    begin = time.monotonic()
    trained = train(sae, data.batches(seed, training.batch, settings.needs_gradients), training, settings)
    seconds = time.monotonic() - begin
    if trained.densities is not None:
        tokens = sum(len(x) for x in data.calibration)
        sae.threshold = calibrate(sae.pre_activations, data.calibration, trained.densities, tokens).threshold
        sae.threshold = sae.threshold.to(sae.W_dec).reshape(-1)
    return sae.folded(data.scale).requires_grad_(False), seconds


def figures(result: Fidelity, curve: Tensor) -> dict[str, float]:
    densities = (result.counts.double() / result.tokens).sort(descending=True).values
    return {
        "fvu": result.fvu,
        "delta_ce": result.delta_ce,
        "loss_recovered_zero": result.loss_recovered_zero,
        "loss_recovered_mean": result.loss_recovered_mean,
        "l0": result.l0,
        "never_active": result.never_active_share,
        "below_1e4": result.share_below_1e4,
        "below_1e5": result.share_below_1e5,
        "under_half_curve": (densities < 0.5 * curve).double().mean().item(),
        "median_density": densities.median().item(),
    }


COLUMNS = {
    "fvu": ("FVU", 4, 1),
    "delta_ce": ("delta CE (nats)", 4, 1),
    "loss_recovered_zero": ("recovered, zero", 4, 1),
    "loss_recovered_mean": ("recovered, mean", 4, 1),
    "l0": ("L0", 2, 1),
    "never_active": ("never active (%)", 2, 100),
    "below_1e4": ("density < 1e-4 (%)", 1, 100),
    "below_1e5": ("density < 1e-5 (%)", 2, 100),
    "under_half_curve": ("under half the curve (%)", 1, 100),
}


def summary(rows: dict[str, list[dict[str, float]]]) -> str:
    """A table: mean over seeds ± half the range."""
    cells = []
    for name, seeds in rows.items():
        cells.append([name])
        for key, (_, digits, factor) in COLUMNS.items():
            values = [factor * seed[key] for seed in seeds]
            cells[-1].append(f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}")
    return table(["method", *(title for title, _, _ in COLUMNS.values())], cells)


def paired(rows: dict[str, list[dict[str, float]]], better: str, worse: str, key: str) -> str:
    """A line that says whether `better` is below `worse` in `key` for every seed."""
    differences = [a[key] - b[key] for a, b in zip(rows[better], rows[worse], strict=True)]
    verdict = "shown" if max(differences) < 0 else "refuted" if min(differences) > 0 else "not shown"
    title, digits, factor = COLUMNS[key]
    listed = ", ".join(f"{factor * d:+.{digits}f}" for d in differences)
    return f"- {better} below {worse} in {title}: {verdict} (differences by seed: {listed})"


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--n-features", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--only", nargs="*", help="methods whose name begins with one of these")
    args = parser.parse_args()
    lm = load_language_model(ModelSettings("demo"), device="cpu")
    data = Data(lm, open_corpus(CorpusSettings("demo"), lm.tokenizer, CONTEXT), args.tokens)
    training = TrainingSettings(tokens=args.tokens, batch=args.batch, lr=args.lr, log_every=10**9)
    evaluated, held_out = Remembering(lm), data.rows[: -(-args.held_out // (CONTEXT - 1))].long()
    few_tokens = int(lm.ordinary(held_out[:128]).sum())
    rows: dict[str, list[dict[str, float]]] = {}
    oracles: dict[str, list[dict[str, float]]] = {}
    curve: tuple[ZipfFit, Tensor] | None = None
    for seed in range(args.seeds):
        for name, settings in methods(args.n_features, args.k).items():
            if args.only and not name.startswith(tuple(args.only)):
                continue
            sae, seconds = run(data, settings, training, seed)
            result = fidelity(sae, evaluated, held_out, SITE, ce_tokens=CE_TOKENS)
            if curve is None:
                fit = fit_zipf(result.counts / result.tokens)
                curve = fit, expected_densities(args.n_features, args.k, args.batch, fit.exponent, fit.shift)
            line = figures(result, curve[1]) | {"training_seconds": seconds}
            rows.setdefault(name, []).append(line)
            print(f"seed {seed}  {name:28} " + "  ".join(f"{k} {v:.4g}" for k, v in line.items()), flush=True)
            if settings.beta and seed == 0:
                for label, oracle in ((name, False), (f"{name} (oracle: sees the next token)", True)):
                    few = fidelity(sae, lm, held_out[:128], SITE, ce_tokens=CE_TOKENS, oracle=oracle)
                    oracles.setdefault(label, []).append(figures(few, curve[1]))
            write(args, curve, rows | {f"{label}; {few_tokens} tokens": line for label, line in oracles.items()})
    assert curve is not None
    print(f"\nreference curve: exponent {curve[0].exponent:.3f}, shift {curve[0].shift:.1f}, R2 {curve[0].r2:.3f}\n")
    print(summary(rows) + "\n")
    if oracles:
        print(f"Seed 0 on {few_tokens:,} tokens, in inference and by the oracle:\n\n{summary(oracles)}\n")
    claims = [
        ("mutual choice", "TopK (token choice)", "fvu"),
        ("feature choice, Zipf", "TopK (token choice)", "never_active"),
        ("feature choice, Zipf", "mutual choice", "never_active"),
        ("TopK, aux_zipf", "TopK (token choice)", "never_active"),
        ("TopK, aux_zipf", "TopK (token choice)", "under_half_curve"),
        *((f"gradient TopK, beta {beta}", "TopK (token choice)", "delta_ce") for beta in ("0.3", "1", "3")),
    ]
    print("\n".join(paired(rows, *claim) for claim in claims if claim[0] in rows and claim[1] in rows))


def write(args: argparse.Namespace, curve: tuple[ZipfFit, Tensor] | None, rows: dict[str, Any]) -> None:
    record = {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "curve": vars(curve[0]) if curve else None,
        "torch": torch.__version__,
        "rows": rows,
    }
    command.write_json(args.json, record)


if __name__ == "__main__":
    command.run(main)
