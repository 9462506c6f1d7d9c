"""Recursive attribution: a feature, its sources, the features there that they come from, and so on to the embedding.

    attention feature   its pre-activation is the sum over source positions, and its bias
    source              what a source adds is the sum over the features of the residual stream there, the error of the
                        autoencoder that finds them, and biases; over the parts of the stream if there is none
    stream feature      its pre-activation is the sum over the parts of the residual stream, and its bias
    parts               attention features of lower layers, which are expanded again; and the leaves: embedding, MLPs,
                        attention without an autoencoder, errors

Patterns and norms' scales are frozen. At each level the contributions add up: those below a feature to its
pre-activation, those below a source to what the source adds. Errors are leaves of their own; the other small ones are
one leaf, `rest`. A tree of depth n takes at most branches^(2n) readings of a feature, each linear in the text's length.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from saelab.analysis.attention.circuit import Circuit, PartKind, open_circuit, parts
from saelab.analysis.attention.prompt import Prompt, encoder_bias
from saelab.analysis.attention.readout import Readout, readout, stream_sites
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal[PartKind, "source", "stream feature", "rounding", "rest"]
_ALWAYS = frozenset({"error", "bias", "rounding"})
"""Leaves that never become part of `rest`."""


@dataclass(frozen=True)
class Node:
    """A part of what its parent is the sum of."""

    kind: Kind
    contribution: float
    """In units of the activation of the feature above; a root's own pre-activation."""
    layer: int | None = None
    position: int | None = None
    feature: int | None = None
    activation: float | None = None
    """A feature's own activation, which its children add up to; None for other kinds."""
    merged: int = 1
    """The number of parts that a `rest` is the sum of."""
    children: tuple["Node", ...] = ()

    @property
    def total(self) -> float:
        """What the children add up to."""
        return self.contribution if self.activation is None else self.activation

    def gap(self) -> float:
        """The largest difference, at any node below, between its total and the sum of its children."""
        own = abs(self.total - sum(child.contribution for child in self.children)) if self.children else 0.0
        return max([own, *(child.gap() for child in self.children)])

    def walk(self, depth: int = 0) -> Iterator[tuple[int, "Node"]]:
        """All nodes with their depth, parents first."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries for JSON, without what is None."""
        own = {name: value for name, value in vars(self).items() if value is not None and name != "children"}
        return own | {"children": [child.to_dict() for child in self.children]}

    def to_frame(self) -> "pd.DataFrame":
        """One line per node, parents first, with its depth."""
        import pandas as pd

        names = ("kind", "layer", "position", "feature", "activation", "contribution", "merged")
        frame = pd.DataFrame([{"depth": depth} | {n: getattr(node, n) for n in names} for depth, node in self.walk()])
        return frame.astype(dict.fromkeys(("layer", "position", "feature"), "Int64"))

    def label(self) -> str:
        """The node in words; no text of the prompt is in it."""
        of = "" if self.layer is None else f" of layer {self.layer}"
        at = "" if self.position is None else f" at {self.position}"
        name = f"{self.kind} {self.feature}{of}" if self.feature is not None else f"{self.kind}{of}"
        return f"{name} ({self.merged} parts)" if self.kind == "rest" else name + at

    def _repr_html_(self) -> str:
        return self._html(" open")

    def _html(self, state: str = "") -> str:
        """The node as an element that folds, with the attribute `state`."""
        line = f"{self.contribution:+.4g} &nbsp; {self.label()}"
        if not self.children:
            return f"<div style='margin-left:1.2em'>{line}</div>"
        inner = "".join(child._html() for child in self.children)
        return f"<details style='margin-left:1em'{state}><summary>{line}</summary>{inner}</details>"


def attribution_tree(
    saes: Mapping[str, SparseAutoencoder],
    lm: LanguageModel,
    ids: Sequence[int] | Tensor,
    layer: int,
    feature: int,
    position: int,
    *,
    depth: int = 2,
    branches: int = 4,
    least: float = 0.02,
) -> Node:
    """The tree below a feature of the heads' outputs of `layer` at a position of the token ids.

    `saes` are autoencoders by site, of ``blocks.N.attn.hook_z`` and, if there are, of the residual stream. `depth` is
    the number of features on a path, `branches` the largest number of parts that are shown below a node, and `least`
    the smallest share of the node's total that is shown. Raises SaelabError as `open_circuit` and `direct_attribution`.
    """
    circuit = open_circuit(lm, saes)
    return grow(circuit, circuit.read(ids), layer, feature, position, depth=depth, branches=branches, least=least)


@torch.no_grad()
def grow(
    circuit: Circuit,
    prompt: Prompt,
    layer: int,
    feature: int,
    position: int,
    *,
    depth: int = 2,
    branches: int = 4,
    least: float = 0.02,
) -> Node:
    """`attribution_tree` on a text that was read."""
    if layer not in circuit.heads:
        raise SaelabError(f"attribution: there is no autoencoder of layer {layer}: choose {sorted(circuit.heads)}")
    if depth < 1 or branches < 1:
        raise SaelabError(f"attribution: depth {depth} and branches {branches} must be positive numbers")
    return _Tree(circuit, prompt, branches, least).attention_feature(layer, feature, position, None, depth)


@dataclass(frozen=True)
class _Tree:
    circuit: Circuit
    prompt: Prompt
    branches: int
    least: float

    def attention_feature(
        self, layer: int, feature: int, position: int, contribution: float | None, depth: int
    ) -> Node:
        sae, maps = self.circuit.heads[layer], self.circuit.maps[layer]
        read = readout(sae, self.prompt, layer, maps, feature, position)
        direct = read.direct
        nodes = [Node("source", value, layer, s) for s, value in enumerate(direct.by_source.tolist())]
        nodes += [Node("bias", direct.bias), Node("rounding", direct.rounding)]
        kept = self._kept(nodes, direct.pre_activation)
        children = [self._source(read, layer, node, depth) if node.kind == "source" else node for node in kept]
        own = direct.pre_activation
        return Node(
            "attention feature",
            own if contribution is None else contribution,
            layer,
            position,
            feature,
            own,
            children=tuple(children),
        )

    def _source(self, read: Readout, layer: int, node: Node, depth: int) -> Node:
        s = node.position
        assert s is not None
        sae = self.circuit.stream.get(layer)
        constants = [
            Node("bias", float(read.constant[:, s].sum())),
            Node("rounding", float(read.remainder[:, s].sum())),
        ]
        x = self.prompt.values[stream_sites(layer)[0]][s]
        towards = (read.weight[:, s, None] * read.directions).sum(0)
        if sae is None or not bool(self.prompt.ordinary[s]):
            return self._with(node, [*self._parts(towards, layer, s, x), *constants], depth)
        features, activations = self.prompt.codes(sae, stream_sites(layer)[0], s)
        written = activations[:, None] * sae.W_dec[features].double()
        error = x - written.sum(0) - sae.b_dec.double()
        found = zip(features.tolist(), activations.tolist(), (written @ towards).tolist(), strict=True)
        nodes = [Node("stream feature", value, layer, s, feature, own) for feature, own, value in found]
        nodes += [
            Node("error", float(error @ towards), layer, s),
            Node("bias", float(sae.b_dec.double() @ towards), layer),
            *constants,
        ]
        return self._with(node, nodes, depth)

    def _stream_feature(self, node: Node, depth: int) -> Node:
        assert node.layer is not None and node.position is not None and node.feature is not None
        sae = self.circuit.stream[node.layer]
        which = torch.tensor([node.feature], device=sae.W_enc.device)
        x = self.prompt.values[stream_sites(node.layer)[0]][node.position]
        nodes = self._parts(sae.W_enc[node.feature].double(), node.layer, node.position, x)
        return self._with(node, [*nodes, Node("bias", float(encoder_bias(sae, which)))], depth)

    def _parts(self, towards: Tensor, layer: int, position: int, x: Tensor) -> list[Node]:
        """x, the residual stream at a layer's input, times `towards`, part by part."""
        found = parts(self.circuit, self.prompt, layer, position)
        values = (torch.stack([part.vector for part in found]) @ towards).tolist()
        nodes = [
            Node(part.kind, value, part.layer, position, part.feature, part.activation)
            for part, value in zip(found, values, strict=True)
        ]
        return [*nodes, Node("rounding", float(x @ towards) - sum(values))]

    def _with(self, node: Node, nodes: Iterable[Node], depth: int) -> Node:
        """`node` with its children, the features among them expanded as deep as asked for."""
        children = []
        for child in self._kept(list(nodes), node.total):
            if depth > 1 and child.kind == "attention feature":
                assert child.layer is not None and child.position is not None and child.feature is not None
                found = (child.layer, child.feature, child.position, child.contribution)
                children.append(self.attention_feature(*found, depth - 1))
            elif depth > 1 and child.kind == "stream feature":
                children.append(self._stream_feature(child, depth - 1))
            else:
                children.append(child)
        values = (node.kind, node.contribution, node.layer, node.position, node.feature, node.activation)
        return Node(*values, children=tuple(children))

    def _kept(self, nodes: list[Node], total: float) -> list[Node]:
        """The largest `nodes` and those that are always shown, largest first; the others as one `rest`.

        Biases, and roundings, become one node each.
        """
        named = [node for node in nodes if node.kind not in _ALWAYS]
        named.sort(key=lambda node: -abs(node.contribution))
        shown = [node for node in named[: self.branches] if abs(node.contribution) >= self.least * abs(total)]
        rest = named[len(shown) :]
        children = shown + [node for node in nodes if node.kind == "error"]
        together: tuple[Kind, ...] = ("bias", "rounding")
        for kind in together:
            values = [node.contribution for node in nodes if node.kind == kind]
            if values:
                children.append(Node(kind, sum(values)))
        if rest:
            children.append(Node("rest", sum(node.contribution for node in rest), merged=len(rest)))
        return children
