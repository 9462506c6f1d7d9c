"""What is tried with the parts of the error: each figure equals its dense formula, and planted answers are found."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.analysis.dark_experiments import cost_in_ce, pursued, trained_on_part
from saelab.analysis.dark_matter import dark_matter
from saelab.analysis.dark_relations import from_other_sites, of_missing_features
from saelab.analysis.decomposition import decompose
from saelab.analysis.least_squares import LinearMap
from saelab.analysis.parts import parts_of, split_rows
from saelab.analysis.result import rebuilt, stored, with_arrays
from saelab.analysis.settings import DarkMatterSettings
from saelab.encoded import Block, encoded
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder
from tests.analysis import test_dead as dead_tests
from tests.tiny import language_model, random_rows

SITE, OTHER, ROWS = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post", 30


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("gpt2")


@pytest.fixture(scope="module")
def rows(lm: LanguageModel) -> Tensor:
    return random_rows(lm, ROWS)


def autoencoder(seed: int = 0, n_features: int = 64, d_in: int = 32) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(d_in, n_features, 4)
    with torch.no_grad():
        sae.W_dec.copy_(F.normalize(torch.randn(n_features, d_in, generator=generator), dim=1))
        sae.W_enc.copy_(sae.W_dec * 0.8)
        sae.b_dec.zero_()
    return sae


def some_map(d: int = 32) -> LinearMap:
    weights = torch.randn(d, d, generator=torch.Generator().manual_seed(3)).double() / 20
    return LinearMap(weights, torch.zeros(d).double())


def test_cost_is_the_loss_with_each_sum_of_parts_in_place_of_x(lm: LanguageModel, rows: Tensor) -> None:
    sae, linear = autoencoder(), some_map()
    found = cost_in_ce(sae, linear, lm, SITE, encoded(sae, lm, rows, SITE, 7), ROWS)
    keep, targets = lm.scored(rows), rows.roll(-1, 1)

    def loss(logits: Tensor) -> float:
        return F.cross_entropy(logits[keep].float(), targets[keep]).item()

    def spliced(linear_part: bool, nonlinear_part: bool) -> float:
        def replace(x: Tensor) -> Tensor:
            parts = parts_of(x, sae(x), linear)
            new = parts.reconstruction + linear_part * parts.linear + nonlinear_part * parts.nonlinear
            return new.to(x.dtype)

        return loss(lm.spliced_logits(rows, SITE, replace))

    clean = loss(lm.logits(rows))
    assert found.tokens == int(keep.sum())
    assert found.clean.value == pytest.approx(clean, rel=1e-5)
    assert spliced(True, True) == pytest.approx(clean, rel=1e-5)
    sae_ce, with_linear, with_nonlinear = spliced(False, False), spliced(True, False), spliced(False, True)
    assert found.spliced.value == pytest.approx(sae_ce, rel=1e-5)
    assert found.with_linear.value == pytest.approx(with_linear, rel=1e-5)
    assert found.with_nonlinear.value == pytest.approx(with_nonlinear, rel=1e-5)
    assert found.recovered_by_linear.value == pytest.approx((sae_ce - with_linear) / (sae_ce - clean), rel=1e-3)
    only_special = torch.full((2, 8), int(lm.special_ids[0]))
    with pytest.raises(SaelabError, match="no position"):
        cost_in_ce(sae, linear, lm, SITE, encoded(sae, lm, only_special, SITE, 2), 2)


def test_gradient_pursuit_lowers_the_error_of_an_encoder_that_shrinks() -> None:
    sae, x = dead_tests.made_up()
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.W_enc.mul_(0.5)

    def blocks(numbers: np.ndarray) -> Iterator[Block]:
        return dead_tests.blocks(sae, x[torch.from_numpy(numbers)], 7)

    split = split_rows(len(x))
    found = pursued(sae, blocks, split, len(x) * 9, 9)
    assert found.fvu_pursued.value < found.fvu.value and found.change.high < 0
    assert found.change.value == pytest.approx(found.fvu_pursued.value / found.fvu.value - 1, rel=1e-4)
    ratio = found.fvu_nonlinear_pursued.value / found.fvu_nonlinear.value
    assert found.change_of_nonlinear.value == pytest.approx(ratio - 1, rel=1e-4)


def test_an_autoencoder_learns_a_part_made_of_few_directions_better_than_noise() -> None:
    """The reconstruction is 0. The linear part are two directions of x, the nonlinear part is noise in the others."""
    d = 8
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q[:2]
    which = F.one_hot(torch.randint(0, 2, (40, 9), generator=generator), 2).float()
    x = 4 * which @ directions + 0.5 * torch.randn(40, 9, d, generator=generator)
    sae = SparseAutoencoder(d, 4, 1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
    linear = LinearMap((directions.T @ directions).double(), torch.zeros(d).double())

    def blocks(numbers: np.ndarray) -> Iterator[Block]:
        return dead_tests.blocks(sae, x[torch.from_numpy(numbers)], 7)

    linear_part, nonlinear = (
        trained_on_part(which, sae, linear, blocks, split_rows(40), 6000) for which in ("linear", "nonlinear")
    )
    assert linear_part.training_tokens > 5800 and linear_part.n_features == 16 * d and linear_part.k == 1
    assert linear_part.fvu < 0.7 * nonlinear.fvu < 0.7 and 0 < linear_part.l0 <= 1


def test_parts_predicted_from_another_site_equal_least_squares_on_all_tokens(lm: LanguageModel, rows: Tensor) -> None:
    sae, source, split = autoencoder(), autoencoder(seed=1), split_rows(ROWS)
    linear = some_map()
    found = from_other_sites(sae, linear, {"below": (source, OTHER)}, lm, SITE, rows, split, 7)
    assert list(found) == ["here", "below", "others", "all"] and list(found["below"]) == [
        "error",
        "linear",
        "nonlinear",
    ]

    def of(numbers: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        part = rows[torch.from_numpy(numbers)]
        values, keep = lm.activations(part, [SITE, OTHER]), lm.ordinary(part)
        parts = parts_of(values[SITE][keep], sae(values[SITE][keep]), linear)
        return source(values[OTHER][keep]).double(), parts.reconstruction, parts.nonlinear

    below, here, target = of(split.fit)
    below2, here2, target2 = of(split.scored)
    assert found["others"] == found["below"]  # the only other one
    for name, a, b in [("below", below, below2), ("all", torch.cat([here, below], 1), torch.cat([here2, below2], 1))]:
        off = target2 - b @ torch.linalg.lstsq(a, target).solution
        deviation = (target2 - target2.mean(0)).square().sum(0)
        prediction = found[name]["nonlinear"]
        assert prediction.r2.value == pytest.approx((1 - off.square().sum(0) / deviation).mean().item(), abs=1e-4)
        assert prediction.left.value == pytest.approx((off.square().sum() / target2.square().sum()).item(), rel=1e-4)


def test_features_that_only_the_wider_one_has_lie_in_the_error() -> None:
    """The wider one has 8 directions at right angles, this one the first 4 and others: a feature's contribution is
    either reconstructed or in the error; here the map keeps the fifth direction only."""
    d = 8
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    x = (torch.rand(30, 9, d, generator=generator) < 0.3) * (1 + torch.rand(30, 9, d, generator=generator)) @ directions

    def exact(which: Tensor) -> SparseAutoencoder:
        sae = SparseAutoencoder(d, len(which), len(which))
        with torch.no_grad():
            sae.W_enc.copy_(which)
            sae.W_dec.copy_(which)
            sae.b_dec.zero_()
        return sae

    narrow, wider = exact(directions[:4]), exact(directions)
    linear = LinearMap(torch.outer(directions[4], directions[4]).double(), torch.zeros(d).double())
    found = of_missing_features(narrow, linear, wider, dead_tests.blocks(narrow, x, 7), 30)
    assert found["known"].features == 4 and found["missing"].features == 4
    assert found["known"].in_linear.value == pytest.approx(0, abs=1e-5)
    assert found["known"].in_nonlinear.value == pytest.approx(0, abs=1e-5)
    ordinary = torch.cat([x[:3, 1:].flatten(0, 1), x[4:, 1:].flatten(0, 1)]) @ directions.T
    fifth = (ordinary[:, 4].square().sum() / ordinary[:, 4:].square().sum()).item()
    assert found["missing"].in_linear.value == pytest.approx(fifth, rel=1e-4)
    assert found["missing"].in_nonlinear.value == pytest.approx(1 - fifth, rel=1e-4)


def test_the_whole_analysis_on_a_model(lm: LanguageModel, rows: Tensor) -> None:
    sae, settings = (
        autoencoder(),
        DarkMatterSettings(rows_per_forward=7, ce_tokens=200, pursuit_tokens=600, part_tokens=1),
    )
    found = dark_matter(
        sae, lm, rows, SITE, settings, sources={"below": (autoencoder(1), OTHER)}, wider=autoencoder(2, 96)
    )
    direct, _ = decompose(sae, lambda n: encoded(sae, lm, rows[torch.from_numpy(n)], SITE, 7), split_rows(ROWS))
    assert str(found.decomposition.fvu) == str(direct.fvu)
    figures = found.figures()
    assert {"FVU, nonlinear", "R2 of the error, intercept, ridge", "R2 of the nonlinear part from all"} <= set(figures)
    assert "missing features of the wider one: share in the nonlinear part" in figures
    assert (
        "FVU of an autoencoder trained on the linear part" in figures
        and found.plot().to_dict()["data"][2]["name"] == "nonlinear"
    )
    fields, arrays = stored(found)
    again = rebuilt(type(found), with_arrays(fields, arrays))
    assert repr(again) == repr(found) and again.decomposition.maps.keys() == found.decomposition.maps.keys()
    bare = dark_matter(sae, lm, rows, SITE, DarkMatterSettings(rows_per_forward=7, ce_tokens=200, pursuit_tokens=0))
    assert bare.pursuit is None and not bare.on_parts and not bare.from_sites and not bare.missing


def test_transcoders_and_crosscoders_are_no_sources(lm: LanguageModel, rows: Tensor) -> None:
    transcoder, crosscoder = SparseAutoencoder(32, 8, 2, d_out=32), SparseAutoencoder(32, 8, 2)
    crosscoder.site_widths = (16, 16)
    for other in (transcoder, crosscoder):
        for options in ({"sources": {"below": (other, OTHER)}}, {"wider": other}):
            with pytest.raises(SaelabError, match=r"^dark_matter: "):
                dark_matter(autoencoder(), lm, rows, SITE, **options)  # type: ignore[arg-type]
