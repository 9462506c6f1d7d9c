"""Attention is sdpa, or eager where sdpa is not there or would change values."""

import pytest
import torch

from saelab.errors import SaelabError, SettingError
from saelab.lm.load import load_language_model, outlined_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.needs import pass_bytes
from saelab.lm.settings import ModelSettings
from saelab.memory import peak_bytes
from tests.lm.shaped import shaped_folder
from tests.tiny import CONTEXT, KINDS, model_folder, random_rows

SITES = [
    "blocks.0.hook_resid_pre",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_mlp_out",
    "blocks.2.hook_attn_out",
    "blocks.2.hook_resid_post",
]


def load(kind: str, attention: str = "auto") -> LanguageModel:
    folder = model_folder(kind) if kind in KINDS else shaped_folder(kind)
    return load_language_model(ModelSettings(str(folder), attention=attention), "cpu")


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neo", "bloom"])
def test_without_sdpa_attention_is_eager_and_all_values_are_the_bridges(kind: str) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    lm = load(kind)
    assert lm.attention == "eager"
    rows = random_rows(lm, 3)
    bridge = TransformerBridge.boot_transformers(str(shaped_folder(kind)), device="cpu", dtype=torch.float32)
    logits, cache = bridge.run_with_cache(rows)
    for site, values in lm.activations(rows, SITES).items():
        torch.testing.assert_close(values, cache[site].reshape(3, CONTEXT, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lm.logits(rows), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_can_be_chosen_and_gives_the_same_values(kind: str) -> None:
    fused, eager = load(kind), load(kind, "eager")
    assert (fused.attention, eager.attention, load(kind, "sdpa").attention) == ("sdpa", "eager", "sdpa")
    rows = random_rows(fused, 3)
    torch.testing.assert_close(eager.logits(rows), fused.logits(rows), rtol=1e-4, atol=1e-4)
    assert eager.fingerprint == fused.fingerprint


def test_a_cap_on_attention_scores_needs_eager_whatever_transformers_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Gemma2ForCausalLM

    monkeypatch.setattr(Gemma2ForCausalLM, "_supports_sdpa", True)
    lm = load("gemma2")
    assert lm.attention == "eager"
    rows = random_rows(lm, 2)
    capped = lm.logits(rows)
    for module in lm.model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    assert (lm.logits(rows) - capped).abs().max() > 1e-2  # what sdpa would compute


@pytest.mark.parametrize(
    ("kind", "attention", "message"),
    [
        ("gemma2", "sdpa", "sdpa attention is not possible with Gemma2ForCausalLM, which caps its attention scores"),
        (
            "gpt_neo",
            "sdpa",
            "not possible with GPTNeoForCausalLM, for which transformers does not have it; set model.att",
        ),
        ("falcon alibi", "eager", "adds Falcon's position biases twice; set model.attention=auto"),
    ],
)
def test_attention_that_would_be_wrong_or_is_not_there_is_refused(kind: str, attention: str, message: str) -> None:
    with pytest.raises(SaelabError, match=message):
        load(kind, attention)
    with (
        pytest.raises(SaelabError, match=message),
        outlined_language_model(ModelSettings(str(shaped_folder(kind)), attention=attention)),
    ):
        pass


def test_settings_name_the_ways_to_compute_attention() -> None:
    with pytest.raises(SettingError, match="attention: 'flash' is not auto, sdpa, eager"):
        ModelSettings(attention="flash")
    with pytest.raises(SettingError, match="name: is empty"):
        ModelSettings(" ")


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neo"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_pass_counted_without_numbers_has_the_same_attention(kind: str, gradients: bool) -> None:
    real, sites = load(kind), SITES[-1:]
    rows = random_rows(real, 6)
    measured = peak_bytes(
        lambda: real.activations_and_gradients(rows, sites) if gradients else real.activations(rows, sites)
    )
    with outlined_language_model(ModelSettings(str(shaped_folder(kind)))) as lm:
        assert lm.attention == "eager"
        assert pass_bytes(lm, 6, CONTEXT, sites, gradients=gradients) == measured


def test_a_run_says_once_that_attention_is_eager_and_loading_says_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from saelab.runs.job import Job, settings_of

    said: list[str] = []

    def job(attention: str) -> Job:
        model = {"name": str(shaped_folder("gemma2")), "attention": attention}
        settings = {"model": model, "site": SITES[-1], "context": 32, "device": "cpu", "out": "nowhere"}
        return Job(settings_of(settings), said.append)

    chosen = job("auto")
    capfd.readouterr()  # of making the model
    assert chosen.lm is chosen.lm
    assert [line for line in said if "eager" in line] == [said[-1]]
    assert "has no sdpa attention, so its attention is eager" in said[-1]
    assert capfd.readouterr() == ("", "")
    said.clear()
    assert job("eager").lm.attention == "eager"
    assert not any("eager" in line for line in said)
