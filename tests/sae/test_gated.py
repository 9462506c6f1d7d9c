"""Gated autoencoders: values, losses and gradients are those of the dense formula, and a threshold can be the gate."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saelab.sae.checkpoint import load, save_sae
from saelab.sae.fold import fold
from saelab.sae.initial import initialise
from saelab.sae.losses import Forward, gate, l1
from saelab.sae.model import Batch, SparseAutoencoder

D, F, N = 6, 20, 200


def make(dtype: torch.dtype = torch.float64) -> tuple[SparseAutoencoder, Tensor]:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, 4).to(dtype)
    x = torch.randn(N, D, dtype=dtype) + 1
    sae.train_magnitudes()
    initialise(sae, x)
    assert sae.r_mag is not None and sae.b_mag is not None
    for vector, spread in ((sae.b_enc, 0.5), (sae.r_mag, 0.3), (sae.b_mag, 0.5)):
        vector.data += spread * torch.randn(F, dtype=dtype)
    return sae, x


class Dense:
    """The formulas of the paper: papers' W_gate is W_enc, b_gate is b_enc."""

    def __init__(self, sae: SparseAutoencoder, x: Tensor) -> None:
        assert sae.r_mag is not None and sae.b_mag is not None
        projected = (x - sae.b_dec) @ sae.W_enc.T
        self.pi = projected + sae.b_enc
        magnitude = (sae.r_mag.exp() * projected + sae.b_mag).relu()
        self.codes = (self.pi > 0) * magnitude
        self.deviation = (x - x.mean(0)).square().sum()
        self.fvu = (x - self.codes @ sae.W_dec - sae.b_dec).square().sum() / self.deviation
        by_gate = self.pi.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
        self.gate = (x - by_gate).square().sum() / self.deviation
        self.l1 = (self.pi.relu() * sae.W_dec.norm(dim=1)).sum() / (N * D**0.5)


def passed(sae: SparseAutoencoder, x: Tensor) -> Forward:
    return sae.training_pass(Batch(x), sae.rule)[0]


def fvu(forward: Forward) -> Tensor:
    return (forward.target - forward.reconstruction).square().sum() / forward.deviation


@pytest.mark.parametrize(
    ("term", "name", "reached"),
    [
        (fvu, "fvu", {"W_enc", "W_dec", "b_dec", "r_mag", "b_mag"}),  # the magnitude does not depend on the gate's bias
        (gate, "gate", {"W_enc", "b_enc", "b_dec"}),
        (l1, "l1", {"W_enc", "b_enc", "b_dec", "W_dec"}),
    ],
)
def test_each_term_and_its_gradients_are_those_of_the_dense_formula(term, name: str, reached: set[str]) -> None:
    sae, x = make()
    twin = copy.deepcopy(sae)
    forward = passed(sae, x)
    dense = Dense(twin, x)
    assert 0 < (dense.pi > 0).sum() < N * F and ((dense.pi > 0) & (dense.codes == 0)).any()
    torch.testing.assert_close(forward.codes.to_dense(), dense.codes)
    value, expected = term(forward), getattr(dense, name)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    found = set()
    for (which, ours), theirs in zip(sae.named_parameters(), twin.parameters(), strict=True):
        zero = torch.zeros_like(ours)
        ours, theirs = (zero if each.grad is None else each.grad for each in (ours, theirs))
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-8)
        found |= {which} if ours.abs().max() > 1e-9 else set()
    assert found == reached


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_folded_it_is_linear_with_thresholds_and_computes_the_same(scale: float) -> None:
    sae, x = make()
    folded = fold(sae, scale)
    assert sae.r_mag is not None and sae.b_mag is not None and folded.r_mag is None and folded.threshold is not None
    expected = (sae.b_mag - sae.r_mag.exp() * sae.b_enc).clamp_min(0) / scale
    torch.testing.assert_close(folded.threshold, expected.detach())
    assert (folded.threshold == 0).any() and (folded.threshold > 0).any()
    torch.testing.assert_close(folded.encode(x / scale).to_dense() * scale, sae.encode(x).to_dense())
    torch.testing.assert_close(folded(x / scale) * scale, sae(x))
    torch.testing.assert_close(sae.encode(x).to_dense(), Dense(sae, x).codes.detach())


def test_a_threshold_of_the_gate_is_kept_when_it_is_folded() -> None:
    sae, x = make()
    sae.threshold = sae.pre_activations(x).detach().quantile(0.7, dim=0).clamp_min(0)
    assert sae.r_mag is not None and (sae.r_mag != 0).any()
    expected = sae.encode(x)
    assert 0 < expected.nnz < copy.deepcopy(sae).encode(x).to_dense().numel()
    without = copy.deepcopy(sae)
    without.threshold = None
    assert without.encode(x).nnz > expected.nnz
    torch.testing.assert_close(fold(sae, 3.0).encode(x / 3).to_dense() * 3, expected.to_dense())


def test_its_checkpoint_is_a_jumprelu_that_computes_the_same(tmp_path: Path) -> None:
    sae, x = make(torch.float32)
    save_sae(sae, tmp_path)
    loaded = load(tmp_path)
    assert (tmp_path / "cfg.json").read_text().count('"jumprelu"') == 1 and loaded.r_mag is None
    torch.testing.assert_close(loaded(x), sae(x))
    torch.testing.assert_close(loaded.encode(x).to_dense(), sae.encode(x).to_dense())


def test_its_summary_says_what_is_active() -> None:
    sae, _ = make()
    assert "every feature whose gate is above 0" in repr(sae)
