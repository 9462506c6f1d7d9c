"""A feature of attention output attributed to the features of a residual-stream autoencoder at the source positions.

    x[s] = sum over q of a[q] d[q]  +  b_dec  +  error[s]                x: the residual stream at the layer's input

The feature reads each part as in readout.py: through the norm with its scale frozen, W_V, and the attention pattern.
(The paper's released dashboards use a[q] d[q] W_V w, without pattern and scale.) Completeness: features, decoder bias,
error, constant, remainder, bias and rounding add up to the pre-activation to 1e-9.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saelab.analysis.attention.direct import DirectAttribution
from saelab.analysis.attention.prompt import Prompt, check_heads, check_site, read_prompt
from saelab.analysis.attention.readout import Readout, readout, stream_sites
from saelab.lm.attention import LayerMaps, layer_maps
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class SourceAttribution:
    """A pre-activation as a sum over features at sources, in units of activation; `source_attribution` makes it."""

    direct: DirectAttribution
    sources: Tensor
    """The source position of each feature found there, ``[n]`` int64, rising."""
    features: Tensor
    """The residual-stream feature, ``[n]`` int64"""
    activations: Tensor
    """Its activation, ``[n]`` float64"""
    by_head: Tensor
    """What it adds through each head, ``[n, heads]`` float64"""
    decoder_bias: Tensor
    """What the residual-stream autoencoder's b_dec adds, ``[heads, position + 1]``; 0 at special tokens."""
    error: Tensor
    """What its error adds, ``[heads, position + 1]``. At special tokens, which have no features, the error is x."""
    constant: Tensor
    """What biases of the norm and the values add, ``[heads, position + 1]``"""
    remainder: Tensor
    """The rounding of norm and values in the model's precision, ``[heads, position + 1]``"""

    @property
    def contributions(self) -> Tensor:
        """``[n]`` float64"""
        return self.by_head.sum(1)

    @property
    def pre_activation(self) -> float:
        """The sum of everything, with the encoder's bias and rounding of `direct`."""
        parts = (self.by_head, self.decoder_bias, self.error, self.constant, self.remainder)
        return sum(float(part.sum()) for part in parts) + self.direct.bias + self.direct.rounding

    def to_frame(self) -> "pd.DataFrame":
        """One line per feature and source, the largest contribution first, then what is no feature, by source."""
        import pandas as pd

        frame = pd.DataFrame(
            {
                "part": "feature",
                "source": self.sources.tolist(),
                "feature": pd.array(self.features.tolist(), dtype="Int64"),
                "activation": self.activations.tolist(),
                "contribution": self.contributions.tolist(),
            }
        ).sort_values("contribution", key=abs, ascending=False, ignore_index=True)
        rest = [
            {"part": name, "source": source, "contribution": float(value)}
            for name in ("decoder_bias", "error", "constant", "remainder")
            for source, value in enumerate(getattr(self, name).sum(0))
        ]
        return pd.concat([frame, pd.DataFrame(rest).astype({"source": "int64"})], ignore_index=True)


def source_attribution(
    sae: SparseAutoencoder,
    stream: SparseAutoencoder,
    lm: LanguageModel,
    ids: Sequence[int] | Tensor,
    feature: int,
    position: int,
    site: str | None = None,
) -> SourceAttribution:
    """The pre-activation of a feature of heads' outputs, by features of `stream` at the sources.

    `stream` is an autoencoder of the residual stream at the layer's input, ``blocks.N.hook_resid_pre`` (the same as
    ``blocks.N-1.hook_resid_post``). Raises SaelabError as `direct_attribution` does, if the norm before the attention
    is not a known one, and if `stream` does not fit.
    """
    layer = check_heads(sae, lm, site)
    check_site(stream, lm, stream_sites(layer)[0])
    prompt = read_prompt(lm, ids, [layer], stream_sites(layer))
    return sources(sae, stream, prompt, layer, layer_maps(lm, layer), feature, position)


@torch.no_grad()
def sources(
    sae: SparseAutoencoder,
    stream: SparseAutoencoder,
    prompt: Prompt,
    layer: int,
    maps: LayerMaps,
    feature: int,
    position: int,
) -> SourceAttribution:
    """`source_attribution` on a text that was read, with maps that were measured."""
    read = readout(sae, prompt, layer, maps, feature, position)
    found = [_source(read, stream, prompt, layer, source) for source in range(position + 1)]
    which, activations, by_head, decoder_bias, error = zip(*found, strict=True)
    counts = torch.tensor([len(features) for features in which])
    return SourceAttribution(
        read.direct,
        torch.arange(position + 1).repeat_interleave(counts),
        torch.cat(which),
        torch.cat(activations),
        torch.cat(by_head),
        torch.stack(decoder_bias, 1),
        torch.stack(error, 1),
        read.constant,
        read.remainder,
    )


def _source(
    read: Readout, stream: SparseAutoencoder, prompt: Prompt, layer: int, source: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features at a source, their activations ``[n]``, and what they, b_dec and the error add, ``[..., heads]``."""
    site = stream_sites(layer)[0]
    features, activations = prompt.codes(stream, site, source)
    parts = activations[:, None] * stream.W_dec[features].double()
    bias = stream.b_dec.double() * float(prompt.ordinary[source])
    error = prompt.values[site][source] - parts.sum(0) - bias
    added = read.of(torch.cat([parts, bias[None], error[None]]), source)
    return features, activations, added[:-2], added[-2], added[-1]
