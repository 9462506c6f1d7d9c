"""What is wrong with a model folder is one message that says what to do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saelab.errors import SaelabError
from saelab.lm.load import load_language_model, model_shape
from saelab.lm.settings import ModelSettings
from tests.lm.shaped import shaped_folder
from tests.tiny import model_folder

Edit = Callable[[Path], object]


def config(**changes: object) -> Edit:
    """Changes the fields of config.json; None removes one."""

    def edit(folder: Path) -> None:
        facts = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))

    return edit


def content(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text)


def without(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names]


def renamed(old: str, new: str) -> Edit:
    return lambda folder: (folder / old).rename(folder / new)


def adapter(folder: Path) -> None:
    without("config.json", "model.safetensors")(folder)
    content("adapter_config.json", '{"base_model_name_or_path": "gpt2", "peft_type": "LORA"}')(folder)


WEIGHTS, CONFIG = "model.safetensors", "config.json"
BAD: dict[str, tuple[Edit, str]] = {
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "is empty: no config.json"),
    "no config": (without(CONFIG), "has no config.json, so it is not a Hugging Face model folder"),
    "config is no JSON": (content(CONFIG, "{model_type: llama}"), "its config.json is not JSON"),
    "config is empty": (content(CONFIG, ""), "its config.json is not JSON"),
    "config is a list": (content(CONFIG, "[]"), "its config.json has no model_type"),
    "config is binary": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"), "its config.json is not JSON"),
    "no model_type": (config(model_type=None), "its config.json has no model_type"),
    "unknown model_type": (config(model_type="lama"), "does not know its model_type 'lama'.* Nearest: llama"),
    "own code": (
        config(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
        "comes with code of its own .*, and saelab runs no code from model folders",
    ),
    "impossible config": (config(num_attention_heads=5), "cannot be loaded: "),
    "config of a wrong type": (config(hidden_size="wide"), "cannot be loaded: .*hidden_size"),
    "no weights": (without(WEIGHTS), r"has no weights \(model\.safetensors\)"),
    "pickled weights": (
        renamed(WEIGHTS, "pytorch_model.bin"),
        r"no safetensors weights, .* not unpickle .*save_pretra",
    ),
    "gguf": (
        lambda folder: [without(CONFIG)(folder), renamed(WEIGHTS, "model-Q4.gguf")(folder)],
        "has GGUF files, which saelab does not read",
    ),
    "other weights": (renamed(WEIGHTS, "consolidated.safetensors"), "has safetensors files, but neither model.safet"),
    "adapter": (adapter, r"is an adapter \(LoRA\).*merge_and_unload"),
    "adapter beside a model": (content("adapter_config.json", "{}"), r"is an adapter \(LoRA\), or has one beside"),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        r"has no tokenizer \(tokenizer\.json\); copy the tokenizer's files",
    ),
    "damaged tokenizer": (content("tokenizer.json", "{}"), "its tokenizer cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_one_message(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit, message = BAD[case]
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    edit(folder)
    capfd.readouterr()  # making the model shows progress
    with pytest.raises(SaelabError, match=message) as error:
        load_language_model(ModelSettings(str(folder)), "cpu")
    said = str(error.value)
    assert said.startswith(f"model: {folder} ") and said.count(str(folder)) == 1 and "\n" not in said
    assert len(said) < 450
    assert capfd.readouterr().err == ""
    if "weights" not in case:
        with pytest.raises(SaelabError, match=message):
            model_shape(ModelSettings(str(folder)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bert", r"it is an encoder \(bert\), in which a token sees those that follow"),
        ("gemma3 encoder", r"it is an encoder \(gemma3_text\)"),
        ("t5", r"it is an encoder-decoder \(t5\), and saelab reads models that only predict the next token"),
        ("vit", r"it is not a language model \(vit\)"),
    ],
)
def test_models_of_another_kind_are_named(kind: str, message: str) -> None:
    with pytest.raises(SaelabError, match=message):
        load_language_model(ModelSettings(str(shaped_folder(kind))), "cpu")


def test_names_that_are_no_folder(tmp_path: Path) -> None:
    folder = model_folder("llama")

    def message(name: str) -> str:
        with pytest.raises(SaelabError) as error:
            load_language_model(ModelSettings(name), "cpu")
        return str(error.value)

    assert "is a file; name the Hugging Face folder" in message(str(folder / WEIGHTS))
    assert f"there is no folder {folder}s. Nearest: llama" in message(f"{folder}s")
    assert "there is no user no_such_user_here" in message("~no_such_user_here/model")
    assert "cannot be read" in message(f"/{'x' * 300}")
    assert "'not a model!' is neither a folder nor a Hub id" in message("not a model!")
    assert "HF_HUB_OFFLINE is set" in message("someone/model")
    assert "Nearest: demo" in message("demoo")


def test_a_typo_in_a_hub_id_names_the_nearest_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models--someone--small-llama").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SaelabError, match=r"not in the local cache.* Nearest: someone/small-llama\."):
        load_language_model(ModelSettings("someone/smal-llama"), "cpu")


def test_a_folder_below_the_working_folder_is_not_taken_for_an_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens knows gpt2-small as another name of the Hub's gpt2."""
    shutil.copytree(model_folder("gpt2"), tmp_path / "gpt2-small")
    monkeypatch.chdir(tmp_path)
    lm = load_language_model(ModelSettings("gpt2-small"), "cpu")
    assert lm.name == "gpt2-small" and "blocks.1.hook_resid_post" in lm.sites


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    folder.chmod(0)
    try:
        with pytest.raises(SaelabError, match="cannot be read"):
            load_language_model(ModelSettings(str(folder)), "cpu")
    finally:
        folder.chmod(0o755)


def test_a_native_model_that_brings_code_is_loaded_without_running_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    config(auto_map={"AutoModelForCausalLM": "modeling_mine.Mine", "AutoConfig": "modeling_mine.Config"})(folder)
    (folder / "modeling_mine.py").write_text("raise SystemExit('ran')\n")
    assert load_language_model(ModelSettings(str(folder)), "cpu").max_context == 64
