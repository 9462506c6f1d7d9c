"""A layout is found by which tokens change a value, and it undoes itself."""

from itertools import permutations

import pytest
import torch
from einops import rearrange
from torch import Tensor

from saelab.lm.layout import CHANGED, POSITIONS, ROWS, Layout, layout_of, with_changed_tokens

TOKENS = torch.arange(ROWS * POSITIONS).view(ROWS, POSITIONS)
OTHERS = with_changed_tokens(TOKENS, torch.arange(100, 100 + POSITIONS))


def vectors(tokens: Tensor, heads: int, width: int) -> Tensor:
    """``[rows, positions, heads, width]``, from each token and those before it in its row."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, heads, width, generator=generator)[tokens].cumsum(1)


def test_the_changed_rows_differ_at_the_end_of_the_last_row_only() -> None:
    assert (TOKENS != OTHERS).nonzero().tolist() == [[ROWS - 1, p] for p in range(CHANGED, POSITIONS)]


@pytest.mark.parametrize("heads", [1, ROWS, 5, POSITIONS])
@pytest.mark.parametrize("order", list(permutations(["rows", "positions", "heads", "width"])))
def test_any_order_of_the_axes_is_found_even_if_two_sizes_coincide(order: tuple[str, ...], heads: int) -> None:
    pattern = f"rows positions heads width -> {' '.join(order)}"
    value, changed = (rearrange(vectors(tokens, heads, 3), pattern) for tokens in (TOKENS, OTHERS))
    layout = layout_of(value, changed)
    assert isinstance(layout, Layout)
    flat = layout.flatten(value, ROWS, POSITIONS)
    kept = "heads width" if order.index("heads") < order.index("width") else "width heads"
    torch.testing.assert_close(
        flat, rearrange(vectors(TOKENS, heads, 3), f"rows positions heads width -> rows positions ({kept})")
    )
    assert torch.equal(layout.restore(flat, value), value)


@pytest.mark.parametrize("merged", ["(rows positions)", "(positions rows)"])
def test_a_list_of_the_tokens_of_all_rows_is_found_in_either_order(merged: str) -> None:
    pattern = f"rows positions heads width -> {merged} (heads width)"
    value, changed = (rearrange(vectors(tokens, 2, 3), pattern) for tokens in (TOKENS, OTHERS))
    layout = layout_of(value, changed)
    assert isinstance(layout, Layout)
    flat = layout.flatten(value, ROWS, POSITIONS)
    torch.testing.assert_close(flat, vectors(TOKENS, 2, 3).flatten(2))
    assert torch.equal(layout.restore(flat, value), value)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: x.flip(1), "mixes tokens"),
        (lambda x: x - x.mean(1, keepdim=True), "mixes tokens"),
        (lambda x: x.flip(0), "mixes tokens"),
        (lambda x: x + x.sum(), "mixes tokens"),
        (torch.ones_like, "does not depend on the tokens"),
        (lambda x: x[:1], "not one vector per token"),
        (lambda x: x.sum(-1), "not one vector per token"),
        (lambda x: x[:, :-1], "not one vector per token"),
        (lambda x: x.long(), "token ids"),
        (lambda x: (x, x), "gives tuple, not a tensor"),
    ],
)
def test_other_values_have_no_layout(make, reason: str) -> None:
    result = layout_of(*(make(vectors(tokens, 1, 4).squeeze(2)) for tokens in (TOKENS, OTHERS)))
    assert isinstance(result, str) and reason in result


def test_last_bits_that_differ_elsewhere_are_rounding() -> None:
    value, changed = vectors(TOKENS, 1, 4), vectors(OTHERS, 1, 4)
    assert isinstance(layout_of(value, changed * (1 + 1e-3)), Layout)
    assert isinstance(layout_of(value, changed * 1.5), str)
