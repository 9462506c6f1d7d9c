"""Which entries of a batch are active: dense scores in tiles, candidates, an exact choice in float32.

The dense ``[tokens, n_features]`` matrix exists one tile at a time. In float32 the tiles are runs of tokens and their
values are final. In bfloat16 they are runs of features (the encoder is cast tile by tile), their scores only propose
candidates, with a margin of `LOW_MARGIN`, and the candidates are scored again in float32 before the choice is made.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from saelab.codes import Codes
from saelab.kernels import sddmm
from saelab.sae.affinity import Alignment, worth
from saelab.sae.allocation.candidates import ColumnBounds, Entries
from saelab.sae.allocation.rules import Rule, as_codes, in_order

LOW_MARGIN = 2.0**-6
"""Relative error of a bfloat16 score that is allowed for: four times the half unit in its last place, 2^-9, for the
product's own rounding on either side of the cut, and as much again for that of its inputs."""
EXACT_MARGIN = 1e-5
"""The same for two float32 computations of one score in different orders of summation."""

_TILE_ELEMENTS = {"cpu": {torch.bfloat16: 2**22, torch.float32: 3 * 2**22}}
"""Pre-activations per tile on a CPU: 8 MB in bfloat16, which stay in its cache; 50 MB in float32, where every product
lays out the whole encoder anew: fewer, larger tiles are a few percent faster."""
_TILE_ELSEWHERE = 2**30


class Scratch:
    """Tensors that are written anew in every step: to allocate them each time would cost a page fault per 4 KB."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = 1
        for length in shape:
            size *= length
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype or held.device != device:
            self._held[name] = held = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)

    @property
    def bytes(self) -> int:
        """Held at present."""
        return sum(held.nbytes for held in self._held.values())

    def __deepcopy__(self, memo: dict) -> "Scratch":
        return Scratch()


class Encoder(NamedTuple):
    """The parameters that scores depend on, and the scratch memory for their tiles."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    scratch: Scratch


class Wanted(NamedTuple):
    """Features among which an auxiliary loss looks for its own: the k strongest of `mask` ``[n_features]`` bool."""

    mask: Tensor
    k: int


class Selection(NamedTuple):
    pattern: Codes
    """The selected entries; the values are their scores, 0 in an unfilled slot."""
    pre: Tensor
    """Pre-activations there, float32 ``[nnz]``."""


class Tile(NamedTuple):
    tokens: slice
    features: slice


@torch.no_grad()
def select(
    encoder: Encoder,
    centred: Tensor,
    rules: list[Rule],
    alignment: Alignment | None,
    low: bool,
    wanted: Wanted | None = None,
) -> tuple[list[Selection], Codes | None]:
    """The selections by `rules`, the first of which has the largest budget, and the auxiliary loss's own entries.

    centred = x - b_dec ``[tokens, d_in]`` float32. `alignment` adds the gradient to what an entry is worth. The
    second result holds, per token, the strongest pre-activations (as found: low precision where `low`) of the wanted
    features, -inf in slots that no feature fills; None where none is wanted.
    """
    tokens, n_features = len(centred), len(encoder.W_enc)
    margin = LOW_MARGIN if low else EXACT_MARGIN if alignment else 0.0
    bounds = rules[0].bounds(tokens, n_features, margin, centred.device)
    strongest = _Strongest(wanted, tokens, centred) if wanted is not None else None
    found = []
    for tile, pre in pre_activations(encoder, centred, low, whole_columns=isinstance(bounds, ColumnBounds)):
        if strongest is not None:
            with record_function("selection"):
                strongest.see(pre, tile)
        scores = pre if alignment is None else _worth(encoder, alignment, pre, tile)
        with record_function("selection"):
            found.append(bounds.candidates(scores, tile.tokens.start, tile.features.start))
    with record_function("selection"):
        entries = Entries(*(torch.cat(parts) for parts in zip(*found, strict=True))) if len(found) > 1 else found[0]
        entries = in_order(bounds.final(entries), n_features)
        pre = entries.scores
        if low or alignment is not None:
            pattern = _pattern(entries, tokens, n_features)
            scores = pre = sddmm(pattern, centred, encoder.W_enc, encoder.b_enc)
            if alignment is not None:
                scores = worth(pre, sddmm(pattern, alignment.gradients, encoder.W_dec), alignment.beta)
            entries = entries._replace(scores=scores)
        selections = []
        for rule in rules:
            keep = rule.keep(entries, tokens)
            pattern, slots = as_codes(entries, keep, rule.budget(tokens), tokens, n_features)
            selections.append(Selection(pattern, pre[slots]))
        return selections, None if strongest is None else strongest.codes(n_features)


def _pattern(entries: Entries, tokens: int, n_features: int) -> Codes:
    offsets = torch.searchsorted(entries.tokens, torch.arange(tokens + 1, device=entries.tokens.device))
    return Codes(entries.scores, entries.features, offsets, n_features)


def pre_activations(
    encoder: Encoder, centred: Tensor, low: bool, whole_columns: bool = False
) -> Iterator[tuple[Tile, Tensor]]:
    """Tiles of ``centred @ W_enc.T + b_enc``, each overwritten by the next; of all tokens where `whole_columns`."""
    tokens, n_features = len(centred), len(encoder.W_enc)
    of_device = _TILE_ELEMENTS.get(centred.device.type, {})
    elements = of_device.get(torch.bfloat16 if low else torch.float32, _TILE_ELSEWHERE)
    if low:
        x = centred.bfloat16()
        b = encoder.b_enc.bfloat16()
        whole = whole_columns and x.device.type != "cpu"  # ColumnBounds takes all features at once there
        for features in _runs(n_features, n_features if whole else elements // max(1, tokens)):
            with record_function("encoder matmul"):
                W = _low(encoder, "W_enc", features)
                out = encoder.scratch.get("pre", (tokens, len(W)), x.dtype, x.device)
                torch.addmm(b[features], x, W.T, out=out)
            yield Tile(slice(0, tokens), features), out
        return
    for rows in _runs(tokens, tokens if whole_columns else elements // n_features):
        with record_function("encoder matmul"):
            x = centred[rows]
            out = encoder.scratch.get("pre", (len(x), n_features), x.dtype, x.device)
            torch.addmm(encoder.b_enc, x, encoder.W_enc.T, out=out)
        yield Tile(rows, slice(0, n_features)), out


def _worth(encoder: Encoder, alignment: Alignment, pre: Tensor, tile: Tile) -> Tensor:
    """What the entries of a tile are worth, in the tile's precision."""
    with record_function("encoder matmul"):
        low = pre.dtype == torch.bfloat16
        g = alignment.gradients[tile.tokens]
        W = _low(encoder, "W_dec", tile.features) if low else encoder.W_dec[tile.features]
        aligned = torch.mm(g.to(pre.dtype), W.T, out=encoder.scratch.get("aligned", pre.shape, pre.dtype, pre.device))
    with record_function("selection"):
        return worth(pre, aligned, alignment.beta, out=aligned)


def _low(encoder: Encoder, name: str, features: slice) -> Tensor:
    rows: Tensor = getattr(encoder, name)[features]
    return encoder.scratch.get(name, tuple(rows.shape), torch.bfloat16, rows.device).copy_(rows)


def _runs(n: int, length: int) -> Iterator[slice]:
    """Slices that cover range(n), of almost equal lengths, multiples of 64 near `length`; one where n is 0."""
    pieces = max(1, -(-n // max(1, length)))
    step = max(64, -(-n // pieces // 64) * 64)
    for start in range(0, max(1, n), step):
        yield slice(start, min(start + step, n))


class _Strongest:
    """Per token, the k largest pre-activations among the wanted features, over tiles of features or tokens."""

    def __init__(self, wanted: Wanted, tokens: int, like: Tensor) -> None:
        self.mask, k = wanted
        device = like.device
        if device.type == "cpu":  # elsewhere the host cannot know how many there are without waiting
            k = min(k, int(self.mask.sum()))
        k = min(k, len(self.mask))
        self.values = torch.full((tokens, k), -torch.inf, device=device, dtype=like.dtype)
        self.features = torch.zeros((tokens, k), dtype=torch.long, device=device)

    def see(self, pre: Tensor, tile: Tile) -> None:
        k = self.values.shape[1]
        mask = self.mask[tile.features]
        if pre.device.type == "cpu":
            which = mask.nonzero().squeeze(1)
            pre = pre[:, which]
        else:
            which = torch.arange(len(mask), device=pre.device)
            pre = pre.masked_fill(~mask, -torch.inf)
        if not k or not len(which):
            return
        values, places = pre.topk(min(k, len(which)), dim=1, sorted=False)
        values = torch.cat([self.values[tile.tokens], values.to(self.values.dtype)], 1)
        features = torch.cat([self.features[tile.tokens], which[places] + tile.features.start], 1)
        self.values[tile.tokens], best = values.topk(k, dim=1, sorted=False)
        self.features[tile.tokens] = features.gather(1, best)

    def codes(self, n_features: int) -> Codes:
        return Codes.from_topk(self.values, self.features, n_features)
