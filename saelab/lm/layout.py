"""How a module lays out one vector per token, measured on a small batch.

Most modules give ``[rows, positions, width]``. Others split heads, put heads or the width before positions, put
positions first, or take the tokens of all rows as one list. Shapes alone do not tell these apart if two sizes coincide,
and a wrong reading mixes tokens. So a layout is accepted only if a change of some tokens changes no other row and no
earlier position.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

ROWS, POSITIONS = 2, 7
"""Shape of the batch that layouts are measured on."""
CHANGED = 4
"""First position of the last row whose token changes."""
_ROUNDING = 0.1
"""Largest relative change elsewhere, as a share of that where tokens change, that counts as rounding. Mixtures of
experts group tokens by their values, so that one token's change alters the last bits of others."""


@dataclass(frozen=True)
class Layout:
    """Names of a value's axes: rows, positions (or both merged), and others in any order."""

    axes: tuple[str, ...]

    def flatten(self, value: Tensor, rows: int, positions: int) -> Tensor:
        """`value` as ``[rows, positions, d_in]``, a view if possible. Raises EinopsError if the sizes do not fit."""
        return rearrange(value, f"{' '.join(self.axes)} -> {self._flat}", rows=rows, positions=positions)

    def restore(self, flat: Tensor, value: Tensor) -> Tensor:
        """``[rows, positions, d_in]`` in the shape of `value`: undoes `flatten`."""
        sizes = {name: size for name, size in zip(self.axes, value.shape, strict=True) if name in self._others}
        return rearrange(flat, f"{self._flat} -> {' '.join(self.axes)}", **sizes)

    @property
    def _others(self) -> list[str]:
        return [name for name in self.axes if name.startswith("axis")]

    @property
    def _flat(self) -> str:
        return f"rows positions ({' '.join(self._others)})"


def measuring_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[ROWS, POSITIONS]`` of different tokens, if `ids` are enough, and these rows with changed tokens."""
    needed = ROWS * POSITIONS
    ids = ids[torch.linspace(0, len(ids) - 1, 2 * needed, device=ids.device).long()]
    rows = ids[:needed].view(ROWS, POSITIONS)
    return rows, with_changed_tokens(rows, ids[needed:])


def with_changed_tokens(rows: Tensor, others: Tensor) -> Tensor:
    """`rows` ``[ROWS, POSITIONS]`` with other tokens at the end of the last row, from `CHANGED` on."""
    changed = rows.clone()
    changed[-1, CHANGED:] = others[: POSITIONS - CHANGED]
    return changed


def layout_of(value: Any, changed: Any = None) -> Layout | str:
    """The layout of a module's `value` on rows ``[ROWS, POSITIONS]``; or why it has none, as the end of a sentence.

    `changed` is the module's value after `with_changed_tokens`. If it is None, the shape decides.
    """
    if not isinstance(value, Tensor):
        return f"gives {type(value).__name__}, not a tensor"
    if not value.is_floating_point():
        return "holds token ids, not activations"
    fitting = list(_fitting(value.shape))
    if not fitting or (changed is not None and changed.shape != value.shape):
        return f"has shape {list(value.shape)} for rows of shape {[ROWS, POSITIONS]}, not one vector per token"
    if changed is None:
        return fitting[0]
    for layout in fitting:
        before, after = (layout.flatten(v, ROWS, POSITIONS).double() for v in (value, changed))
        change = (after - before).norm(dim=-1) / torch.maximum(before.norm(dim=-1), after.norm(dim=-1)).clamp_min(1e-30)
        here = torch.zeros_like(change, dtype=torch.bool)
        here[-1, CHANGED:] = True
        if change[here].max() > 0 and change[~here].max() <= _ROUNDING * change[here].max():
            return layout
    if torch.equal(value, changed):
        return "does not depend on the tokens"
    return "mixes tokens: when a token changes, it changes at earlier positions or in other rows too"


def _fitting(shape: torch.Size) -> Iterator[Layout]:
    """The layouts that fit `shape`, those with rows before positions first."""
    if len(shape) < 2:
        return
    for i, j in sorted(permutations(range(len(shape)), 2), key=lambda pair: pair[0] > pair[1]):
        if (shape[i], shape[j]) == (ROWS, POSITIONS) and len(shape) > 2:
            yield Layout(tuple({i: "rows", j: "positions"}.get(a, f"axis{a}") for a in range(len(shape))))
    for i, size in enumerate(shape):
        if size == ROWS * POSITIONS:
            for both in ("(rows positions)", "(positions rows)"):
                yield Layout(tuple(both if a == i else f"axis{a}" for a in range(len(shape))))
