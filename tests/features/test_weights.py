"""The columns that follow from the weights equal their formulas in dense.py, whatever the tiles."""

import numpy as np
import pytest
import torch

from saelab.features import weights
from saelab.features.layout import LIST_LENGTH, LOGIT_BINS, WEIGHTS
from saelab.features.weights import weight_columns
from saelab.lm.lens import Lens
from saelab.sae.model import SparseAutoencoder
from tests.features import dense


def autoencoder(
    n_features: int, d_in: int, d_out: int | None = None, dtype: torch.dtype = torch.float32
) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = SparseAutoencoder(d_in, n_features, 1, d_out=d_out)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    return sae.to(dtype)


def lens(vocabulary: int, width: int, *, centred: bool = False, dtype: torch.dtype = torch.float32) -> Lens:
    generator = torch.Generator().manual_seed(1)
    W_U, gain = torch.randn(vocabulary, width, generator=generator), torch.rand(width, generator=generator) + 0.5
    return Lens("made up", W_U.to(dtype), gain, centred, torch.zeros_like(gain), 1.0)


def folded(lens: Lens) -> np.ndarray:
    W_U = lens.unembedding.float() * lens.gain
    return (W_U - W_U.mean(1, keepdim=True) if lens.centred else W_U).numpy()


def columns(sae: SparseAutoencoder, lens: Lens | None) -> dict[str, np.ndarray]:
    blocks = list(weight_columns(sae, lens))
    joined = {name: np.concatenate([block[name] for block in blocks]) for name in WEIGHTS}
    for name, (dtype, *width) in WEIGHTS.items():
        assert joined[name].dtype == dtype and joined[name].shape == (sae.n_features, *width)
    return joined


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, column in expected.items():
        if name == "logit_histogram":  # a logit at an edge may fall on either side of it
            assert np.array_equal(found[name].sum(1), column.sum(1))
            assert np.abs(found[name] - column).sum() <= 1e-3 * column.sum()
        elif column.dtype == np.int32:
            np.testing.assert_array_equal(found[name], column, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], column, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("cells", [2**25, 7 * 64])
@pytest.mark.parametrize("centred", [False, True])
def test_columns_equal_the_dense_formulas(centred: bool, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CELLS", cells)  # the smaller: tiles of 6 rows, 28 features, 2 tokens
    sae, lens_of = autoencoder(50, 16), lens(70, 16, centred=centred)
    W_enc, W_dec = sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy()
    assert_equal(columns(sae, lens_of), dense.weights(W_enc, W_dec, folded(lens_of)))


@pytest.mark.parametrize("n_features", [1, 2, 11])
def test_lists_of_few_features_tokens_and_dimensions_are_padded(n_features: int) -> None:
    sae, lens_of = autoencoder(n_features, 2), lens(4, 2)
    found = columns(sae, lens_of)
    W_enc, W_dec = sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy()
    assert_equal(found, dense.weights(W_enc, W_dec, folded(lens_of)))
    assert (found["decoder_neighbours"] >= 0).sum() == n_features * min(LIST_LENGTH, n_features - 1)
    assert (found["neurons"] >= 0).sum() == 2 * n_features


def test_weights_in_bfloat16_give_the_columns_of_the_same_numbers_in_float32() -> None:
    sae, lens_of = autoencoder(40, 16, dtype=torch.bfloat16), lens(30, 16, dtype=torch.bfloat16)
    W_enc, W_dec = (W.detach().float().numpy() for W in (sae.W_enc, sae.W_dec))
    assert_equal(columns(sae, lens_of), dense.weights(W_enc, W_dec, folded(lens_of)))


def test_a_transcoder_has_the_logits_of_what_it_reconstructs_and_no_cosine_between_two_spaces() -> None:
    sae, lens_of = autoencoder(40, 16, d_out=24), lens(30, 24)
    found = columns(sae, lens_of)
    assert not found["encoder_decoder_cosine"].any()
    same = autoencoder(40, 24)
    same.W_dec = sae.W_dec
    expected = columns(same, lens_of)
    for name in WEIGHTS:
        if not name.startswith("encoder"):
            np.testing.assert_array_equal(found[name], expected[name])
    W = sae.W_enc.detach().numpy()
    np.testing.assert_array_equal(found["encoder_neighbours"], dense.weights(W, W, None)["encoder_neighbours"])


def test_columns_of_a_crosscoder_are_those_of_its_rows_in_the_units_of_training() -> None:
    """The second site has activations a hundred times as large, so its decoder rows are as much longer."""
    sae, factors = autoencoder(40, 12), np.repeat([1.0, 0.01], (8, 4)).astype(np.float32)
    W_enc, W_dec = sae.W_enc.detach().numpy().copy(), sae.W_dec.detach().numpy().copy()
    sae.site_widths, sae.metadata = (8, 4), {"saelab": {"input_scale": [1.0, 0.01]}}
    with torch.no_grad():
        sae.W_enc.mul_(torch.from_numpy(factors))
        sae.W_dec.div_(torch.from_numpy(factors))
    assert_equal(columns(sae, None), dense.weights(W_enc, W_dec, None))


@pytest.mark.parametrize("of", [None, lens(30, 8)])
def test_without_a_lens_or_with_one_of_another_width_logits_are_empty(of: Lens | None) -> None:
    sae = autoencoder(20, 16)
    W_enc, W_dec = sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy()
    found = columns(sae, of)
    assert_equal(found, dense.weights(W_enc, W_dec, None))
    assert (found["top_logit_tokens"] == -1).all() and not found["logit_histogram"].any()


def test_of_equal_values_the_lower_id_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_CELLS", 9 * 40)
    sae, lens_of = autoencoder(40, 4), lens(40, 4)
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec[:1].sign() * 2)  # integers: every way to sum them gives the same
        sae.W_enc.copy_(sae.W_dec)
    lens_of.unembedding.copy_(lens_of.unembedding[:1].sign())
    lens_of.gain.fill_(1)
    found = columns(sae, lens_of)
    others = [[g for g in range(40) if g != f][:LIST_LENGTH] for f in range(40)]
    for kind in ("decoder", "encoder"):
        assert found[f"{kind}_neighbours"].tolist() == others
    for end in ("top", "bottom"):
        assert found[f"{end}_logit_tokens"].tolist() == [list(range(LIST_LENGTH))] * 40
    assert found["neurons"].tolist() == [[0, 1, 2]] * 40
    assert found["logit_histogram"][:, LOGIT_BINS // 2].tolist() == [40] * 40  # a range without width has one bin


def test_features_without_weights_have_no_direction() -> None:
    sae, lens_of = autoencoder(20, 16), lens(30, 16)
    with torch.no_grad():
        sae.W_dec[3], sae.W_enc[3] = 0, 0
    found = columns(sae, lens_of)
    W_enc, W_dec = sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy()
    assert_equal(found, dense.weights(W_enc, W_dec, folded(lens_of)))
    assert not any(found[name][3].any() for name in ("decoder_cosines", "encoder_cosines", "neuron_shares"))
