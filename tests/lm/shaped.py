"""Tiny random models of families beyond tests/tiny.py, as local Hugging Face folders: soft caps, ALiBi, images."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.tiny import model_folder as plain_folder

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _models(n: int) -> dict[str, Callable[[], Any]]:
    """How to make each model with a vocabulary of `n`."""
    import transformers as hf

    text = {"vocab_size": n, **_TEXT}
    gemma = {**text, "head_dim": 8, "sliding_window": 16}
    qwen = {**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    two = {"bos_token_id": 0, "eos_token_id": 1}
    eyes = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    image = {"image_token_index": 5}
    places = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return {
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**gemma, attn_logit_softcapping=0.05)),
        "gemma3 encoder": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**gemma, use_bidirectional_attention=True)),
        "gpt_neo": lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                vocab_size=n,
                hidden_size=32,
                num_layers=3,
                num_heads=4,
                max_position_embeddings=64,
                attention_types=[[["global", "local", "global"], 1]],
                **two,
            )
        ),
        "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=n, hidden_size=32, n_layer=3, n_head=4, **two)),
        "falcon alibi": lambda: hf.FalconForCausalLM(
            hf.FalconConfig(vocab_size=n, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True, **two)
        ),
        "mamba": lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=n, hidden_size=32, num_hidden_layers=3, state_size=4, pad_token_id=0, **two)
        ),
        "bert": lambda: hf.BertForMaskedLM(
            hf.BertConfig(
                vocab_size=n, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
            )
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=n, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64)
        ),
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**_VISION)),
        "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                text_config=gemma,
                vision_config=_VISION,
                mm_tokens_per_image=4,
                image_token_index=5,
                boi_token_index=6,
                eoi_token_index=7,
            )
        ),
        "llava": lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(text_config=hf.LlamaConfig(**text), vision_config=hf.CLIPVisionConfig(**_VISION), **image)
        ),
        "mistral3": lambda: hf.Mistral3ForConditionalGeneration(
            hf.Mistral3Config(
                text_config=hf.MistralConfig(**text, head_dim=8),
                vision_config=hf.PixtralVisionConfig(**_VISION),
                **image,
            )
        ),
        "idefics3": lambda: hf.Idefics3ForConditionalGeneration(
            hf.Idefics3Config(text_config=hf.LlamaConfig(**text), vision_config=_VISION, image_token_id=5)
        ),
        "qwen2_vl": lambda: hf.Qwen2VLForConditionalGeneration(
            hf.Qwen2VLConfig(text_config=qwen, vision_config=eyes, **places)
        ),
        "qwen3_vl": lambda: hf.Qwen3VLForConditionalGeneration(
            hf.Qwen3VLConfig(
                text_config={**qwen, "head_dim": 8},
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "out_hidden_size": 32,
                    "num_heads": 2,
                    "intermediate_size": 32,
                    "deepstack_visual_indexes": [0],
                },
                **places,
            )
        ),
    }


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="saelab-shaped-")


@functools.cache
def shaped_folder(kind: str) -> Path:
    """The folder of a model of this kind, with the tokenizer of the tiny Llama."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain_folder("llama"))
    torch.manual_seed(0)
    model = _models(len(tokenizer))[kind]()
    with torch.no_grad():  # default weights are so small that every next token looks alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    folder = Path(_root().name) / kind.replace(" ", "_")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
