"""Direct attribution is complete, and equals what a plain reading of the model's weights gives."""

import pytest
import torch

from saelab.analysis.attention.direct import contributions, direct_attribution
from saelab.analysis.attention.heads import head_shares, top_features
from saelab.analysis.attention.prompt import read_prompt
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder
from tests.analysis.attention.made import CONTEXT, RESID, Z, active_feature, autoencoder, double_model, ids_of, lm_of
from tests.tiny import KINDS, language_model


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_sources_add_up_to_the_pre_activation(kind: str) -> None:
    lm = double_model(kind)
    sae, ids = autoencoder(lm), ids_of(lm)
    x = lm.activations(ids[None], [Z])[Z][0]
    for position in (1, CONTEXT - 1):
        feature = active_feature(sae, lm, ids, position)
        found = direct_attribution(sae, lm, ids, feature, position)
        w, c = sae.W_enc[feature].double(), sae.b_dec.double()
        expected = float((x[position] - c) @ w + sae.b_enc[feature])
        assert found.contributions.shape == (4, position + 1)
        assert abs(float(found.contributions.sum()) + found.bias - expected) < 1e-9
        assert abs(found.rounding) < 1e-9 and found.pre_activation == pytest.approx(expected, abs=1e-12)
        by_head = (x[position].view(4, 8) * w.view(4, 8)).sum(1)
        torch.testing.assert_close(found.by_head, by_head, rtol=0, atol=1e-9)
        assert abs(float(found.by_source.sum() - by_head.sum())) < 1e-9
        assert float(found.contributions.abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_in_float32_gives_the_same_up_to_a_rounding_that_is_stated(kind: str) -> None:
    exact, lm = double_model(kind), lm_of(kind)
    sae, ids = autoencoder(lm), ids_of(lm)
    feature = active_feature(sae, lm, ids, 9)
    found, reference = (direct_attribution(sae, model, ids, feature, 9) for model in (lm, exact))
    torch.testing.assert_close(found.contributions, reference.contributions, rtol=1e-3, atol=1e-4)
    assert 0 < abs(found.rounding) < 1e-4
    assert float(found.contributions.sum()) + found.bias + found.rounding == pytest.approx(found.pre_activation)
    of_sae = sae.pre_activations(lm.activations(ids[None], [Z])[Z][0, 9:10])[0, feature]
    assert found.pre_activation == pytest.approx(float(of_sae), abs=1e-4)


def test_grouped_values_and_patterns_are_those_of_the_weights() -> None:
    """Llama's 4 heads share 2 value heads: recomputed from v_proj, and the pattern of transformers' own eager model."""
    lm = double_model("llama")
    ids, v_proj = ids_of(lm), lm.model.get_submodule("model.layers.2.self_attn.v_proj")
    prompt = read_prompt(lm, ids, [2], ["blocks.2.attn.hook_in"])
    heads = prompt.heads[2]
    assert heads.values.shape == (1, 2, CONTEXT, 8) and heads.value_head.tolist() == [0, 0, 1, 1]
    v = v_proj(prompt.values["blocks.2.attn.hook_in"])
    torch.testing.assert_close(heads.values[0].transpose(0, 1).flatten(1), v, rtol=0, atol=1e-12)
    expected = lm.model(ids[None], output_attentions=True).attentions[2]
    torch.testing.assert_close(heads.pattern, expected, rtol=0, atol=1e-12)
    rows = torch.randn(3, 32, dtype=torch.float64)
    at = torch.tensor([4, 0, 13])
    found = contributions(heads, rows, at)
    for n, t in enumerate(at.tolist()):
        for h in range(4):
            for s in range(CONTEXT):
                one = heads.pattern[0, h, t, s] * (v[s].view(2, 8)[h // 2] @ rows[n].view(4, 8)[h])
                assert float(found[n, h, s]) == pytest.approx(float(one), abs=1e-12)
    assert not found[1, :, 1:].any()


def test_attention_is_as_before_after_a_reading_and_after_an_error() -> None:
    lm = lm_of("gpt2")
    ids = ids_of(lm)
    before = lm.logits(ids[None])
    direct_attribution(autoencoder(lm), lm, ids, 0, 3)
    with pytest.raises(SaelabError, match="no token"):
        read_prompt(lm, [], [2])
    assert lm.attention == "sdpa" and torch.equal(lm.logits(ids[None]), before)


def test_a_frame_and_a_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.graph_objects as go

    lm = lm_of("gpt2")
    found = direct_attribution(autoencoder(lm), lm, ids_of(lm), 5, 7)
    frame = found.to_frame()
    assert len(frame) == 4 * 8 and set(frame["source"] + frame["distance"]) == {7}
    sums = [sum(frame["contribution"][frame["head"] == head]) for head in range(4)]
    torch.testing.assert_close(torch.tensor(sums, dtype=torch.float64), found.by_head)
    figure = found.plot(["<b>x</b>\n"] * 8)
    assert figure.layout.xaxis.ticktext[3] == "3: &lt;b&gt;x&lt;/b&gt;\\n"
    page = figure.to_json()
    assert page is not None and "<b>" not in page and "lt;b" in page
    shown: list[go.Figure] = []
    monkeypatch.setattr(go.Figure, "show", lambda self, *_: shown.append(self))
    found._ipython_display_()
    assert [each.layout.title.text for each in shown] == [found.plot().layout.title.text]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature": 48}, "no feature 48: features are 0 to 47"),
        ({"position": CONTEXT}, f"no position {CONTEXT}: the text has {CONTEXT} tokens"),
        ({"position": 0}, "position 0 is special"),
        ({"site": RESID}, f"{RESID} is not the output of attention heads"),
        ({"ids": [0, 10**6]}, "a token id outside"),
    ],
)
def test_what_cannot_be_attributed_is_an_error(change: dict, message: str) -> None:
    lm = lm_of("gpt2")
    given = {"ids": ids_of(lm), "feature": 1, "position": 3, "site": None} | change
    with pytest.raises(SaelabError, match=message):
        direct_attribution(autoencoder(lm), lm, **given)


def test_a_transcoder_and_another_width_are_errors() -> None:
    lm = lm_of("gpt2")
    with pytest.raises(SaelabError, match="a transcoder does not reconstruct"):
        direct_attribution(SparseAutoencoder(32, 8, 2, {"hook_name": Z}, d_out=32), lm, ids_of(lm), 0, 3)
    with pytest.raises(SaelabError, match="has width 32, the autoencoder has d_in 16"):
        direct_attribution(SparseAutoencoder(16, 8, 2), lm, ids_of(lm), 0, 3, Z)


def test_a_model_whose_attention_is_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from saelab.lm import attention

    lm = language_model("falcon")
    with pytest.raises(SaelabError, match="FalconForCausalLM does not give its attention pattern"):
        read_prompt(lm, ids_of(lm), [2])
    lm = LanguageModel("gated", lm_of("llama").model, lm_of("llama").tokenizer, lm_of("llama").sites, "")
    real = attention.Heads.z
    monkeypatch.setattr(attention.Heads, "z", lambda heads: 0.5 * real(heads))
    with pytest.raises(SaelabError, match="not the sum of its values weighted by the attention pattern"):
        read_prompt(lm, ids_of(lm), [2])


def test_head_shares_are_shares_of_norms_and_rank_features() -> None:
    torch.manual_seed(0)
    W = torch.randn(20, 32)
    W[3] = 0
    W[4, 8:] = 0
    shares = head_shares(W, 4)
    norms = torch.stack([W[:, 8 * h : 8 * h + 8].norm(dim=1) for h in range(4)], 1)
    torch.testing.assert_close(shares.sum(1), torch.ones(20))
    torch.testing.assert_close(shares[5], norms[5] / norms[5].sum())
    assert shares[4].tolist() == [1, 0, 0, 0] and shares[3].tolist() == [0.25] * 4
    top = top_features(shares, 5)
    assert top.shape == (4, 5) and top[0, 0] == 4
    alive = torch.ones(20, dtype=torch.bool)
    alive[4] = False
    assert 4 not in top_features(shares, 5, alive)[0]
    with pytest.raises(SaelabError, match="do not divide into 5 heads"):
        head_shares(W, 5)
