"""Direct logit attribution adds up to the logits, and is their derivative with the norm's scale frozen."""

import pytest
import torch

from saelab.analysis.attention.logits import lens_of, logit_attribution, stream_effects
from saelab.errors import SaelabError
from saelab.features.weights import weight_columns
from saelab.lm.attention import direct_lens, output_map
from saelab.lm.lens import logit_lens
from tests.analysis.attention.made import CONTEXT, Z, autoencoder, double_model, ids_of, lm_of
from tests.lm.test_lens import HEADS, SIZES, made
from tests.tiny import KINDS

POSITION = 8
OPT = SIZES | {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_logit(kind: str) -> None:
    lm = double_model(kind)
    sae, ids = autoencoder(lm), ids_of(lm)
    logits = lm.logits(ids[None])[0, POSITION]
    pairs = ((7, None), (90, None), (7, 90))
    one, two, difference = (logit_attribution(sae, lm, ids, POSITION, *pair) for pair in pairs)
    for found, expected in ((one, logits[7]), (two, logits[90]), (difference, logits[7] - logits[90])):
        parts = found.decoder_bias + found.error + found.rest + found.norm_bias
        linear = float(found.contributions.sum()) + parts
        assert linear + found.remainder == pytest.approx(float(expected), abs=1e-9)
        assert abs(found.remainder) < 2e-5 * (abs(parts) + float(found.contributions.abs().sum()))
        assert found.logit == pytest.approx(float(expected), abs=1e-12)
    torch.testing.assert_close(difference.contributions, one.contributions - two.contributions, rtol=0, atol=1e-9)
    assert float(one.contributions.abs().max()) > 1e-3 and len(one.features) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_features_add_what_the_models_own_modules_make_of_them(kind: str) -> None:
    lm = double_model(kind)
    sae, ids = autoencoder(lm), ids_of(lm)
    found = logit_attribution(sae, lm, ids, POSITION, 7)
    o = lm.model.get_submodule(lm.sites[Z].module)
    norm = lm.model.get_submodule(lm.sites["ln_final.hook_in"].module)
    x = lm.activations(ids[None], ["ln_final.hook_in"])["ln_final.hook_in"][0, POSITION]
    W_U = lm.unembedding[7].double()
    zero = torch.zeros(32, dtype=torch.float64)
    centred = x if kind == "llama" else x - x.mean()
    eps = norm.variance_epsilon if kind == "llama" else norm.eps
    scale = float((centred.square().mean() + eps).sqrt())  # type: ignore[operator]
    for n in range(3):
        y = float(found.activations[n]) * (o(sae.W_dec[found.features[n]].double()) - o(zero))
        y = y if kind == "llama" else y - y.mean()
        assert float(found.contributions[n]) == pytest.approx(float(y * norm.weight @ W_U) / scale, rel=1e-4, abs=1e-7)  # type: ignore[operator]


def test_pre_activations_of_later_features_need_only_weights() -> None:
    lm = lm_of("gpt2")
    sae, stream = autoencoder(lm), autoencoder(lm, "blocks.2.hook_resid_post", seed=4)
    W_O = lm.model.get_submodule("transformer.h.2.attn.c_proj").weight
    assert isinstance(W_O, torch.Tensor)
    which = torch.tensor([3, 40])
    expected = sae.W_dec[which] @ W_O @ stream.W_enc.T
    torch.testing.assert_close(stream_effects(sae, stream, output_map(lm, 2), which), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_database_of_heads_outputs_has_the_logits_of_the_direct_path(kind: str) -> None:
    """W_dec W_O, the mean subtraction and the gain of the final norm, W_U: the model's own modules and parameters."""
    lm = lm_of(kind)
    sae, lens = autoencoder(lm), direct_lens(lm, Z)
    assert lens is not None and lens.width == sae.d_in and lens.words.endswith(", after the layer's W_O")
    output = lm.model.get_submodule(lm.sites[Z].module)
    norm = lm.model.get_submodule(lm.sites["ln_final.hook_in"].module)
    written = output(sae.W_dec) - output(torch.zeros(1, sae.d_in))
    written = written if kind == "llama" else written - written.mean(1, keepdim=True)
    logits = written * norm.weight @ lm.unembedding.T  # type: ignore[operator]
    (columns,) = weight_columns(sae, lens)
    top, tokens = logits.topk(10)
    torch.testing.assert_close(torch.from_numpy(columns["top_logits"]), top, rtol=1e-3, atol=1e-3)
    assert (columns["top_logit_tokens"][:, 0] == tokens[:, 0].numpy()).mean() > 0.9  # some are all but equal
    found = torch.from_numpy(columns["logit_range"])
    torch.testing.assert_close(found, torch.stack(logits.aminmax(dim=1), 1), rtol=1e-3, atol=1e-3)
    assert logit_lens(lm, Z) is None and direct_lens(lm, "blocks.2.hook_resid_post") is not None


def test_a_frame_and_a_special_token_without_features() -> None:
    lm = lm_of("llama")
    sae, ids = autoencoder(lm), ids_of(lm)
    found = logit_attribution(sae, lm, ids, POSITION, 7, 9)
    frame = found.to_frame()
    assert sum(frame["contribution"]) == pytest.approx(found.logit) and len(frame) == 6 + 5
    first = logit_attribution(sae, lm, ids, 0, 7)
    assert not len(first.features) and first.error != 0
    assert first.error + first.rest + first.decoder_bias + first.norm_bias == pytest.approx(first.logit, abs=1e-4)


def test_what_has_no_logits_is_an_error() -> None:
    lm = lm_of("gpt2")
    sae, ids = autoencoder(lm), ids_of(lm)
    with pytest.raises(SaelabError, match=f"no position {CONTEXT}"):
        logit_attribution(sae, lm, ids, CONTEXT, 3)
    with pytest.raises(SaelabError, match=r"not \[3, 100000\]"):
        logit_attribution(sae, lm, ids, 3, 3, 10**5)
    gemma = made("Gemma2ForCausalLM", SIZES | HEADS | {"pad_token_id": 1})  # it normalises what attention adds
    site = "blocks.1.attn.hook_z"
    with pytest.raises(
        SaelabError, match="attention of layer 1 of Gemma2ForCausalLM adds to the residual stream is not linear"
    ):
        logit_attribution(autoencoder(gemma, site), gemma, ids_of(gemma) % 90, 3, 3)
    assert direct_lens(gemma, site) is None
    with pytest.raises(SaelabError, match="not linear in what the attention of layer 1 gives"):
        lens_of(made("OPTForCausalLM", OPT), 1)
