"""Dark matter: what an autoencoder leaves out, and how much of it is linear in what it was given (2410.14670).

parts.py defines the parts and their figures, decomposition.py measures them; dark_experiments.py and dark_relations.py
have what is tried with them; dark_widths.py compares the results of autoencoders of several widths.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.affine import check_reconstructs
from saelab.analysis.dark_experiments import Cost, OnPart, Pursuit, cost_in_ce, pursued, trained_on_part
from saelab.analysis.dark_relations import Missing, Prediction, from_other_sites, of_missing_features
from saelab.analysis.decomposition import decompose
from saelab.analysis.intervals import Interval
from saelab.analysis.parts import MAPS, Decomposition, split_rows
from saelab.analysis.result import Result
from saelab.analysis.settings import DarkMatterSettings
from saelab.encoded import Block, encoded
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class DarkMatter(Result):
    """The decomposition of the error of one autoencoder, and the experiments with its parts."""

    site: str
    n_features: int
    decomposition: Decomposition
    cost: Cost
    pursuit: Pursuit | None
    """None if the settings give it no tokens."""
    on_parts: dict[str, OnPart]
    """Autoencoders trained on "linear" and "nonlinear"; empty if the settings give them no tokens."""
    from_sites: dict[str, dict[str, Prediction]]
    """By source and part; empty without sources."""
    missing: dict[str, Missing]
    """"known" and "missing" features of a wider autoencoder; empty without one."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        d, cost = self.decomposition, self.cost
        lines: dict[str, int | float | str | Interval] = {
            "site": self.site,
            "features": self.n_features,
            "L0 (active features per token)": d.l0,
            "tokens scored": d.tokens,
            "FVU": d.fvu,
            "FVU, linear": d.fvu_linear,
            "FVU, nonlinear": d.fvu_nonlinear,
        }
        for name in MAPS:
            of_map = d.maps[name]
            lines[f"R2 of the error, {name}"] = of_map.r2
            lines[f"R2 of its squared norm, {name}"] = of_map.r2_of_norm
        lines["share of the error's squared norm, linear"] = d.shares.linear
        lines["share of the error's squared norm, nonlinear"] = d.shares.nonlinear
        lines["shrinkage <x, Sae(x)> / <Sae(x), Sae(x)>"] = d.shrinkage
        lines["shrinkage of the deviations from the means"] = d.shrinkage_of_deviations
        for name, test in d.norm_tests.items():
            lines[f"norm test on itself with intercept, {name}"] = test.on_itself_with_intercept
        lines["CE, clean (nats)"] = cost.clean
        lines["CE, Sae(x) (nats)"] = cost.spliced
        lines["share of the CE recovered by the linear part"] = cost.recovered_by_linear
        lines["share of the CE recovered by the nonlinear part"] = cost.recovered_by_nonlinear
        if self.pursuit is not None:
            lines["gradient pursuit: relative change of FVU"] = self.pursuit.change
            lines["gradient pursuit: relative change of FVU, nonlinear"] = self.pursuit.change_of_nonlinear
        lines |= {f"FVU of an autoencoder trained on the {name} part": each.fvu for name, each in self.on_parts.items()}
        for name, of_parts in self.from_sites.items():
            lines |= {f"R2 of the {part} part from {name}": each.r2 for part, each in of_parts.items()}
        for name, each in self.missing.items():
            lines[f"{name} features of the wider one: share in the linear part"] = each.in_linear
            lines[f"{name} features of the wider one: share in the nonlinear part"] = each.in_nonlinear
        return lines

    def plot(self) -> "go.Figure":
        """The norm of each part by token: the distribution over the scored tokens."""
        import plotly.graph_objects as go

        d = self.decomposition
        figure = go.Figure(layout={"title": f"{self.site}, {self.n_features:,} features", "violinmode": "group"})
        for name, norms in (("error", d.error_norm), ("linear", d.linear_norm), ("nonlinear", d.nonlinear_norm)):
            step = max(1, len(norms) // 5000)
            figure.add_violin(y=norms[::step], name=name, points=False, box_visible=True)
        return figure.update_yaxes(title="norm of the part, by token", rangemode="tozero")


def dark_matter(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    settings: DarkMatterSettings = DarkMatterSettings(),  # noqa: B008 (frozen)
    *,
    sources: Mapping[str, tuple[SparseAutoencoder, str]] | None = None,
    wider: SparseAutoencoder | None = None,
    track: Track = silent,
) -> DarkMatter:
    """The parts of the error of `sae` on held-out `rows` ``[rows, context]``, and what the settings ask for with them.

    `sources` are autoencoders at other sites, by name, each with its site; `wider` reads the same site. Settings that
    name run folders are not read here. Raises SaelabError for transcoders and crosscoders, if there are too few rows,
    and as `saelab.encoded.encoded` does.
    """
    for each in (sae, *(of for of, _ in (sources or {}).values()), *([] if wider is None else [wider])):
        check_reconstructs(each, "dark_matter")
    split, context, per_forward = split_rows(len(rows)), rows.shape[1], settings.rows_per_forward

    def blocks(numbers: np.ndarray) -> Iterator[Block]:
        return encoded(sae, lm, rows[torch.from_numpy(numbers)], site, per_forward, track=track)

    decomposition, linear = decompose(sae, blocks, split)
    first = split.scored[: max(1, settings.ce_tokens // context)]
    cost = cost_in_ce(sae, linear, lm, site, blocks(first), len(first))
    pursuit = pursued(sae, blocks, split, settings.pursuit_tokens, context) if settings.pursuit_tokens else None
    trained = ("linear", "nonlinear") if settings.part_tokens else ()
    return DarkMatter(
        site=site,
        n_features=sae.n_features,
        decomposition=decomposition,
        cost=cost,
        pursuit=pursuit,
        on_parts={which: trained_on_part(which, sae, linear, blocks, split, settings.part_tokens) for which in trained},
        from_sites=from_other_sites(sae, linear, sources, lm, site, rows, split, per_forward) if sources else {},
        missing={}
        if wider is None
        else of_missing_features(sae, linear, wider, blocks(split.scored), len(split.scored)),
    )
