"""The products of codes with many entries, on a CPU: dense matrix products, one tile of tokens at a time.

A ReLU or JumpReLU autoencoder begins training with half of all entries active. The sparse products (cpu.py) then gather
millions of rows and sort millions of entries; writing the codes out as a dense matrix is four times faster. Below
`products.CROSSOVER` the sparse products are faster.

Memory: a product makes one dense tile of at most `TILE_ENTRIES` floats (or one token) at a time. The position of each
entry in its tile, 8 bytes, is computed once per pattern and lives as long as the pattern. Repeated entries add up.
Low-precision input is multiplied in float32 and rounded once, at the end. As in any dense product, a row of the table
that is not finite spoils all tokens, not only those it is active on.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.kernels.cpu import topk

__all__ = ["sddmm", "spmm", "spmm_transposed", "topk"]

TILE_ENTRIES = 2**22
"""Floats of a tile, 16 MB. Larger tiles cost new pages every time; smaller ones have few rows at 24576 features."""


def spmm(codes: Codes, table: Tensor) -> Tensor:
    """``codes.to_dense() @ table``: table ``[n_features, d]`` -> ``[tokens, d]``."""
    dtype = torch.promote_types(codes.values.dtype, table.dtype)
    table = table.to(_accumulator(dtype))
    out = table.new_empty(codes.tokens, table.shape[1], dtype=dtype)
    for tile in _tiles(codes):
        out[tile.tokens] = _dense(codes, tile, table.dtype) @ table
    return out


def spmm_transposed(codes: Codes, rows: Tensor, into: Tensor | None = None) -> Tensor:
    """``codes.to_dense().T @ rows``: rows ``[tokens, d]`` -> ``[n_features, d]``; added to `into` if given."""
    dtype = torch.promote_types(codes.values.dtype, rows.dtype)
    rows = rows.to(_accumulator(dtype))
    total = into
    if total is None or total.dtype != rows.dtype:
        total = rows.new_zeros(codes.n_features, rows.shape[1])
    for tile in _tiles(codes):
        total.addmm_(_dense(codes, tile, rows.dtype).T, rows[tile.tokens])
    if into is None:
        return total.to(dtype)
    return into if total is into else into.add_(total)


def sddmm(codes: Codes, a: Tensor, b: Tensor) -> Tensor:
    """``(a @ b.T)`` at the pattern of `codes`: a ``[tokens, d]``, b ``[n_features, d]`` -> ``[nnz]``."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(_accumulator(dtype)), b.to(_accumulator(dtype))
    out = a.new_empty(codes.nnz, dtype=dtype)
    for tile in _tiles(codes):
        out[tile.entries] = (a[tile.tokens] @ b.T).view(-1).index_select(0, tile.positions)
    return out


class _Tile(NamedTuple):
    tokens: slice
    entries: slice
    """Entries of these tokens."""
    positions: Tensor
    """Index of each entry in the flattened tile, ``[entries]`` int64: token * n_features + feature."""


def _tiles(codes: Codes) -> list[_Tile]:
    return codes.once("tiles", lambda: _cut(codes))


def _cut(codes: Codes) -> list[_Tile]:
    tiles, step = [], max(1, TILE_ENTRIES // codes.n_features)
    for start in range(0, codes.tokens, step):
        offsets = codes.offsets[start : start + step + 1]
        tokens, entries = slice(start, start + len(offsets) - 1), slice(int(offsets[0]), int(offsets[-1]))
        first = torch.arange(len(offsets) - 1) * codes.n_features
        positions = torch.repeat_interleave(first, offsets.diff(), output_size=entries.stop - entries.start)
        tiles.append(_Tile(tokens, entries, positions.add_(codes.features[entries])))
    return tiles


def _dense(codes: Codes, tile: _Tile, dtype: torch.dtype) -> Tensor:
    """The codes of the tokens of `tile`, ``[tokens, n_features]``."""
    dense = codes.values.new_zeros(tile.tokens.stop - tile.tokens.start, codes.n_features, dtype=dtype)
    dense.view(-1).scatter_add_(0, tile.positions, codes.values[tile.entries].to(dtype))
    return dense


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
