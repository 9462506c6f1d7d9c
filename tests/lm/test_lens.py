"""The lens is the derivative of the logits with the final norm's scale frozen, on many architectures."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from saelab.lm import lens as module
from saelab.lm.lens import logit_lens, norm_scale
from saelab.lm.model import LanguageModel
from saelab.lm.sites import bridge_of, hook
from tests.tiny import KINDS, language_model, random_rows

SITE = "blocks.0.hook_resid_post"
SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 90}
RMS, LAYER = "with the gain of the final norm (RMSNorm)", module._LAYER_NORM
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "GemmaForCausalLM": (SIZES | HEADS | {"pad_token_id": 1}, RMS),
    "Gemma2ForCausalLM": (
        SIZES | HEADS | {"pad_token_id": 1, "final_logit_softcapping": 30.0},
        f"{RMS}, before the soft-cap of the logits",
    ),
    "CohereForCausalLM": (
        SIZES | HEADS | {"logit_scale": 0.0625, "pad_token_id": 1},
        f"{LAYER}, with the logits' factor 0.0625",
    ),
    "GraniteForCausalLM": (
        SIZES | HEADS | {"logits_scaling": 8.0, "pad_token_id": 1},
        f"{RMS}, with the logits' factor 0.125",
    ),
    "OlmoForCausalLM": (SIZES | HEADS | {"pad_token_id": 1}, LAYER),
    "GPTJForCausalLM": (GPT | {"rotary_dim": 8}, LAYER),  # its unembedding has a bias
    "MambaForCausalLM": (SIZES | {"state_size": 4, "pad_token_id": 1}, RMS),
    "OpenAIGPTLMHeadModel": (GPT, "without a final norm, as the model has none"),
}


def wrapped(model: nn.Module) -> LanguageModel:
    """The model with random weights of a size at which norms and biases matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    sites = bridge_of(type(model)(model.config))[1]
    return LanguageModel(type(model).__name__, model, language_model("llama").tokenizer, sites, "")


def made(architecture: str, config: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(0)
    of = getattr(transformers, architecture)
    return wrapped(of(of.config_class(**config)))


def slope(lm: LanguageModel, rows: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The change of the logits per change of the last block's output along `direction` ``[tokens, d]``, and the output.

    Central difference, for all tokens. Many norms compute in float32 whatever the model's precision.
    """
    last = lm.sites["blocks.1.hook_resid_post"]
    x: list[Tensor] = []

    def shifted(by: float) -> Tensor:
        def add(value: Tensor) -> Tensor:
            x.append(value.flatten(0, 1).clone())
            return value + by * direction.view(value.shape)

        with hook(lm.model, last, add):
            return lm.logits(rows).flatten(0, 1)

    return (shifted(0.02) - shifted(-0.02)) / 0.04, x[0]


@pytest.mark.parametrize("architecture", CASES)
def test_the_lens_is_the_derivative_with_the_scale_of_the_norm_frozen(architecture: str) -> None:
    config, words = CASES[architecture]
    lm = made(architecture, config)
    lens = logit_lens(lm, SITE)
    assert lens is not None and lens.words == words and lens.unembedding.shape == (90, 32)
    assert lens.centred == ("LayerNorm" in words)
    rows = random_rows(lm, 2) % 90
    direction = torch.randn(rows.numel(), 32, generator=torch.Generator().manual_seed(2))
    _, x = slope(lm, rows, direction)
    scale = norm_scale(lm, lens, rows).view(-1, 1)
    if "without" not in words:  # changes at right angles to x leave its scale as it is
        centre = (lambda v: v - v.mean(1, keepdim=True)) if lens.centred else (lambda v: v)
        along = centre(x)
        direction -= (centre(direction) * along).sum(1, keepdim=True) / along.square().sum(1, keepdim=True) * along
        torch.testing.assert_close(scale, along.square().mean(1, keepdim=True).sqrt())
    found, _ = slope(lm, rows, direction)
    expected = lens.at_head(direction) @ lens.unembedding.T / scale
    if "soft-cap" in words:  # tanh(raw / 30) * 30
        expected = expected * (1 - (lm.logits(rows).flatten(0, 1) / 30).square())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.std().item())


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_the_lens_is_almost_the_same(kind: str) -> None:
    exact = logit_lens(language_model(kind), SITE)
    lm = language_model(kind)
    of = type(lm.model)(lm.model.config)  # type: ignore[call-arg]
    of.load_state_dict(lm.model.state_dict())
    rounded = logit_lens(LanguageModel(kind, of.bfloat16(), lm.tokenizer, lm.sites, ""), SITE)
    assert exact is not None and rounded is not None and exact.words == rounded.words
    torch.testing.assert_close(rounded.gain, exact.gain, rtol=0.01, atol=0.002)


def test_a_site_outside_the_residual_stream_has_no_lens() -> None:
    assert logit_lens(language_model("gpt2"), "blocks.1.attn.hook_z") is None
    assert logit_lens(language_model("gpt2"), "blocks.1.hook_mlp_out") is not None


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        # a projection between the stream and the unembedding, and no final norm
        (
            "OPTForCausalLM",
            {"word_embed_proj_dim": 16, "do_layer_norm_before": False, "ffn_dim": 64, "num_attention_heads": 4}
            | SIZES
            | {"pad_token_id": 1},
        ),
        # a dense layer, an activation and a norm
        ("ModernBertDecoderForCausalLM", SIZES | HEADS | {"pad_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}),
    ],
)
def test_a_model_with_more_than_a_norm_before_its_unembedding_has_no_lens(
    architecture: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "in_residual_stream", lambda lm, site: True)
    assert logit_lens(made(architecture, config), SITE) is None
