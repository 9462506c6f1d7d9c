"""Matryoshka: losses and gradients equal those of dense nested autoencoders; one prefix is no prefix."""

import copy

import pytest
import torch
from torch import Tensor

from saelab.sae.allocation.rules import MutualChoice, TokenChoice
from saelab.sae.allocation.selection import Request
from saelab.sae.initial import initialise
from saelab.sae.losses import auxiliary, terms
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.new import bare_autoencoder, new_autoencoder
from saelab.sae.settings import AllocationSettings, AuxSettings, SaeSettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

D, F, N = 6, 24, 100
SIZES = (4, 11)
NESTED = SaeSettings(F, 4, prefixes=SIZES)


def make(settings: SaeSettings = NESTED) -> tuple[SparseAutoencoder, Tensor]:
    torch.manual_seed(0)
    sae = bare_autoencoder(settings, D).double()
    x = torch.randn(N, D, dtype=torch.float64) + 1
    initialise(sae, x)
    sae.b_enc.data[::5] = -9  # dead
    return sae, x


def fvu(target: Tensor, found: Tensor) -> Tensor:
    return (target - found).square().sum() / (target - target.mean(0)).square().sum()


def dense_codes(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    return z * MutualChoice(4).mask(z.detach())


def assert_same_gradients(sae: SparseAutoencoder, twin: SparseAutoencoder) -> None:
    for (name, ours), theirs in zip(sae.named_parameters(), twin.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(ours.grad, expected, msg=name)


def test_the_loss_is_the_mean_over_prefixes_with_the_gradients_of_the_dense_formula() -> None:
    sae, x = make()
    twin = copy.deepcopy(sae)
    fvu_term, nested, _ = terms(NESTED, D, 10)
    forward, _ = sae.training_pass(Batch(x), MutualChoice(4))
    dead = torch.zeros(F, dtype=torch.bool)
    loss = sum(term.weight(0) * term.value(forward, None, dead) for term in (fvu_term, nested))
    codes = dense_codes(twin, x)
    of_prefixes = [fvu(x, codes[:, :m] @ twin.W_dec[:m] + twin.b_dec) for m in (*SIZES, F)]
    for m, reconstruction in zip((*SIZES, F), forward.reconstructions, strict=True):
        torch.testing.assert_close(reconstruction, codes[:, :m] @ twin.W_dec[:m] + twin.b_dec)
    torch.testing.assert_close(nested.value(forward, None, dead), sum(of_prefixes[:-1]) / 2)
    torch.testing.assert_close(fvu_term.value(forward, None, dead), of_prefixes[-1])
    expected = sum(of_prefixes) / 3
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(sae, twin)


@pytest.mark.parametrize("living", [False, True], ids=["aux_k", "aux_zipf"])
def test_the_auxiliary_loss_is_the_mean_over_prefixes_each_with_its_error(living: bool) -> None:
    """Its gradient reaches the rows of the targets, weighted by the prefixes that have them."""
    sae, x = make()
    sae.b_enc.data[::5] = 0.1
    targets = torch.arange(F) % 5 == 0
    alive = torch.arange(F) % 10 == 0 if living else None
    twin = copy.deepcopy(sae)
    forward, (_, entries) = sae.training_pass(Batch(x), MutualChoice(4), [None, Request(TokenChoice(3), targets)])
    auxiliary(forward, entries, alive, unit_norm=False).backward()

    codes = dense_codes(twin, x).detach()
    z = (x - twin.b_dec.detach()) @ twin.W_enc.T + twin.b_enc
    z = z.where(targets, -torch.inf)
    chosen = torch.zeros_like(z).scatter(1, z.topk(3).indices, 1.0) * z.clamp_min(-1e9).relu()
    together = chosen if alive is None else chosen * ~alive
    ratios = []
    for m in (*SIZES, F):
        error = (x - codes[:, :m] @ twin.W_dec[:m] - twin.b_dec).detach()
        squares = (error - together[:, :m] @ twin.W_dec[:m]).square().sum()
        for i in [] if alive is None else alive[:m].nonzero().flatten().tolist():
            alone = chosen[:, i, None] * twin.W_dec[i]
            squares = squares + ((error - alone).square() - error.square()).sum()
        ratios.append(squares / (error - error.mean(0)).square().sum())
    expected = sum(ratios) / 3
    torch.testing.assert_close(auxiliary(forward, entries, alive, unit_norm=False), expected)
    expected.backward()
    for ours, theirs in ((sae.W_enc, twin.W_enc), (sae.b_enc, twin.b_enc), (sae.W_dec, twin.W_dec)):
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert ours.grad is not None and ours.grad[targets].any() and not ours.grad[~targets].any()
    assert sae.b_dec.grad is None


def batches(n: int = 12) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [Batch(torch.randn(64, D, generator=generator)) for _ in range(n)]


def trained(prefixes: tuple[float, ...], allocation: str = "mutual_choice") -> tuple[SparseAutoencoder, list[dict]]:
    settings = SaeSettings(F, 4, prefixes=prefixes, allocation=AllocationSettings(allocation))
    sae = new_autoencoder(settings, batches(1)[0].x, seed=0)
    trainer = Trainer(sae, TrainingSettings(12 * 64, 64, log_every=1), settings)
    return sae, [metrics for batch in batches() if (metrics := trainer.step(batch)) is not None]


@pytest.mark.parametrize("allocation", ["token_choice", "mutual_choice", "feature_choice", "group_max"])
def test_one_prefix_is_the_plain_autoencoder_to_the_bit(allocation: str) -> None:
    plain, metrics = trained((), allocation)
    whole, same = trained((F,), allocation)
    nested, other = trained(SIZES, allocation)
    assert metrics == same and "nested" not in metrics[0] and "nested" in other[0]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), whole.parameters(), strict=True))
    assert not torch.equal(plain.W_dec, nested.W_dec)


def loss_of(sae: SparseAutoencoder, x: Tensor, order: Tensor) -> float:
    moved = copy.deepcopy(sae)
    for name in ("W_enc", "b_enc", "W_dec"):
        getattr(moved, name).data = getattr(sae, name).data[order]
    forward, _ = moved.training_pass(Batch(x), TokenChoice(4))
    return sum(fvu(x, each).item() for each in forward.reconstructions)


def test_features_may_change_places_within_a_group_and_not_across() -> None:
    sae, x = make()
    groups = [torch.arange(*ends) for ends in ((0, 4), (4, 11), (11, F))]
    here = loss_of(sae, x, torch.arange(F))
    assert loss_of(sae, x, torch.cat([group.flip(0) for group in groups])) == pytest.approx(here, rel=1e-12)
    assert abs(loss_of(sae, x, torch.arange(F).flip(0)) - here) > 1e-3


def test_after_training_larger_prefixes_explain_more() -> None:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(F, D), dim=1)
    data = [torch.rand(128, F).pow(12) @ directions * 3 for _ in range(200)]
    settings = SaeSettings(F, 3, prefixes=(3, 8), aux=AuxSettings("none"))
    sae = new_autoencoder(settings, data[0], seed=0)
    trainer = Trainer(sae, TrainingSettings(200 * 128, 128, lr=5e-3), settings)
    for x in data:
        trainer.step(Batch(x))
    x = torch.cat(data[:4])
    errors = [fvu(x, each).item() for each in sae.training_pass(Batch(x), TokenChoice(3))[0].reconstructions]
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2] and errors[0] < 0.9
