"""Autoencoders that normalise each token, leave b_dec out of x or have a skip connection: the dense formulas."""

import pytest
import torch
from torch import Tensor

from saelab.analysis.affine import check_affine
from saelab.analysis.settings import Intervention
from saelab.analysis.steering import steered
from saelab.errors import SaelabError
from saelab.sae.allocation.rules import TokenChoice
from saelab.sae.fold import fold
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.normalisation import NORMALISATIONS, normalised
from tests.sae.interop.peers import inputs, numbers

X = inputs()


def autoencoder(
    normalisation: str | None = None, skip: bool = False, d_out: int | None = None, threshold: float | None = None
) -> SparseAutoencoder:
    sae = SparseAutoencoder(12, 40, 5, d_out=d_out)
    sae.W_enc.data, sae.W_dec.data = numbers(40, 12, seed=1, scale=0.4), numbers(40, d_out or 12, seed=2)
    sae.b_enc.data, sae.b_dec.data = numbers(40, seed=3, scale=0.2), numbers(d_out or 12, seed=4)
    if skip:
        sae.W_skip = torch.nn.Parameter(numbers(d_out or 12, 12, seed=6))
    if threshold is not None:
        sae.threshold = torch.tensor([threshold])
    sae.normalisation = normalisation
    return sae.requires_grad_(False)


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_a_normalisation_of_one_token_is_undone(name: str) -> None:
    y, gain, shift = normalised(X.double(), name)
    torch.testing.assert_close(y * gain + shift, X.double(), rtol=1e-4, atol=1e-4)  # 1e-5 is added in one direction
    each = torch.cat([normalised(token[None], name).x for token in X.double()])
    torch.testing.assert_close(each, y)
    if name == "layer_norm":
        torch.testing.assert_close(y.mean(1), torch.zeros(len(X), dtype=torch.float64))
        torch.testing.assert_close(y.std(1), torch.ones(len(X), dtype=torch.float64), rtol=1e-4, atol=0)
    else:
        torch.testing.assert_close(y.norm(dim=1), torch.full((len(X),), 12**0.5, dtype=torch.float64))
    assert torch.isfinite(normalised(torch.zeros(2, 12), name).x).all()


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_pre_activations_and_reconstruction(name: str) -> None:
    sae = autoencoder(name, skip=True)
    y, gain, shift = normalised(X, name)
    pre = (y - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(sae.pre_activations(X), pre)
    codes = sae.encode(X)
    torch.testing.assert_close(codes.to_dense(), pre.relu() * TokenChoice(5).mask(pre))
    assert sae.W_skip is not None
    right = (codes.to_dense() @ sae.W_dec + sae.b_dec) * gain + shift + X @ sae.W_skip.T
    torch.testing.assert_close(sae.decode(codes, X), right)
    torch.testing.assert_close(sae(X.view(2, 15, 12)), right.view(2, 15, 12))
    assert not sae.affine
    with pytest.raises(ValueError, match="needs the input x too"):
        sae.decode(codes)


@pytest.mark.parametrize("d_out", [None, 7])
@pytest.mark.parametrize("normalisation", [None, "constant_norm_rescale"])
def test_a_scale_is_folded(normalisation: str | None, d_out: int | None) -> None:
    """What was trained on s x computes the same on x: activations over s unless the token was normalised."""
    sae, s = autoencoder(normalisation, skip=True, d_out=d_out, threshold=0.3), 2.5
    folded = fold(sae, s)
    acts = sae.encode(s * X).to_dense() / (s if normalisation is None else 1)
    torch.testing.assert_close(folded.encode(X).to_dense(), acts)
    torch.testing.assert_close(folded(X), sae(s * X) / s)


@pytest.mark.parametrize("name", [None, *NORMALISATIONS])
def test_steering_adds_what_the_change_of_an_activation_adds_to_the_reconstruction(name: str | None) -> None:
    sae = autoencoder(name, skip=True)
    codes = sae.encode(X)
    strongest = int(codes.to_dense().sum(0).argmax())
    changes = [Intervention(3, "add", 2.0), Intervention(strongest, "ablate")]
    dense = codes.to_dense()
    dense[:, 3] += 2.0
    dense[:, strongest] = 0

    def decoded(z: Tensor) -> Tensor:
        _, gain, shift = (X, 1.0, 0.0) if name is None else normalised(X, name)
        assert sae.W_skip is not None
        return (z @ sae.W_dec + sae.b_dec) * gain + shift + X @ sae.W_skip.T

    torch.testing.assert_close(steered(sae, X, changes, error=False), decoded(dense), rtol=1e-4, atol=1e-4)
    right = X + decoded(dense) - decoded(codes.to_dense())
    torch.testing.assert_close(steered(sae, X, changes), right, rtol=1e-4, atol=1e-4)


def test_what_needs_a_sum_of_decoder_rows_refuses_anything_else() -> None:
    check_affine(autoencoder(), "attribution")
    with pytest.raises(
        SaelabError, match=r"attribution: the reconstruction .* it scales each token \(layer_norm\); use"
    ):
        check_affine(autoencoder("layer_norm"), "attribution")
    with pytest.raises(SaelabError, match=r"absorption: the reconstruction .* it adds W_skip x to it; use"):
        check_affine(autoencoder(skip=True), "absorption")
    with pytest.raises(SaelabError, match="training: this version trains no autoencoder that normalises each token"):
        autoencoder("layer_norm").training_pass(Batch(X), TokenChoice(5))


def test_a_summary_says_how_the_input_is_read() -> None:
    text = repr(autoencoder("layer_norm", skip=True))
    assert "input: each token normalised (layer_norm)" in text and "skip connection: W_skip x is added" in text
    assert "d_out" not in text and "d_out 7" in repr(autoencoder(d_out=7))
    uncentred = autoencoder()
    uncentred.centred = False
    assert "d_out" not in repr(uncentred) and "input" not in repr(uncentred)
