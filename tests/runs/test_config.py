"""Settings: YAML 1.2 numbers, overrides, and one clear message for each mistake."""

from pathlib import Path

import pytest

from saelab.errors import SaelabError
from saelab.runs.config import find_config, load_config, settings_from

BASE = {"out": "runs/x", "site": "blocks.0.hook_resid_post"}


def test_the_shipped_configs_are_valid_and_say_what_their_yaml_says() -> None:
    for path in sorted(find_config("quickstart").parent.glob("*.yaml")):
        load_config(path)
    quickstart = load_config(find_config("quickstart"))
    assert (quickstart.sae.n_features, quickstart.sae.k, quickstart.site) == (4096, 32, "blocks.2.hook_resid_post")
    assert quickstart.training.tokens == 1_000_000 and isinstance(quickstart.training.tokens, int)
    assert quickstart.model.name == quickstart.corpus.source == "demo"


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2e6", 2e6), ("1.5E+3", 1500.0), (".5", 0.5), ("3", 3.0), ("010", 10.0)]
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"out: x\nsite: y\ntraining: {{lr: {text}}}\n")
    assert load_config(path).training.lr == value
    assert settings_from(BASE, [f"training.lr={text}"]).training.lr == value


def test_yes_and_on_are_words_and_names_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("out: on\nsite: yes\nmodel: no\n")
    settings = load_config(path)
    assert (settings.out, settings.site, settings.model.name) == ("on", "yes", "no")


def test_dates_and_sexagesimals_stay_text_and_whole_numbers_are_whole() -> None:
    settings = settings_from(BASE, ["out=2026-01-02", "site=1:30", "seed=7"])
    assert (settings.out, settings.site, settings.seed) == ("2026-01-02", "1:30", 7)


def test_overrides_reach_sections_and_their_short_forms(tmp_path: Path) -> None:
    settings = settings_from(
        BASE | {"model": "gpt2"}, ["model.dtype=bfloat16", "corpus=book.txt", "sae.k=8", "training.tokens=2e6"]
    )
    assert (settings.model.name, settings.model.dtype) == ("gpt2", "bfloat16")
    assert (settings.corpus.source, settings.sae.k, settings.training.tokens) == ("book.txt", 8, 2_000_000)
    path = tmp_path / "b.yaml"
    path.write_text(settings.to_yaml())
    assert load_config(path) == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sea": {}}, r"sea: no such setting. Nearest: sae"),
        ({"sae": {"n_feature": 5}}, r"sae.n_feature: no such setting. Nearest: n_features"),
        ({"sae": {"k": 0}}, r"sae.k: 0 is not between 1 and n_features"),
        ({"sae": {"k": 9, "n_features": 8}}, r"sae.k: 9 is not between 1 and n_features \(8\)"),
        ({"sae": 3}, r"sae: must be a section of settings, not 3"),
        ({"training": {"tokens": 1.5}}, r"training.tokens: .*integer"),
        ({"training": {"lr": "fast"}}, r"training.lr: .*'fast'"),
        ({"context": 1}, r"context: 1 leaves no room"),
        ({"model": {"dtype": "int8"}}, r"model.dtype: 'int8'"),
        ({"site": None}, r"site"),
    ],
)
def test_a_bad_setting_is_named(change: dict, message: str) -> None:
    with pytest.raises(SaelabError, match=message):
        settings_from(BASE | change)


def test_every_bad_setting_is_named_at_once() -> None:
    with pytest.raises(SaelabError, match=r"sae.k: 0.*; training.lr: -1"):
        settings_from(BASE | {"sae": {"k": 0}, "training": {"lr": -1}})


def test_missing_settings_and_bad_overrides() -> None:
    with pytest.raises(SaelabError, match="site: is required"):
        settings_from({"out": "x"})
    with pytest.raises(SaelabError, match=r"'sae.k': an override is written section.key=value"):
        settings_from(BASE, ["sae.k"])
    with pytest.raises(SaelabError, match="out is a single value"):
        settings_from(BASE, ["out.k=3"])
    with pytest.raises(SaelabError, match="cannot be read as YAML"):
        settings_from(BASE, ["sae.k=[1"])


def test_files_that_are_not_configs(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=r"no such file, and no shipped config .*Nearest: quickstart"):
        find_config("quickstrat")
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SaelabError, match="not a text file"):
        load_config(binary)
    binary.write_text("- a\n- b\n")
    with pytest.raises(SaelabError, match="a config is a mapping"):
        load_config(binary)
    binary.write_text("a: [1\n")
    with pytest.raises(SaelabError, match="cannot be read as YAML"):
        load_config(binary)
