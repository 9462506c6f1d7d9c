"""The language model inside a model that also reads images or sound."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from saelab.errors import SaelabError
from saelab.lm import architecture
from saelab.lm.load import load_language_model, model_shape
from saelab.lm.settings import ModelSettings
from saelab.runs.cache import cache
from saelab.runs.job import settings_of
from saelab.runs.plan import plan_cache, plan_training
from tests.lm.shaped import shaped_folder
from tests.tiny import random_rows, text

SITE = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3", "idefics3", "qwen2_vl", "qwen3_vl"])
def test_the_text_model_is_loaded_and_computes_what_the_whole_model_does(kind: str) -> None:
    import transformers as hf

    folder = shaped_folder(kind)
    lm = load_language_model(ModelSettings(str(folder)), "cpu")
    assert not any("visi" in name or "visual" in name for name, _ in lm.model.named_parameters())
    assert (lm.max_context, lm.shape().layers, lm.width(SITE)) == (64, 3, 32)
    whole_class = getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0])
    whole = whole_class.from_pretrained(folder).eval()
    rows = random_rows(lm, 3)
    with torch.no_grad():
        expected = whole(input_ids=rows, use_cache=False)
    torch.testing.assert_close(lm.logits(rows), expected.logits, rtol=1e-5, atol=1e-5)
    assert model_shape(ModelSettings(str(folder)), [SITE]) == lm.shape([SITE])


def test_plan_and_cache_read_the_nested_config(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text(600))
    settings = settings_of(
        {
            "model": str(shaped_folder("gemma3")),
            "corpus": {"source": str(tmp_path / "book.txt"), "held_out": 0.2},
            "site": SITE,
            "context": 32,
            "device": "cpu",
            "training": {"tokens": 4000, "batch": 200},
            "out": str(tmp_path / "run"),
            "sae": {"n_features": 64, "k": 4},
        }
    )
    plan_training(settings)
    plan_cache(settings, tmp_path / "cache", 2000)
    folder = cache(settings, tmp_path / "cache", tokens=2000)
    assert (folder / "manifest.json").is_file()
    with pytest.raises(SaelabError, match="takes at most 64 tokens, not 128"):
        plan_training(settings_of(settings, ["context=128"]))


def test_weights_that_the_text_model_lacks_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(shaped_folder("gemma3"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "language_model" in name and name.endswith("layers.1.mlp.up_proj.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SaelabError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_language_model(ModelSettings(str(folder)), "cpu")


def test_a_tied_head_follows_the_whole_models_config(tmp_path: Path) -> None:
    folder = shaped_folder("mistral3")
    facts = json.loads((folder / "config.json").read_text())
    assert facts["tie_word_embeddings"] and not facts["text_config"]["tie_word_embeddings"]
    lm = load_language_model(ModelSettings(str(folder)), "cpu")
    assert torch.equal(lm.unembedding, lm.model.get_input_embeddings().weight)  # type: ignore[operator]


@pytest.mark.parametrize(("kind", "limit"), [("bloom", None), ("mamba", None), ("gpt_neo", 64)])
def test_models_without_positions_take_rows_of_any_length(kind: str, limit: int | None) -> None:
    lm = load_language_model(ModelSettings(str(shaped_folder(kind))), "cpu")
    assert lm.max_context == limit
    if limit is None:
        assert lm.logits(random_rows(lm, 1, 80)).shape[:2] == (1, 80)


def test_a_language_model_that_cannot_be_taken_out_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "_SAME", {})
    message = r"it has a language model that transformers only loads with the rest \(qwen2_vl\)"
    with pytest.raises(SaelabError, match=message):
        load_language_model(ModelSettings(str(shaped_folder("qwen2_vl"))), "cpu")
    with pytest.raises(SaelabError, match=message):
        model_shape(ModelSettings(str(shaped_folder("qwen2_vl"))))
