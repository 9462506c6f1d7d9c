"""Names of sites are held to TransformerLens' meaning of them, and to the residual stream, on many architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from saelab.errors import SaelabError
from saelab.lm import selfcheck
from saelab.lm.load import load_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.selfcheck import in_residual_stream, site_meanings
from saelab.lm.settings import ModelSettings
from saelab.lm.sites import Site, bridge_of, general_name, resolve_sites
from saelab.memory import no_numbers
from tests.lm.shaped import shaped_folder
from tests.tiny import language_model, model_folder, random_rows

SIZES = {"vocab_size": 90, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "GPTNeoXForCausalLM": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8, "vocab_size": 50304},
    "LlamaForCausalLM": {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256},
    "Phi3ForCausalLM": {
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "long_factor": [2.0] * 48,
            "short_factor": [1.0] * 48,
            "original_max_position_embeddings": 4096,
        },
    },
    "PhiForCausalLM": {"partial_rotary_factor": 0.4},
    "Qwen3MoeForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": LLAMA_LIKE | SIZES,
    "Olmo2ForCausalLM": {},
    "OPTForCausalLM": {"do_layer_norm_before": True},
    "XGLMForCausalLM": {},
    "BloomForCausalLM": {"hidden_size": 64, "n_layer": 2, "n_head": 8},
    "MptForCausalLM": {"d_model": 4096, "n_layers": 32, "n_heads": 32},
    "MambaForCausalLM": {},
    "DeepseekV3ForCausalLM": {},
}
"""Real widths where that says something: the check is to reduce them. Models are made without weights."""
SUMS = "its module adds to the residual stream and gives the sum"
DISPUTED = {
    "BloomForCausalLM": {"blocks.N.attn.hook_out": SUMS, "blocks.N.mlp.hook_out": SUMS},
    "MptForCausalLM": {"blocks.N.mlp.hook_out": SUMS},
}
NORMALISED_FIRST = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM")
"""Architectures that normalise the output of attention and MLP before they add it."""


def outlined(architecture: str) -> nn.Module:
    config = getattr(transformers, getattr(transformers, architecture).config_class.__name__)(**CONFIGS[architecture])
    with torch.device("meta"):
        return getattr(transformers, architecture)(config)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_names_mean_what_the_bridge_means_and_the_exceptions_are_found(architecture: str) -> None:
    model, state = outlined(architecture), torch.get_rng_state()
    meanings = site_meanings(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert meanings.disputed == DISPUTED.get(architecture, {})
    assert {"blocks.N.hook_resid_pre", "blocks.N.hook_resid_post"} <= meanings.residual
    modules = {"blocks.N.attn.hook_out", "blocks.N.mlp.hook_out"} & meanings.residual
    if architecture in NORMALISED_FIRST:
        assert not modules
        assert {"blocks.N.hook_attn_out", "blocks.N.hook_mlp_out"} <= meanings.residual
    elif architecture not in ("OPTForCausalLM", "XGLMForCausalLM", "MambaForCausalLM"):  # these have no module for MLPs
        assert modules == {"blocks.N.attn.hook_out", "blocks.N.mlp.hook_out"}
    assert not {"blocks.N.attn.q.hook_out", "blocks.N.attn.hook_z", "blocks.N.ln1.hook_out"} & meanings.residual


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "XGLMForCausalLM"])
def test_the_mlp_of_a_block_without_such_a_module_is_not_the_block(architecture: str) -> None:
    with no_numbers():
        config = outlined(architecture).config
        sites = bridge_of(getattr(transformers, architecture)(config))[1]
    assert "blocks.0.mlp.hook_out" not in sites and "blocks.0.mlp.hook_in" not in sites
    assert sites["blocks.0.hook_mlp_out"] == sites["blocks.0.mlp.out.hook_out"] != sites["blocks.0.hook_resid_post"]


def test_a_name_that_leads_to_another_module_is_disputed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> tuple[Any, dict[str, Site]]:
        bridge, sites = bridge_of(model)
        return bridge, sites | {"blocks.0.hook_mlp_out": sites["blocks.0.hook_attn_out"]}

    lm = language_model("llama")  # other tests use it, so it is loaded before the bridge is wrong
    monkeypatch.setattr(selfcheck, "bridge_of", wrong)
    monkeypatch.setattr(selfcheck, "_known", {})
    disputed = site_meanings(lm.model).disputed
    assert set(disputed) == {"blocks.N.hook_mlp_out"}
    lm = LanguageModel("wrong", lm.model, lm.tokenizer, lm.sites, "", disputed=disputed)
    with pytest.raises(SaelabError, match=r"blocks\.2\.hook_mlp_out of wrong is not what its name says: its mod"):
        lm.activations(random_rows(lm, 1), ["blocks.2.hook_mlp_out"])
    assert lm.width("blocks.2.hook_attn_out") == 32


def test_without_a_small_model_only_the_named_setting_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> nn.Module:
        raise ValueError("sizes do not fit")

    monkeypatch.setattr(selfcheck, "random_model", refuse)
    monkeypatch.setattr(selfcheck, "_known", {})
    name = str(model_folder("gpt2"))
    with pytest.raises(SaelabError, match=r"GPT2LMHeadModel can be made .*do not fit.*`model\.self_check=false` skips"):
        load_language_model(ModelSettings(name), "cpu")
    lm = load_language_model(ModelSettings(name, self_check=False), "cpu")
    assert lm.width("blocks.0.hook_resid_post") == 32 and not in_residual_stream(lm, "blocks.0.hook_resid_post")


def test_biases_that_the_bridge_adds_twice_dispute_no_name() -> None:
    lm = load_language_model(ModelSettings(str(shaped_folder("falcon alibi"))), "cpu")
    assert lm.attention == "sdpa"
    assert lm.width("blocks.1.hook_mlp_out") == 32 and in_residual_stream(lm, "blocks.1.hook_resid_post")


def test_a_model_that_only_the_bridge_cannot_run_is_checked_against_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module) -> tuple[Any, dict[str, Site]]:
        bridge, sites = bridge_of(model)
        bridge.forward = bridge.run_with_cache = None
        return bridge, sites

    monkeypatch.setattr(selfcheck, "bridge_of", broken)
    monkeypatch.setattr(selfcheck, "_known", {})
    assert site_meanings(outlined("MptForCausalLM")).disputed == DISPUTED["MptForCausalLM"]


def test_sites_with_heads_before_positions_give_each_tokens_own_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**LLAMA_LIKE | SIZES))
    model.save_pretrained(tmp_path)
    sites = resolve_sites(tmp_path)
    lm = LanguageModel("gemma3", model, language_model("llama").tokenizer, sites, "")
    rows = torch.arange(2, 10).view(2, 4)  # as many positions as heads
    site, raw = "blocks.1.attn.q_norm.hook_out", []
    handle = model.get_submodule(sites[site].module).register_forward_hook(lambda _, __, output: raw.append(output))
    found = lm.activations(rows, [site])[site]
    handle.remove()
    assert raw[-1].shape == (2, 4, 4, 8)  # rows, heads, positions, width
    for head in range(4):
        assert torch.equal(found[:, :, 8 * head : 8 * head + 8], raw[-1][:, head])
    changed = rows.clone()
    changed[:, 3] += 10
    differs = (lm.activations(changed, [site])[site] != found).any(-1)
    assert differs.tolist() == [[False, False, False, True]] * 2


def test_the_check_of_a_site_takes_two_passes_of_fourteen_tokens_once() -> None:
    lm, seen = language_model("llama"), []
    lm = LanguageModel("llama", lm.model, lm.tokenizer, lm.sites, "")
    handle = lm.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for _ in range(2):
        lm.activations(random_rows(lm, 3), ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"])
    handle.remove()
    assert seen == [(2, 7), (2, 7), (3, 32), (3, 32)]


@pytest.mark.parametrize("site", ["hook_pos_embed", "pos_embed.hook_out"])
def test_a_site_that_does_not_depend_on_the_tokens_is_refused(site: str) -> None:
    lm = language_model("gpt2")
    with pytest.raises(SaelabError, match=rf"{site} of .* choose another site"):
        lm.spliced_logits(random_rows(lm, 2), site, lambda x: x)


def test_the_general_name_of_a_site_has_no_numbers() -> None:
    assert general_name("blocks.12.attn.q_norm.hook_out") == "blocks.N.attn.q_norm.hook_out"
    assert general_name("ln_final.hook_out") == "ln_final.hook_out"
