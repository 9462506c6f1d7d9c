"""Fidelity is exact where it is known: the identity, the ablations, and the formulas written out in numpy."""

import dataclasses
import json
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from saelab.analysis.decoder import mean_absolute_cosine, mean_largest_cosine
from saelab.analysis.fidelity import INFERENCE, ORACLE, fidelity
from saelab.codes import Codes
from saelab.errors import SaelabError
from saelab.sae.initial import initialise
from saelab.sae.model import SparseAutoencoder
from tests.tiny import KINDS, language_model, random_rows

SITE = "blocks.1.hook_resid_post"


class Fixed:
    """An autoencoder whose reconstruction is a given function of x; its codes only carry x along."""

    n_features = 32
    metadata: ClassVar = {"hook_name": SITE}

    def __init__(self, reconstruct) -> None:
        self.reconstruct = reconstruct

    def encode(self, x: Tensor) -> Codes:
        return Codes.from_topk(x, torch.arange(32).expand(len(x), 32), 32)

    def decode(self, codes: Codes, x: Tensor) -> Tensor:
        return self.reconstruct(codes.values.view(-1, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_recovers_everything_exactly(kind: str) -> None:
    lm = language_model(kind)
    result = fidelity(Fixed(lambda x: x), lm, random_rows(lm, 12))
    assert result.loss_recovered_zero == result.loss_recovered_mean == 1.0
    assert result.delta_ce == 0.0 and result.kl == 0.0 and result.fvu == 0.0
    assert result.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ablations_recover_exactly_nothing(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 12)
    assert fidelity(Fixed(torch.zeros_like), lm, rows).loss_recovered_zero == 0.0
    x = lm.activations(rows, [SITE])[SITE][lm.ordinary(rows)].double()
    mean = fidelity(Fixed(lambda z: x.mean(0).float().expand_as(z)), lm, rows)
    assert mean.loss_recovered_mean == 0.0
    assert mean.fvu == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_its_formula(kind: str) -> None:
    torch.manual_seed(0)
    lm = language_model(kind)
    rows = random_rows(lm, 12)
    sae = SparseAutoencoder(32, 40, 5, {"hook_name": SITE})
    ordinary = lm.ordinary(rows)
    x = lm.activations(rows, [SITE])[SITE][ordinary]
    initialise(sae, x)
    found = fidelity(sae, lm, rows, rows_per_forward=5)

    X, R = x.double().numpy(), sae(x).double().numpy()
    z = sae.encode(x).to_dense().numpy()
    assert found.tokens == len(X) == int(ordinary.sum())
    assert found.fvu == pytest.approx(((X - R) ** 2).sum() / ((X - X.mean(0)) ** 2).sum(), rel=1e-6)
    assert found.l0 == pytest.approx((z > 0).sum(1).mean())
    counts = (z > 0).sum(0)
    assert found.counts.tolist() == counts.tolist()
    assert found.counts.sum().item() == pytest.approx(found.l0 * found.tokens)
    assert found.never_active == int((counts == 0).sum())
    for density in (0.0, 1e-5, 1e-4, 0.02, 1.0):
        assert found.share_below(density) == pytest.approx((counts / len(X) < density).mean())
    assert found.share_below_1e4 == found.share_below(1e-4) and found.share_below_1e5 == found.share_below(1e-5)
    cosine = (X * R).sum(1) / np.linalg.norm(X, axis=1) / np.linalg.norm(R, axis=1)
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-5)

    def log_probabilities(logits: Tensor) -> np.ndarray:
        return logits.double().log_softmax(-1).numpy()

    clean, spliced = log_probabilities(lm.logits(rows)), log_probabilities(lm.spliced_logits(rows, SITE, sae))
    ce_clean, ce_spliced, kl = [], [], []
    for row in range(rows.shape[0]):
        for t in range(rows.shape[1] - 1):
            if ordinary[row, t] and ordinary[row, t + 1]:
                ce_clean.append(-clean[row, t, rows[row, t + 1]])
                ce_spliced.append(-spliced[row, t, rows[row, t + 1]])
                kl.append((np.exp(clean[row, t]) * (clean[row, t] - spliced[row, t])).sum())
    assert found.ce_tokens == len(ce_clean)
    assert found.ce_clean == pytest.approx(np.mean(ce_clean), rel=1e-5)
    assert found.ce_spliced == pytest.approx(np.mean(ce_spliced), rel=1e-5)
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-3)
    zero = found.ce_zero_ablated
    assert found.loss_recovered_zero == pytest.approx((zero - found.ce_spliced) / (zero - found.ce_clean))
    D = sae.W_dec.detach().double().numpy()
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    pairs = [abs(D[i] @ D[j]) for i in range(40) for j in range(i)]
    assert found.c_dec == pytest.approx(np.mean(pairs), rel=1e-5)
    assert found.mode == INFERENCE
    assert found.to_frame().loc["delta_ce", "value"] == found.delta_ce
    assert len(found.plot().data[0].x) == 4 and INFERENCE not in found.plot().layout.title.text


def test_c_dec_is_the_mean_over_all_pairs_whatever_the_norms() -> None:
    torch.manual_seed(0)
    W = torch.randn(2500, 7) * torch.rand(2500, 1)  # more features than are compared at once
    W[3] = 0
    unit = torch.nan_to_num(W.double() / W.double().norm(dim=1, keepdim=True))
    cosines = (unit @ unit.T).abs().fill_diagonal_(0)
    assert mean_absolute_cosine(W) == pytest.approx(cosines.sum().item() / (2500 * 2499), rel=1e-5)
    assert mean_absolute_cosine(torch.eye(5)) == 0.0
    assert mean_absolute_cosine(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])) == pytest.approx(1.0)
    assert math.isnan(mean_absolute_cosine(torch.ones(1, 5)))
    largest = (unit @ unit.T).fill_diagonal_(-2).amax(1)
    assert mean_largest_cosine(W) == pytest.approx(largest.mean().item(), rel=1e-5)
    assert mean_largest_cosine(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])) == pytest.approx(-1.0)
    assert math.isnan(mean_largest_cosine(torch.ones(1, 5)))
    assert fidelity(Fixed(lambda x: x), language_model("gpt2"), random_rows(language_model("gpt2"), 2)).c_dec is None


@pytest.mark.parametrize("kind", KINDS)
def test_layers_below_the_site_run_twice_for_a_row_with_ce_and_once_for_another(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 12)
    fidelity(Fixed(lambda x: x), lm, rows[:4])
    ran: list[int] = []
    module = lm.model.get_submodule(lm.site("blocks.0.mlp.hook_out").module)
    # Passes of one row find the width and test whether sharing is exact.
    handle = module.register_forward_hook(lambda _, __, out: ran.append(out.numel() // 32 // rows.shape[1]))
    fidelity(Fixed(lambda x: x), lm, rows, rows_per_forward=3, ce_tokens=100)
    handle.remove()
    assert [n for n in ran if n > 1] == [3] * 4 + [3] * 2  # the pass, then the clean runs on the first two blocks


def test_bos_with_a_hundred_times_the_norm_is_in_no_figure() -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 8)
    site = "blocks.0.hook_resid_pre"  # before attention can carry BOS to other positions
    sae = SparseAutoencoder(32, 40, 5)
    initialise(sae, lm.activations(rows, [site])[site][lm.ordinary(rows)])
    before = fidelity(sae, lm, rows, site)
    embedding, bos = lm.model.get_input_embeddings().weight, lm.tokenizer.bos_token_id
    kept = embedding[bos].clone()
    tied = lm.model.get_output_embeddings().weight
    lm.model.get_output_embeddings().weight = torch.nn.Parameter(tied.clone(), requires_grad=False)
    try:
        embedding.data[bos] = 100 * kept
        after = fidelity(sae, lm, rows, site)
        assert (after.fvu, after.l0, after.never_active, after.tokens) == (
            before.fvu,
            before.l0,
            before.never_active,
            before.tokens,
        )
        assert fidelity(Fixed(lambda x: x), lm, rows, site).loss_recovered_zero == 1.0
    finally:
        embedding.data[bos] = kept
        lm.model.get_output_embeddings().weight = tied


@pytest.mark.parametrize("rows_per_forward", [1, 5, 64])
def test_sinks_are_counted_and_left_out_of_the_figures_without_them(rows_per_forward: int) -> None:
    torch.manual_seed(0)
    lm = language_model("gpt2")
    rows = random_rows(lm, 12)
    rows[rows == 17] = 18
    rows[:, 1] = 17
    sae = SparseAutoencoder(32, 40, 5, {"hook_name": "blocks.0.hook_resid_pre"})
    initialise(sae, lm.activations(rows, [sae.metadata["hook_name"]])[sae.metadata["hook_name"]][:, 2:].reshape(-1, 32))
    embedding = lm.model.get_input_embeddings().weight
    kept = embedding[17].clone()
    try:
        embedding.data[17] = 100 * kept
        found = fidelity(sae, lm, rows, rows_per_forward=rows_per_forward)
        x = lm.activations(rows, [found.site])[found.site]
        spliced = sae(x)
        spliced[rows == 17] = x[rows == 17]
        log_p = lm.spliced_logits(rows, found.site, lambda _: spliced[lm.ordinary(rows)]).log_softmax(-1)
    finally:
        embedding.data[17] = kept
    loss = -log_p.gather(2, rows.roll(-1, 1)[..., None]).squeeze(2)[lm.scored(rows)].mean().item()
    assert found.ce_spliced_without_sinks == pytest.approx(loss, rel=1e-5) != pytest.approx(found.ce_spliced, rel=1e-3)
    assert found.delta_ce_without_sinks == found.ce_spliced_without_sinks - found.ce_clean
    ordinary = lm.ordinary(rows)
    sink, X = (rows == 17)[ordinary].numpy(), x[ordinary].double().numpy()
    errors = (X - sae(x[ordinary]).double().numpy()) ** 2
    norms = np.linalg.norm(X, axis=1)
    assert ((norms > 10 * np.median(norms)) == sink).all() and found.sinks == 12

    def fvu(chosen: np.ndarray) -> float:
        return errors[chosen].sum() / ((X[chosen] - X[chosen].mean(0)) ** 2).sum()

    assert found.fvu == pytest.approx(fvu(sink | True), rel=1e-5)
    assert found.fvu_without_sinks == pytest.approx(fvu(~sink), rel=1e-5)
    assert abs(found.fvu - found.fvu_without_sinks) > 0.1
    squares = (X - X.mean(0)) ** 2
    assert found.sink_variance == pytest.approx(squares[sink].sum() / squares.sum(), rel=1e-5)
    others = ((X[~sink] - X[~sink].mean(0)) ** 2).sum(0)
    assert found.top_variance == pytest.approx(others.max() / others.sum(), rel=1e-5)
    cosine = torch.nn.functional.cosine_similarity(x[ordinary], sae(x[ordinary]), dim=1).double().numpy()
    assert found.cosine_without_sinks == pytest.approx(cosine[~sink].mean(), rel=1e-5)


def test_sinks_of_a_crosscoder_stay_clean_in_the_ce_without_them() -> None:
    """They are sinks of its sites side by side, as scaled, and the reconstruction is spliced in at the first site."""
    torch.manual_seed(0)
    lm, sites, scales = language_model("gpt2"), ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"], [0.5, 2.0]
    rows = random_rows(lm, 12)
    rows[rows == 17] = 18
    rows[:, 1] = 17
    sae = SparseAutoencoder(64, 40, 5, {"hook_name": sites[0], "hook_names": sites, "saelab": {"input_scale": scales}})
    sae.site_widths = (32, 32)
    embedding, ordinary = lm.model.get_input_embeddings().weight, lm.ordinary(rows)
    kept = embedding[17].clone()
    try:
        embedding.data[17] = 100 * kept
        found = lm.activations(rows, sites)
        initialise(sae, torch.cat([found[site][ordinary] for site in sites], 1))
        figures = fidelity(sae, lm, rows)
        norms = torch.cat([scale * found[site][ordinary] for site, scale in zip(sites, scales, strict=True)], 1).norm(
            dim=1
        )
        sink = norms > 10 * norms.median()
        x = found[sites[0]][ordinary]
        spliced = sae(torch.cat([found[site][ordinary] for site in sites], 1))[:, :32]
        spliced[sink] = x[sink]
        log_p = lm.spliced_logits(rows, sites[0], lambda _: spliced).log_softmax(-1)
    finally:
        embedding.data[17] = kept
    assert figures.sinks == int(sink.sum()) == 12
    loss = -log_p.gather(2, rows.roll(-1, 1)[..., None]).squeeze(2)[lm.scored(rows)].mean().item()
    assert figures.ce_spliced_without_sinks == pytest.approx(loss, rel=1e-5)
    assert figures.ce_spliced_without_sinks != pytest.approx(figures.ce_spliced, rel=1e-3)


def test_without_sinks_the_figures_without_them_are_the_same() -> None:
    lm = language_model("gpt2")
    found = fidelity(Fixed(lambda x: 0.9 * x), lm, random_rows(lm, 12))
    assert found.sinks == found.sink_variance == 0 and 0 < found.top_variance < 1
    assert (found.fvu_without_sinks, found.cosine_without_sinks) == (found.fvu, found.cosine)
    assert found.ce_spliced_without_sinks == found.ce_spliced


def test_equal_activations_leave_fvu_undefined() -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 12)
    weights = [lm.model.get_submodule("transformer.wte").weight, lm.model.get_submodule("transformer.wpe").weight]
    kept = [weight.clone() for weight in weights]
    try:
        weights[0].data[:], weights[1].data[:] = 0.1, 0.0
        found = fidelity(Fixed(lambda x: x), lm, rows, "blocks.0.hook_resid_pre", rows_per_forward=5)
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.data.copy_(before)
    assert math.isnan(found.fvu) and math.isnan(found.fvu_without_sinks) and found.top_variance == 0


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 8)
    bias = lm.model.get_submodule("transformer.h.1.mlp.c_proj").bias
    kept = bias.clone()
    try:
        bias.data += 3000.0
        x = lm.activations(rows, [SITE])[SITE][lm.ordinary(rows)].double()
        noise = Fixed(lambda z: z + 0.5)
        exact = (0.25 * x.numel()) / ((x - x.mean(0)) ** 2).sum().item()
        assert fidelity(noise, lm, rows).fvu == pytest.approx(exact, rel=1e-3)
    finally:
        bias.data.copy_(kept)


def test_input_that_does_not_fit_is_an_error() -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 2)
    with pytest.raises(SaelabError, match="width 32, the autoencoder has d_in 8"):
        fidelity(SparseAutoencoder(8, 16, 2), lm, rows, SITE)
    with pytest.raises(SaelabError, match="does not say its site"):
        fidelity(SparseAutoencoder(32, 64, 2), lm, rows)
    with pytest.raises(SaelabError, match="no ordinary token"):
        fidelity(SparseAutoencoder(32, 64, 2), lm, torch.zeros(2, 5, dtype=torch.long), SITE)
    no_pair = torch.zeros(2, 4, dtype=torch.long)
    no_pair[:, 1] = 5
    sae = SparseAutoencoder(32, 64, 2)
    initialise(sae, torch.randn(50, 32))
    with pytest.raises(SaelabError, match="no loss"):
        fidelity(sae, lm, no_pair, SITE)


def test_an_ablation_that_changes_no_loss_leaves_loss_recovered_undefined() -> None:
    lm = language_model("gpt2")
    result = fidelity(Fixed(lambda x: x), lm, random_rows(lm, 2))
    harmless = dataclasses.replace(result, ce_zero_ablated=result.ce_clean)
    assert math.isnan(harmless.loss_recovered_zero) and not math.isnan(harmless.loss_recovered_mean)


class Selective(Fixed):
    """Keeps each token's 8 largest dimensions by |x| (1 + beta |g|) and records the x and g that it gets."""

    def __init__(self, beta: float) -> None:
        super().__init__(lambda x: x)
        self.beta = beta
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def encode(self, x: Tensor, gradients: Tensor | None = None) -> Codes:
        self.seen.append((x, gradients))
        scores = x.abs() if gradients is None else x.abs() * (1 + self.beta * gradients.abs())
        chosen = scores.topk(8).indices
        return Codes.from_topk(x.gather(1, chosen), chosen, 32)

    def decode(self, codes: Codes, x: Tensor) -> Tensor:
        return codes.to_dense()


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_selects_with_the_clean_runs_gradients_and_is_labelled(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 8)
    sae = Selective(1e3)
    found = fidelity(sae, lm, rows, rows_per_forward=8, oracle=True)
    assert found.mode == ORACLE == found.to_dict()["mode"] == found.to_frame().loc["mode", "value"]
    assert found.plot().layout.title.text.endswith(ORACLE)
    ordinary = lm.ordinary(rows)
    values, gradients = (found[SITE] for found in lm.activations_and_gradients(rows, [SITE]))
    assert len(sae.seen) == 1  # for FVU and the spliced loss alike: the text is encoded once
    for x, g in sae.seen:
        assert g is not None
        torch.testing.assert_close(x, values[ordinary], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(g, gradients[ordinary], rtol=1e-4, atol=1e-4)
        last = (ordinary.nonzero()[:, 1] == rows.shape[1] - 1).nonzero().squeeze(1)
        assert len(last) == len(rows) and (g[last] == 0).all()

    x, g = values[ordinary], gradients[ordinary]
    kept = sae.decode(sae.encode(x, gradients=g), x)
    assert found.fvu == pytest.approx(((x - kept).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
    log_p = lm.spliced_logits(rows, SITE, lambda _: kept).log_softmax(-1)
    scored = lm.scored(rows)
    loss = -log_p.gather(2, rows.roll(-1, 1)[..., None]).squeeze(2)[scored].mean().item()
    assert found.ce_spliced == pytest.approx(loss, rel=1e-5)


def test_the_oracle_changes_only_the_selection() -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 8)
    plain_sae = Selective(1e3)
    plain, oracle = fidelity(plain_sae, lm, rows), fidelity(Selective(1e3), lm, rows, oracle=True)
    assert all(g is None for _, g in plain_sae.seen) and plain.mode == INFERENCE
    same = ("site", "tokens", "ce_tokens", "n_features", "ce_clean", "ce_zero_ablated", "ce_mean_ablated")
    before, after = plain.to_dict(), oracle.to_dict()
    assert set(before) == set(after)
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert oracle.fvu > plain.fvu  # because the largest |x| leave the smallest error
    assert oracle.ce_spliced != plain.ce_spliced
    for found in (plain, oracle):
        assert found.counts.sum().item() == pytest.approx(found.l0 * found.tokens)

    unweighted = fidelity(Selective(0.0), lm, rows, oracle=True)
    assert {**unweighted.to_dict(), "mode": INFERENCE} == before
    with pytest.raises(SaelabError, match="takes no gradients"):
        fidelity(Fixed(lambda x: x), lm, rows, oracle=True)


def test_our_autoencoder_with_beta_0_is_its_own_oracle() -> None:
    torch.manual_seed(0)
    lm = language_model("gpt2")
    rows = random_rows(lm, 8)
    sae = SparseAutoencoder(32, 64, 4, {"hook_name": SITE})
    initialise(sae, lm.activations(rows, [SITE])[SITE][lm.ordinary(rows)])
    plain = fidelity(sae, lm, rows)
    assert dataclasses.replace(fidelity(sae, lm, rows, oracle=True), mode=INFERENCE) == plain
    sae.beta = 3.0
    assert fidelity(sae, lm, rows) == plain
    oracle = fidelity(sae, lm, rows, oracle=True)
    assert oracle.fvu != plain.fvu and oracle.delta_ce != plain.delta_ce


def test_the_written_result_has_only_numbers_and_text() -> None:
    lm = language_model("gpt2")
    result = fidelity(Fixed(lambda x: x), lm, random_rows(lm, 3))
    written = result.to_dict()
    assert json.loads(json.dumps(written)) == written
    assert "counts" not in written and {"never_active", "never_active_share", "share_below_1e4"} <= set(written)
    assert all(f"<th>{name}</th>" in result._repr_html_() for name in written)
