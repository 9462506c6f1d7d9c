"""The autoencoder equals its dense formula, value and gradient; each loss trains exactly what it should."""

import copy

import pytest
import torch
from torch import Tensor

from saelab.sae import encoder
from saelab.sae.allocation.rules import FeatureChoice, MutualChoice, Rule, TokenChoice
from saelab.sae.allocation.selection import Request
from saelab.sae.fold import fold
from saelab.sae.initial import geometric_median, initialise
from saelab.sae.losses import Forward, auxiliary, batch_fvu, terms
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.settings import AuxSettings, SaeSettings
from saelab.training.trainer import _target_coverage

D, F, K, N = 6, 20, 4, 30
TOKEN = TokenChoice(K)


def mask_of(features: Tensor) -> Tensor:
    return torch.zeros(F, dtype=torch.bool).index_fill_(0, features, True)


def forward_pass(sae: SparseAutoencoder, x: Tensor, rule: Rule = TOKEN, bf16: bool = False) -> Forward:
    return sae.training_pass(Batch(x), rule, bf16=bf16)[0]


def aux_loss(
    sae: SparseAutoencoder,
    x: Tensor,
    mask: Tensor,
    k_aux: int,
    bf16: bool = False,
    rule: Rule = TOKEN,
    living: Tensor | None = None,
    unit_norm: bool = True,
) -> tuple[Forward, Tensor]:
    forward, found = sae.training_pass(Batch(x), rule, [None, Request(TokenChoice(k_aux), mask)], bf16=bf16)
    assert found[0] is None
    return forward, auxiliary(forward, found[1], living, unit_norm)


def make_sae(seed: int = 0) -> tuple[SparseAutoencoder, Tensor]:
    torch.manual_seed(seed)
    sae = SparseAutoencoder(D, F, K).double()
    x = torch.randn(N, D, dtype=torch.float64) + 1
    initialise(sae, x)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3)
    return sae, x


def dense_pass(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, reconstruction) by the dense formula, through a mask of tokens x features."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    mask = torch.zeros_like(pre).scatter(1, pre.topk(sae.k).indices, 1.0)
    z = pre.relu() * mask
    return z, z @ sae.W_dec + sae.b_dec


def test_a_training_pass_has_the_values_and_gradients_of_the_dense_formula() -> None:
    sae, x = make_sae()
    twin = copy.deepcopy(sae)
    found = forward_pass(sae, x)
    ours = batch_fvu(x, found.reconstruction)
    ours.backward()
    z, reconstruction = dense_pass(twin, x)
    fvu = (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    fvu.backward()
    torch.testing.assert_close(found.codes.to_dense(), z)
    torch.testing.assert_close(ours, fvu)
    for (name, ours), dense in zip(sae.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, dense.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_encode_is_what_training_selects_and_does_not_depend_on_other_tokens() -> None:
    sae, x = make_sae()
    z, reconstruction = dense_pass(sae, x)
    codes = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(), z)
    torch.testing.assert_close(sae(x), reconstruction)
    assert bool((codes.values > 0).all()) and bool((codes.l0() <= K).all())
    alone = torch.cat([sae.encode(row[None]).to_dense() for row in x])
    torch.testing.assert_close(alone, z)
    assert torch.equal(sae.encode(x.view(5, 6, D)).to_dense(), codes.to_dense())
    assert sae.encode(x[:0]).tokens == 0


@pytest.mark.parametrize("bf16", [False, True])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, 300, K)
    x = torch.randn(200, D)
    initialise(sae, x)
    rules: list[Rule] = [TOKEN, MutualChoice(K), FeatureChoice(torch.arange(300) % 6, 5 * 150)]
    mask = torch.arange(300) % 3 == 0
    whole = [aux_loss(sae, x, mask, 7, bf16, rule) for rule in rules]
    monkeypatch.setitem(encoder._TILE_ELEMENTS, "cpu", dict.fromkeys((torch.bfloat16, torch.float32), 64 * 200))
    for rule, before in zip(rules, whole, strict=True):
        after = aux_loss(sae, x, mask, 7, bf16, rule)
        torch.testing.assert_close(after[0].codes.to_dense(), before[0].codes.to_dense())
        if not bf16:  # rounded scores pick the auxiliary loss's features, and rounding depends on the tile's shape
            torch.testing.assert_close(after[1], before[1])


@pytest.mark.parametrize("bf16", [False, True])
def test_the_auxiliary_loss_trains_exactly_the_selected_features_with_a_positive_pre_activation(bf16: bool) -> None:
    sae, x = make_sae()
    dead = torch.tensor([1, 4, 7, 11, 13])
    with torch.no_grad():
        sae.b_enc[7] = -100  # all its pre-activations are negative: it may be selected, but gets no gradient
    k_aux = 3
    aux_loss(sae, x, mask_of(dead), k_aux, bf16)[1].backward()

    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()[:, dead]
    chosen = torch.zeros_like(pre, dtype=torch.bool).scatter(1, pre.topk(k_aux).indices, True) & (pre > 0)
    expected = set(dead[chosen.any(0)].tolist())
    requested = Request(TokenChoice(k_aux), mask_of(dead))
    _, (entries,) = sae.training_pass(Batch(x), TOKEN, [requested], bf16=bf16)
    assert _target_coverage([requested], [entries]) == {
        "targets": len(dead),
        "share_reached": len(expected) / len(dead),
    }
    assert 7 not in expected and expected
    for gradient in (sae.W_enc.grad, sae.W_dec.grad, sae.b_enc.grad):
        assert gradient is not None
        reached = gradient.reshape(F, -1).abs().sum(1).nonzero().squeeze(1)
        assert set(reached.tolist()) == expected
    assert sae.b_dec.grad is None or not sae.b_dec.grad.any()


def test_aux_k_equals_its_dense_formula() -> None:
    sae, x = make_sae()
    twin = copy.deepcopy(sae)
    dead = torch.tensor([0, 3, 8, 9])
    aux_loss(sae, x, mask_of(dead), 2)[1].backward()
    _, reconstruction = dense_pass(twin, x)
    error = (x - reconstruction).detach()
    pre = ((x - twin.b_dec.detach()) @ twin.W_enc.T + twin.b_enc)[:, dead]
    mask = torch.zeros_like(pre).scatter(1, pre.topk(2).indices, 1.0)
    explained = (pre.relu() * mask) @ twin.W_dec[dead]
    aux = (error - explained).square().sum() / (error - error.mean(0)).square().sum()
    aux.backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(getattr(sae, name).grad, getattr(twin, name).grad)


@pytest.mark.parametrize(("bf16", "unit_norm"), [(False, False), (True, False), (False, True)])
def test_aux_zipf_equals_its_dense_formula(bf16: bool, unit_norm: bool) -> None:
    """Dead features explain the error together, each living one alone; with unit_norm, but for lengths of rows."""
    sae, x = make_sae()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, F, dtype=torch.float64)[:, None])  # lengths count
    twin = copy.deepcopy(sae)
    targets, living = torch.tensor([0, 3, 8, 9, 12, 15]), mask_of(torch.tensor([3, 7, 9, 15]))
    ours = aux_loss(sae, x, mask_of(targets), 3, bf16, living=living, unit_norm=unit_norm)[1]
    ours.backward()
    _, reconstruction = dense_pass(twin, x)
    error = (x - reconstruction).detach()
    pre = ((x - twin.b_dec.detach()) @ twin.W_enc.T + twin.b_enc)[:, targets]
    z = pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(3).indices, 1.0)
    W_dec, alone = twin.W_dec[targets], living[targets]
    loss = (error - (z * ~alone) @ W_dec).square().sum()
    for i in alone.nonzero().squeeze(1).tolist():
        loss = loss + (error - z[:, i, None] * W_dec[i]).square().sum() - error.square().sum()
    dense = loss / (error - error.mean(0)).square().sum()
    dense.backward()
    torch.testing.assert_close(ours, dense)
    if unit_norm:
        for model in (sae, twin):
            remove_parallel(model.W_dec, living)
    for name in ("W_enc", "b_enc", "W_dec"):
        torch.testing.assert_close(getattr(sae, name).grad, getattr(twin, name).grad)
    used = set(targets[(z > 0).any(0)].tolist())
    for gradient in (sae.W_enc.grad, sae.W_dec.grad):
        assert gradient is not None and set(gradient.abs().sum(1).nonzero().squeeze(1).tolist()) == used
    assert sae.b_dec.grad is None or not sae.b_dec.grad.any()


def remove_parallel(rows: torch.nn.Parameter, which: Tensor) -> None:
    """Remove the part of the gradient of some rows that changes their lengths."""
    assert rows.grad is not None
    d = torch.nn.functional.normalize(rows.detach(), dim=1) * which[:, None]
    rows.grad -= (rows.grad * d).sum(1, keepdim=True) * d


def test_if_all_its_targets_are_dead_aux_zipf_is_aux_k() -> None:
    sae, x = make_sae()
    twin, dead = copy.deepcopy(sae), mask_of(torch.tensor([0, 3, 8, 9]))
    aux_k, aux_zipf = (
        next(term for term in terms(SaeSettings(F, K, aux=AuxSettings(name)), D, 1) if term.name == "aux")
        for name in ("aux_k", "aux_zipf")
    )
    values = []
    for model, term in ((sae, aux_k), (twin, aux_zipf)):
        forward, (entries,) = model.training_pass(Batch(x), TOKEN, [term.request(TOKEN, dead)])
        values.append(term.value(forward, entries, dead))
        values[-1].backward()
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0)
    for ours, theirs in zip(sae.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)


def test_features_that_share_a_direction_shrink_together_and_grow_alone() -> None:
    """Each of 19 explains too little of the error, but all together too much: then they lower each other."""
    directions = torch.eye(D, dtype=torch.float64)
    x = torch.zeros(N, D, dtype=torch.float64)
    x[:, 0], x[:, 1] = torch.linspace(1, 2, N, dtype=torch.float64), 5.0
    targets = mask_of(torch.arange(1, F))
    for living, expected in ((None, 1 / (F - 1)), (targets, 1.0)):
        sae = SparseAutoencoder(D, F, 1).double()
        with torch.no_grad():
            sae.b_dec.zero_()
            sae.b_enc.zero_()
            sae.W_dec[:], sae.W_enc[:] = directions[0], 0.3 * directions[0]
            sae.W_dec[0] = sae.W_enc[0] = directions[1]  # the one that is active, on every token
        for step in range(200):
            aux_loss(sae, x, targets, F, rule=TokenChoice(1), living=living)[1].backward()
            assert sae.W_enc.grad is not None and not sae.W_enc.grad[0].any()
            if step == 0:
                assert bool((sae.W_enc.grad[1:, 0] * (0.3 - expected) > 0).all())
            with torch.no_grad():
                sae.W_enc[:, 0] -= 5e-4 * sae.W_enc.grad[:, 0]  # along the error only
            sae.zero_grad()
        assert sae.pre_activations(x)[:, 1:].mean().item() == pytest.approx(1.5 * expected, abs=0.03)


def test_the_auxiliary_loss_of_no_error_has_no_gradient() -> None:
    """Features 0 and 1 are the number and its opposite, so the reconstruction is exact; feature 2 is the target."""
    sae, x = SparseAutoencoder(1, 3, 1), torch.tensor([[1.0], [-2.0], [3.0]])
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [-1.0], [0.5]]))
        sae.W_dec.copy_(torch.tensor([[1.0], [-1.0], [1.0]]))
    forward, found = sae.training_pass(
        Batch(x), TokenChoice(1), [Request(TokenChoice(1), torch.tensor([False, False, True]))]
    )
    assert torch.equal(forward.reconstruction, x)
    loss = auxiliary(forward, found[0])
    loss.backward()
    assert loss == 0 and all(not parameter.grad.any() for parameter in sae.parameters() if parameter.grad is not None)


def test_the_auxiliary_loss_of_no_feature_is_zero() -> None:
    sae, x = make_sae()
    assert aux_loss(sae, x, torch.zeros(F, dtype=torch.bool), 3)[1] == 0


def test_losses_do_not_depend_on_the_scale_of_the_data() -> None:
    sae, x = make_sae()
    scaled = copy.deepcopy(sae)
    with torch.no_grad():
        scaled.b_enc.mul_(10)
        scaled.b_dec.mul_(10)
    dead = mask_of(torch.tensor([1, 2]))
    (ours, aux), (theirs, scaled_aux) = aux_loss(sae, x, dead, 1), aux_loss(scaled, 10 * x, dead, 1)
    torch.testing.assert_close(batch_fvu(x, ours.reconstruction), batch_fvu(10 * x, theirs.reconstruction))
    torch.testing.assert_close(aux, scaled_aux)


def test_folding_moves_the_input_scale_into_the_biases() -> None:
    sae, x = make_sae()
    scale = 3.7
    folded = fold(sae, scale)
    torch.testing.assert_close(folded(x), sae(x * scale) / scale)
    assert torch.equal(folded.W_enc, sae.W_enc) and torch.equal(folded.W_dec, sae.W_dec)


def test_an_orthogonal_dictionary_with_k_equal_to_all_features_is_the_identity() -> None:
    q, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    sae = SparseAutoencoder(D, 2 * D, 2 * D).double()
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([q, -q]))
        sae.W_enc.copy_(sae.W_dec)
        sae.b_dec.normal_()
    x = torch.randn(9, D, dtype=torch.float64)
    torch.testing.assert_close(sae(x), x)


def test_initialisation_has_unit_rows_and_no_better_common_scale() -> None:
    sae, x = make_sae()
    initialise(sae, x, "geometric_median")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
    errors = []
    for factor in (0.95, 1.0, 1.05):
        changed = copy.deepcopy(sae)
        changed.W_enc.data.mul_(factor)
        errors.append((x - changed(x)).square().sum().item())
    assert errors[1] == min(errors)


def test_the_geometric_median_resists_an_outlier_and_has_the_least_summed_distance() -> None:
    torch.manual_seed(0)
    points = torch.randn(200, 3, dtype=torch.float64)
    points[0] = 1e4
    median = geometric_median(points)
    assert median.norm() < 0.5 < points.mean(0).norm()
    distance = torch.linalg.vector_norm
    best = distance(points - median, dim=1).sum()
    assert all(best <= distance(points - median - 0.05 * torch.randn(3), dim=1).sum() for _ in range(20))


def test_multi_topk_adds_the_reconstruction_with_four_times_the_budget() -> None:
    sae, x = make_sae()
    twin = copy.deepcopy(sae)
    fvu, multi = terms(SaeSettings(F, K, multi_topk=True), D, steps=1)[:2]
    assert (fvu.name, multi.name, fvu.weight(0), multi.weight(0)) == ("fvu", "multi_topk", 1.0, 1 / 8)
    found, (none, wider) = sae.training_pass(Batch(x), TOKEN, [fvu.request(TOKEN, None), multi.request(TOKEN, None)])
    assert none is None
    nothing = torch.zeros(F, dtype=torch.bool)
    (fvu.value(found, None, nothing) + multi.value(found, wider, nothing) / 8).backward()
    _, reconstruction = dense_pass(twin, x)
    wide = copy.copy(twin)
    wide.k = 4 * K
    _, by_hand = dense_pass(wide, x)
    deviation = (x - x.mean(0)).square().sum()
    ((x - reconstruction).square().sum() / deviation + (x - by_hand).square().sum() / deviation / 8).backward()
    torch.testing.assert_close(found.codes.to_dense(), dense_pass(twin, x)[0])
    for ours, dense in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, dense.grad)


def test_bfloat16_proposes_and_float32_decides() -> None:
    """The same entries and values as in float32: the margin covers the error of the proposal."""
    torch.manual_seed(0)
    sae = SparseAutoencoder(64, 2048, 16)
    x = torch.randn(256, 64) * torch.logspace(1, -1, 64)  # some dimensions weigh more than others, as in a model
    initialise(sae, x)
    uniform = FeatureChoice(torch.full((2048,), 2), 2 * 2048)
    for rule in (TokenChoice(16), MutualChoice(16), uniform):
        exact, low = (forward_pass(sae, x, rule, bf16).codes.to_dense() for bf16 in (False, True))
        both = (exact > 0) & (low > 0)
        torch.testing.assert_close(low[both], exact[both], rtol=1e-5, atol=1e-5)
        # Two sums in float32 may order entries either way whose scores differ by a rounding error; no others differ.
        only_exact, only_low = exact[(exact > 0) & ~both], low[(low > 0) & ~both]
        assert len(only_exact) == len(only_low) <= 2
        torch.testing.assert_close(only_low.sort().values, only_exact.sort().values, rtol=1e-6, atol=0.0)


def test_lifting_gives_silent_features_a_token_and_does_not_change_the_others() -> None:
    sae, x = make_sae()
    with torch.no_grad():
        sae.b_enc[3] = sae.b_enc[5] = -100
    before = sae.b_enc.clone()
    sae.lift(x, mask_of(torch.tensor([2, 3])))
    active = (sae.pre_activations(x) > 0).sum(0)
    assert active[3] == 1 and active[5] == 0
    unchanged = torch.arange(F) != 3
    assert torch.equal(sae.b_enc[unchanged], before[unchanged])


@pytest.mark.parametrize("threshold", [torch.tensor([0.4]), torch.linspace(-1, 1, F)])
def test_with_a_threshold_an_activation_depends_only_on_its_token(threshold: Tensor) -> None:
    sae, x = make_sae()
    sae.threshold = threshold.double()
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    expected = torch.where(pre > sae.threshold.clamp_min(0), pre, 0.0)
    torch.testing.assert_close(sae.encode(x).to_dense(), expected)
    torch.testing.assert_close(torch.cat([sae.encode(row[None]).to_dense() for row in x]), expected)
    assert sae.encode(x[:0]).tokens == 0
    torch.testing.assert_close(fold(sae, 2.0).encode(x / 2).to_dense(), expected / 2)
