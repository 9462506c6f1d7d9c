"""An autoencoder beside others: each figure is that of its own function, on the codes of the same tokens."""

import json

import numpy as np
import pytest
import torch

from saelab.analysis.decoder import mean_absolute_cosine
from saelab.analysis.result import rebuilt, stored, with_arrays
from saelab.analysis.settings import SimilaritySettings
from saelab.analysis.similarities import Other, Similarities, similarities
from saelab.analysis.similarity import absolute_cosine_by_chance, compare_decoders
from saelab.sae.model import SparseAutoencoder
from tests.analysis.test_steering import SITES, autoencoder
from tests.tiny import language_model, random_rows

SITE, ELSEWHERE = SITES[0], "blocks.2.hook_resid_post"


def near(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy whose first half of features is the same but for noise, in another order."""
    other = autoencoder(SITE)
    torch.manual_seed(5)
    half = sae.n_features // 2
    order = torch.randperm(half)
    with torch.no_grad():
        for name in ("W_enc", "W_dec"):
            theirs = torch.randn_like(getattr(sae, name))
            theirs[:half] = getattr(sae, name)[order] * (1 + 0.05 * torch.randn(half, 1))
            getattr(other, name).copy_(theirs)
    return other


@pytest.fixture(scope="module")
def found() -> tuple[Similarities, SparseAutoencoder, list[Other]]:
    lm, sae = language_model("gpt2"), autoencoder(SITE)
    sae.metadata = {"saelab": {"inputs": "abc", "tokens": 5}}
    others = [Other("near", near(sae), SITE), Other("same", sae, SITE), Other("<i>", autoencoder(ELSEWHERE), ELSEWHERE)]
    settings = SimilaritySettings(rows_per_forward=5)
    return similarities(sae, lm, random_rows(lm, 12), SITE, others, settings, name="one"), sae, others


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = (each.double() - each.double().mean(0) for each in (x, y))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_each_figure_is_that_of_its_own_function(found: tuple[Similarities, SparseAutoencoder, list[Other]]) -> None:
    result, sae, others = found
    lm = language_model("gpt2")
    rows = random_rows(lm, 12)
    keep = lm.ordinary(rows)
    x = {site: lm.activations(rows, [site])[site][keep].float() for site in (SITE, ELSEWHERE)}
    codes = sae.encode(x[SITE]).to_dense()
    for compared, other in zip(result.others, others, strict=True):
        theirs = other.sae.encode(x[other.site]).to_dense()
        assert compared.cka.tokens == keep.sum() and compared.cka.rows == 12
        assert compared.cka.cka.value == pytest.approx(linear_cka(codes, theirs), rel=1e-4)
        assert compared.weights.c_dec == mean_absolute_cosine(other.sae.W_dec)
        assert compared.weights.c_dec_by_chance == absolute_cosine_by_chance(sae.d_in)
    near, same, elsewhere = result.others
    assert elsewhere.decoders is None and same.cka.cka.value == pytest.approx(1, abs=1e-6)
    expected = compare_decoders(sae.W_dec.detach().numpy(), others[0].sae.W_dec.detach().numpy())
    assert near.decoders is not None and near.decoders.figures() == expected.figures()
    assert near.decoders.one_to_one.share(0.7) >= 0.5 > near.decoders.one_to_one_by_chance.share(0.7)


def test_features_that_come_back_are_counted_over_the_others_of_the_site(
    found: tuple[Similarities, SparseAutoencoder, list[Other]],
) -> None:
    result, sae, _ = found
    half = sae.n_features // 2
    assert (result.counterparts[:half] == 2).all() and (result.counterparts >= 1).all()
    figures = result.figures()
    assert figures["share that comes back in each of 2"] == (result.counterparts == 2).mean()
    assert figures["share that comes back in none of 2"] == 0
    assert figures["near: share paired at a cosine of 0.9"] >= 0.5  # type: ignore[operator]
    assert "<i>: linear CKA of codes" in figures and "<i>: each other's best (pairs)" not in figures
    assert result.run.training == "abc 5" and result.others[0].weights.training is None


def test_frame_plot_and_storage(found: tuple[Similarities, SparseAutoencoder, list[Other]]) -> None:
    result, *_ = found
    frame = result.by_run()
    assert frame["run"].tolist() == ["near", "same", "<i>"] and np.isnan(frame["each other's best (pairs)"][2])
    assert [len(bar.y) for bar in result.plot().data] == [3] * 4 and "<i>" not in result._repr_html_()  # type: ignore[arg-type]
    values, arrays = stored(result)
    again = rebuilt(Similarities, with_arrays(json.loads(json.dumps(values)), arrays))
    assert repr(again) == repr(result) and (again.counterparts == result.counterparts).all()
    match = again.others[0].decoders
    assert match is not None and (match.match.pairs == result.others[0].decoders.match.pairs).all()  # type: ignore[union-attr]


def test_the_structure_of_the_decoders_is_trained_only_if_asked_for() -> None:
    lm, sae = language_model("gpt2"), autoencoder(SITE)
    settings = SimilaritySettings(meta_rows=2000)
    result = similarities(sae, lm, random_rows(lm, 3), SITE, [Other("b", autoencoder(SITE), SITE)], settings)
    assert result.run.meta is not None and result.others[0].weights.meta is not None
    assert result.figures()["b: variance of decoder rows explained"] == result.others[0].weights.meta.explained
