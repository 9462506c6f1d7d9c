"""Features of attention output ablated, with the autoencoder's error kept: what they do to logits, and along one path.

Attribution (direct.py, tree.py, logits.py) freezes patterns and norms. Here nothing is frozen: a feature's contribution
is taken out of the activations at its site, x - f W_dec, and the model runs on. So these are the tests of attributions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
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


Taken = Callable[[Tensor], Tensor]
"""From the activations ``[d_in]`` at a site and position of the run, in float32, what is taken away from them."""


def ablated_logits(
    saes: Mapping[int, SparseAutoencoder], lm: LanguageModel, ids: Sequence[int] | Tensor, chosen: Iterable[FeatureAt]
) -> Tensor:
    """Logits ``[context, vocabulary]`` of a run in which some features are ablated at once, each with the error kept.

    `saes` are autoencoders of heads' outputs by layer. What a feature contributes is encoded anew in the run, after the
    changes in lower layers. Raises SaelabError if a layer has no autoencoder or a position is a special token.
    """
    features: dict[tuple[int, int], set[int | None]] = {}
    for one in chosen:
        if one.layer not in saes:
            raise SaelabError(f"attribution: there is no autoencoder of layer {one.layer}: choose {sorted(saes)}")
        features.setdefault((one.layer, one.position), set()).add(one.feature)
    return changed_logits(lm, ids, {at: _contribution(saes[at[0]], which) for at, which in features.items()})


def _contribution(sae: SparseAutoencoder, which: set[int | None]) -> Taken:
    """What some features, and the error if `which` has None, contribute."""

    def taken(x: Tensor) -> Tensor:
        codes = sae.encode(x[None])
        left = torch.tensor([int(f) in which for f in codes.features], dtype=codes.values.dtype, device=x.device)
        found = sae.decode(codes.with_values(codes.values * left))[0] - sae.b_dec
        return found + x - sae.decode(codes)[0] if None in which else found

    return taken


@torch.no_grad()
def changed_logits(lm: LanguageModel, ids: Sequence[int] | Tensor, taken: Mapping[tuple[int, int], Taken]) -> Tensor:
    """Logits ``[context, vocabulary]`` of a run in which something is taken from heads' outputs, by layer and position.

    Raises SaelabError if a position is a special token.
    """
    row = torch.as_tensor(ids, device=lm.device).long()[None]
    ordinary = lm.ordinary(row)[0]
    for _, position in taken:
        if not bool(ordinary[position]):
            raise SaelabError(f"attribution: the token at position {position} is special, and has no features")
    order = ordinary.cumsum(0) - 1  # splices see ordinary tokens only
    layers = sorted({layer for layer, _ in taken})

    def changed(x: Tensor, layer: int) -> Tensor:
        new = x.clone()
        for (at, position), take in taken.items():
            if at == layer:
                value = x[order[position]].float()
                new[order[position]] = (value - take(value)).to(x.dtype)
        return new

    lm.measure([site_of(layer) for layer in layers])
    with ExitStack() as splices:
        for layer in layers:
            splices.enter_context(lm.spliced(row, site_of(layer), partial(changed, layer=layer)))
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
