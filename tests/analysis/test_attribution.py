"""Effects of features: gradients against ablation where they must agree, sums that are complete, the error kept."""

import copy
import functools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import saelab
from saelab.analysis.attribution import Attribution, attribute, next_token_loss
from saelab.analysis.result import rebuilt, stored, with_arrays
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.lm.splice import SplicedRuns
from saelab.sae.model import SparseAutoencoder
from tests.tiny import KINDS, language_model, random_rows

SITE, LAST = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"


@functools.cache
def double(kind: str = "llama", linear: bool = False) -> LanguageModel:
    """The tiny model in float64; `linear`: without its final norm, so logits are linear in the last block's output."""
    found = language_model(kind)
    model = copy.deepcopy(found.model).double()
    if linear:
        model.model.norm = nn.Identity()  # type: ignore[union-attr]
    return LanguageModel(kind, model, found.tokenizer, found.sites, "")


def autoencoder(site: str = SITE, scale: float = 1.0) -> SparseAutoencoder:
    """One whose error is far from 0, with decoder rows of different lengths."""
    torch.manual_seed(3)
    sae = SparseAutoencoder(32, 48, 6, {"hook_name": site})
    for weights in (sae.W_enc, sae.W_dec):
        nn.init.normal_(weights)
    sae.W_dec.data.mul_(scale)
    nn.init.normal_(sae.b_dec, std=0.1)
    return sae.double().requires_grad_(False)


def difference(logits: Tensor, rows: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def curved(logits: Tensor, rows: Tensor) -> Tensor:
    return logits.log_softmax(-1)[:, :, 7].sum(1)


def ablated(lm: LanguageModel, sae: SparseAutoencoder, rows: Tensor, site: str, feature: int | None) -> Tensor:
    """Logits without a feature, or without the error: the plain way, one feature and one run of all rows at a time."""

    def replace(x: Tensor) -> Tensor:
        z = sae.encode(x).to_dense()
        if feature is None:
            return z @ sae.W_dec + sae.b_dec
        return x - z[:, [feature]] @ sae.W_dec[[feature]]

    return lm.spliced_logits(rows, site, replace)


@pytest.mark.parametrize("metric", [difference, curved])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_effects_are_those_of_one_run_per_feature(kind: str, metric) -> None:
    lm, sae = double(kind), autoencoder()
    rows = random_rows(lm, 5, 12)
    found = attribute(lm, sae, rows, metric, method="exact", rows_per_forward=2)
    clean = metric(lm.logits(rows), rows)
    expected = torch.stack([clean - metric(ablated(lm, sae, rows, SITE, f), rows) for f in range(sae.n_features)])
    np.testing.assert_allclose(found.effect, expected.sum(1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.by_row, expected.sum(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.metric, clean, rtol=1e-9)
    without_error = clean - metric(ablated(lm, sae, rows, SITE, None), rows)
    np.testing.assert_allclose(found.error_by_row, without_error, rtol=1e-6, atol=1e-9)
    for row, position, feature, effect in zip(*found.strongest, strict=True):
        assert position == -1 and abs(effect - float(expected[feature, row])) < 1e-8
    x = lm.activations(rows, [SITE])[SITE][lm.ordinary(rows)]
    assert found.active.tolist() == sae.encode(x).firing_counts().tolist() and found.tokens == len(x)

    some = attribute(lm, sae, rows, metric, method="exact", features=[3, 11])
    np.testing.assert_allclose(some.effect[[3, 11]], found.effect[[3, 11]], rtol=1e-9, atol=1e-12)
    others = np.setdiff1d(np.arange(48), [3, 11])
    assert (np.isnan(some.effect[others]) == (found.active[others] > 0)).all()
    assert set(some.by_feature().feature) <= {3, 11}


@pytest.mark.parametrize("metric", [difference, curved])
@pytest.mark.parametrize("kind", KINDS[:2])  # Llama's norms compute in float32, which differences do not bear
def test_gradients_are_those_of_the_activations_with_everything_else_constant(kind: str, metric) -> None:
    """Against central differences of the activation of one feature on one token, and of the size of the error."""
    lm, sae = double(kind), autoencoder()
    rows = random_rows(lm, 2, 9)
    found = attribute(lm, sae, rows, metric, method="gradient", rows_per_forward=1)
    ordinary = lm.ordinary(rows)
    row_of_token, position_of_token = ordinary.nonzero(as_tuple=True)
    x = lm.activations(rows, [SITE])[SITE][ordinary]
    z, error = sae.encode(x).to_dense(), x - sae(x)

    def value(z: Tensor, share: float) -> Tensor:
        new = z @ sae.W_dec + sae.b_dec + share * error
        return metric(lm.spliced_logits(rows, SITE, lambda _: new), rows)

    step = 1e-5
    for row, position, feature, effect in list(zip(*found.strongest, strict=True))[:4]:
        token = int(((row_of_token == int(row)) & (position_of_token == int(position))).nonzero())
        up, down = z.clone(), z.clone()
        up[token, feature] *= 1 + step
        down[token, feature] *= 1 - step
        slope = (value(up, 1.0) - value(down, 1.0)).sum() / (2 * step)
        assert abs(float(slope) - effect) < 1e-5 * max(1, abs(effect))
    expected = (value(z, 1 + step) - value(z, 1 - step)) / (2 * step)
    np.testing.assert_allclose(found.error_by_row, expected, rtol=1e-5, atol=1e-7)
    dense = torch.zeros(48, dtype=torch.float64)
    everything = attribute(lm, sae, rows, metric, strongest=10**6).strongest
    dense.scatter_add_(0, torch.from_numpy(everything.feature), torch.from_numpy(everything.effect))
    np.testing.assert_allclose(found.effect, dense, rtol=1e-9, atol=1e-12)
    size = np.abs(everything.effect)
    assert (size[:-1] >= size[1:]).all() and len(size) == int((z > 0).sum())


def test_all_methods_agree_if_the_metric_is_linear_in_the_activations() -> None:
    lm, sae = double(linear=True), autoencoder(LAST)
    rows = random_rows(lm, 4, 10)
    exact, gradient, integrated = (
        attribute(lm, sae, rows, difference, method=method, rows_per_forward=3)
        for method in ("exact", "gradient", "integrated")
    )
    assert np.abs(exact.effect).max() > 0.1
    for other in (gradient, integrated):
        np.testing.assert_allclose(other.effect, exact.effect, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(other.error_by_row, exact.error_by_row, rtol=1e-6, atol=1e-9)
    assert integrated.gap is not None and integrated.gap < 1e-9


def test_gradients_approach_exact_effects_as_contributions_become_small() -> None:
    lm, rows = double(), random_rows(double(), 4, 10)
    misses = []
    for scale in (1e-1, 1e-3):
        sae = autoencoder(scale=scale)
        exact, gradient = (attribute(lm, sae, rows, curved, method=m).effect for m in ("exact", "gradient"))
        misses.append(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))
    assert misses[1] < 0.03 * misses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_add_up(kind: str) -> None:
    lm, sae = double(kind), autoencoder()
    rows = random_rows(lm, 4, 10)
    metric = next_token_loss(lm)
    found = attribute(lm, sae, rows, metric, method="integrated", steps=64, rows_per_forward=3)
    assert found.baseline is not None
    start = metric(lm.spliced_logits(rows, SITE, sae.b_dec.expand_as), rows)
    np.testing.assert_allclose(found.baseline, start, rtol=1e-9)
    np.testing.assert_allclose(found.by_row + found.error_by_row, found.metric - found.baseline, atol=1e-3)
    few = attribute(lm, sae, rows, metric, method="integrated", steps=4)
    assert found.gap is not None and few.gap is not None and found.gap < 1e-4 < few.gap
    shares = np.abs(few.by_row + few.error_by_row - few.metric + found.baseline)
    assert few.gap == pytest.approx(shares.sum() / np.abs(found.metric - found.baseline).sum())
    assert abs(found.effect.sum() - found.by_row.sum()) < 1e-9


def test_the_methods_rank_features_alike() -> None:
    lm, sae = double("gpt2"), autoencoder()
    rows = random_rows(lm, 8, 16)
    exact, gradient, integrated = (
        attribute(lm, sae, rows, next_token_loss(lm), method=m).effect for m in ("exact", "gradient", "integrated")
    )
    alike = [float(spearmanr(exact, other).statistic) for other in (gradient, integrated)]
    # 0.51 and 0.44: the contributions are as large as the activations, and random weights far from linear
    assert alike[0] > 0.4 and alike[1] > 0.3


def test_a_metric_of_one_number_is_taken_row_by_row_and_loss_is_that_of_scored_positions() -> None:
    lm, sae = double(), autoencoder()
    rows = random_rows(lm, 3, 10)
    for method in ("gradient", "exact"):
        per_row, scalar = (
            attribute(lm, sae, rows, metric, method=method)
            for metric in (difference, lambda logits, rows: difference(logits, rows).sum())
        )
        np.testing.assert_allclose(scalar.effect, per_row.effect, rtol=1e-9, atol=1e-12)
    logits = lm.logits(rows)
    log_p = logits.log_softmax(-1)
    expected = [-sum(log_p[r, t, rows[r, t + 1]] for t in range(9) if lm.scored(rows)[r, t]) for r in range(len(rows))]
    torch.testing.assert_close(next_token_loss(lm)(logits, rows), torch.stack([torch.as_tensor(e) for e in expected]))


def test_runs_with_gradients_that_share_layers_have_those_of_full_runs() -> None:
    lm, rows = double(), random_rows(double(), 2, 9)
    slopes = []
    for runs in (SplicedRuns(lm, SITE), None):
        leaf: list[Tensor] = []

        def cut(x: Tensor, leaf: list[Tensor] = leaf) -> Tensor:
            leaf.append(x.detach().clone().requires_grad_())
            return leaf[-1]

        if runs is None:
            logits = lm.spliced_logits(rows, SITE, cut, gradients=True)
        else:
            assert runs.shared(rows)
            clean, logits = runs(rows, [cut], gradients=True)
            assert not clean.requires_grad and torch.equal(clean, logits)
        slopes.append(torch.autograd.grad(curved(logits, rows).sum(), leaf[-1])[0])
    assert torch.equal(*slopes) and slopes[0].abs().max() > 0


def test_models_in_float32_and_bfloat16_come_near() -> None:
    wide = double()
    rows = random_rows(wide, 3, 10)
    expected = attribute(wide, autoencoder(), rows, difference)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        found = language_model("llama")
        lm = LanguageModel("llama", copy.deepcopy(found.model).to(dtype), found.tokenizer, found.sites, "")
        low = attribute(lm, autoencoder().float(), rows, difference)
        assert np.linalg.norm(low.effect - expected.effect) < tolerance * np.linalg.norm(expected.effect)


def test_a_result_is_stored_and_shown() -> None:
    lm, sae = double(), autoencoder()
    found = attribute(lm, sae, random_rows(lm, 3, 10), difference, method="integrated")
    facts, arrays = stored(found)
    again = rebuilt(Attribution, with_arrays(facts, arrays))
    assert again.figures() == found.figures() and (again.strongest.feature == found.strongest.feature).all()
    assert "gap of the sum" in found.to_frame().index and "Attribution" in found._repr_html_()
    bars = found.plot().data[0]
    assert bars.y[-1] == "error" and bars.x[-1] == found.error and bars.x[0] == found.by_feature().effect[0]
    assert saelab.attribute is attribute and saelab.next_token_loss is next_token_loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "blocks.9.hook_resid_post"}, "Nearest"),
        ({"site": "blocks.1.mlp.hook_post"}, "attribution: .* has width 64"),
        ({"method": "guess"}, "use gradient, integrated, exact"),
        ({"method": "integrated", "steps": 0}, "steps=0 is not a positive number"),
        ({"features": [1]}, "limits the passes of the exact method"),
        ({"features": [48], "method": "exact"}, "no feature 48: features are 0 to 47"),
        ({"metric": lambda logits, rows: logits[:, -1]}, "gave a tensor of shape"),
        ({"metric": lambda logits, rows: 1.0}, "gave float"),
        ({"metric": lambda logits, rows: logits[:, -1, 0].detach()}, "does not depend on the logits"),
        ({"metric": lambda logits, rows: logits[:, -1, 0] * torch.nan}, "NaN or infinite in row 0"),
        ({"rows": torch.tensor([[0, 40, 77], [0, 0, 1]])}, "row 1 has no ordinary token"),
        ({"rows": torch.zeros(0, 5, dtype=torch.long)}, "there is no ordinary token"),
    ],
)
def test_what_cannot_be_done_is_said(options: dict, message: str) -> None:
    lm = double()
    arguments = {"rows": random_rows(lm, 2, 8), "metric": difference, **options}
    with pytest.raises(SaelabError, match=message):
        attribute(lm, autoencoder(), **arguments)


def test_an_autoencoder_of_no_site_and_a_transcoder_are_refused() -> None:
    lm = double()
    rows = random_rows(lm, 2, 8)
    with pytest.raises(SaelabError, match="pass site="):
        attribute(lm, SparseAutoencoder(32, 8, 2), rows, difference)
    with pytest.raises(SaelabError, match="transcoder"):
        attribute(lm, SparseAutoencoder(32, 8, 2, d_out=32), rows, difference, SITE)
