"""Every method trains through the same seams: JumpReLU, ReLU, frozen parts, free lengths, transcoders, and resuming."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from saelab.sae.allocation.rules import MutualChoice, Rule, Threshold, TokenChoice
from saelab.sae.losses import batch_fvu
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.new import new_autoencoder
from saelab.sae.settings import (
    AffinitySettings,
    AllocationSettings,
    AuxSettings,
    EncoderSettings,
    SaeSettings,
    SparsitySettings,
)
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer, train

D, TRUE, F, BATCH = 16, 40, 64, 256
SETTINGS = TrainingSettings(tokens=200 * BATCH, batch=BATCH, lr=3e-3)
THRESHOLD = AllocationSettings("threshold")


def planted(batches: int, seed: int = 0) -> Iterator[Tensor]:
    """Sums of 3 of 40 fixed directions with positive strengths, E||x||^2 = d_in, and a little noise."""
    generator = torch.Generator().manual_seed(123)
    directions = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=generator), dim=1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        chosen = torch.rand(BATCH, TRUE, generator=generator).topk(3).indices
        strength = torch.rand(BATCH, 3, 1, generator=generator) + 0.5
        yield 2.2 * ((directions[chosen] * strength).sum(1) + 0.01 * torch.randn(BATCH, D, generator=generator))


def trained(
    settings: SaeSettings, training: TrainingSettings = SETTINGS, seed: int = 0
) -> tuple[SparseAutoencoder, SparseAutoencoder, list[dict]]:
    """An autoencoder before and after training, and the metrics."""
    start, sae = (new_autoencoder(settings, next(planted(1, 99)), seed=seed) for _ in range(2))
    metrics: list[dict] = []
    train(sae, map(Batch, planted(training.steps, seed)), training, settings, log=metrics.append)
    return start, sae, metrics


def jumprelu(target: float | None = 3.0, coefficient: float = 10.0) -> SaeSettings:
    sparsity = SparsitySettings("l0", coefficient, target)
    return SaeSettings(F, 3, encoder=EncoderSettings("jumprelu"), allocation=THRESHOLD, sparsity=sparsity)


TOPK, BATCHTOPK = TokenChoice(3), MutualChoice(3)


@pytest.mark.parametrize(
    ("settings", "rule", "other"),
    [
        (SaeSettings(F, 3), TOPK, BATCHTOPK),
        (SaeSettings(F, 3, allocation=AllocationSettings("mutual_choice")), BATCHTOPK, TOPK),
        (SaeSettings(F, 3, allocation=AllocationSettings("feature_choice")), BATCHTOPK, TOPK),
        (SaeSettings(F, 3, allocation=THRESHOLD, sparsity=SparsitySettings("l1")), Threshold(torch.zeros(1)), TOPK),
    ],
    ids=lambda value: value.allocation.name if isinstance(value, SaeSettings) else "",
)
def test_the_first_scale_is_the_best_for_the_entries_that_training_begins_with(
    settings: SaeSettings, rule: Rule, other: Rule
) -> None:
    x = next(planted(1)) * torch.linspace(0.2, 1.7, BATCH)[:, None]  # so that one batch-wide cut is not k per token
    sae = new_autoencoder(settings, x, seed=0)
    pre = (x - sae.b_dec) @ sae.W_enc.T

    def best_factor(of: Rule) -> float:
        first = torch.where(of.mask(pre), pre, 0.0) @ sae.W_dec
        return (((x - sae.b_dec) * first).sum() / first.square().sum()).item()

    assert best_factor(rule) == pytest.approx(1, abs=1e-5)
    assert abs(best_factor(other) - 1) > 0.02


@pytest.mark.parametrize(
    ("target", "seed", "steps"),
    [(4.0, 0, 400), *(pytest.param(t, seed, 1000, marks=pytest.mark.slow) for t in (2.0, 4.0) for seed in (0, 1, 2))],
)
def test_jumprelu_reaches_its_target_l0_and_learns(target: float, seed: int, steps: int) -> None:
    _, sae, metrics = trained(jumprelu(target), dataclasses.replace(SETTINGS, tokens=steps * BATCH), seed)
    held_out = torch.cat(list(planted(20, 1000 + seed)))
    assert sae.encode(held_out).nnz / len(held_out) == pytest.approx(target, rel=0.05)
    assert metrics[-1]["fvu"] < 0.5 * metrics[0]["fvu"]
    assert metrics[-1]["l0"] == pytest.approx(target, rel=0.1)


def test_without_a_target_a_larger_l0_coefficient_leaves_fewer_active() -> None:
    found = [trained(jumprelu(None, price))[2][-1]["l0"] for price in (0.002, 0.2)]
    assert found[1] < 0.8 * found[0]


def test_relu_with_a_larger_l1_coefficient_leaves_fewer_active() -> None:
    found = []
    for price in (0.02, 0.2):
        settings = SaeSettings(F, 3, allocation=THRESHOLD, sparsity=SparsitySettings("l1", price))
        _, sae, metrics = trained(settings)
        assert metrics[-1]["fvu"] < 0.3 and torch.equal(sae.threshold, torch.zeros(1))
        found.append(metrics[-1]["l0"])
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("freeze", ["decoder", "encoder", "none"])
def test_frozen_weights_stay_as_they_start_and_the_others_learn(freeze: str) -> None:
    start, sae, metrics = trained(SaeSettings(F, 3, freeze=freeze))
    before = dict(start.named_parameters())
    same = {name for name, parameter in sae.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {"decoder": {"W_dec"}, "encoder": {"W_enc", "b_enc"}, "none": set()}[freeze]
    assert metrics[-1]["fvu"] < metrics[0]["fvu"]


def test_decoder_rows_keep_length_one_only_if_they_should() -> None:
    for unit_norm in (True, False):
        _, sae, _ = trained(SaeSettings(F, 3, unit_norm=unit_norm))
        lengths = sae.W_dec.norm(dim=1)
        assert torch.allclose(lengths, torch.ones(F), atol=1e-5) == unit_norm


def test_a_transcoder_learns_another_target_with_the_gradients_of_the_dense_formula() -> None:
    torch.manual_seed(0)
    settings, readout = SaeSettings(F, 3), torch.randn(D, 5) / D**0.5
    x = next(planted(1))
    sae, twin = (new_autoencoder(settings, x, seed=0, target=x @ readout) for _ in range(2))
    assert sae.d_out == 5 and sae(x).shape == (BATCH, 5)
    forward, _ = sae.training_pass(Batch(x, x @ readout), sae.rule)
    batch_fvu(x @ readout, forward.reconstruction).backward()
    z = x @ twin.W_enc.T + twin.b_enc
    y = x @ readout
    error = y - ((z.relu() * twin.rule.mask(z.detach())) @ twin.W_dec + twin.b_dec)
    (error.square().sum() / (y - y.mean(0)).square().sum()).backward()
    for ours, dense in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, dense.grad)
    sae.zero_grad()
    metrics: list[dict] = []
    train(sae, (Batch(x, x @ readout) for x in planted(SETTINGS.steps)), SETTINGS, settings, log=metrics.append)
    assert metrics[-1]["fvu"] < 0.3 * metrics[0]["fvu"]


RESUMED = {
    "token": SaeSettings(F, 3),
    "mutual": SaeSettings(F, 3, allocation=AllocationSettings("mutual_choice"), aux=AuxSettings("aux_zipf")),
    "feature": SaeSettings(F, 3, allocation=AllocationSettings("feature_choice", refresh=7), multi_topk=True),
    "gradient": SaeSettings(F, 3, affinity=AffinitySettings("gradient"), selection="bfloat16"),
    "jumprelu": jumprelu(),
    "relu": SaeSettings(F, 3, allocation=THRESHOLD, sparsity=SparsitySettings("l1", 0.1)),
    "frozen": SaeSettings(F, 3, freeze="decoder", unit_norm=False),
    "gated": SaeSettings(F, 3, EncoderSettings("gated"), allocation=THRESHOLD, sparsity=SparsitySettings("l1", 0.1)),
    "tanh": SaeSettings(F, 3, allocation=THRESHOLD, sparsity=SparsitySettings("tanh", 0.01)),
    "tied": SaeSettings(F, 4, EncoderSettings("tied"), allocation=AllocationSettings("group_max")),
    "aligned": SaeSettings(
        F, 3, EncoderSettings("aligned"), allocation=THRESHOLD, sparsity=SparsitySettings("lp", 0.1)
    ),
    "prefixes": SaeSettings(F, 3, allocation=AllocationSettings("mutual_choice"), prefixes=(0.25, 0.5)),
}


ADDED = ("gated", "tanh", "tied", "aligned", "prefixes")
"""Methods without a state of their own."""


@pytest.mark.parametrize(
    ("name", "at"),
    [(name, at) for name in RESUMED for at in ((99,) if name in ADDED else (0, 1, 99, 130))],
)
def test_a_new_trainer_with_the_state_continues_to_the_bit(name: str, at: int) -> None:
    """Also within the first phases of feature choice and aux_zipf, and from a copy of the state."""
    settings, sample = RESUMED[name], next(planted(1, 99))
    training = TrainingSettings(tokens=200 * BATCH, batch=BATCH, lr=3e-3, log_every=1)
    batches = [Batch(x, gradients=torch.cos(x)) for x in planted(140)]

    def fresh(seed: int) -> Trainer:
        return Trainer(new_autoencoder(settings, sample, seed=seed), training, settings)

    whole = fresh(0)
    logs = [whole.step(batch) for batch in batches]
    first = fresh(0)
    for batch in batches[:at]:
        first.step(batch)
    second = fresh(1)
    second.load_state_dict(_copied(first.state_dict()))
    assert [second.step(batch) for batch in batches[at:]] == logs[at:]
    for ours, theirs in zip(second.sae.parameters(), whole.sae.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = second.trained(), whole.trained()
    assert (ours.tokens, ours.steps, ours.facts) == (theirs.tokens, theirs.steps, theirs.facts)
    assert (ours.densities is None) == (theirs.densities is None)
    assert ours.densities is None or torch.equal(ours.densities, theirs.densities)


def _copied(state: object) -> object:
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return state.detach().clone() if isinstance(state, Tensor) else state
