"""Settings: YAML 1.2 numbers, overrides, and one clear message for each mistake."""

import time
from pathlib import Path

import pytest

from saelab.errors import SaelabError
from saelab.features.settings import FeatureSettings
from saelab.runs.config import find_config, load_config, settings_from
from saelab.runs.grid import grid

BASE = {"out": "runs/x", "site": "blocks.0.hook_resid_post"}


def test_the_shipped_configs_are_valid_and_say_what_their_yaml_says() -> None:
    for path in sorted(find_config("quickstart").parent.glob("*.yaml")):
        grid(path)
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
        ({"sae": 3}, r"sae: must be a section with some of the settings n_features, k, .*; not 3"),
        ({"sae": "topk"}, r"sae: must be a section with .*; not 'topk'"),
        ({"sae": ["k", 3]}, r"sae: must be a section with .*; not \['k', 3\]"),
        ({"sae": None}, r"sae: is empty; write its settings below it, or remove the line"),
        ({"model": 3}, r"model: must be one name, or a section with some of the settings name, .*; not 3"),
        ({"sae": {"encoder": []}}, r"sae.encoder: must be one name, or a section"),
        ({"activations": {"cache": 3}}, r"activations.cache: must be one path, or a section"),
        ({"training": {"tokens": 1.5}}, r"training.tokens: must be a whole number, such as 2000000 or 2e6, not 1.5"),
        ({"training": {"tokens": "1e6.5"}}, r"training.tokens: must be a whole number, .* not '1e6.5'"),
        ({"training": {"tokens": 10**400}}, r"training.tokens: 1000+\.\.\.0+ is too large"),
        ({"training": {"tokens": 1e300}}, r"training.tokens: 1e\+300 is too large"),
        ({"features": {"tokens": 2**63 - 1}}, r"features.tokens: 9223372036854775807 is too large"),
        ({"seed": 2**63}, r"seed: 9223372036854775808 is too large"),
        ({"sae": {"n_features": 2**31}}, r"sae.n_features: 2147483648 is not between 1 and 2,147,483,647"),
        (
            {"activations": {"stream": {"rows_per_forward": 10**9}}},
            r"activations.stream.rows_per_forward: 1,000,000,000",
        ),
        ({"cache": {"rows_per_forward": 10**9}}, r"cache.rows_per_forward: 1,000,000,000 rows do not fit"),
        ({"cache": {"lanes": 10**9}}, r"cache.lanes: 1,000,000,000 is more than 4,096"),
        ({"training": {"lr": "fast"}}, r"training.lr: must be a number, such as 2e-3, not 'fast'"),
        ({"training": {"lr": None}}, r"training.lr: is empty; give a value, or remove the setting"),
        ({"training.tokens": 5}, r"In a file, sections are nested: training: \{tokens: ...\}"),
        ({"seed": True}, r"seed: must be a whole number, not true"),
        ({"sae": {"multi_topk": 2}}, r"sae.multi_topk: must be true or false, not 2"),
        ({"out": 2026}, r'out: must be text, not 2026; in quotes it is: "2026"'),
        ({"out": "a\0b"}, r"out: 'a\\x00b' is no name"),
        ({"corpus": "é" * 200}, r"corpus.source: 'é+\.\.\.' is no name: it is too long"),
        ({"out": "a/" * 3000}, r"out: '.*' is no name: it is too long"),
        ({"out": "\ud800"}, r"out: .* is no name"),
        ({"cache": {"sites": "a"}}, r"cache.sites: must be a list, such as cache.sites=\[a,b\]"),
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
    for override in ("=3", ".k=3", "sae.=3", "sae..k=3"):
        with pytest.raises(SaelabError, match=r"an override is written section.key=value"):
            settings_from(BASE, [override])
    with pytest.raises(SaelabError, match="k: is given twice"):
        settings_from(BASE, ["sae={k: 3, k: 4}"])


def test_an_override_fills_an_empty_section(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("out: x\nsite: y\nsae:\n")
    assert load_config(path, ["sae.k=3"]).sae.k == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: y\n", "out: is given twice (lines 1 and 3); keep one of them"),
        ("sae:\n  k: 1\n  n_features: 9\n  k: 2\n", "sae.k: is given twice (lines 4 and 6)"),
        ("sae: {k: 1, k: 2}\n", "sae.k: is given twice (line 3)"),
        ("sae: {k: 1}\ntraining: {lr: 1}\nsae: {n_features: 4}\n", "sae: is given twice (lines 3 and 5)"),
        ("sae: {aux: {name: none, lift: false, 'name': aux_k}}\n", "sae.aux.name: is given twice"),
        ("sae: {<<: {k: 1, k: 2}}\n", "sae.k: is given twice"),
        ("sae: {<<: [{k: 1}, {k: 2, k: 3}]}\n", "sae.k: is given twice"),
        ("<<: {seed: 1}\n<<: {context: 9}\n", "<<: is given twice (lines 3 and 4)"),
    ],
)
def test_a_key_that_is_given_twice_is_an_error_with_its_lines(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"out: x\nsite: y\n{text}")
    with pytest.raises(SaelabError) as error:
        load_config(path)
    assert f"{path}: {message}" in str(error.value)


def test_merged_keys_give_way_to_the_keys_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("out: x\nsite: y\ntraining: &t {lr: 1, tokens: 5000}\neval: {tokens: 5}\n")
    assert load_config(path).training.lr == 1
    path.write_text("out: x\nsite: y\nsae: {<<: [{k: 3}, {k: 4, n_features: 50}], n_features: 60}\n")
    assert (load_config(path).sae.k, load_config(path).sae.n_features) == (3, 60)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("seed: 1\n---\nseed: 2\n", "line 2, column 1: expected a single document in the stream, but found another"),
        ("seed: !!python/object:os.system {}", "line 1, column 7: could not determine a constructor for the tag"),
        ("seed: !!int x", "seed: 'x' is not of the type int (line 1)"),
        ("seed: !!timestamp x", "could not determine a constructor"),
        (f"seed: {'9' * 5000}", "seed: a number of 5,000 digits is too large (line 1)"),
        ("seed: " + "[" * 3000, "too many nested lists or mappings"),
        ("[a]: 1", "has a list or a mapping as a key"),
        ("seed: \0", "cannot be read as YAML: unacceptable character"),
        ("a: [1", "line 1, column 6: expected ',' or ']'"),
    ],
)
def test_text_that_is_no_config_is_one_line_of_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(SaelabError) as error:
        load_config(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def doubled(begin: str, item: str) -> str:
    """30 lines, each of which has the line before it nine times."""
    lines = [f"x{n + 1}: &x{n + 1} {item % ', '.join([f'*x{n}'] * 9)}\n" for n in range(30)]
    return f"x0: &x0 {begin}\n" + "".join(lines)


@pytest.mark.parametrize("text", [doubled("[1, 2]", "[%s]"), doubled("{k: 1}", "{<<: [%s]}"), "x: &x [*x]\n"])
def test_aliases_of_aliases_take_no_time(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for last in ("", f"\nout: *x{30 if 'x30' in text else ''}\nsite: y\n"):
        path.write_text(text + last)
        began = time.process_time()
        with pytest.raises(SaelabError) as error:
            load_config(path)
        assert time.process_time() - began < 5 and len(str(error.value)) < 20_000


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


def test_a_run_of_an_earlier_version_is_read_without_the_settings_that_are_gone() -> None:
    earlier = BASE | {"features": {"contexts": 20, "window": 32, "tokens": 5}}
    assert settings_from(earlier).features == FeatureSettings(tokens=5)
    with pytest.raises(SaelabError, match=r"features\.window: no such setting"):
        settings_from(earlier, ["features.window=8"])
