"""A model loads with all the weights of its checkpoint, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab.errors import SaelabError
from saelab.lm.load import load_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.settings import ModelSettings
from tests.tiny import NEEDS_NUMBERS, language_model, model_folder, random_rows

UP = "model.layers.1.mlp.up_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Weights = dict[str, Tensor]


def edited(folder: Path, kind: str, edit: Callable[[Weights], object], **config: object) -> ModelSettings:
    """A copy of a tiny model in `folder`, with weights and config changed."""
    shutil.copytree(model_folder(kind), folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | config))
    return ModelSettings(str(folder))


def without(*names: str) -> Callable[[Weights], object]:
    return lambda weights: [weights.pop(name) for name in names]


def having(name: str, tensor: Tensor) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: tensor})


def nothing(weights: Weights) -> None:
    """Changes no weights."""


def renamed(weights: Weights) -> None:
    weights["model.layers.1.mlp.up.weight"] = weights.pop(UP)


WRONG = {
    "missing": ("llama", without(UP), {}, rf"lacks {UP}, which transformers would fill with random numbers"),
    "misnamed": ("llama", renamed, {}, rf"lacks {UP}.*has model\.layers\.1\.mlp\.up\.weight instead"),
    "several": ("llama", without(*(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)), HEAD), {}, "and 1 more"),
    "no head": ("llama", without(HEAD), {}, rf"lacks {HEAD}"),
    "tied, and neither": ("llama", without(HEAD, EMBED), {"tie_word_embeddings": True}, rf"lacks .*{EMBED}"),
    "other shape": (
        "llama",
        having(UP, torch.zeros(60, 32)),
        {},
        rf"shapes than its config.json says: {UP} \[60, 32\], not \[64, 32\]",
    ),
    "more layers": ("llama", nothing, {"num_hidden_layers": 4}, r"lacks model\.layers\.3\."),
    "fewer layers": ("llama", nothing, {"num_hidden_layers": 2}, r"config.json leaves out .*: model\.layers\.2\."),
    "fewer layers, old names": (
        "gpt2",
        lambda weights: [weights.update({name.removeprefix("transformer."): weights.pop(name)}) for name in [*weights]],
        {"n_layer": 2},
        r"config.json leaves out .*: h\.2\.",
    ),
    "a bias": (
        "llama",
        having("model.layers.1.self_attn.q_proj.bias", torch.ones(32)),
        {},
        r"config.json leaves out .*q_proj\.bias",
    ),
    "a norm": (
        "llama",
        having("model.layers.1.self_attn.q_norm.weight", torch.ones(8)),
        {},
        r"config.json leaves out .*q_norm\.weight",
    ),
    "a matrix of an expert": (
        NEEDS_NUMBERS,
        without("model.layers.1.block_sparse_moe.experts.1.w1.weight"),
        {},
        r"seems to lack model\.layers\.1\.block_sparse_moe\.experts\.1\.w1\.weight;",
    ),
    "an expert": (
        NEEDS_NUMBERS,
        without(*(f"model.layers.1.block_sparse_moe.experts.1.w{j}.weight" for j in (1, 2, 3))),
        {},
        r"other shapes .*: model\.layers\.1\.mlp\.experts\.down_proj \[1, 32, 64\], not \[2, 32, 64\]",
    ),
    "all experts of a layer": (
        NEEDS_NUMBERS,
        without(*(f"model.layers.1.block_sparse_moe.experts.{i}.w{j}.weight" for i in (0, 1) for j in (1, 2, 3))),
        {},
        r"lacks model\.layers\.1\.mlp\.experts\.down_proj",
    ),
    "one matrix of all experts": (
        NEEDS_NUMBERS,
        without(*(f"model.layers.1.block_sparse_moe.experts.{i}.w1.weight" for i in (0, 1))),
        {},
        r"lack model\.layers\.1\.block_sparse_moe\.experts\.[01]\.w1",
    ),
    "int8": ("llama", having(UP, torch.ones(64, 32, dtype=torch.int8)), {}, rf"quantised \(I8: {UP}\)"),
    "fp8": ("llama", having(UP, torch.ones(64, 32).to(torch.float8_e4m3fn)), {}, r"quantised \(F8_E4M3"),
    "NaN": ("llama", having(UP, torch.full((64, 32), torch.nan)), {}, rf"NaN or infinite values: {UP}; download"),
    "infinity": ("llama", having(UP, torch.full((64, 32), -torch.inf)), {}, r"NaN or infinite values"),
    **{
        f"quantised by {method}": (
            "llama",
            nothing,
            {"quantization_config": {"quant_method": method, "bits": 4}},
            rf"it is quantised \({method}\)",
        )
        for method in ("gptq", "bitsandbytes", "fp8", "awq", "mxfp4", "compressed-tensors")
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_are_not_the_models_are_named(case: str, tmp_path: Path) -> None:
    kind, edit, config, message = WRONG[case]
    settings = edited(tmp_path / "model", kind, edit, **config)
    with pytest.raises(SaelabError, match=message) as error:
        load_language_model(settings, "cpu")
    assert str(error.value).startswith(f"model: {tmp_path / 'model'} cannot be loaded: it")


def test_a_weight_too_large_for_float16_is_named_with_what_helps(tmp_path: Path) -> None:
    settings = edited(tmp_path / "model", "llama", having(UP, torch.full((64, 32), 1e5)))
    with pytest.raises(SaelabError, match=r"infinite values: .*; with model\.dtype=bf16 or fp32 they may fit"):
        load_language_model(ModelSettings(settings.name, dtype="fp16"), "cpu")
    load_language_model(ModelSettings(settings.name, dtype="bf16"), "cpu")


def same_logits(lm: LanguageModel, kind: str) -> bool:
    rows = random_rows(lm, 2)
    return torch.equal(lm.logits(rows), language_model(kind).logits(rows))


@pytest.mark.parametrize(
    ("kind", "name", "tensor"),
    [
        ("llama", "score.weight", torch.ones(2, 32)),  # the head of another task
        ("llama", "vision_tower.layers.0.mlp.up_proj.weight", torch.ones(2, 32)),
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq", torch.ones(4)),
        ("gpt2", "transformer.h.1.attn.bias", torch.ones(1, 1, 64, 64)),  # a mask
        ("gpt2", "transformer.h.1.attn.masked_bias", torch.tensor(-1e4)),
        ("gpt_neox", "gpt_neox.layers.1.attention.bias", torch.ones(1, 1, 64, 64, dtype=torch.bool)),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias", torch.tensor(-1e9)),
    ],
)
def test_weights_of_other_parts_and_what_older_versions_saved_are_left_out(
    kind: str, name: str, tensor: Tensor, tmp_path: Path
) -> None:
    lm = load_language_model(edited(tmp_path / "model", kind, having(name, tensor)), "cpu")
    assert same_logits(lm, kind)


def test_a_layer_that_predicts_further_tokens_is_left_out(tmp_path: Path) -> None:
    further = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    lm = load_language_model(edited(tmp_path / "model", "llama", nothing, **further), "cpu")
    assert lm.shape().layers == 2


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    lm = load_language_model(edited(tmp_path / "model", "llama", without(HEAD), tie_word_embeddings=True), "cpu")
    assert torch.equal(lm.unembedding, lm.model.get_input_embeddings().weight)  # type: ignore[operator]


def sharded(folder: Path) -> tuple[Path, dict]:
    """The tiny Llama in two files and an index."""
    shutil.copytree(model_folder("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(weights)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, part in zip(files, parts, strict=True):
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, part in zip(files, parts, strict=True) for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, index


def test_a_divided_model_needs_all_its_files_whole(tmp_path: Path) -> None:
    folder, index = sharded(tmp_path / "model")
    settings = ModelSettings(str(folder))
    assert same_logits(load_language_model(settings, "cpu"), "llama")
    last = folder / "model-00002-of-00002.safetensors"
    content = last.read_bytes()
    for cut in (len(content) - 1, 100, 0):
        last.write_bytes(content[:cut])
        with pytest.raises(SaelabError, match=rf"{last.name} is damaged or cut short .* download it again"):
            load_language_model(settings, "cpu")
    last.unlink()
    with pytest.raises(SaelabError, match=rf"{last.name}, a part of its weights, is missing; download it again"):
        load_language_model(settings, "cpu")
    last.write_bytes(content)
    path = folder / "model.safetensors.index.json"
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != last.name}
    path.write_text(json.dumps(index))  # the second file is there, but not in the index
    with pytest.raises(SaelabError, match="its checkpoint lacks"):
        load_language_model(settings, "cpu")
    for damaged in ("", "[]", "{}", '{"weight_map": 3}'):
        path.write_text(damaged)
        with pytest.raises(SaelabError, match=rf"{path.name} is damaged"):
            load_language_model(settings, "cpu")
    path.unlink()
    with pytest.raises(SaelabError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_language_model(settings, "cpu")
