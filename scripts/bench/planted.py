"""Which way of training finds planted features: every method on the same planted dictionaries.

    python scripts/bench/planted.py [--crowded] [--seeds N] [--tokens N] [--json FILE]

planted_truth.py defines the data and the scores. Each seed gives a new dictionary, new tokens and a new random start,
the same for every method; all train on the same tokens in the same order. k is the mean number of planted features of a
token, and inference is set so that as many are active (within 2%, checked). The tables and the verdicts are printed as
Markdown; a verdict is computed from the differences between two methods of one seed. A verdict is valid for its setting
only: `--crowded` plants as many features in half as many dimensions.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import command
import torch
from planted_truth import Scores, draw, learn, plant, random_dictionary, score, set_l0
from table import table as markdown

from saelab.sae.settings import AffinitySettings, AllocationSettings, AuxSettings, SaeSettings
from saelab.training.settings import TrainingSettings

N_TRUE, EXPONENT, SHIFT, BATCH = 512, 1.0, 10.0, 512
CALIBRATION, HELD_OUT = 32_768, 131_072
TOLERANCE = 0.02

ALLOCATIONS = {
    "token choice": AllocationSettings("token_choice"),
    "mutual choice": AllocationSettings("mutual_choice"),
    "feature choice, Zipf": AllocationSettings("feature_choice"),
    "feature choice, uniform": AllocationSettings("feature_choice", capacity="uniform"),
}
AUXILIARIES = ("none", "aux_k", "aux_zipf")
RANDOM = "random dictionary"

Table = dict[str, list[Scores]]
"""The scores of each method, one per seed."""


@dataclass(frozen=True)
class Setting:
    d_in: int
    l0: int
    """Mean number of planted features of a token, and k."""
    noise: float
    lr: float


USUAL = Setting(d_in=128, l0=8, noise=0.2, lr=5e-3)
CROWDED = Setting(d_in=64, l0=5, noise=0.1, lr=1e-2)


@dataclass(frozen=True)
class Comparison:
    """Which of two methods scores lower; the differences are paired by seed."""

    claim: str
    differences: list[float]

    @property
    def verdict(self) -> str:
        """Shown if every seed agrees with the claim."""
        if all(difference < 0 for difference in self.differences):
            return "shown"
        opposite = all(difference > 0 for difference in self.differences)
        return "not shown (the opposite in every seed)" if opposite else "not shown"


def methods(n_features: int, k: int) -> dict[str, SaeSettings]:
    """Every method by its name."""

    def made(allocation: str, aux: str, affinity: str = "activation") -> SaeSettings:
        who = ALLOCATIONS[allocation]
        return SaeSettings(n_features, k, affinity=AffinitySettings(affinity), allocation=who, aux=AuxSettings(aux))

    found = {}
    for allocation in ALLOCATIONS:
        for aux in AUXILIARIES if "uniform" not in allocation else AUXILIARIES[:1]:
            found[f"{allocation}; {aux}"] = made(allocation, aux)
    for allocation in ("token choice", "mutual choice"):
        found[f"{allocation}, gradient; aux_k"] = made(allocation, "aux_k", "gradient")
    return found


def run_seed(setting: Setting, seed: int, tokens: int, say: Callable[[str], None]) -> dict[str, Scores]:
    """Every method's scores on the dictionary of one seed."""
    l0 = setting.l0
    planted = plant(setting.d_in, N_TRUE, l0, exponent=EXPONENT, shift=SHIFT, noise=setting.noise, seed=seed)
    data, calibration, held_out = (
        draw(planted, n, 10 * seed + part) for part, n in enumerate((tokens, CALIBRATION, HELD_OUT), start=1)
    )
    scores = {}
    training = TrainingSettings(tokens, BATCH, setting.lr, log_every=100)
    for name, settings in methods(N_TRUE, l0).items():
        begin = time.monotonic()
        sae, densities, _ = learn(settings, training, data, seed)
        k = set_l0(sae, densities, l0, calibration.x)
        scores[name] = score(sae, planted, held_out, k)
        say(f"seed {seed}: {name}: FVU {scores[name].fvu:.4f} in {time.monotonic() - begin:.0f} s")
    sae = random_dictionary(SaeSettings(N_TRUE, l0), data, seed)
    scores[RANDOM] = score(sae, planted, held_out, set_l0(sae, None, l0, calibration.x))
    return scores


def comparisons(table: Table) -> list[Comparison]:
    """The four claims, each for every pair of methods that differ only in the claim's part."""

    def pair(claim: str, lower: str, higher: str, figure: Callable[[Scores], float]) -> Comparison:
        both = zip(table[lower], table[higher], strict=True)
        return Comparison(f"{claim}: {lower} < {higher}", [figure(a) - figure(b) for a, b in both])

    found = []
    for aux in AUXILIARIES:
        found.append(pair("FVU", f"mutual choice; {aux}", f"token choice; {aux}", lambda s: s.fvu))
    for aux in AUXILIARIES:
        for other in ("token choice", "mutual choice"):
            found.append(pair("dead", f"feature choice, Zipf; {aux}", f"{other}; {aux}", lambda s: s.dead))
    for allocation in list(ALLOCATIONS)[:3]:
        zipf, k = f"{allocation}; aux_zipf", f"{allocation}; aux_k"
        found.append(pair("dead", zipf, k, lambda s: s.dead))
        found.append(pair("under-used", zipf, k, lambda s: s.under_used))
    worst = [min(scores, key=lambda s: s.recovered) for scores in zip(*_trained(table), strict=True)]
    differences = [r.recovered - w.recovered / 10 for r, w in zip(table[RANDOM], worst, strict=True)]
    found.append(Comparison(f"recovered: {RANDOM} < a tenth of the worst trained method", differences))
    return found


def _trained(table: Table) -> list[list[Scores]]:
    return [scores for name, scores in table.items() if name != RANDOM]


def spread(values: list[float], digits: int = 3) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def report(table: Table, setting: Setting, tokens: int) -> str:
    """Both tables as Markdown."""
    seeds = len(next(iter(table.values())))
    head = (
        f"{N_TRUE} planted features in {setting.d_in} dimensions (Zipf exponent {EXPONENT:g}, shift {SHIFT:g}, "
        f"{setting.l0} active on a token, noise {setting.noise:g} of the signal); {N_TRUE} features learnt from "
        f"{tokens:,} tokens (batch {BATCH}, lr {setting.lr:g}); scored on {HELD_OUT:,} others. "
        f"Mean ± standard deviation over {seeds} seeds."
    )
    columns = ["inference k", "L0", "recovered", "mean cosine", "FVU", "dead %", "under-used %", "delta CE"]
    rows = []
    for name, scores in table.items():
        cells = [spread([s.k for s in scores], 2), spread([s.l0 for s in scores], 2)]
        cells += [spread([getattr(s, field) for s in scores]) for field in ("recovered", "mean_cosine")]
        cells.append(spread([s.fvu for s in scores], 4))
        cells += [spread([100 * getattr(s, field) for s in scores], 1) for field in ("dead", "under_used")]
        rows.append([name, *cells, spread([s.delta_ce for s in scores], 4)])
    off = [
        f"{name} ({s.l0:.2f}, seed {seed})"
        for name, scores in table.items()
        for seed, s in enumerate(scores)
        if abs(s.l0 / setting.l0 - 1) > TOLERANCE
    ]
    claims = [
        [c.claim, ", ".join(f"{difference:+.4f}" for difference in c.differences), spread(c.differences, 4), c.verdict]
        for c in comparisons(table)
    ]
    return "\n\n".join(
        [
            head,
            markdown(["method", *columns], rows),
            f"L0 further than 2% from {setting.l0}: {', '.join(off) or 'none'}.",
            markdown(["claim", "difference per seed", "mean ± sd", "verdict"], claims),
        ]
    )


def as_json(table: Table, setting: Setting, tokens: int) -> dict:
    return {
        "setting": asdict(setting) | {"n_true": N_TRUE, "exponent": EXPONENT, "shift": SHIFT},
        "training": {"tokens": tokens, "batch": BATCH},
        "machine": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "methods": {name: [asdict(s) for s in scores] for name, scores in table.items()},
        "claims": [asdict(c) | {"verdict": c.verdict} for c in comparisons(table)],
    }


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--crowded", action="store_true", help="64 dimensions for the 512 features instead of 128")
    parser.add_argument("--seeds", type=command.whole(1), default=3, help="dictionaries to average over (3)")
    parser.add_argument("--tokens", type=command.whole(1), default=1_000_000, help="training tokens (1,000,000)")
    options = parser.parse_args()
    setting = CROWDED if options.crowded else USUAL
    table: Table = {}
    say = partial(print, file=sys.stderr, flush=True)
    for seed in range(options.seeds):
        for name, scores in run_seed(setting, seed, options.tokens, say).items():
            table.setdefault(name, []).append(scores)
    print(report(table, setting, options.tokens))
    command.write_json(options.json, as_json(table, setting, options.tokens))


if __name__ == "__main__":
    command.run(main)
