"""A model's text and the autoencoders that explain it: what a recursive attribution reads.

The residual stream at the input of layer L is a sum, position by position:

    x[L] = embedding + sum over l < L of (attention[l] + mlp[l])            embedding: the input of layer 0
    attention[l] = z[l] W_O + b_O = sum over j of f[j] (W_dec[j] W_O)  +  (b_dec W_O + b_O)  +  error W_O

with the features j of an autoencoder of layer l's heads, if there is one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saelab.analysis.attention.prompt import Prompt, check_heads, check_site, read_prompt
from saelab.analysis.attention.readout import stream_sites
from saelab.errors import SaelabError
from saelab.lm.attention import LayerMaps, check_output, layer_maps, site_of
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

PartKind = Literal["attention feature", "attention", "mlp", "embedding", "error", "bias"]
_HEADS = re.compile(r"blocks\.\d+\.attn\.hook_z")
_STREAM = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


@dataclass(frozen=True, eq=False)
class Circuit:
    """The autoencoders of a model by layer, and the linear maps around the heads; `open_circuit` makes it."""

    lm: LanguageModel
    heads: Mapping[int, SparseAutoencoder]
    """Autoencoders of heads' outputs."""
    stream: Mapping[int, SparseAutoencoder]
    """Autoencoders of the residual stream at the input of a layer."""
    maps: Mapping[int, LayerMaps]
    """The maps of each layer that has an autoencoder of its heads."""

    def read(self, ids: Sequence[int] | Tensor) -> Prompt:
        """One pass over some token ids. Raises SaelabError if parts do not add up to the residual stream."""
        last = max(self.heads)
        outputs = [f"blocks.{layer}.{name}" for layer in range(last) for name in ("hook_attn_out", "hook_mlp_out")]
        streams = [site for layer in self.heads for site in stream_sites(layer)]
        first = "blocks.0.hook_resid_pre"
        prompt = read_prompt(self.lm, ids, sorted(self.heads), [first, *outputs, *streams])
        total = sum((prompt.values[site] for site in outputs), prompt.values[first])
        x = prompt.values[stream_sites(last)[0]]
        if (total - x).norm() > (1e-4 if self.lm.dtype in (torch.float32, torch.float64) else 0.05) * x.norm():
            raise SaelabError(
                f"model: the residual stream of {self.lm.name} is not the sum of its embedding and of the outputs of "
                "attention and MLPs, so it cannot be attributed to them"
            )
        for layer in self.heads:
            if layer < last:
                out = prompt.values[f"blocks.{layer}.hook_attn_out"]
                check_output(self.lm, layer, self.maps[layer].output, prompt.values[site_of(layer)], out)
        return prompt


class Part(NamedTuple):
    """A part of the residual stream at one position."""

    kind: PartKind
    layer: int
    feature: int | None
    activation: float | None
    vector: Tensor
    """``[d_model]`` float64"""


def takes_part(site: str) -> bool:
    """Whether autoencoders of a site take part in an attribution."""
    return bool(_HEADS.fullmatch(site) or _STREAM.fullmatch(site))


def open_circuit(lm: LanguageModel, saes: Mapping[str, SparseAutoencoder]) -> Circuit:
    """The autoencoders of a model, by site, and the maps that attribution needs, which are measured now.

    Sites are ``blocks.N.attn.hook_z``, at least one, and ``blocks.N.hook_resid_pre`` or ``hook_resid_post``. Raises
    SaelabError for any other site, and if an autoencoder does not fit its site.
    """
    heads, stream = {}, {}
    for site, sae in saes.items():
        check_site(sae, lm, site)
        if _HEADS.fullmatch(site):
            heads[check_heads(sae, lm, site)] = sae
        elif match := _STREAM.fullmatch(site):
            stream[int(match[1]) + (match[2] == "post")] = sae
        else:
            raise SaelabError(
                f"attribution: {site} is neither blocks.N.attn.hook_z, blocks.N.hook_resid_pre nor blocks.N."
                "hook_resid_post; autoencoders of other sites take no part in the attribution"
            )
    if not heads:
        raise SaelabError("attribution: none of the autoencoders is of blocks.N.attn.hook_z, where attribution begins")
    return Circuit(lm, heads, stream, {layer: layer_maps(lm, layer) for layer in heads})


@torch.no_grad()
def parts(circuit: Circuit, prompt: Prompt, layer: int, position: int) -> list[Part]:
    """The parts of the residual stream at the input of `layer`, at one position; they add up to it but for rounding."""
    x = prompt.values["blocks.0.hook_resid_pre"][position]
    found = [Part("embedding", 0, None, None, x)]
    for below in range(layer):
        found += _attention(circuit, prompt, below, position)
        mlp = prompt.values[f"blocks.{below}.hook_mlp_out"][position]
        found.append(Part("mlp", below, None, None, mlp))
    return found


def _attention(circuit: Circuit, prompt: Prompt, layer: int, position: int) -> list[Part]:
    """The parts of a layer's attention output. At special tokens, which have no features, it is one part."""
    sae = circuit.heads.get(layer)
    out = prompt.values[f"blocks.{layer}.hook_attn_out"][position]
    if sae is None or not bool(prompt.ordinary[position]):
        return [Part("attention", layer, None, None, out)]
    output, b_dec = circuit.maps[layer].output, sae.b_dec.double()
    features, activations = prompt.codes(sae, site_of(layer), position)
    written = activations[:, None] * sae.W_dec[features].double()
    error = prompt.values[site_of(layer)][position] - written.sum(0) - b_dec
    vectors = written @ output.weight
    active = zip(features.tolist(), activations.tolist(), vectors, strict=True)
    return [
        *(Part("attention feature", layer, feature, activation, vector) for feature, activation, vector in active),
        Part("error", layer, None, None, error @ output.weight),
        Part("bias", layer, None, None, b_dec @ output.weight + output.bias),
    ]
