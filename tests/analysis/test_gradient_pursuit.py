"""Gradient pursuit equals its definition with dense vectors, and finds planted codes."""

import torch
from torch import Tensor

from saelab.analysis import gradient_pursuit as module
from saelab.analysis.gradient_pursuit import gradient_pursuit


def dense(y: Tensor, dictionary: Tensor, steps: int) -> Tensor:
    """The definition, for one token ``[d]``: dense weights ``[n_features]``."""
    w = torch.zeros(len(dictionary), dtype=y.dtype)
    for _ in range(steps):
        r = y - w @ dictionary
        c = dictionary @ r
        chosen = w != 0
        chosen[c.argmax()] = True
        g = c * chosen
        v = g @ dictionary
        if v @ v == 0:
            continue
        w = (w + (v @ r) / (v @ v) * g).clamp_min(0)
    return w


def unit_rows(n: int, d: int) -> Tensor:
    rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return torch.nn.functional.normalize(rows, dim=1)


def test_it_equals_the_dense_definition(monkeypatch) -> None:
    monkeypatch.setattr(module, "_ENTRIES", 300)  # several parts
    dictionary = unit_rows(40, 6)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(60, 6, dtype=torch.float64, generator=generator)
    y[5] = 0
    steps = torch.randint(0, 9, (60,), generator=generator)
    found = gradient_pursuit(y, dictionary, steps)
    expected = torch.stack([dense(row, dictionary, int(n)) for row, n in zip(y, steps, strict=True)])
    torch.testing.assert_close(found.to_dense(), expected)
    assert (found.l0() <= steps).all() and found.l0()[5] == 0 and (found.l0() < steps).any()


def test_it_finds_planted_codes_of_directions_at_right_angles() -> None:
    dictionary = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    code = torch.zeros(3, 8, dtype=torch.float64)
    code[0, 2], code[1, [1, 5]], code[2, [0, 3]] = 2.0, torch.tensor([1.0, 3.0]).double(), 1.0
    found = gradient_pursuit(code @ dictionary, dictionary, torch.tensor([1, 30, 30]))
    torch.testing.assert_close(found.to_dense(), code, rtol=1e-4, atol=1e-4)
    assert gradient_pursuit(code[:0] @ dictionary, dictionary, torch.zeros(0, dtype=torch.long)).tokens == 0
