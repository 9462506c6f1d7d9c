"""The claims of two papers by id, from what methods.py measured. Reads no run, trains nothing.

A claim about methods is decided by seeds: the difference of two methods that share the initial weights' seed and all
batches, its mean with the 95% interval of Student's t, and each seed. `shown`: the interval is on the claim's side of
0; `the opposite`: on the other; `not shown`: it contains 0. Other intervals are over rows of text, or over features.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from saelab.analysis.intervals import add_by_row, interval
from saelab.runs.config import RunSettings

TOPK, MUTUAL, FEATURE, GRADIENT, FROZEN = "topk", "mutual", "feature", "gradient", "-frozen"
TITLES = {
    f"{TOPK}-none": "TopK, no auxiliary loss",
    TOPK: "TopK, aux_k",
    f"{TOPK}-zipf": "TopK, aux_zipf",
    MUTUAL: "mutual choice, aux_k",
    f"{MUTUAL}-zipf": "mutual choice, aux_zipf",
    FEATURE: "feature choice, Zipf, aux_k",
    GRADIENT: "gradient-aware TopK, aux_k",
    TOPK + FROZEN: "TopK, decoder frozen",
    MUTUAL + FROZEN: "mutual choice, decoder frozen",
    FEATURE + FROZEN: "feature choice, decoder frozen",
    GRADIENT + FROZEN: "gradient-aware TopK, decoder frozen",
}
"""By the name of the folder, in the order of training and of the table."""
UNKNOWN = "no figure known to us"
COLUMNS = {
    "fvu": ("FVU", 4, 1),
    "delta_ce": ("delta CE (nats)", 4, 1),
    "loss_recovered_mean": ("loss recovered, mean", 4, 1),
    "l0": ("L0", 2, 1),
    "never_active": ("never active (%)", 2, 100),
    "under_half": ("under half the curve (%)", 1, 100),
}


class Run(NamedTuple):
    """A finished run: its evaluation, and the arrays of `PerToken`."""

    seed: int
    evaluation: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Found(NamedTuple):
    """What is finished of the study."""

    runs: dict[str, list[Run]]
    """Seeds in order, by method."""
    experiments: dict[str, dict[str, Any]]
    settings: RunSettings | None


Figures = dict[str, list[dict[str, float]]]
Line = list[str]


def line(claim: str, paper: str, here: str, verdict: str) -> Line:
    return [claim, paper, here, verdict]


def mutual_claims(found: Found, figures: Figures) -> list[Line]:
    lines: list[Line] = []
    if spreads := found.experiments.get("spreads"):
        error, l0, of = spreads["error"], spreads["l0"], spreads["features"]
        lines.append(
            line(
                "M1 tokens differ in how hard they are to reconstruct: error per token of TopK, over its mean",
                UNKNOWN,
                f"Gini {shown(error['Gini'])}; the hardest tenth has {shown(error['share of the top tenth'])} of the "
                f"error; 5% and 95% quantiles {_of_mean(error, '5%')} and {_of_mean(error, '95%')}",
                away(error["Gini"], 0.05),
            )
        )
        lines.append(
            line(
                "M2 each feature has at most m tokens (feature choice)",
                "by construction",
                "for any scores and capacities: `tests/sae/allocation/test_rules.py`",
                "shown by tests",
            )
        )
        lines.append(
            line(
                "M3 the budget goes freely to tokens and features (mutual choice)",
                "by construction",
                f"top tenth of the tokens {shown(l0['share of the top tenth'])} of the budget (TopK: 0.1), Gini "
                f"{shown(l0['Gini'])}; top tenth of the features {shown(of['share of the top tenth'])} (TopK: "
                f"{shown(spreads['features of TopK']['share of the top tenth'])})",
                away(l0["Gini"], 0.05),
            )
        )
        lines.append(
            line(
                "M4 the number of active features varies by token (mutual choice, by its threshold)",
                UNKNOWN,
                f"mean {shown(l0['mean'])}, standard deviation {shown(l0['standard deviation'])}, 5% to 95% of the "
                f"tokens {l0['5% quantile']:.0f} to {l0['95% quantile']:.0f}",
                away(l0["standard deviation"], 1),
            )
        )
        lines.append(
            line(
                "M5 aux_zipf generalises aux_k",
                "by construction",
                "if only dead features are under-used both are equal: `tests/training/test_usage.py`",
                "shown by tests",
            )
        )
    zipf, none = f"{TOPK}-zipf", f"{TOPK}-none"
    paired: Sequence[tuple[str, ...]] = (
        ("M6 aux_zipf leaves fewer dead features", zipf, TOPK, "never_active"),
        ("M6 the same, against no auxiliary loss", zipf, none, "never_active"),
        ("M6 aux_zipf leaves fewer under-used features", zipf, TOPK, "under_half"),
        ("M6 the same, against no auxiliary loss", zipf, none, "under_half"),
        ("M6 dead, with mutual choice", f"{MUTUAL}-zipf", MUTUAL, "never_active"),
        ("M6 under-used, with mutual choice", f"{MUTUAL}-zipf", MUTUAL, "under_half"),
        ("M7 fewer dead features", MUTUAL, TOPK, "never_active"),
        ("M7 fewer dead features", FEATURE, TOPK, "never_active", "nearly none dead"),
        ("M8 better reconstruction at equal sparsity", MUTUAL, TOPK, "fvu"),
        ("M8 better reconstruction at equal sparsity", f"{MUTUAL}-zipf", zipf, "fvu"),
        ("M8 better reconstruction at equal sparsity", FEATURE, TOPK, "fvu"),
    )
    lines += [made for each in paired if (made := by_seed(figures, *each)) is not None]
    if MUTUAL in found.runs and TOPK in found.runs:
        lines.append(
            line(
                "M8 the same for one seed, over rows: FVU of mutual choice less that of TopK",
                UNKNOWN,
                shown(difference_of_errors(found.runs[MUTUAL][0], found.runs[TOPK][0]), sign=True),
                below(difference_of_errors(found.runs[MUTUAL][0], found.runs[TOPK][0])),
            )
        )
    if dealt := found.experiments.get("dealt"):
        fvu, gain, of_dealt = dealt["fvu"], dealt["gain"], dealt["gain_dealt"]
        lines.append(
            line(
                "M9 because of adaptive computation: FVU that mutual choice's own numbers per token gain over constant "
                "ones; and the same numbers dealt to random tokens (ours)",
                "not tested there",
                f"{shown(gain, sign=True)} of {shown(fvu['constant'])}; dealt {shown(of_dealt, sign=True)}",
                f"own numbers {above(gain)}; dealt ones {'gain nothing' if of_dealt[2] <= 0 else 'gain too'}",
            )
        )
    if spreads:
        lines.append(
            line(
                "M9 hard tokens get more: rank correlation of mutual choice's numbers with TopK's error (ours)",
                "not tested there",
                shown(spreads["correlation"], sign=True),
                above(spreads["correlation"]),
            )
        )
    for name, what in (("crossed", "TopK's"), ("dealt", "mutual choice's")):
        if each := found.experiments.get(name):
            fvu = each["fvu"]
            lines.append(
                line(
                    f"{what} dictionary selected per token, batch-wide (ours): FVU",
                    "not tested there",
                    f"{shown(fvu['constant'])}, {shown(fvu['batch-wide'])}",
                    f"batch-wide is {compared(fvu['batch-wide'], fvu['constant'])}",
                )
            )
    if lines:
        lines.append(["M10 it scales", "up to 34 M features", "", "cannot be shown at this size"])
    return lines


def gradient_claims(found: Found, figures: Figures) -> list[Line]:
    lines: list[Line] = []
    if oracle := found.experiments.get("oracle"):
        lines.append(
            line(
                "G2 selection uses the gradient: share of its entries that activations select too",
                "by construction",
                f"{shown(oracle['shared'])}; FVU {oracle['fvu'][0]:.4f} by activation and {oracle['fvu'][1]:.4f} by "
                f"the gradient, delta CE {oracle['delta_ce'][0]:.4f} and {oracle['delta_ce'][1]:.4f} "
                f"({oracle['tokens']:,} tokens)",
                "shown" if oracle["shared"][2] < 1 else "not shown",
            )
        )
    spliced = by_seed(figures, "G3 lower spliced loss at equal sparsity", GRADIENT, TOPK, "delta_ce")
    lines += [spliced] if spliced is not None else []
    if steering := found.experiments.get("steering"):
        topk, gradient = (np.array(each) for each in steering["score"])
        difference = mean(gradient[:, 0] - topk[:, 0])
        lines.append(
            line(
                f"G4 its features steer better in arbitrary contexts: steering score (logits), {steering['features']} "
                "features matched by density",
                "better on average; " + UNKNOWN,
                f"{shown(mean(gradient[:, 0]))} against TopK's {shown(mean(topk[:, 0]))}, difference "
                f"{shown(difference, sign=True)}; random directions {shown(mean(gradient[:, 1]))} and "
                f"{shown(mean(topk[:, 1]))}",
                above(difference),
            )
        )
        topk, gradient = steering["share_against_effect"]
        lines.append(
            line(
                "G5 features are representations and actions: rank correlation of activation share and effect of "
                "ablation",
                UNKNOWN,
                f"gradient-aware {shown(gradient, sign=True)}, TopK {shown(topk, sign=True)}",
                {
                    "shown": "the effect follows the share",
                    "the opposite": "the larger the share, the smaller the effect",
                }.get(above(gradient), "the effect does not follow the share"),
            )
        )
    return lines


def by_seed(figures: Figures, claim: str, better: str, worse: str, key: str, paper: str = UNKNOWN) -> Line | None:
    """The line of the claim that `better` is below `worse` in the figure `key`; None if they have no seed in common."""
    title, digits, factor = COLUMNS[key]
    other = {line["seed"]: line[key] for line in figures.get(worse, ())}
    each = [factor * (line[key] - other[line["seed"]]) for line in figures.get(better, ()) if line["seed"] in other]
    if not each:
        return None
    seeds = ", ".join(f"{value:+.{digits}f}" for value in each)
    what = f"{claim}: {title} of {TITLES[better]} less that of {TITLES[worse]}"
    if len(each) < 2:
        return [what, paper, f"{seeds} (one seed)", "one seed only"]
    low, high = students(each)
    here = f"{statistics.mean(each):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}); seeds {seeds}"
    return [what, paper, here, below((0.0, low, high))]


def students(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of `values`, by Student's t."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def difference_of_errors(a: Run, b: Run) -> tuple[float, float, float]:
    """Mean error per token of `a` less that of `b`, on the same tokens, with its interval over rows."""
    sums = np.zeros((int(a.arrays["rows"]), 2))
    error = a.arrays["error"] - b.arrays["error"]
    add_by_row(sums, a.arrays["row"], np.stack([error, np.ones_like(error)], 1))
    return interval(sums)


def mean(values: np.ndarray) -> tuple[float, float, float]:
    return interval(np.stack([values, np.ones(len(values))], 1))


def shown(figure: Sequence[float], *, sign: bool = False) -> str:
    value, low, high = figure
    form: Callable[[float], str] = (lambda x: f"{x:+.4f}") if sign else (lambda x: f"{x:.4g}")
    return f"{form(value)} ({form(low)} to {form(high)})"


def _of_mean(spread: dict[str, Any], share: str) -> str:
    return f"{spread[f'{share} quantile'] / spread['mean'][0]:.2f}"


def below(figure: Sequence[float]) -> str:
    _, low, high = figure
    return "shown" if high < 0 else "the opposite" if low > 0 else "not shown"


def above(figure: Sequence[float]) -> str:
    value, low, high = figure
    return below((-value, -high, -low))


def compared(a: Sequence[float], b: Sequence[float]) -> str:
    """Whether the error `a` is clearly larger than `b`: if their intervals have no number in common."""
    return "worse" if a[1] > b[2] else "better" if a[2] < b[1] else "not clearly different"


def away(figure: Sequence[float], least: float) -> str:
    """Whether a figure that cannot be negative is clearly above `least`."""
    return "shown" if figure[1] > least else "not shown"
