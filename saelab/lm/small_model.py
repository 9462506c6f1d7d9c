"""A small model with random weights of any architecture, made from a configuration with its widths reduced."""

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import nn

_SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "word_embed_proj_dim": 64,
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "state_size": 4,
    "mamba_d_state": 4,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "index_n_heads": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
"""Sizes of the small model; those that its configuration has under another name or does not have stay as they are."""
_HEAD_SIZES = dict.fromkeys(
    (
        "head_dim",
        "global_head_dim",
        "rotary_dim",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "index_head_dim",
        "mamba_d_head",
        "mamba_headdim",
    ),
    16,
) | {"mamba_n_heads": 8, "num_heads": 8}
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_ROPE = ("long_factor", "short_factor")
"""Lists with an entry per pair of a head's dimensions, in the parameters of rotary embeddings."""
_KINDS = ("layer_types", "mlp_layer_types")
"""Lists with an entry per layer: the small model has a layer of each kind, and at least two layers."""
ATTEMPTS = ((_SIZES | _HEAD_SIZES, 2), (_SIZES, 2), (_SIZES | _HEAD_SIZES, 3), (_SIZES | _HEAD_SIZES, 10), ({}, 2))
"""Sizes and layers of small models, tried in order: some sizes depend on each other, and some kinds of layers come
later than the first two."""
_LARGEST = 2**24
"""Most parameters of a small model: 67 MB in float32."""


def random_model(config: Any) -> nn.Module:
    """A model of `config` in float32 on the CPU. Raises ValueError if it is too large."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n > _LARGEST:
        raise ValueError(f"it would have {n:,} parameters")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # as they begin, norms do nothing and all sites have nearly equal values
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def smaller(config: Any, sizes: dict[str, int], least: int) -> Any:
    """A copy of `config` with at most these sizes, and a layer of each of `_KINDS`, `least` layers or more."""
    config = copy.deepcopy(config)
    nested = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    for part in (config, *(part for part in nested if part is not None)):
        queries = _get(part, "num_attention_heads")
        keys = {name: n for name in _KEY_HEADS if type(n := _get(part, name)) is int}
        for name, size in sizes.items():
            old = _get(part, name)
            if type(old) is int and old > size:
                _set(part, name, size)
        if "head_dim" in sizes and isinstance(rope := _get(part, "rope_parameters"), dict):
            pairs = int(sizes["head_dim"] * (rope.get("partial_rotary_factor") or 1)) // 2
            _set(part, "rope_parameters", rope | {name: rope[name][:pairs] for name in _ROPE if name in rope})
        kinds = {name: list(dict.fromkeys(_get(part, name) or ())) for name in _KINDS}
        layers = max(least, *map(len, kinds.values()))
        for name, of in kinds.items():
            if of:
                _set(part, name, (of * layers)[:layers])
        _set(part, "num_hidden_layers", layers)
        for name, n in keys.items() if sizes else ():
            _set(part, name, 4 if n == queries else min(n, 2))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if sizes and _get(part, name) is not None:
                _set(part, name, 0)
    return config


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some configurations refuse to give a size that differs by layer
        return None


def _set(config: Any, name: str, value: Any) -> None:
    with suppress(AttributeError):  # derived from other settings
        setattr(config, name, value)
