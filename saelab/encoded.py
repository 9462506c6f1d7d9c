"""Rows of text to activations of ordinary tokens and their codes, block by block.

Evaluation, the feature database and every analysis read text this way. `encoded` yields the blocks to one reader;
`read_together` gives several readers their blocks and encodes the blocks they have in common once; `read_all` does so
for several autoencoders, at any sites, in the same passes of the model.

Memory, besides the model and the autoencoders: one forward pass up to the last site, the activations of each site, what
`encode` needs, and at most two blocks. A block takes 4 d_in bytes per token (twice that with gradients) and about 20
bytes per active feature of each token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from saelab.activations.sites import Sites, as_sites
from saelab.activations.stream import ActivationModel, check_finite, side_by_side
from saelab.codes import Codes
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.sae.checkpoint import check_weights


class Autoencoder(Protocol):
    """The part of an autoencoder that a pass over text and an evaluation use."""

    n_features: int

    def encode(self, x: Tensor) -> Codes: ...
    def decode(self, codes: Codes, x: Tensor) -> Tensor: ...


class GradientAware(Autoencoder, Protocol):
    """An autoencoder whose selection can use the gradients of the loss, of the shape of x."""

    def encode(self, x: Tensor, gradients: Tensor | None = None) -> Codes: ...


@dataclass(frozen=True, eq=False)
class Block:
    """The ordinary tokens of some consecutive rows, at least one."""

    rows: Tensor
    """All token ids ``[rows, context]``, int64, on the model's device."""
    first_row: int
    """Number of the first of these rows; rows are numbered through the pass."""
    positions: Tensor
    """row * context + position of each ordinary token, ``[tokens]`` int64."""
    x: Tensor
    """Activations at the site, ``[tokens, d_in]`` float32."""
    codes: Codes
    """``[tokens, n_features]``"""
    target: Tensor | None = None
    """Activations at the target site of a transcoder, ``[tokens, d_out]`` float32; None: x itself."""

    @property
    def output(self) -> Tensor:
        """What the reconstruction stands for, ``[tokens, d_out]``."""
        return self.x if self.target is None else self.target

    def row_of_token(self) -> Tensor:
        """Number of the row of each ordinary token, ``[tokens]`` int64 on the CPU."""
        return (self.positions // self.rows.shape[1]).cpu()


@dataclass(frozen=True)
class Reader:
    """A reader of a pass: `add` is called with the blocks of the rows from `first_row` up to `rows`, in order."""

    add: Callable[[Block], None]
    rows: int
    rows_per_forward: int
    first_row: int = 0
    """A multiple of `rows_per_forward`, so that blocks have the same rows wherever a reader begins; or `rows`."""


def encoded(
    sae: Autoencoder,
    lm: ActivationModel,
    rows: Tensor,
    site: str | Sites,
    rows_per_forward: int,
    *,
    gradients: bool = False,
    track: Track = silent,
) -> Iterator[Block]:
    """Blocks of `rows` ``[rows, context]``, `rows_per_forward` rows each, in order.

    Blocks without an ordinary token are left out. With `gradients`, `sae` must be `GradientAware`, of one site, and
    selects features with the gradients of the loss, which know the next token. Raises SaelabError if the model has no
    such site, if the site has no activations, if `gradients` are asked of several sites, and if activations, gradients
    or weights of `sae` are NaN or infinite.
    """
    _check_weights(sae)
    if gradients and len(as_sites(site).all) > 1:
        raise SaelabError(f"{site}: the gradient affinity is that of an autoencoder of one site")
    starts = iter(range(0, len(rows), rows_per_forward))
    for start in track(starts, "encoding", rows.numel(), lambda start: rows[start : start + rows_per_forward].numel()):
        yield from _blocks([(sae, as_sites(site))], lm, rows, slice(start, start + rows_per_forward), gradients)


def read_together(
    sae: Autoencoder,
    lm: ActivationModel,
    rows: Tensor,
    site: str | Sites,
    readers: Sequence[Reader],
    *,
    track: Track = silent,
) -> None:
    """Give each reader the blocks that `encoded` yields for its rows from its `first_row` on, bit for bit.

    The last bits of results depend on which rows share a forward pass. So readers share a block only if it has the same
    rows for each of them. Readers with equal `rows_per_forward` share all blocks except the last one of the reader with
    fewer rows. Readers with different `rows_per_forward` mostly share none. Raises SaelabError as `encoded` does.
    """
    read_all(lm, rows, [(sae, site, readers)], track=track)


def read_all(
    lm: ActivationModel,
    rows: Tensor,
    readings: Sequence[tuple[Autoencoder, str | Sites, Sequence[Reader]]],
    *,
    track: Track = silent,
) -> None:
    """`read_together` of several autoencoders, each with its site and readers, in the same passes of the model."""
    takers: dict[tuple[int, int], dict[int, list[Callable[[Block], None]]]] = {}
    pairs = [(sae, as_sites(site)) for sae, site, _ in readings]
    for number, (sae, _, readers) in enumerate(readings):
        _check_weights(sae)
        for reader in readers:
            end = min(reader.rows, len(rows))
            for start in range(reader.first_row, end, reader.rows_per_forward):
                stop = min(start + reader.rows_per_forward, end)
                takers.setdefault((start, stop), {}).setdefault(number, []).append(reader.add)

    spans = sorted(takers)
    total = sum(rows[start:stop].numel() for start, stop in spans)
    for start, stop in track(iter(spans), "encoding", total, lambda span: rows[slice(*span)].numel()):
        here = takers[start, stop]
        blocks = _blocks([pairs[number] for number in here], lm, rows, slice(start, stop))
        for block, adds in zip(blocks, here.values(), strict=False):  # no block at all without an ordinary token
            for add in adds:
                add(block)
            del block  # the next one needs the memory


@torch.no_grad()
def _blocks(
    pairs: Sequence[tuple[Autoencoder, Sites]], lm: ActivationModel, rows: Tensor, part: slice, gradients: bool = False
) -> Iterator[Block]:
    """The block of each pair of autoencoder and sites, from one pass; none at all without an ordinary token."""
    ids = rows[part].to(lm.device).long()
    keep = lm.ordinary(ids)
    if not keep.any():
        return
    row, position = keep.nonzero(as_tuple=True)
    row += part.start
    slopes: dict[str, Tensor] = {}
    sites = list(dict.fromkeys(site for _, sites in pairs for site in sites.all))
    if gradients:
        values, found = cast(LanguageModel, lm).activations_and_gradients(ids, sites)
        slopes = {site: found[site][keep] for site in sites}
        for site in sites:
            check_finite(f"{site}: {lm.name}", "gradients", slopes[site], row, position)
    else:
        values = lm.activations(ids, sites)
    inputs = {site: values.pop(site)[keep].float() for site in sites}
    for site in sites:
        check_finite(f"{site}: {lm.name}", "activations", inputs[site], row, position)
    for sae, site in pairs:
        x, target = (
            side_by_side([inputs[each] for each in site.inputs]),
            None if site.target is None else inputs[site.target],
        )
        if (d_in := getattr(sae, "d_in", x.shape[1])) != x.shape[1]:
            raise SaelabError(f"{site}: is {x.shape[1]:,} wide in {lm.name}, and the autoencoder takes {d_in:,}")
        codes = cast(GradientAware, sae).encode(x, gradients=slopes[site.input]) if gradients else sae.encode(x)
        yield Block(ids, part.start, row * rows.shape[1] + position, x, codes, target)


def _check_weights(sae: Autoencoder) -> None:
    """Raises SaelabError if a weight of `sae` is not finite: its features would count as silent."""
    if isinstance(sae, nn.Module):
        check_weights(sae, "the autoencoder")
