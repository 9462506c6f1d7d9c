"""One text as attribution reads it: patterns, values and activations of one pass, in float64."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.analysis.affine import check_affine
from saelab.errors import SaelabError
from saelab.lm.attention import Heads, layer_of, read_heads, site_of
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row of token ids and what one pass of the model computes on it; `read_prompt` makes it."""

    lm: LanguageModel
    ids: Tensor
    """``[context]`` int64"""
    heads: dict[int, Heads]
    """By layer, with one row, in float64."""
    values: dict[str, Tensor]
    """Activations by site, ``[context, d_in]`` float64."""

    @property
    def ordinary(self) -> Tensor:
        """Whether each token has features, bool ``[context]``; special tokens have none."""
        return self.lm.ordinary(self.ids)

    def codes(self, sae: SparseAutoencoder, site: str, position: int) -> tuple[Tensor, Tensor]:
        """The features that are active at a position, ``[n]`` int64, and their activations in float64.

        None at special tokens. The autoencoder selects in its own precision; values are pre-activations in float64.
        """
        x = self.values[site][position]
        if not bool(self.ordinary[position]):
            return torch.zeros(0, dtype=torch.long, device=x.device), x.new_zeros(0)
        features = sae.encode(x[None].float()).features.long()
        return features, pre_activations(sae, x, features)


def read_prompt(
    lm: LanguageModel, ids: Sequence[int] | Tensor, layers: Iterable[int], sites: Iterable[str] = ()
) -> Prompt:
    """The `Prompt` of some token ids, with the heads of `layers`, and the activations there and at `sites`.

    Memory: 8 x heads x context^2 bytes per layer. Raises SaelabError if there is no token or too many, or if the
    model's attention cannot be taken apart.
    """
    row = torch.as_tensor(ids, device=lm.device).long()
    if row.ndim != 1 or not len(row):
        raise SaelabError("The text has no token; type something, or begin with BOS.")
    if not 0 <= int(row.min()) <= int(row.max()) < lm.embeddings:
        raise SaelabError(f"The text has a token id outside of 0 to {lm.embeddings - 1}.")
    heads, values = read_heads(lm, row[None], layers, sites)
    return Prompt(
        lm,
        row,
        {layer: found.double() for layer, found in heads.items()},
        {site: value[0].double() for site, value in values.items()},
    )


def pre_activations(sae: SparseAutoencoder, x: Tensor, features: Tensor) -> Tensor:
    """Pre-activations of some features at x ``[d_in]`` float64, in float64, ``[n]``."""
    return sae.W_enc[features].double() @ x + encoder_bias(sae, features)


def encoder_bias(sae: SparseAutoencoder, features: Tensor) -> Tensor:
    """What pre-activations are at x = 0, b_enc - W_enc b_dec (b_enc if b_dec is not subtracted), ``[n]`` float64."""
    bias = sae.b_enc[features].double()
    return bias - sae.W_enc[features].double() @ sae.b_dec.double() if sae.centred else bias


def check_heads(sae: SparseAutoencoder, lm: LanguageModel, site: str | None = None) -> int:
    """The layer whose heads' outputs the autoencoder reads, at `site` or at the site of its training.

    Raises SaelabError if it reads something else, is a transcoder, or has another width than the site.
    """
    layer = layer_of(site or sae.metadata.get("hook_name"))
    check_site(sae, lm, site_of(layer))
    return layer


def check_site(sae: SparseAutoencoder, lm: LanguageModel, site: str) -> None:
    """Raises SaelabError if the autoencoder does not reconstruct activations of the width of `site`."""
    if sae.transcodes:
        raise SaelabError(f"attribution: a transcoder does not reconstruct {site}; use an autoencoder of the site")
    check_affine(sae, "attribution")
    if (width := lm.width(site)) != sae.d_in:
        raise SaelabError(f"attribution: {site} of {lm.name} has width {width}, the autoencoder has d_in {sae.d_in}")
    if (device := sae.W_dec.device) != lm.device:
        raise SaelabError(
            f"attribution: the autoencoder is on {device}, the model on {lm.device}; move it with sae.to()"
        )


def check_target(sae: SparseAutoencoder, prompt: Prompt, feature: int, position: int) -> None:
    """Raises SaelabError if there is no such feature, position, or no features at the position."""
    if not 0 <= feature < sae.n_features:
        raise SaelabError(f"attribution: there is no feature {feature}: features are 0 to {sae.n_features - 1}")
    if not 0 <= position < len(prompt.ids):
        raise SaelabError(f"attribution: there is no position {position}: the text has {len(prompt.ids)} tokens")
    if not bool(prompt.ordinary[position]):
        raise SaelabError(f"attribution: the token at position {position} is special, and has no features")
