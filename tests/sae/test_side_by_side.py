"""Crosscoders: with one site an autoencoder, to the bit; lengths of rows, the penalty, folding, and norms by site."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saelab.errors import SaelabError, SettingError
from saelab.sae.checkpoint import load, save_sae
from saelab.sae.losses import l1, row_lengths
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.new import bare_autoencoder, new_autoencoder
from saelab.sae.settings import AllocationSettings, AuxSettings, EncoderSettings, SaeSettings, SparsitySettings
from saelab.sae.side_by_side import SideBySide, side_by_side_map, site_shares
from saelab.training.optim import remove_parallel_gradient
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

WIDTHS, F, BATCH = (6, 4), 40, 128
D = sum(WIDTHS)
THRESHOLD = AllocationSettings("threshold")
METHODS = {
    "topk": SaeSettings(F, 4, aux=AuxSettings("aux_zipf")),
    "relu": SaeSettings(F, 4, allocation=THRESHOLD, sparsity=SparsitySettings("l1", 0.1), unit_norm=False),
    "jumprelu": SaeSettings(F, 4, EncoderSettings("jumprelu"), allocation=THRESHOLD, sparsity=SparsitySettings("l0")),
}


def planted(n: int, seed: int = 0, widths: tuple[int, int] = WIDTHS) -> tuple[Tensor, Tensor]:
    """Activations ``[n, d]`` of two sites of very different sizes, sums of few features; and the features' rows.

    The first 8 features are at the first site only, the next 8 at the second, the last 8 at both.
    """
    first, d = widths[0], sum(widths)
    rows = torch.nn.functional.normalize(torch.randn(24, d, generator=torch.Generator().manual_seed(5)), dim=1)
    rows[:8, first:] = 0
    rows[8:16, :first] = 0
    sizes = torch.tensor([20.0, 0.1]).repeat_interleave(torch.tensor(widths))
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, 24, generator=generator) < 0.08
    return ((torch.rand(n, 24, generator=generator) + 1) * active @ rows + 0.3) * sizes, rows * sizes


def trained(settings: SaeSettings, x: Tensor, steps: int, site_widths: tuple[int, ...] = WIDTHS) -> Trainer:
    sae = new_autoencoder(settings, x, seed=0, site_widths=site_widths)
    trainer = Trainer(sae, TrainingSettings(steps * BATCH, BATCH, 1e-2), settings)
    for step in range(steps):
        trainer.step(Batch(x[torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)]))
    trainer.release()
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_one_site_is_an_autoencoder_to_the_bit(method: str) -> None:
    x = planted(10 * BATCH)[0]
    x = x / x.std(0)
    plain, one = (trained(METHODS[method], x, 10, widths).sae for widths in ((), (D,)))
    for ours, theirs in zip(one.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_penalty_is_activation_times_the_sum_of_the_lengths_at_the_sites() -> None:
    """With its gradients, those of lengths too."""
    x = planted(BATCH)[0].double()
    settings = METHODS["relu"]
    sae = new_autoencoder(settings, x.float(), seed=0, site_widths=WIDTHS).double()
    twin = copy.deepcopy(sae)
    forward, _ = sae.training_pass(Batch(x), sae.rule)
    found = l1(forward)
    found.backward()
    z = ((x - twin.b_dec) @ twin.W_enc.T + twin.b_enc).relu()
    lengths = twin.W_dec[:, :6].norm(dim=1) + twin.W_dec[:, 6:].norm(dim=1)
    expected = (z @ lengths).mean() / D**0.5
    expected.backward()
    torch.testing.assert_close(found, expected)
    for name in ("W_dec", "W_enc", "b_enc"):
        torch.testing.assert_close(sae.get_parameter(name).grad, twin.get_parameter(name).grad)
    assert not torch.allclose(lengths, twin.W_dec.norm(dim=1))


def test_rows_keep_their_length_and_no_gradient_changes_it() -> None:
    """So that selection by z is selection by z times the sum of the lengths."""
    x = planted(20 * BATCH)[0]
    sae = trained(METHODS["topk"], side_by_side_map("scale", x, WIDTHS)(x), 20).sae
    torch.testing.assert_close(row_lengths(sae.W_dec, WIDTHS), torch.ones(F))
    assert (sae.W_dec.norm(dim=1) < 0.99).any()
    twin = copy.deepcopy(sae).double()
    gradient = torch.randn(F, D, dtype=torch.float64)
    twin.W_dec.grad = gradient.clone()
    remove_parallel_gradient(twin)
    lengths = row_lengths(twin.W_dec, WIDTHS)
    (slope,) = torch.autograd.grad(lengths.sum(), twin.W_dec)
    assert twin.W_dec.grad is not None
    torch.testing.assert_close(
        (twin.W_dec.grad * slope).sum(1), torch.zeros(F, dtype=torch.float64), atol=1e-12, rtol=0
    )
    removed = gradient - twin.W_dec.grad  # along the slope, and nothing else
    torch.testing.assert_close(
        removed, (removed * slope).sum(1, keepdim=True) * slope / slope.square().sum(1, keepdim=True)
    )


@pytest.mark.parametrize("inputs", ["scale", "centre"])
@pytest.mark.parametrize("method", METHODS)
def test_the_saved_crosscoder_takes_activations_as_they_are(method: str, inputs: str, tmp_path: Path) -> None:
    x = planted(4 * BATCH)[0]
    read = side_by_side_map(inputs, x, WIDTHS)
    for part, scale in zip(read(x).split(WIDTHS, 1), read.scale, strict=True):
        assert part.square().sum(1).mean().item() == pytest.approx(part.shape[1], rel=1e-4) and scale > 0
    sae = trained(METHODS[method], read(x), 8).sae.requires_grad_(False)
    made = read.folded(sae)
    made.metadata["saelab"] = {"input_scale": list(read.scale)}
    save_sae(made, tmp_path)
    saved = load(tmp_path)
    assert saved.site_widths == WIDTHS
    rule = {"topk": "topk", "relu": "standard", "jumprelu": "jumprelu"}[method]
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == f"saelab_{rule}_crosscoder"
    torch.testing.assert_close(saved.encode(x).to_dense(), sae.encode(read(x)).to_dense(), atol=1e-3, rtol=1e-3)
    expected = sae(read(x)) / read.factors + (0 if read.mean is None else read.mean)
    torch.testing.assert_close(saved(x) * read.factors, expected * read.factors, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(
        site_shares(saved) * row_lengths(sae.W_dec, WIDTHS)[:, None], by_site(sae), atol=1e-4, rtol=1e-3
    )
    for scales in ([1.0], [1.0, "2"], [1.0, 0], [1.0, None], 3):
        config["metadata"]["saelab"]["input_scale"] = scales
        (tmp_path / "cfg.json").write_text(json.dumps(config))
        with pytest.raises(SaelabError, match=r"input_scale is .*, not a list of 2 positive numbers"):
            load(tmp_path)
    config["site_widths"] = [6, 5]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(SaelabError, match="site_widths"):
        load(tmp_path)


def by_site(sae: SparseAutoencoder) -> Tensor:
    return torch.stack([part.norm(dim=1) for part in sae.W_dec.split(WIDTHS, 1)], 1)


@pytest.mark.slow
def test_features_of_one_site_are_told_from_shared_ones() -> None:
    """Planted features are found, and the shares of their rows are those of the truth, whatever the scales."""
    widths = (24, 16)
    x, rows = planted(8192, widths=widths)
    read = side_by_side_map("scale", x, widths)
    settings = SaeSettings(F, 3, allocation=AllocationSettings("mutual_choice"))
    sae = read.folded(trained(settings, read(x), 400, widths).sae.requires_grad_(False))
    sae.metadata["saelab"] = {"input_scale": list(read.scale)}
    truth = torch.nn.functional.normalize(rows * read.factors, dim=1)
    found = torch.nn.functional.normalize(sae.W_dec * read.factors, dim=1)
    cosine, at = (truth @ found.T).max(1)
    known, shares = cosine > 0.9, site_shares(sae)[at]
    for kind in (slice(0, 8), slice(8, 16), slice(16, 24)):
        assert known[kind].sum() >= 4
    lengths = torch.stack([part.norm(dim=1) for part in truth.split(widths, 1)], 1)
    assert ((shares - lengths / lengths.sum(1, keepdim=True)).abs().amax(1)[known] < 0.25).all()
    torch.testing.assert_close(shares.sum(1), torch.ones(24))


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(SettingError, match=r"^unit_norm: false: a crosscoder with a budget"):
        bare_autoencoder(SaeSettings(F, 4, unit_norm=False), D, None, WIDTHS)
    sae = bare_autoencoder(SaeSettings(F, 4), D, None, WIDTHS)
    assert isinstance(SideBySide((1.0, 1.0), WIDTHS).folded(sae), SparseAutoencoder) and "d_out" not in repr(sae)
