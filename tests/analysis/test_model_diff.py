"""What two models share equals its dense definition, and finds planted shrinkage and decoupling."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saelab.analysis.model_diff import ModelDiff, model_diff
from saelab.analysis.result import rebuilt, stored, with_arrays
from saelab.analysis.site_norms import site_norms
from saelab.codes import Codes
from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder

N, D = 6, 5
METADATA = {
    "hook_names": ["a", "a@second"],
    "model_name": "base",
    "second_model_name": "<b>tuned",
    "saelab": {"input_scale": [0.5, 2.0]},
}


def crosscoder(**metadata: Any) -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = SparseAutoencoder(2 * D, N, 2, METADATA | metadata)
    sae.site_widths = (D, D)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        sae.W_dec[0, D:], sae.W_dec[1, :D], sae.W_dec[2] = 0, 0, 0
    return sae


def blocks_of(x: Tensor, z: Tensor) -> Iterator[Block]:
    """Blocks of 16 tokens, with the codes `z` ``[tokens, features]``."""
    for first in range(0, len(x), 16):
        part, codes = x[first : first + 16], Codes.from_mask(z[first : first + 16] > 0, z[first : first + 16])
        rows = torch.zeros(len(part), 1, dtype=torch.long)
        yield Block(rows, first, torch.arange(first, first + len(part)), part, codes)


def test_every_figure_equals_the_dense_least_squares() -> None:
    sae = crosscoder()
    x, z = 3 * torch.randn(50, 2 * D), torch.relu(torch.randn(50, N) - 0.5)
    z[:, 5] = 0
    found = model_diff(sae, blocks_of(x, z))
    scale = torch.tensor([0.5, 2.0]).repeat_interleave(D)
    target, rows = (x * scale).double(), (sae.W_dec * scale).detach().double()
    reconstruction = ((z @ sae.W_dec + sae.b_dec) * scale).detach().double()
    for i in range(N):
        parts = rows[i, :D], rows[i, D:]
        lengths = [part.norm() for part in parts]
        assert found.active[i] == (z[:, i] > 0).sum()
        if i == 2:
            assert np.isnan(found.relative_norm[i])
            continue
        assert found.relative_norm[i] == pytest.approx(float(lengths[1] / sum(lengths)), abs=1e-6)
        if i > 2:
            assert found.cosine[i] == pytest.approx(float(torch.cosine_similarity(*parts, dim=0)), abs=1e-6)
        if i == 5:
            assert np.isnan(found.error_ratio[i]) and np.isnan(found.reconstruction_ratio[i])
            continue
        longer = int(lengths[1] > lengths[0])
        column = (z[:, i : i + 1].double() * parts[longer]).reshape(-1, 1)
        betas = []
        for model, at in enumerate((slice(0, D), slice(D, 2 * D))):
            without = reconstruction[:, at] - z[:, i : i + 1].double() * parts[model]
            for y in (target[:, at] - without, reconstruction[:, at]):
                betas.append(torch.linalg.lstsq(column, y.reshape(-1, 1)).solution.item())
        error, whole = (betas[k + 2 * (1 - longer)] / betas[k + 2 * longer] for k in (0, 1))
        assert found.error_ratio[i] == pytest.approx(error, rel=1e-4)
        assert found.reconstruction_ratio[i] == pytest.approx(whole, rel=1e-4)


def test_shrinkage_decoupling_and_a_true_difference_are_told_apart() -> None:
    """Three orthogonal features have no row at the first model: the first feature is not there, the second is there and
    left in the error, and another feature, active on the same tokens, reconstructs the third."""
    sae = crosscoder(saelab={})
    one = torch.eye(D)
    with torch.no_grad():
        sae.b_dec.zero_(), sae.W_dec.zero_()
        for i in range(3):
            sae.W_dec[i, D:] = one[i]
        sae.W_dec[3, :D] = one[2]
    z = torch.rand(400, N).round() * torch.rand(400, N)
    z[:, 3], z[:, 4:] = z[:, 2], 0
    x = z @ sae.W_dec.detach()
    x[:, :D] += z[:, 1:2] * one[1]
    found = model_diff(sae, blocks_of(x, z))
    np.testing.assert_allclose(found.error_ratio[:3], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(found.reconstruction_ratio[:3], [0, 0, 1], atol=1e-6)
    figures = found.figures()
    assert figures["only in <b>tuned (relative norm above 0.9)"] == 3
    assert figures["only in base (relative norm below 0.1)"] == 1
    assert figures["only in <b>tuned: ratios below 0.2 and 0.5"] == 1
    assert figures["shared (relative norm 0.4 to 0.6)"] == 0 and figures["features that are active"] == 4


def test_a_result_is_stored_drawn_and_escaped() -> None:
    found = model_diff(crosscoder(), blocks_of(torch.randn(20, 2 * D), torch.rand(20, N)))
    again = rebuilt(ModelDiff, with_arrays(*stored(found)))
    np.testing.assert_array_equal(again.error_ratio, found.error_ratio)
    assert again.models == ("base", "<b>tuned") and "&lt;b&gt;tuned" in found._repr_html_()
    bars: Any = found.plot().data[0]
    assert sum(bars.y) == N - 1  # one row is zero
    same = model_diff(crosscoder(second_model_name="base"), blocks_of(torch.randn(20, 2 * D), torch.rand(20, N)))
    assert same.models == ("base", "base@second") and len(same.figures()) == len(found.figures())
    assert site_norms(crosscoder()).sites == ("a of base", "a of <b>tuned")


def test_other_autoencoders_are_refused() -> None:
    for names in (None, ["a", "b"], ["a@second", "b@second"]):
        with pytest.raises(SaelabError, match="takes a crosscoder of two models"):
            model_diff(crosscoder(hook_names=names), ())
    with pytest.raises(SaelabError, match="takes a crosscoder of two models"):
        model_diff(SparseAutoencoder(4, 4, 2), ())
    unequal = crosscoder()
    unequal.site_widths = (4, 6)
    with pytest.raises(SaelabError, match="differ in number or width"):
        model_diff(unequal, ())
