"""Features of attention output ablated, with the autoencoder's error kept: what they do to logits, and along one path.

Attribution (direct.py, tree.py, logits.py) freezes patterns and norms. Here nothing is frozen: a feature's contribution
is taken out of the activations at its site, x - f W_dec, and the model runs on. So these are the tests of attributions.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from saelab.analysis.attention.circuit import Circuit
from saelab.analysis.attention.prompt import pre_activations
from saelab.analysis.attention.readout import readout, stream_sites
from saelab.errors import SaelabError
from saelab.lm.attention import site_of
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder


class FeatureAt(NamedTuple):
    """A feature of a layer's attention output at a position; with `feature` None, the autoencoder's error there."""

    layer: int
    position: int
    feature: int | None


@torch.no_grad()
def ablated_logits(
    saes: Mapping[int, SparseAutoencoder], lm: LanguageModel, ids: Sequence[int] | Tensor, chosen: Iterable[FeatureAt]
) -> Tensor:
    """Logits ``[context, vocabulary]`` of a run in which some features are ablated at once, each with the error kept.

    `saes` are autoencoders of heads' outputs by layer. What a feature contributes is encoded anew in the run, after the
    changes in lower layers. Raises SaelabError if a layer has no autoencoder or a position is a special token.
    """
    row = torch.as_tensor(ids, device=lm.device).long()[None]
    by_layer: dict[int, list[FeatureAt]] = {}
    for one in chosen:
        if one.layer not in saes:
            raise SaelabError(f"attribution: there is no autoencoder of layer {one.layer}: choose {sorted(saes)}")
        if not bool(lm.ordinary(row)[0, one.position]):
            raise SaelabError(f"attribution: the token at position {one.position} is special, and has no features")
        by_layer.setdefault(one.layer, []).append(one)
    order = torch.zeros(row.shape[1], dtype=torch.long, device=lm.device)
    ordinary = lm.ordinary(row)[0]
    order[ordinary] = torch.arange(int(ordinary.sum()), device=lm.device)  # splices see ordinary tokens only

    def without(layer: int, sae: SparseAutoencoder, x: Tensor) -> Tensor:
        new = x.clone()
        for position in {one.position for one in by_layer[layer]}:
            here = {one.feature for one in by_layer[layer] if one.position == position}
            at = x[order[position]][None].to(sae.W_dec.dtype)
            codes = sae.encode(at)
            kept = torch.tensor([int(f) not in here for f in codes.features], dtype=torch.bool, device=lm.device)
            values = torch.where(kept, 0.0, codes.values)
            taken = sae.decode(codes.with_values(values))[0] - sae.b_dec
            if None in here:
                taken = taken + at[0] - sae.decode(codes)[0]
            new[order[position]] = (at[0] - taken).to(x.dtype)
        return new

    lm.measure([site_of(layer) for layer in by_layer])
    with ExitStack() as splices:
        for layer in by_layer:
            sae = saes[layer]
            splices.enter_context(
                lm.spliced(row, site_of(layer), lambda x, layer=layer, sae=sae: without(layer, sae, x))
            )
        return lm.logits(row)[0]


class PathEffect(NamedTuple):
    """How much of a feature's pre-activation a lower feature accounts for, in three ways; `path_effect` measures it."""

    attributed: float
    """With the pattern and the norm's scale frozen: what attribution says."""
    direct: float
    """The fall when it is taken out of the residual stream at the upper layer's input only, through Q, K and V."""
    total: float
    """The fall when it is ablated at its own layer, and all layers between change."""


@torch.no_grad()
def path_effect(circuit: Circuit, ids: Sequence[int] | Tensor, lower: FeatureAt, upper: FeatureAt) -> PathEffect:
    """The effect of one feature on another of a higher layer, at a source of its destination.

    Raises SaelabError if `lower` is not below `upper`, not at or before its position, or not active.
    """
    if lower.feature is None or upper.feature is None:
        raise SaelabError("attribution: a path leads from a feature to a feature, not from or to an error")
    if lower.layer >= upper.layer or lower.position > upper.position:
        raise SaelabError(f"attribution: {tuple(lower)} is not below {tuple(upper)}, or comes after it")
    lm, prompt = circuit.lm, circuit.read(ids)
    below, above = circuit.heads[lower.layer], circuit.heads[upper.layer]
    features, activations = prompt.codes(below, site_of(lower.layer), lower.position)
    found = (features == lower.feature).nonzero()
    if not len(found):
        raise SaelabError(f"attribution: feature {lower.feature} is not active at position {lower.position}")
    written = float(activations[found[0, 0]]) * below.W_dec[lower.feature].double()
    added = written @ circuit.maps[lower.layer].output.weight
    read = readout(above, prompt, upper.layer, circuit.maps[upper.layer], upper.feature, upper.position)
    attributed = float(read.of(added[None], lower.position).sum())

    row, which = prompt.ids[None], torch.tensor([upper.feature], device=lm.device)
    index = int(prompt.ordinary[: lower.position].sum())
    site = site_of(upper.layer)

    def pre(at: str, change: Tensor) -> float:
        """The upper feature's pre-activation after a change at the lower one's position."""

        def replace(x: Tensor) -> Tensor:
            new = x.clone()
            new[index] -= change.to(x.dtype)
            return new

        lm.measure([site])
        with lm.spliced(row, at, replace):
            z = lm.activations(row, [site])[site][0, upper.position]
        return float(pre_activations(above, z.double(), which)[0])

    stream = stream_sites(upper.layer)[0]
    clean = pre(stream, torch.zeros_like(added))
    return PathEffect(attributed, clean - pre(stream, added), clean - pre(site_of(lower.layer), written))
