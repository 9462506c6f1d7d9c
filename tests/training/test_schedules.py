"""Rates, k, parts of a batch, bfloat16 copies and averaged weights equal their formulas, and resume exactly."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saelab.errors import SettingError
from saelab.memory import peak_bytes
from saelab.sae.allocation.rules import FeatureChoice
from saelab.sae.model import LIFT, Batch, SparseAutoencoder
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
from saelab.training.state import load_state, save_state
from saelab.training.trainer import Trainer, learning_rate

D, F, K, BATCH, STEPS = 16, 64, 3, 96, 20
SAMPLE = torch.randn(500, D, generator=torch.Generator().manual_seed(0))
TRAINING = TrainingSettings(STEPS * BATCH, BATCH, lr=3e-3, log_every=1)
JUMPRELU = SaeSettings(
    F,
    K,
    encoder=EncoderSettings("jumprelu"),
    allocation=AllocationSettings("threshold"),
    sparsity=SparsitySettings("l0", target_l0=3.0),
)
METHODS = {
    "token": SaeSettings(F, K, multi_topk=True),
    "mutual": SaeSettings(F, K, allocation=AllocationSettings("mutual_choice"), selection="bfloat16"),
    "feature": SaeSettings(F, K, allocation=AllocationSettings("feature_choice", after=0.3, refresh=4)),
    "gradient": SaeSettings(F, K, affinity=AffinitySettings("gradient"), aux=AuxSettings("none")),
    "jumprelu": JUMPRELU,
}


def batches(n: int = STEPS, tokens: int = BATCH) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        x = torch.randn(tokens, D, generator=generator)
        yield Batch(x, gradients=torch.cos(x))


def trainer(settings: SaeSettings, training: TrainingSettings = TRAINING, seed: int = 0) -> Trainer:
    return Trainer(new_autoencoder(settings, SAMPLE, seed=seed), training, settings)


def changed(training: TrainingSettings = TRAINING, **settings: object) -> TrainingSettings:
    return dataclasses.replace(training, **settings)  # type: ignore[arg-type]


# The learning rate


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_falls_to_almost_zero_on_a_line_or_a_cosine(schedule: str) -> None:
    settings = TrainingSettings(tokens=1000, batch=10, lr=2.0, warmup=0.1, decay=0.4, schedule=schedule)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:61] == [2.0] * 52
    assert rates[80] == pytest.approx(1.0), "half of the fall is half the rate for both"
    left = [(100 - step) / 40 for step in range(60, 100)]
    if schedule == "cosine":
        left = [(1 - math.cos(math.pi * share)) / 2 for share in left]
    assert rates[60:] == pytest.approx([2 * share for share in left])
    last = 2.0 / 40 if schedule == "linear" else 2.0 * math.sin(math.pi / 80) ** 2
    assert rates[99] == pytest.approx(last)


# k


@pytest.mark.parametrize("name", ["token", "mutual", "feature"])
def test_k_falls_on_a_line_and_the_steps_use_it(name: str) -> None:
    """Feature choice begins in step 6, while k still falls; its capacities sum to the budget of each step."""
    settings = dataclasses.replace(METHODS[name], k_start=11, k_steps=0.5, aux=AuxSettings("none"))
    tested = trainer(settings)
    ks = [settings.k_at(step, STEPS) for step in range(STEPS)]
    assert ks == [11, 10, 9, 9, 8, 7, 6, 5, 5, 4] + [3] * 10
    rules, of_step = [], tested.allocation.rule
    tested.allocation.rule = lambda *of: rules.append(of_step(*of)) or rules[-1]  # type: ignore[method-assign]
    l0 = [metrics["l0"] for batch in batches() if (metrics := tested.step(batch)) is not None]
    assert [rule.slots(BATCH) for rule in rules] == [k * BATCH for k in ks]
    chosen = [
        (int(rule.capacities.sum()), k * BATCH)
        for rule, k in zip(rules, ks, strict=True)
        if isinstance(rule, FeatureChoice)
    ]
    assert len(chosen) == (14 if name == "feature" else 0) and all(sum_ == budget for sum_, budget in chosen)
    assert all(0.8 * k <= found <= k for found, k in zip(l0, ks, strict=True))
    assert tested.sae.k == K
    densities = tested.trained().densities
    if densities is not None:
        total = densities * F if densities.ndim == 0 else densities.sum()
        assert float(total) == pytest.approx(K)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"k_start": 2}, "k_start: 2 is not between k"),
        ({"k_start": F + 1}, "k_start: 65"),
        ({"k_start": 8, "k_steps": 1.5}, "k_steps: 1.5"),
    ],
)
def test_an_impossible_fall_of_k_is_an_error(setting: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SaeSettings(F, K, **setting)
    with pytest.raises(SettingError, match="k_start: goes with a budget"):
        dataclasses.replace(JUMPRELU, k_start=8)


# Parts of a batch


def gradients_of_a_step(tested: Trainer, batch: Batch) -> tuple[dict[str, Tensor], dict]:
    """The gradients that the optimiser is given in a step, and the step's metrics."""
    found: dict[str, Tensor] = {}

    def note(lr: float, clip: float) -> Tensor:
        named = tested.sae.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        return torch.zeros(())

    tested.optimiser.step = note  # type: ignore[method-assign]
    metrics = tested.step(batch)
    assert metrics is not None
    return found, metrics


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_a_step_are_the_mean_of_those_of_its_parts(name: str) -> None:
    """Each part of a trainer of its own, in float64, as a batch by itself; L0 is of the whole batch."""
    settings = dataclasses.replace(METHODS[name], selection="float32")
    (batch,) = (
        Batch(b.x.double(), gradients=None if b.gradients is None else b.gradients.double()) for b in batches(1)
    )
    tested = trainer(settings, changed(accumulate=4))
    tested.sae.double()
    parts = []
    for rows in torch.arange(BATCH).split(BATCH // 4):
        alone = Trainer(_copy(tested.sae, settings), changed(tokens=STEPS * BATCH // 4, batch=BATCH // 4), settings)
        gradients = None if batch.gradients is None else batch.gradients[rows]
        parts.append(gradients_of_a_step(alone, Batch(batch.x[rows], gradients=gradients)))
    found, metrics = gradients_of_a_step(tested, batch)
    assert tested.usage.densities.sum() == pytest.approx(metrics["l0"])
    for name, gradient in found.items():
        expected = torch.stack([part[name] for part, _ in parts]).mean(0)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    for name in metrics.keys() - {"step", "tokens", "lr", "gradient_norm", "dead", "targets"}:
        assert metrics[name] == pytest.approx(sum(logged[name] for _, logged in parts) / 4), name
    assert metrics["tokens"] == BATCH and metrics["step"] == 0


def test_gradients_of_a_step_in_parts_are_the_mean_of_the_dense_formula_on_each() -> None:
    settings = SaeSettings(F, K, aux=AuxSettings("none"))
    tested = trainer(settings, changed(accumulate=3))
    tested.sae.double()
    twin, x = _copy(tested.sae, settings), next(batches()).x.double()
    found, _ = gradients_of_a_step(tested, Batch(x))
    for part in x.split(BATCH // 3):
        z = (part - twin.b_dec) @ twin.W_enc.T + twin.b_enc
        error = part - ((z.relu() * twin.rule.mask(z.detach())) @ twin.W_dec + twin.b_dec)
        (error.square().sum() / (part - part.mean(0)).square().sum() / 3).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def _copy(sae: SparseAutoencoder, settings: SaeSettings) -> SparseAutoencoder:
    twin = new_autoencoder(settings, SAMPLE, seed=0).double()
    twin.load_state_dict(sae.state_dict())
    return twin


def test_feature_choice_draws_capacities_for_every_part() -> None:
    tested = trainer(METHODS["feature"], changed(accumulate=3))
    found = [metrics["l0"] for batch in batches() if (metrics := tested.step(batch)) is not None]
    assert found[6:] == pytest.approx([K] * (STEPS - 6), rel=0.1)
    assert tested.trained().densities.sum() == pytest.approx(K)  # type: ignore[union-attr]


def test_a_step_in_parts_needs_less_memory_in_fact_and_by_the_plan() -> None:
    from saelab.sae.needs import step_needs

    settings, tokens = SaeSettings(1024, 8, aux=AuxSettings("aux_k", features=8)), 2048
    held, bounds = [], []
    for parts in (1, 8):
        sae = new_autoencoder(settings, SAMPLE, seed=0)
        tested = Trainer(sae, TrainingSettings(tokens, tokens, accumulate=parts), settings)
        (batch,) = batches(1, tokens)
        held.append(peak_bytes(lambda: tested.step(batch)) + 2 * batch.x.nbytes)  # noqa: B023 (called at once)
        weights = sum(p.nbytes for p in sae.parameters())
        needs = step_needs(settings, D, tokens, "memory", parts=parts)
        bounds.append(sum(need.bytes for need in needs) + 2 * weights)  # and the optimiser's moments
    assert held[1] < 0.3 * held[0] and bounds[1] < 0.4 * bounds[0]
    assert held[0] <= bounds[0] and held[1] <= bounds[1]


def test_parts_have_at_least_two_tokens() -> None:
    x = torch.randn(7, D)
    assert [len(part.x) for part in Batch(x).cut(4)] == [3, 2, 2]
    assert [len(part.x) for part in Batch(x, gradients=x).cut(2)] == [4, 3]
    assert torch.equal(torch.cat([part.x for part in Batch(x).cut(3)]), x)
    for wrong in (0, 5, BATCH):
        with pytest.raises(SettingError, match=f"accumulate: a batch of {BATCH} cannot be cut into {wrong}"):
            changed(accumulate=wrong)


# Copies in bfloat16


@pytest.mark.parametrize("selection", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", METHODS)
def test_with_bfloat16_copies_gradients_are_those_of_the_rounded_weights(name: str, selection: str) -> None:
    """A twin with rounded weights has the same values and gradients, and the trainer's weights are not rounded."""
    settings = dataclasses.replace(METHODS[name], selection="float32" if name == "jumprelu" else selection)
    tested = trainer(settings, changed(precision="bfloat16"))
    twin = Trainer(_rounded(tested.sae, settings), TRAINING, settings)
    (batch,) = batches(1)
    before = tested.sae.W_enc.detach().clone()
    found, metrics = gradients_of_a_step(tested, batch)
    expected, logged = gradients_of_a_step(twin, batch)
    assert torch.equal(tested.sae.W_enc, before) and not torch.equal(twin.sae.W_enc, before)
    assert found.keys() == expected.keys() and found["W_enc"].dtype == torch.float32
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert metrics["fvu"] == pytest.approx(logged["fvu"], rel=1e-5) and metrics["l0"] == logged["l0"]


def test_with_bfloat16_copies_features_are_lifted_until_the_rounded_weights_activate_them() -> None:
    settings = SaeSettings(F, K, aux=AuxSettings("aux_k", lift=True))
    tested = trainer(settings, changed(precision="bfloat16"))
    tested.sae.b_enc.data[::3] = -50
    twin, x = _rounded(tested.sae, settings), next(batches()).x
    dead = torch.arange(F) % 3 == 0
    tested.sae.lift(x, dead, tested.sae.rounded_tables())
    twin.b_enc.data.copy_(tested.sae.b_enc)
    highest = twin.pre_activations(x).amax(0)[dead]
    torch.testing.assert_close(highest, torch.full_like(highest, LIFT), rtol=0, atol=1e-4)
    assert not torch.allclose(tested.sae.pre_activations(x).amax(0)[dead], highest, rtol=0, atol=1e-4)


def _rounded(sae: SparseAutoencoder, settings: SaeSettings) -> SparseAutoencoder:
    """The autoencoder with W_enc and W_dec rounded to bfloat16."""
    twin = new_autoencoder(settings, SAMPLE, seed=0)
    twin.load_state_dict(sae.state_dict())
    for table in (twin.W_enc, twin.W_dec):
        table.data.copy_(table.data.bfloat16())
    return twin


def test_training_with_bfloat16_copies_learns_and_moments_are_float32() -> None:
    errors = {}
    for precision in ("float32", "bfloat16"):
        tested = trainer(SaeSettings(F, K, selection="bfloat16"), changed(precision=precision))
        (batch,) = batches(1)
        errors[precision] = [metrics["fvu"] for _ in range(STEPS) if (metrics := tested.step(batch)) is not None]
        state = tested.optimiser.state_dict()
        assert all(moments["exp_avg"].dtype == torch.float32 for moments in state.values())
    assert errors["bfloat16"][-1] < 0.8 * errors["bfloat16"][0]
    assert errors["bfloat16"] == pytest.approx(errors["float32"], rel=0.03) and errors["bfloat16"] != errors["float32"]


# Averaged weights


def test_averaged_weights_equal_the_recursion_with_bias_correction_in_float64() -> None:
    decay, settings = 0.9, SaeSettings(F, K, freeze="encoder", unit_norm=False)
    tested, plain = trainer(settings, changed(ema=decay)), trainer(settings)
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in plain.sae.named_parameters()}
    for batch in batches():
        tested.step(batch)
        plain.step(batch)
        for name, p in plain.sae.named_parameters():
            sums[name] = decay * sums[name] + (1 - decay) * p.detach().double()
    same(tested.sae, plain.sae)
    assert tested.state_dict()["ema"].keys() == {"W_dec", "b_dec"}
    for _ in range(2):  # a second call changes nothing
        tested.release()
        for name, parameter in tested.sae.named_parameters():
            expected = (sums[name] / (1 - decay**STEPS)).float()
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(tested.sae.W_dec, plain.sae.W_dec) and torch.equal(tested.sae.W_enc, plain.sae.W_enc)


def test_averaged_decoder_rows_have_length_one_and_one_step_is_its_own_average() -> None:
    tested = trainer(SaeSettings(F, K), changed(ema=0.5))
    for batch in batches():
        tested.step(batch)
    assert (torch.linalg.vector_norm(tested.state_dict()["ema"]["W_dec"], dim=1) < 1 - 1e-6).any()
    tested.release()
    torch.testing.assert_close(torch.linalg.vector_norm(tested.sae.W_dec, dim=1), torch.ones(F))
    once, plain = (trainer(SaeSettings(F, K, unit_norm=False), changed(ema=ema)) for ema in (0.999, None))
    for each in (once, plain):
        each.step(next(batches()))
    once.release()
    same(once.sae, plain.sae)


def same(one: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Together


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [4, 8])
def test_a_resumed_training_with_all_of_them_continues_to_the_bit(name: str, at: int, tmp_path: Path) -> None:
    """From the state on the disk."""
    settings = METHODS[name]
    if name != "jumprelu":
        settings = dataclasses.replace(settings, k_start=11, k_steps=0.5)
    training = changed(schedule="cosine", accumulate=3, precision="bfloat16", ema=0.9)
    whole, first, second = (trainer(settings, training, seed) for seed in (0, 0, 1))
    logs = [whole.step(batch) for batch in batches()]
    for batch in batches(at):
        first.step(batch)
    save_state(tmp_path, first.state_dict())
    second.load_state_dict(load_state(tmp_path))
    assert [second.step(batch) for batch in list(batches())[at:]] == logs[at:]
    same(second.sae, whole.sae)
    whole.release()
    second.release()
    same(second.sae, whole.sae)


def test_settings_that_are_no_choice_are_named() -> None:
    with pytest.raises(SettingError, match="schedule: 'step' is not linear or cosine"):
        changed(schedule="step")
    with pytest.raises(SettingError, match="precision: 'fp16' is not float32 or bfloat16"):
        changed(precision="fp16")
    with pytest.raises(SettingError, match=r"ema: 1\.0 is not a number between 0 and 1"):
        changed(ema=1.0)
