"""Attribution to residual-stream features is complete, and includes pattern and norm as the weights have them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from saelab.analysis.attention.readout import stream_sites
from saelab.analysis.attention.sources import source_attribution
from saelab.errors import SaelabError
from saelab.lm.attention import layer_maps, read_heads
from saelab.lm.model import LanguageModel
from tests.analysis.attention.made import CONTEXT, RESID, Z, active_feature, autoencoder, double_model, ids_of, lm_of
from tests.tiny import KINDS

POSITION = 11


def plain_values(lm: LanguageModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """A part x of the stream through gain and W_V by head, and what the norm divides by, from the parameters."""
    block: Any = lm.model.get_submodule(lm.site("blocks.2.hook_resid_pre").module)
    if lm.name == "llama":
        norm, V = block.input_layernorm, block.self_attn.v_proj.weight.T
        scale = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        by_value_head = (x * norm.weight @ V).unflatten(-1, (2, 8))
        return by_value_head[..., [0, 0, 1, 1], :], scale
    if lm.name == "gpt2":
        norm, V = block.ln_1, block.attn.c_attn.weight[:, 64:]
    else:
        norm = block.input_layernorm
        V = block.attention.query_key_value.weight.view(4, 3, 8, 32)[:, 2].flatten(0, 1).T
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return (centred * norm.weight @ V).unflatten(-1, (4, 8)), scale


@pytest.mark.parametrize("kind", KINDS)
def test_features_at_sources_add_up_and_are_those_of_the_weights(kind: str) -> None:
    lm = double_model(kind)
    ids = ids_of(lm)
    sae, stream = autoencoder(lm), autoencoder(lm, RESID, seed=1)
    feature = active_feature(sae, lm, ids, POSITION)
    found = source_attribution(sae, stream, lm, ids, feature, POSITION)
    assert found.pre_activation == pytest.approx(found.direct.pre_activation, abs=1e-9)
    assert abs(found.direct.rounding) < 1e-9
    assert float(found.remainder.abs().max()) < 1e-5  # the gain is measured
    heads, values = read_heads(lm, ids[None], [2], [RESID])
    x = values[RESID][0]
    _, scale = plain_values(lm, x)
    w = sae.W_enc[feature].double().view(4, 8)
    assert not (found.sources == 0).any()  # BOS has no features
    assert len(found.features) == 6 * POSITION
    for n in range(0, len(found.features), 7):
        s, q = int(found.sources[n]), int(found.features[n])
        activation = float((x[s] - stream.b_dec.double()) @ stream.W_enc[q].double() + stream.b_enc[q])
        assert float(found.activations[n]) == pytest.approx(activation, abs=1e-12)
        part, _ = plain_values(lm, activation * stream.W_dec[q].double())
        expected = heads[2].pattern[0, :, POSITION, s] * (part * w).sum(1) / scale[s]
        torch.testing.assert_close(found.by_head[n], expected, rtol=1e-4, atol=1e-6)
    by_source = found.direct.contributions
    for s in range(POSITION + 1):
        parts = found.by_head[found.sources == s].sum(0) + found.decoder_bias[:, s] + found.error[:, s]
        total = parts + found.constant[:, s] + found.remainder[:, s]
        torch.testing.assert_close(total, by_source[:, s], rtol=0, atol=1e-9)
    assert not found.decoder_bias[:, 0].any() and found.error[:, 0].any()
    if kind == "llama":  # it has no biases
        assert float(found.constant.abs().max()) < 1e-5


def test_the_model_in_float32_is_complete_too() -> None:
    lm = lm_of("gpt2")
    ids, sae, stream = ids_of(lm), autoencoder(lm), autoencoder(lm, RESID, seed=1)
    found = source_attribution(sae, stream, lm, ids, 3, POSITION)
    assert found.pre_activation == pytest.approx(found.direct.pre_activation, abs=1e-9)
    assert float(found.remainder.abs().max()) < 1e-4
    frame = found.to_frame()
    assert sum(frame["contribution"]) + found.direct.bias + found.direct.rounding == pytest.approx(found.pre_activation)
    sizes = [abs(value) for part, value in zip(frame["part"], frame["contribution"], strict=True) if part == "feature"]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == len(found.features)


@pytest.mark.parametrize("kind", KINDS)
def test_measured_maps_are_the_models(kind: str) -> None:
    lm = double_model(kind)
    maps = layer_maps(lm, 2)
    rows = ids_of(lm)[None]
    heads, values = read_heads(lm, rows, [2], [*stream_sites(2), "blocks.2.hook_attn_out"])
    normed = values["blocks.2.attn.hook_in"][0]
    v = heads[2].values[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(normed @ maps.values.weight + maps.values.bias, v, rtol=0, atol=1e-12)
    out = values[Z][0] @ maps.output.weight + maps.output.bias
    torch.testing.assert_close(out, values["blocks.2.hook_attn_out"][0], rtol=0, atol=1e-12)
    assert maps.norm.centred == (kind != "llama")


def test_an_unknown_norm_and_an_autoencoder_of_another_width_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("gpt2")
    ids, sae = ids_of(lm, CONTEXT), autoencoder(lm)
    with pytest.raises(SaelabError, match="has width 32, the autoencoder has d_in 128"):
        source_attribution(sae, autoencoder(lm, "blocks.2.mlp.hook_post"), lm, ids, 3, POSITION)
    from saelab.lm import attention

    monkeypatch.setattr(attention, "fitted_norm", lambda *_: None)
    with pytest.raises(SaelabError, match="layer 2 is neither RMSNorm, LayerNorm nor nothing"):
        source_attribution(sae, autoencoder(lm, RESID), lm, ids, 3, POSITION)
