"""Meta-structure: planted directions are found, random rows explain what chance does, figures equal dense formulas."""

import pytest
import torch
from torch import Tensor

from saelab.analysis import meta_structure as module
from saelab.analysis.meta_structure import MetaStructure, meta_structure
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder

N, D, DIRECTIONS, K = 300, 24, 30, 2


def planted() -> Tensor:
    """Rows of any length that are sums of K of DIRECTIONS directions, and a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, D, generator=generator), dim=1)
    chosen = torch.rand(N, DIRECTIONS, generator=generator).topk(K, 1).indices
    weights = torch.zeros(N, DIRECTIONS).scatter_(1, chosen, 0.5 + torch.rand(N, K, generator=generator))
    return torch.cat([3 * weights @ directions, torch.zeros(1, D)])


def found(rows: Tensor) -> MetaStructure:
    return meta_structure(rows, meta_features=40, k=K, rows_seen=15_000)


def test_planted_directions_explain_what_chance_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[SparseAutoencoder] = []
    train = module.train

    def recorded(sae, *arguments):
        trained.append(sae)
        return train(sae, *arguments)

    monkeypatch.setattr(module, "train", recorded)
    rows = planted()
    result = found(rows)
    assert result.n_features == N and result.meta_features == 40
    assert result.explained.low > 0.85 and result.explained_by_chance.high < 0.6
    assert result.l0 == pytest.approx(K, abs=0.05)

    sae, unit = trained[0], torch.nn.functional.normalize(rows[:N], dim=1) * D**0.5
    pre = (unit - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    active = pre > sae.threshold
    error = (unit - (pre * active) @ sae.W_dec - sae.b_dec).square().sum(1)
    deviation = (unit - unit.mean(0)).square().sum(1)
    assert result.explained.value == pytest.approx(1 - (error.sum() / deviation.sum()).item(), abs=1e-5)
    assert result.explained_of_row == pytest.approx((1 - error / deviation).numpy(), abs=1e-4)
    assert result.never_active == (~active.any(0)).sum() and result.l0 == pytest.approx(active.sum().item() / N)
    assert [sum(bar.y) for bar in result.plot().data] == [N, N]  # type: ignore[attr-defined]


def test_random_rows_have_no_structure() -> None:
    scales = torch.linspace(2, 0.3, D)
    result = found(torch.randn(N, D, generator=torch.Generator().manual_seed(1)) * scales)
    assert result.explained.value == pytest.approx(result.explained_by_chance.value, abs=0.05)
    assert result.explained.value > 0.2


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(SaelabError, match="2 meta-features with k=4 of 8 decoder rows"):
        meta_structure(torch.eye(8))
    with pytest.raises(SaelabError, match="9 meta-features"):
        meta_structure(torch.eye(8), meta_features=9)
