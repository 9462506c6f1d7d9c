"""The tables of explaining.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from table import table

from saelab.analysis.intervals import Interval
from saelab.autointerp.embedders import tfidf
from saelab.autointerp.similarity import Described, PairedExplanations, compare_explanations, described
from saelab.autointerp.summary import mean_interval
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.runs import folder
from saelab.runs.decoder import decoder_rows

HOOKS = {"residual stream": "hook_resid_post", "output of the MLP": "hook_mlp_out"}
TESTS = {
    "random": "windows of all strengths, others at random",
    "coactive": "others from co-active features",
    "decoder": "others from features with near decoder rows",
    "same_token": "others with the feature's tokens",
    "strongest": "the strongest tenth only, others at random",
}


def tables(records: Sequence[Mapping[str, Any]], judge: str) -> dict[str, str]:
    """Markdown of P4, P6 and P7 by the name of its marks."""
    scores = [each["found"] for each in records if each["part"] == "scores" and each["found"] is not None]
    return {
        "explanations: P4": _tokens([each["found"] for each in records if each["part"] == "tokens"]),
        "explanations: P6": _sampling(scores, judge),
        "explanations: P7": _pitfalls(scores, judge),
    }


def _tokens(found: Sequence[Mapping[str, float]]) -> str:
    lines = []
    for name in ("detection", "fuzzing", "simulation"):
        counts, other = (np.array([each[key] for each in found], float) for key in (name, "simulation"))
        lines.append([name, shown(mean_interval(counts), 0), shown(mean_interval(other / counts), 2)])
    return table([f"{len(found)} features", "tokens of a feature", "tokens of simulation / tokens"], lines)


def _sampling(scores: Sequence[Mapping[str, Any]], judge: str) -> str:
    def values(sampling: str, by: str, figure: str) -> np.ndarray:
        return np.array([each[sampling][by][figure] for each in scores], float)

    lines = []
    for sampling in ("quantiles", "random", "mix", "top"):
        cells = [sampling]
        for by in ("exact", "judge"):
            own = values(sampling, by, "random")
            cells.append(_mean(own))
            cells.append(_difference(own, values("quantiles", by, "random")) if sampling != "quantiles" else "")
        weak = [values(each, "exact", "recall, weaker half") for each in (sampling, "quantiles")]
        cells += [_mean(weak[0]), _difference(*weak) if sampling != "quantiles" else ""]
        lines.append(cells)
    less = "less quantiles"
    head = [f"explained from ({len(scores)} features)", "exact", less, f"detection by {judge}", less]
    return table([*head, "exact recall, weaker half", less], lines)


def _pitfalls(scores: Sequence[Mapping[str, Any]], judge: str) -> str:
    def values(sampling: str, by: str, test: str) -> np.ndarray:
        return np.array([each[sampling][by][test] for each in scores], float)

    lines = []
    for test, title in TESTS.items():
        cells = [title]
        for by in ("exact", "judge"):
            own = values("quantiles", by, test)
            cells.append(_mean(own))
            cells.append(_difference(own, values("quantiles", by, "random")) if test != "random" else "")
        cells.append(_difference(values("top", "exact", test), values("quantiles", "exact", test)))
        lines.append(cells)
    less = "less the first line"
    head = [f"scored on ({len(scores)} features)", "exact", less, f"detection by {judge}", less]
    return table([*head, "explained from top less from quantiles, exact"], lines)


def _difference(own: np.ndarray, other: np.ndarray) -> str:
    """The mean of the paired differences over features, with its interval."""
    both = own - other
    both = both[np.isfinite(both)]
    return shown(mean_interval(both), 3, "+") if len(both) else "none"


def _mean(values: np.ndarray) -> str:
    """The mean of the features with a value."""
    values = values[np.isfinite(values)]
    return f"{values.mean():.3f}" if len(values) else "none"


def shown(value: Interval, digits: int, sign: str = "") -> str:
    middle, low, high = (format(each, f"{sign},.{digits}f") for each in value)
    return f"{middle} ({low} to {high})"


def layers(sweep: Path) -> str:
    """Markdown of P9: of each pair of sites, the similarity of explanations less chance, by distance in layers.

    Seeds are compared with later ones. Controls are those of `saelab controls RUN --kinds untrained`: of another seed
    than the run that they are compared with, which has other initial weights.
    """
    seeds, untrained = _described(sweep, "*-seed*"), _described(sweep, "*-seed*/controls/untrained")
    if len({seed for _, seed in seeds}) < 2:
        raise SaelabError(f"{sweep}: has no explained runs named SITE-seed0 and SITE-seed1; `saelab sweep` makes them")
    lines = []
    for kind, hook in HOOKS.items():
        runs, none = (
            {(_layer(site), seed): each for (site, seed), each in found.items() if site.endswith(hook)}
            for found in (seeds, untrained)
        )
        pairs = [(a, b) for a in runs for b in runs if a[1] < b[1]]
        for distance in sorted({abs(a[0] - b[0]) for a, b in pairs}):
            chosen = [(runs[a], runs[b]) for a, b in pairs if abs(a[0] - b[0]) == distance]
            title = "another seed, the same layer" if not distance else f"{distance} layer{'s' * (distance > 1)} apart"
            lines.append(_line(f"{kind}: {title}", chosen))
        chosen = [(runs[a], none[b]) for a in runs for b in none if a[0] == b[0] and a[1] != b[1]]
        if chosen:
            lines.append(_line(f"{kind}: untrained, the same layer", chosen))
    resid, mlp = HOOKS.values()
    both = [
        (seeds[a, i], seeds[b, j])
        for a, i in seeds
        for b, j in seeds
        if a.endswith(resid) and b.endswith(mlp) and _layer(a) == _layer(b) and i < j
    ]
    if both:
        lines.append(_line("residual stream and MLP of a layer", both))
    head = ["A and B", "pairs of runs", "pairs by explanation: similarity", "by chance", "less chance"]
    return table([*head, "pairs by decoder row: less chance"], lines)


def _line(title: str, pairs: Sequence[tuple[Described, Described]]) -> list[str]:
    def compared(by: str) -> list[PairedExplanations]:
        return [compare_explanations(a, b, tfidf([*a.texts.values(), *b.texts.values()]), by=by) for a, b in pairs]

    by_text, by_row = compared("explanation"), compared("decoder")
    cosine, expected = (np.concatenate([getattr(each, name) for each in by_text]) for name in ("cosine", "expected"))
    of_rows = np.concatenate([each.cosine - each.expected for each in by_row])
    values = [mean_interval(cosine), mean_interval(cosine - expected), mean_interval(of_rows)]
    texts = [
        f"{len(pairs)}",
        f"{values[0].value:.3f}",
        f"{expected.mean():.3f}",
        *(shown(each, 3) for each in values[1:]),
    ]
    return [title, *texts]


def _described(sweep: Path, pattern: str) -> dict[tuple[str, str], Described]:
    """Explanations and decoder of the explained runs of this pattern, by site and seed."""
    found = {}
    for run in sorted(sweep.glob(pattern)):
        if (run / folder.AUTOINTERP).is_dir():
            inputs = str(open_database(folder.features(run)).arrays.manifest["inputs"])
            name = run.relative_to(sweep).parts[0]
            made = described(run / folder.AUTOINTERP, inputs, decoder_rows(run))
            found[name.rpartition("-seed")[0], name.rpartition("-seed")[2]] = made
    return found


def _layer(site: str) -> int:
    return int(site.split(".")[1])
