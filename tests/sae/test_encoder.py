"""JumpReLU: its straight-through gradients are those of the smoothed loss, and reach the right parameters."""

import copy

import pytest
import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.sae.allocation.rules import Threshold
from saelab.sae.encoder import JumpReLU
from saelab.sae.fold import fold
from saelab.sae.initial import initialise, threshold_for
from saelab.sae.losses import SMOOTHING, batch_fvu, l0, l1, lp, smooth_l0
from saelab.sae.model import Batch, SparseAutoencoder

D, F, N, BANDWIDTH = 6, 20, 200, 0.3


def make() -> tuple[SparseAutoencoder, Tensor]:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, 4).double()
    x = torch.randn(N, D, dtype=torch.float64) + 1
    initialise(sae, x)
    sae.train_thresholds(threshold_for(sae, 4, x), BANDWIDTH)
    assert sae.log_threshold is not None
    sae.log_threshold.data = sae.log_threshold.data.double() + 0.2 * torch.randn(F, dtype=torch.float64)
    return sae, x


def smoothed(z: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The step and the JumpReLU convolved over theta with the rectangle kernel; exact outside the window."""
    inside = ((z - theta) / BANDWIDTH + 0.5).clamp(0, 1)
    upper = z + BANDWIDTH / 2  # the theta at which the window ends
    integral = (upper.square() - theta.clamp(z - BANDWIDTH / 2, upper).square()) / (2 * BANDWIDTH)
    return inside, integral


def test_the_gradient_of_the_thresholds_is_that_of_the_smoothed_loss() -> None:
    """By central differences. The loss is linear in the codes, so that smoothing them is smoothing it."""
    sae, x = make()
    assert isinstance(sae.encoder, JumpReLU) and sae.log_threshold is not None
    z = sae.pre_activations(x).detach()
    weights = torch.randn(N, F, dtype=torch.float64)

    def smooth_loss(log_threshold: Tensor) -> Tensor:
        steps, values = smoothed(z, log_threshold.exp())
        return (weights * values).sum() / N + 0.7 * steps.sum() / N

    forward, _ = sae.training_pass(Batch(x), Threshold(sae.encoder.cut()))
    rows, features = forward.codes.row_of_entry(), forward.codes.features
    ((weights[rows, features] * forward.codes.values).sum() / N + 0.7 * l0(forward, None)).backward()
    found, at = sae.log_threshold.grad, sae.log_threshold.detach()
    assert found is not None and (found != 0).sum() > F // 2
    for i in range(F):
        step = torch.zeros(F, dtype=torch.float64).index_fill_(0, torch.tensor(i), 1e-6)
        numeric = (smooth_loss(at + step) - smooth_loss(at - step)) / 2e-6
        assert found[i].item() == pytest.approx(numeric.item(), abs=1e-6)


def test_the_forward_and_the_other_gradients_are_those_of_the_dense_formula() -> None:
    sae, x = make()
    twin = copy.deepcopy(sae)
    forward, _ = sae.training_pass(Batch(x), Threshold(sae.encoder.cut()))
    batch_fvu(x, forward.reconstruction).backward()
    z = (x - twin.b_dec) @ twin.W_enc.T + twin.b_enc
    assert twin.log_threshold is not None
    codes = z * (z > twin.log_threshold.exp())
    error = x - (codes @ twin.W_dec + twin.b_dec)
    (error.square().sum() / (x - x.mean(0)).square().sum()).backward()
    torch.testing.assert_close(forward.codes.to_dense(), codes)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(sae, name).grad, getattr(twin, name).grad)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes)


def test_entries_in_the_window_below_a_threshold_are_selected_with_value_zero() -> None:
    sae, x = make()
    forward, _ = sae.training_pass(Batch(x), Threshold(sae.encoder.cut()))
    assert forward.codes.nnz > int(forward.codes.l0().sum()) == sae.encode(x).nnz


def test_l0_counts_active_entries_and_moves_only_thresholds() -> None:
    sae, x = make()
    forward, _ = sae.training_pass(Batch(x), Threshold(sae.encoder.cut()))
    mean = sae.encode(x).nnz / N
    assert l0(forward, None).item() == pytest.approx(mean)
    assert l0(forward, 8.0).item() == pytest.approx((mean / 8 - 1) ** 2)
    l0(forward, 8.0).backward()
    assert sae.log_threshold is not None and sae.log_threshold.grad is not None
    assert (sae.log_threshold.grad > 0).any()  # fewer than 8 are active: descent lowers thresholds
    assert not (sae.log_threshold.grad < 0).any()
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
        assert parameter.grad is None or not parameter.grad.any()


def test_l1_equals_its_dense_formula_and_reaches_encoder_and_decoder_lengths() -> None:
    sae, x = make()
    sae.log_threshold, sae.threshold = None, torch.zeros(1, dtype=torch.float64)
    twin = copy.deepcopy(sae)
    forward, _ = sae.training_pass(Batch(x), Threshold(sae.encoder.cut()))
    l1(forward).backward()
    z = ((x - twin.b_dec) @ twin.W_enc.T + twin.b_enc).relu()
    expected = (z * twin.W_dec.norm(dim=1)).sum() / (N * D**0.5)
    expected.backward()
    torch.testing.assert_close(l1(forward), expected)
    for name in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(getattr(sae, name).grad, getattr(twin, name).grad)


@pytest.mark.parametrize(
    ("term", "formula"),
    [
        (lambda forward: lp(forward, 0.5), lambda a: ((a / D**0.5 + SMOOTHING).sqrt() - SMOOTHING**0.5).sum() / N),
        (lambda forward: smooth_l0(forward, 4.0), lambda a: (4 * a).tanh().sum() / N),
    ],
    ids=["lp", "tanh"],
)
def test_smoother_sparsity_losses_equal_their_dense_formulas(term, formula) -> None:
    """Decoder rows are not of length 1; the gradient reaches encoder, centre and decoder lengths, and stays finite."""
    sae, x = make()
    sae.W_dec.data *= torch.linspace(0.5, 2, F, dtype=torch.float64)[:, None]
    sae.log_threshold, sae.threshold = None, torch.zeros(1, dtype=torch.float64)
    sae.b_enc.data[0] = -(sae.W_enc[0] @ (x[0] - sae.b_dec)).item() + 1e-12  # just active
    twin = copy.deepcopy(sae)
    forward, _ = sae.training_pass(Batch(x), Threshold(sae.encoder.cut()))
    expected = formula(((x - twin.b_dec) @ twin.W_enc.T + twin.b_enc).relu() * twin.W_dec.norm(dim=1))
    torch.testing.assert_close(term(forward), expected)
    term(forward).backward()
    expected.backward()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        found = getattr(sae, name).grad
        assert torch.isfinite(found).all() and found.any()
        torch.testing.assert_close(found, getattr(twin, name).grad)


def test_lp_is_l1_if_the_power_is_one() -> None:
    sae, x = make()
    forward, _ = sae.training_pass(Batch(x), Threshold(sae.encoder.cut()))
    torch.testing.assert_close(lp(forward, 1.0), l1(forward))
    forward.codes.values.retain_grad()
    smooth_l0(forward, 2.0).backward()  # of a JumpReLU, it also reaches the thresholds
    assert sae.log_threshold is not None and sae.log_threshold.grad is not None and sae.log_threshold.grad.any()


@pytest.mark.parametrize("target", [2.0, 6.0])
def test_thresholds_begin_where_the_target_is_met(target: float) -> None:
    sae, x = make()
    sae.log_threshold = None
    sae.train_thresholds(threshold_for(sae, target, x), 0.01)
    assert sae.encode(x).nnz / N == pytest.approx(target, rel=0.02)
    sae.train_thresholds(0.75, 0.01)
    assert sae.log_threshold is not None and sae.log_threshold.dtype == torch.float32
    torch.testing.assert_close(sae.log_threshold.detach().exp(), torch.full((F,), 0.75))


def test_folding_divides_a_trained_threshold_by_the_scale_and_fixes_it() -> None:
    sae, x = make()
    folded = fold(sae, 3.0)
    assert folded.log_threshold is None and isinstance(folded.encode(x), Codes)
    torch.testing.assert_close(folded.encode(x / 3).to_dense(), sae.encode(x).to_dense() / 3)
