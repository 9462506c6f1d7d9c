"""sae-dashboard's features on the autoencoder, model and text of a feature database of ours.

child.py calls it with the peer's interpreter. It imports sae-dashboard and nothing of saelab or of this folder.

dashboards    `SaeVisRunner.run` with its default layout and its default of 256 features at a time: activations,
              histograms, logits and sequences of some features in memory; writing pages or JSON is left out, as is
              loading. It passes over the whole text once for each group of features
"""

# sae-dashboard needs an environment of its own, with TransformerLens 2.
# pyright: reportMissingImports=false, reportCallIssue=false

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def dashboards(model: str, checkpoint: str, database: str, features: list[int], hook: str, bos: int) -> dict[str, Any]:
    """Seconds, and for each feature its strongest sequences: (row, position) of the peak, strongest first.

    `model` is the folder of a Llama model, `checkpoint` of an autoencoder as sae-lens saves it; the text is that of the
    feature database in the folder `database`, of which the token `bos` is left out.
    """
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as copy:
        hooked = _hooked(_readable(model, copy))
    sae = SAE.load_from_disk(checkpoint, device="cpu")
    norms = sae.W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-3), "the decoder rows are not of length 1"
    sae.fold_W_dec_norm = lambda: None  # it would change nothing, and refuses TopK
    rows = torch.from_numpy(np.load(f"{database}/tokens.npy")).long()
    config = SaeVisConfig(hook_point=hook, features=features, ignore_tokens={bos})
    began = time.perf_counter()
    found = SaeVisRunner(config).run(encoder=sae, model=hooked, tokens=rows)
    seconds = time.perf_counter() - began
    tops = {}
    for feature, data in found.feature_data_dict.items():
        top = data.sequence_data.seq_group_data[0].seq_data
        tops[str(feature)] = [[int(each.original_index), int(each.qualifying_token_index)] for each in top]
    return {"seconds": seconds, "features": len(features), "tops": tops}


def _readable(model: str, copy: str) -> str:
    """A copy of the model whose tokenizer transformers 4 can load: the class has another name there."""
    shutil.copytree(model, copy, dirs_exist_ok=True)
    path = Path(copy) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings), encoding="utf-8")
    return copy


def _hooked(folder: str) -> Any:
    """The Llama model in `folder` as HookedSAETransformer, which otherwise loads only models that it knows by name."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    theta = settings.get("rope_theta") or settings["rope_parameters"]["rope_theta"]  # transformers 5 writes the latter
    llama = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, rope_theta=theta)
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
        rotary_base=int(theta),
        original_architecture="LlamaForCausalLM",
        device="cpu",
    )
    hooked = HookedSAETransformer(config, PreTrainedTokenizerFast.from_pretrained(folder))
    hooked.load_state_dict(convert_llama_weights(llama, config), strict=False)  # buffers such as masks are missing
    ids = torch.arange(its.vocab_size).reshape(-1, 64)[:2]
    with torch.no_grad():
        assert torch.allclose(hooked(ids), llama(ids).logits, rtol=1e-3, atol=1e-3), "the converted model differs"
    return hooked
