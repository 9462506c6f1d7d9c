"""Direct feature attribution (DFA): which heads and source positions a feature's pre-activation comes from.

    pre[t] = z[t] . w + b_enc - b_dec . w                                   w: the feature's encoder row
           = sum over h, s of pattern[h, t, s] v[s, h] . w[h]  +  bias      w[h]: its slice of head h

The attention pattern is frozen. v includes b_V. Completeness: contributions + bias + rounding = pre-activation, with
`rounding` what the model's own precision loses in the sum of z; 0 to 1e-9 if the model runs in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from saelab.analysis.attention.prompt import (
    Prompt,
    check_heads,
    check_target,
    encoder_bias,
    pre_activations,
    read_prompt,
)
from saelab.lm.attention import Heads, site_of
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class DirectAttribution:
    """A feature's pre-activation at one position as a sum, in units of activation; `direct_attribution` makes it."""

    layer: int
    feature: int
    position: int
    contributions: Tensor
    """By head and source position, ``[heads, position + 1]`` float64."""
    bias: float
    """b_enc - b_dec . w: the pre-activation at z = 0."""
    rounding: float
    """What the sum in the model's precision differs by."""
    pre_activation: float
    """The sum of all."""

    @property
    def by_head(self) -> Tensor:
        """``[heads]``"""
        return self.contributions.sum(1)

    @property
    def by_source(self) -> Tensor:
        """``[position + 1]``"""
        return self.contributions.sum(0)

    def to_frame(self) -> "pd.DataFrame":
        """One line per head and source: head, source, distance, contribution."""
        import pandas as pd

        heads, sources = self.contributions.shape
        columns = {
            "head": torch.arange(heads).repeat_interleave(sources).tolist(),
            "source": torch.arange(sources).repeat(heads).tolist(),
            "contribution": self.contributions.flatten().tolist(),
        }
        frame = pd.DataFrame(columns)
        frame.insert(2, "distance", self.position - frame["source"])
        return frame

    def plot(self, tokens: Sequence[str] | None = None) -> "go.Figure":
        """The contributions as a map, heads by sources; `tokens` are the texts of the sources."""
        from html import escape

        import plotly.graph_objects as go

        from saelab.errors import printable

        most = float(self.contributions.abs().max())
        heads, sources = self.contributions.shape
        texts = [f"{s}: {escape(printable(tokens[s]))}" if tokens else str(s) for s in range(sources)]
        figure = go.Figure(
            go.Heatmap(
                z=self.contributions.tolist(),
                x=list(range(sources)),
                y=[f"head {h}" for h in range(heads)],
                customdata=[texts] * heads,
                colorscale="RdBu",
                zmin=-most,
                zmax=most,
                hovertemplate="%{y}, source %{customdata}: %{z:.4g}<extra></extra>",
            )
        )
        title = f"Feature {self.feature} of layer {self.layer} at position {self.position}"
        figure.update_layout(title=title, xaxis_title="source position", yaxis_autorange="reversed")
        return figure.update_xaxes(tickvals=list(range(sources)), ticktext=texts) if tokens else figure

    def _ipython_display_(self) -> None:
        self.plot().show()


def direct_attribution(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    ids: Sequence[int] | Tensor,
    feature: int,
    position: int,
    site: str | None = None,
) -> DirectAttribution:
    """The pre-activation of a feature at a position of the token ids, by head and by source position.

    `site` defaults to the one the autoencoder was trained at. One pass of the model up to there. Raises SaelabError if
    the autoencoder is not of ``blocks.N.attn.hook_z``, if there is no such feature or position, and if the model's
    attention is not a weighted sum of values.
    """
    layer = check_heads(sae, lm, site)
    return direct(sae, read_prompt(lm, ids, [layer]), layer, feature, position)


@torch.no_grad()
def direct(sae: SparseAutoencoder, prompt: Prompt, layer: int, feature: int, position: int) -> DirectAttribution:
    """`direct_attribution` on a text that was read."""
    check_target(sae, prompt, feature, position)
    which = torch.tensor([feature], device=sae.W_enc.device)
    at = torch.tensor([position], device=sae.W_enc.device)
    found = contributions(prompt.heads[layer], sae.W_enc[which].double(), at)[0, :, : position + 1]
    bias = float(encoder_bias(sae, which))
    pre = float(pre_activations(sae, prompt.values[site_of(layer)][position], which))
    return DirectAttribution(layer, feature, position, found.cpu(), bias, pre - bias - float(found.sum()), pre)


def contributions(heads: Heads, rows: Tensor, positions: Tensor, row: int = 0) -> Tensor:
    """z at each of n positions times each of n encoder rows ``[n, heads * d_head]``, as ``[n, heads, context]``.

    `row` is the row of text.
    """
    by_head = rearrange(rows, "n (h d) -> n h d", h=heads.n_heads)
    read = torch.einsum("hsd,nhd->nhs", heads.values[row, heads.value_head], by_head)
    return read.mul_(heads.pattern[row, :, positions].transpose(0, 1))
