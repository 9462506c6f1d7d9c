"""The parts of x: their figures equal dense formulas, they add up, and planted errors land in the right part."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from saelab.analysis.decomposition import decompose
from saelab.analysis.intervals import Interval
from saelab.analysis.least_squares import LinearMap
from saelab.analysis.parts import MAPS, PARTS, Blocks, parts_of, split_rows
from saelab.codes import Codes
from saelab.encoded import Block
from saelab.errors import SaelabError
from tests.analysis import test_dead as dead_tests

D, CONTEXT = 12, 8


class Known:
    """Stands for an autoencoder whose reconstructions ``[tokens, d]`` are known: a code is the number of the token."""

    def __init__(self, reconstructions: Tensor) -> None:
        self.reconstructions, self.n_features = reconstructions, 1

    def encode(self, x: Tensor) -> Codes:
        raise NotImplementedError

    def decode(self, codes: Codes, x: Tensor) -> Tensor:
        return self.reconstructions[codes.values.long()]


def known(x: Tensor, reconstructions: Tensor) -> tuple[Known, Blocks]:
    """Rows of CONTEXT tokens of x ``[tokens, d]``, all of them ordinary, in blocks of three rows."""
    numbers = torch.arange(len(x)).view(-1, CONTEXT)

    def blocks(rows: np.ndarray) -> Iterator[Block]:
        for first in range(0, len(rows), 3):
            part = numbers[torch.from_numpy(rows[first : first + 3])]
            codes = Codes.from_topk(part.view(-1, 1).double(), torch.zeros(part.numel(), 1, dtype=torch.long), 1)
            position = torch.arange(part.numel()) + first * CONTEXT
            yield Block(part, first, position, x[part.flatten()], codes)

    return Known(reconstructions), blocks


def ordinary(blocks: Iterable[Block]) -> Tensor:
    return torch.cat([block.x for block in blocks])


def fvu(error: Tensor, x: Tensor) -> float:
    return (error.square().sum() / (x - x.mean(0)).square().sum()).item()


def near(found: Interval, expected: float, tolerance: float = 1e-7) -> None:
    assert found.value == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert found.low <= found.value <= found.high


def of_spread(tokens: int, seed: int = 0, mean: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, D, generator=generator) @ torch.randn(D, D, generator=generator) + mean


def test_the_figures_equal_their_dense_formulas() -> None:
    sae, x = dead_tests.made_up()
    rows = len(x)

    def blocks(numbers: np.ndarray) -> Iterator[Block]:
        return dead_tests.blocks(sae, x[torch.from_numpy(numbers)], 7)

    split = split_rows(rows)
    found, linear = decompose(sae, blocks, split)
    fitted, scored = ordinary(blocks(split.fit)), ordinary(blocks(split.scored))

    def error_of(tokens: Tensor) -> Tensor:
        return (tokens - sae(tokens)).double()

    weights = torch.linalg.lstsq(fitted.double(), error_of(fitted)).solution
    torch.testing.assert_close(linear.weights, weights)
    assert (linear.bias == 0).all()
    error, x64 = error_of(scored), scored.double()
    nonlinear = error - x64 @ weights
    near(found.fvu, fvu(error, x64))
    near(found.fvu_nonlinear, fvu(nonlinear, x64))
    near(found.fvu_linear, fvu(error, x64) - fvu(nonlinear, x64))
    near(found.shares.nonlinear, (nonlinear.square().sum() / error.square().sum()).item())
    assert sum(share.value for share in found.shares) == pytest.approx(1)
    xhat = x64 - error
    near(found.shrinkage, ((x64 * xhat).sum() / xhat.square().sum()).item())
    centred, centred_hat = x64 - x64.mean(0), xhat - xhat.mean(0)
    near(found.shrinkage_of_deviations, ((centred * centred_hat).sum() / centred_hat.square().sum()).item())
    near(found.l0, sae.encode(scored).l0().double().mean().item())

    deviation = (error - error.mean(0)).square().sum(0)
    of_map = found.maps[MAPS[0]]
    near(of_map.r2, (1 - nonlinear.square().sum(0) / deviation).mean().item())
    near(of_map.r2_pooled, 1 - (nonlinear.square().sum() / deviation.sum()).item())
    ones = torch.cat([fitted.double(), torch.ones(len(fitted), 1)], 1)
    with_one = torch.cat([x64, torch.ones(len(scored), 1)], 1)
    residual = error - with_one @ torch.linalg.lstsq(ones, error_of(fitted)).solution
    near(found.maps["intercept"].r2, (1 - residual.square().sum(0) / deviation).mean().item())
    near(found.maps["intercept"].fvu_nonlinear, fvu(residual, x64))

    def r2_of_norm(source: Tensor, target: Tensor, of: Tensor, score: Tensor) -> float:
        off = score - of @ torch.linalg.lstsq(source, target).solution
        return 1 - (off.square().sum() / (score - score.mean()).square().sum()).item()

    def norm(tokens: Tensor) -> Tensor:
        return tokens.square().sum(1, keepdim=True)

    of_fit, of_scored = (parts_of(each, sae(each), linear) for each in (fitted, scored))
    near(of_map.r2_of_norm, r2_of_norm(fitted.double(), norm(of_fit.error), x64, norm(error)))
    assert list(found.norm_tests) == list(PARTS)
    for name, a, b in zip(PARTS, of_fit, of_scored, strict=True):
        test = found.norm_tests[name]
        near(test.on_x_with_intercept, r2_of_norm(ones, norm(a), with_one, norm(b)))
        near(test.on_itself, r2_of_norm(a, norm(a), b, norm(b)), 1e-5)
        near(found.mean_norms[name], norm(b).sqrt().mean().item())

    np.testing.assert_allclose(found.error_norm, norm(error).sqrt()[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.nonlinear_norm, norm(nonlinear).sqrt()[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.deviation, (scored - fitted.mean(0)).norm(dim=1), rtol=1e-4)
    whole = x.flatten(0, 1)[torch.from_numpy(found.token)]
    torch.testing.assert_close(whole, scored)


def test_the_parts_add_up_to_x_and_the_sets_of_rows_are_disjoint() -> None:
    x, weights = of_spread(64), torch.randn(D, D, generator=torch.Generator().manual_seed(1)).double()
    parts = parts_of(x, 0.7 * x, LinearMap(weights, torch.zeros(D).double()))
    assert (parts.reconstruction + parts.linear + parts.nonlinear - parts.x).abs().max() < 1e-12
    assert sorted(np.concatenate(split_rows(37))) == list(range(37))
    assert [len(each) for each in split_rows(40)] == [20, 4, 16]
    with pytest.raises(SaelabError, match="4 rows cannot be divided"):
        split_rows(4)


def test_shrinkage_is_linear_noise_is_not_and_validation_shrinks_the_map_of_noise() -> None:
    x, noise = of_spread(2400), of_spread(2400, seed=5, mean=0)
    split = split_rows(300)
    shrunk, _ = decompose(*known(x, 0.8 * x), split)
    near(shrunk.maps[MAPS[0]].r2, 1)
    assert shrunk.fvu_nonlinear.value < 1e-12 and shrunk.shrinkage.value == pytest.approx(1.25)
    noisy, _ = decompose(*known(x, x - noise), split)
    without, ridge = noisy.maps["no intercept"], noisy.maps["no intercept, ridge"]
    assert abs(without.r2.value) < 0.05 and without.r2.low < 0.01
    assert ridge.ridge > 0 and without.ridge == 0 and ridge.r2.value > without.r2.value
    assert noisy.shares.linear.value < 0.03


def test_an_error_at_right_angles_to_x_has_no_linear_part() -> None:
    """On the tokens of the fit, uncentred; an error that is not has one."""
    x, noise = of_spread(320, seed=2), of_spread(320, seed=3)
    away = noise - x @ torch.linalg.lstsq(x, noise).solution
    sae, blocks = known(x, x - away)
    everything = split_rows(40)._replace(fit=np.arange(40), scored=np.arange(40))
    found, linear = decompose(sae, blocks, everything)
    assert linear.weights.abs().max() < 1e-5 and found.shares.linear.value < 1e-9
    assert found.shares.twice_product.value == pytest.approx(0, abs=1e-6)
    other, _ = decompose(*known(x, x - noise), everything)
    assert other.shares.linear.value > 0.01


def test_text_without_ordinary_tokens_is_an_error() -> None:
    sae, blocks = known(of_spread(80), of_spread(80))
    split = split_rows(10)
    for which in range(3):
        empty = split[which]

        def without(rows: np.ndarray, empty: np.ndarray = empty) -> Iterable[Block]:
            return iter(()) if rows is empty else blocks(rows)

        with pytest.raises(SaelabError, match="no ordinary token"):
            decompose(sae, without, split)


def planted(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Activations ``[tokens, 10]`` of ten features of falling density, and their directions ``[10, 40]``."""
    density = torch.linspace(0.6, 0.1, 10)
    active = torch.rand(1600, 10, generator=generator) < density
    directions = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q[:10]
    return active * (20 + 2 * torch.randn(1600, 10, generator=generator)), directions


@pytest.mark.parametrize("dropped", [0, 5])
def test_the_synthetic_grid_of_the_paper(dropped: int) -> None:
    """x = x0 + eps_a * noise, Sae(x) = x0 without its rarest features + eps_r * other noise, both from 0 to 4.

    The linear part follows what is absent or dense, the nonlinear part what the autoencoder adds. Noise counts as
    linear only in directions without features: in the others x does not tell it from activations.
    """
    generator = torch.Generator().manual_seed(dropped)
    activations, directions = planted(generator)
    clean = activations @ directions
    kept = activations[:, : 10 - dropped] @ directions[: 10 - dropped]
    split, found = split_rows(200), []
    for dense in np.linspace(0, 4, 5):
        for introduced in np.linspace(0, 4, 5):
            noise, other = (torch.randn(clean.shape, generator=generator) for _ in range(2))
            x, added = clean + dense * noise, introduced * other
            result, _ = decompose(*known(x, kept + added), split, resamples=2)
            true = fvu(x - kept, x), fvu(added, x)
            found.append((dense, introduced, *true, result.fvu_linear.value, result.fvu_nonlinear.value))
    dense, introduced, true_linear, true_nonlinear, linear, nonlinear = np.array(found).T
    assert np.corrcoef(true_linear, linear)[0, 1] > 0.9 and np.corrcoef(dense, linear)[0, 1] > 0.9
    assert np.corrcoef(true_nonlinear, nonlinear)[0, 1] > 0.9 and np.corrcoef(introduced, nonlinear)[0, 1] > 0.9
    assert abs(np.corrcoef(introduced, linear)[0, 1]) < 0.3 and abs(np.corrcoef(dense, nonlinear)[0, 1]) < 0.3
