"""How the rows of a crosscoder's features are divided among its sites: which features are at which site.

    share of site l in feature i = ||d_il|| / sum over sites m of ||d_im||

with every site in the units of training (side_by_side.py). Of two sites a share of 1 is a feature of that site alone, 0
one of the other, and 0.5 a shared one. It is a property of the weights only. Crosscoders that were trained with L1 have
features whose share is near 1 though the other site has them too (Minder et al. 2025, arXiv 2504.02922).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from saelab.analysis.intervals import Interval
from saelab.analysis.result import Result
from saelab.errors import SaelabError
from saelab.lm.settings import SECOND, is_second
from saelab.sae.model import SparseAutoencoder
from saelab.sae.side_by_side import site_shares

if TYPE_CHECKING:
    import plotly.graph_objects as go

ALONE = 0.9
"""Share above which a feature counts as one of that site alone."""
_BINS = 50


@dataclass(frozen=True, eq=False, repr=False)
class SiteNorms(Result):
    """What is defined at the head of this file."""

    sites: tuple[str, ...]
    shares: np.ndarray
    """``[n_features, sites]`` float32; a row of zeros for a feature that writes nothing."""

    def figures(self) -> Mapping[str, int | float | str | Interval]:
        found: dict[str, int | float | str | Interval] = {"features": len(self.shares)}
        for site, shares in zip(self.sites, self.shares.T, strict=True):
            found[f"median share of {site}"] = float(np.median(shares))
            found[f"features of {site} alone (share above {ALONE})"] = int((shares > ALONE).sum())
        return found

    def plot(self) -> "go.Figure":
        """Number of features by share, a line for each site."""
        import plotly.graph_objects as go

        edges = np.linspace(0, 1, _BINS + 1)
        figure = go.Figure()
        for site, shares in zip(self.sites, self.shares.T, strict=True):
            counts = np.histogram(shares, edges)[0]
            figure.add_scatter(x=(edges[:-1] + edges[1:]) / 2, y=counts, name=site, line_shape="hvh")
        return figure.update_layout(xaxis_title="share of the site in the length of a row", yaxis_title="features")


def site_norms(sae: SparseAutoencoder) -> SiteNorms:
    """The shares of each site in the rows of `sae`. Raises SaelabError unless it is a crosscoder."""
    if len(sae.site_widths) < 2:
        raise SaelabError("site_norms: takes a crosscoder, and this autoencoder has one site")
    names, second = sae.metadata.get("hook_names"), sae.metadata.get("second_model_name")
    if not isinstance(names, list) or len(names) != len(sae.site_widths):
        names = [f"site {i}" for i in range(len(sae.site_widths))]
    if second is not None:
        models = (sae.metadata.get("model_name"), second)
        names = [f"{site.removesuffix(SECOND)} of {models[is_second(site)]}" for site in map(str, names)]
    return SiteNorms(tuple(map(str, names)), site_shares(sae).float().cpu().numpy())
