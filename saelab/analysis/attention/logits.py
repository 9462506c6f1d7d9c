"""Direct logit attribution: what the features of attention output add to a logit at their own position.

    logit[a] = norm(sum over i of f[i] W_dec[i] W_O  +  b_dec W_O + b_O  +  error W_O  +  rest) . W_U[a]

The final norm's scale is frozen. `rest` is the residual stream without this layer's attention; what later layers make
of the features is part of it. A soft-cap of the logits comes after this sum, so it is part of the remainder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saelab.analysis.attention.prompt import check_heads, read_prompt
from saelab.errors import SaelabError
from saelab.lm.attention import Affine, check_output, output_map, site_of
from saelab.lm.lens import Lens, last_site, logit_lens
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import pandas as pd

_HEAD = "unembed.hook_in"


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """A logit, or the difference of two, as a sum; `logit_attribution` makes it."""

    position: int
    features: Tensor
    """The features that are active there, ``[n]`` int64"""
    activations: Tensor
    """``[n]`` float64"""
    contributions: Tensor
    """What each adds to the logit, ``[n]`` float64"""
    decoder_bias: float
    """What b_dec and b_O add."""
    error: float
    """What the autoencoder's error adds."""
    rest: float
    """What the residual stream without this layer's attention adds."""
    norm_bias: float
    """What the bias of the final norm adds."""
    remainder: float
    """What this sum leaves of the logit: rounding, the unembedding's bias, a soft-cap."""
    logit: float
    """The model's own, the sum of all."""

    def to_frame(self) -> "pd.DataFrame":
        """One line per part, the features first, the largest contribution first."""
        import pandas as pd

        found = zip(self.features.tolist(), self.activations.tolist(), self.contributions.tolist(), strict=True)
        lines = [{"part": "feature", "feature": f, "activation": a, "contribution": c} for f, a, c in found]
        lines.sort(key=lambda line: -abs(line["contribution"]))
        names = ("decoder_bias", "error", "rest", "norm_bias", "remainder")
        rest = [
            {"part": name, "feature": None, "activation": None, "contribution": getattr(self, name)} for name in names
        ]
        return pd.DataFrame([*lines, *rest]).astype({"feature": "Int64"})


@torch.no_grad()
def logit_attribution(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    ids: Sequence[int] | Tensor,
    position: int,
    token: int,
    against: int | None = None,
    site: str | None = None,
) -> LogitAttribution:
    """What the features at a position add to the logit there of a token id; minus that of the token id `against`.

    `site` defaults to the one the autoencoder was trained at. Two passes of the model. Raises SaelabError if the model
    has no logit lens, or adds something else to the residual stream than its attention gives.
    """
    layer = check_heads(sae, lm, site)
    lens = lens_of(lm, layer)
    out, last = f"blocks.{layer}.hook_attn_out", last_site(lm)
    assert last is not None, "there would be no lens"
    prompt = read_prompt(lm, ids, [layer], [out, last, _HEAD])
    if not 0 <= position < len(prompt.ids):
        raise SaelabError(f"attribution: there is no position {position}: the text has {len(prompt.ids)} tokens")
    targets = [token] if against is None else [token, against]
    if not 0 <= min(targets) <= max(targets) < len(lens.unembedding):
        raise SaelabError(f"attribution: token ids are 0 to {len(lens.unembedding) - 1}, not {targets}")
    logits = lm.logits(prompt.ids[None])[0, position, targets].double()
    rows = lens.unembedding[targets].double()
    target, logit = (rows[0], logits[0]) if against is None else (rows[0] - rows[1], logits[0] - logits[1])

    final, normed = prompt.values[last][position], prompt.values[_HEAD][position] * lens.factor
    linear, bias = lens.at_head(final), lens.bias.double()
    towards = ((normed - bias) @ linear / linear.square().sum().clamp_min(1e-300)) * target
    features, activations = prompt.codes(sae, site_of(layer), position)
    written = activations[:, None] * sae.W_dec[features].double()
    b_dec = sae.b_dec.double() * float(prompt.ordinary[position])
    error = prompt.values[site_of(layer)][position] - written.sum(0) - b_dec
    output = output_map(lm, layer)
    check_output(lm, layer, output, prompt.values[site_of(layer)], prompt.values[out])
    attention = prompt.values[out][position]
    biases = b_dec @ output.weight + output.bias
    vectors = torch.stack([biases, error @ output.weight, final - attention])
    decoder_bias, missed, rest = (lens.at_head(vectors) @ towards).tolist()
    found = lens.at_head(written @ output.weight) @ towards
    norm_bias = float(bias @ target)
    remainder = float(logit - found.sum()) - decoder_bias - missed - rest - norm_bias
    return LogitAttribution(
        position,
        features,
        activations,
        found,
        decoder_bias,
        missed,
        rest,
        norm_bias,
        remainder,
        float(logit),
    )


@torch.no_grad()
def stream_effects(sae: SparseAutoencoder, stream: SparseAutoencoder, output: Affine, features: Tensor) -> Tensor:
    """What features at an activation of 1 add to the pre-activations of residual-stream features, ``[n, stream's]``.

    ``W_dec W_O W_enc``: the forward lens to an autoencoder of the stream after the layer's attention.
    """
    return sae.W_dec[features].float() @ output.weight.float() @ stream.W_enc.float().T


def lens_of(lm: LanguageModel, layer: int) -> Lens:
    """The logit lens for what the attention of a layer adds. Raises SaelabError if there is none."""
    lens = logit_lens(lm, f"blocks.{layer}.hook_attn_out")
    if lens is None:
        raise SaelabError(
            f"attribution: the logits of {lm.name} are not linear in what the attention of layer {layer} gives, even "
            "with the final norm's scale frozen"
        )
    return lens
