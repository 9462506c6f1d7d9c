"""sae-lens' activation cache: its own functions, on the same activations, or text and model, as ours.

child.py calls it with the peers' interpreter. It imports sae-lens, and nothing of saelab or of this folder.

write         sae_lens/cache_activations_runner.py, `_create_shard`, `save_to_disk` and `_consolidate_shards`: from a
              buffer of activations in memory to the dataset on disk, in float32 (it cannot write bfloat16). Left out:
              the concatenation of passes into the buffer
end_to_end    `CacheActivationsRunner.run`, whole, with its defaults except the sizes, on the texts in a file (one JSON
              string per line) and the Llama model in a folder, the model being TransformerLens' HookedTransformer

It never calls fsync, so its files may not be on the disk when the clock stops.
"""

# sae-lens lives in an environment of its own, with an older TransformerLens.
# pyright: reportMissingImports=false, reportCallIssue=false

import json
import os
import time
from pathlib import Path

import torch

CONTEXT, ROWS = 256, 32


def write(folder: str, tokens: int, d_in: int, buffer_tokens: int) -> dict[str, float]:
    """Seconds, bytes of the files, and bytes of the activations in them."""
    from sae_lens.cache_activations_runner import CacheActivationsRunner

    runner = _runner(folder, tokens, d_in, buffer_tokens, hook_name="made.up")
    buffer = (torch.randn(buffer_tokens, d_in), torch.zeros(buffer_tokens, dtype=torch.int32))
    shards = Path(folder) / ".tmp_shards"
    os.sync()
    began = time.perf_counter()
    shards.mkdir(parents=True)
    for i in range(runner.cfg.n_buffers):
        runner._create_shard(buffer).save_to_disk(f"{shards}/shard_{i:05d}", num_shards=1)
    dataset = CacheActivationsRunner._consolidate_shards(shards, Path(folder), copy_files=False)
    seconds = time.perf_counter() - began
    assert len(dataset) * CONTEXT == tokens
    return {"seconds": seconds, "bytes": _size(folder), "values": tokens * d_in * 4}


def end_to_end(folder: str, tokens: int, buffer_tokens: int, model: str, texts: str, layer: int) -> dict[str, float]:
    """Seconds from the first row to the finished dataset, and positions of the text per second. Loading is left out."""
    from datasets import Dataset

    documents = Dataset.from_list([{"text": json.loads(line)} for line in Path(texts).read_text("utf-8").splitlines()])
    hooked = _hooked(model)
    runner = _runner(
        folder, tokens, hooked.cfg.d_model, buffer_tokens, f"blocks.{layer}.hook_resid_post", hooked, documents
    )
    os.sync()
    began = time.perf_counter()
    dataset = runner.run()
    seconds, done = time.perf_counter() - began, len(dataset) * CONTEXT
    return {"seconds": seconds, "tokens": done, "tokens_per_s": done / seconds, "bytes": _size(folder)}


def _runner(folder: str, tokens: int, d_in: int, buffer_tokens: int, hook_name: str, model=None, documents=None):
    """Its runner with its own constructor, without the model and the store if `model` is None."""
    import sae_lens.cache_activations_runner as room
    from sae_lens.config import CacheActivationsRunnerConfig

    room.load_model = lambda **names: model
    if model is None:
        room._mk_activations_store = lambda *arguments, **names: None
    config = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name="",
        model_batch_size=ROWS,
        hook_name=hook_name,
        d_in=d_in,
        training_tokens=tokens,
        context_size=CONTEXT,
        new_cached_activations_path=folder,
        dtype="float32",
        device="cpu",
        streaming=False,
        buffer_size_gb=(buffer_tokens + 0.5) * d_in * 4 / 1e9,  # it rounds down
    )
    assert config.n_tokens_in_buffer == buffer_tokens and config.n_buffers * buffer_tokens == tokens
    return room.CacheActivationsRunner(config, override_dataset=documents)


def _hooked(folder: str):
    """The Llama model in `folder` as HookedTransformer, which otherwise loads only models that it knows by name."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    its = llama.config
    config = HookedTransformerConfig(
        n_layers=its.num_hidden_layers,
        d_model=its.hidden_size,
        n_ctx=its.max_position_embeddings,
        d_head=its.head_dim,
        n_heads=its.num_attention_heads,
        d_mlp=its.intermediate_size,
        d_vocab=its.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        eps=its.rms_norm_eps,
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=its.head_dim,
        rotary_adjacent_pairs=False,
        rotary_base=int(its.rope_parameters["rope_theta"]),
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    hooked = HookedTransformer(config, AutoTokenizer.from_pretrained(folder))
    hooked.load_state_dict(convert_llama_weights(llama, config), strict=False)  # buffers such as masks are missing
    ids = torch.arange(its.vocab_size).reshape(-1, 64)[:2]
    with torch.no_grad():
        assert torch.allclose(hooked(ids), llama(ids).logits, rtol=1e-3, atol=1e-3), "the converted model differs"
    return hooked


def _size(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
