"""The tables of methods.py: the methods side by side, then the claims; and their place in a file."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from methods_claims import COLUMNS, TITLES, TOPK, Figures, Found, Run, gradient_claims, mutual_claims
from table import table

from saelab.errors import SaelabError
from saelab.sae.allocation.capacity import expected_densities, fit_zipf


def report(found: Found) -> dict[str, str]:
    """Markdown by the name of its marks; without the methods and claims that are not finished."""
    if not found.runs or found.settings is None:
        raise SaelabError("no run of the study is finished; `python scripts/bench/methods.py` trains them")
    s, figures = found.settings, figures_of(found)
    evaluated = next(iter(found.runs.values()))[0].evaluation
    about = (
        f"`{s.site}` of the model {s.model.name}: {s.sae.n_features:,} features, k {s.sae.k}, {s.training.tokens:,} "
        f"training tokens (batch {s.training.batch}, lr {s.training.lr:g}); {evaluated['tokens']:,} held-out ones, CE "
        f"on {evaluated['ce_tokens']:,}. Mean over seeds, ± half of their range. Under half the curve: share of ranks "
        "whose density is below half of one curve for all, the Zipf fit of the first TopK."
    )
    lines = []
    for name, seeds in figures.items():
        cells = [
            mean_and_range([factor * seed[key] for seed in seeds], digits)
            for key, (_, digits, factor) in COLUMNS.items()
        ]
        lines.append([TITLES[name], str(len(seeds)), *cells])
    titles = [title for title, _, _ in COLUMNS.values()]
    side_by_side = table(["method", "seeds", *titles], lines)
    return {
        "methods": "\n\n".join([about, side_by_side, listed(mutual_claims(found, figures))]),
        "methods: gradient": listed(gradient_claims(found, figures)),
    }


def listed(claims: Sequence[Sequence[str]]) -> str:
    """A Markdown table of sentences, which is not padded."""
    head = [["claim", "paper", "here, with its interval", "verdict"], ["---"] * 4]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *claims])


def rewritten(text: str, made: Mapping[str, str], where: str) -> str:
    """`text` with each of `made` between its two marks. Raises SaelabError unless each mark is there once, in order."""
    for name, inside in made.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended or begin in rest or end in before + after:
            raise SaelabError(f"{where}: must have the lines {begin} and {end} once each, in this order")
        text = f"{before}{begin}\n\n{inside}\n\n{end}{after}"
    return text


def figures_of(found: Found) -> Figures:
    """The columns of each seed of each method."""
    curve = None
    if TOPK in found.runs and found.settings is not None:
        s, run = found.settings, found.runs[TOPK][0]
        fit = fit_zipf(torch.from_numpy(run.arrays["counts"] / run.evaluation["tokens"]))
        curve = expected_densities(s.sae.n_features, s.sae.k, s.training.batch, fit.exponent, fit.shift).numpy()

    def line(run: Run) -> dict[str, float]:
        e = run.evaluation
        densities = -np.sort(-run.arrays["counts"] / e["tokens"])
        under = float("nan") if curve is None else float((densities < 0.5 * curve).mean())
        figures = {name: e[name] for name in ("fvu", "delta_ce", "loss_recovered_mean", "l0")}
        return figures | {"seed": run.seed, "never_active": e["never_active"] / e["n_features"], "under_half": under}

    return {name: [line(run) for run in runs] for name, runs in found.runs.items()}


def mean_and_range(values: Sequence[float], digits: int) -> str:
    middle = f"{statistics.mean(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ± {(max(values) - min(values)) / 2:.{digits}f}"
