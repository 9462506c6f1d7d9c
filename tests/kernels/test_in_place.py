"""Gradients added in place are the gradients that would be returned."""

import torch

from saelab.codes import Codes
from saelab.kernels import sddmm, spmm
from saelab.kernels.products import accumulate_in_place, return_gradients


def test_two_uses_in_two_passes_add_up_in_the_same_memory() -> None:
    torch.manual_seed(0)
    dense = torch.randn(9, 30) * (torch.rand(9, 30) < 0.3)
    codes = Codes.from_mask(dense != 0, dense)
    table, rows = torch.nn.Parameter(torch.randn(30, 5)), torch.randn(9, 5)

    def backward(table: torch.Tensor) -> None:
        (spmm(codes, table).square().sum() + sddmm(codes, rows, table).sin().sum()).backward()

    reference = table.detach().clone().requires_grad_(True)
    backward(reference)
    backward(reference)
    accumulate_in_place(table)
    memory = table.grad
    backward(table)
    backward(table)
    assert table.grad is memory and reference.grad is not None
    torch.testing.assert_close(table.grad, reference.grad)

    return_gradients(table)
    assert table.grad is None
    backward(table)
    torch.testing.assert_close(2 * table.grad, reference.grad)
