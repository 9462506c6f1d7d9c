"""What `saelab push` makes and uploads, with a server that stands for the Hub."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import saelab
from saelab.cli import app
from saelab.errors import SaelabError
from saelab.runs.config import RunSettings
from saelab.runs.model_card import About, card
from saelab.runs.push import prepare, send, without_paths, write
from saelab.runs.save import write_settings
from saelab.sae.checkpoint import save_sae
from saelab.sae.model import SparseAutoencoder
from tests.hub_server import Hub, in_place_of_the_hub

SITE = "blocks.1.hook_resid_post"
FIGURES = {"fvu": 0.25, "l0": 4.0, "tokens": 1234, "ce_tokens": 567, "delta_ce": 0.5, "kl": None, "never_active": 3}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An evaluated run whose settings name files and folders of this machine."""
    run, model, corpus = tmp_path / "my runs" / "k4", tmp_path / "a model", tmp_path / "text.txt"
    model.mkdir()
    corpus.write_text("text")
    run.mkdir(parents=True)
    settings = RunSettings(out=str(run), site=SITE)
    settings = replace(
        settings,
        model=replace(settings.model, name=str(model)),
        corpus=replace(settings.corpus, source=str(corpus)),
    )
    write_settings(run, settings)
    torch.manual_seed(0)
    sae = SparseAutoencoder(8, 24, 4)
    sae.metadata = {
        "model_name": str(model),
        "hook_name": SITE,
        "dataset_path": str(corpus),
        "context_size": 16,
        "saelab": {"tokens": 1000, "corpus": {"text": f"files in {tmp_path}/text.txt"}},
    }
    save_sae(sae, run / "sae")
    (run / "eval.json").write_text(json.dumps({"inputs": "a", "n_features": 24, **FIGURES}))
    (run / "train.json").write_text(json.dumps({"inputs": "a", "complete": True, "tokens": 1000}))
    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub without repositories; the present folder has nothing of the same names."""
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    monkeypatch.chdir(empty)
    with in_place_of_the_hub(tmp_path / "the-hub", tmp_path / "cache", monkeypatch) as found:
        yield found


def same(found: SparseAutoencoder, run: Path) -> bool:
    right = saelab.load(run)
    equal = all(torch.equal(a, b) for a, b in zip(found.parameters(), right.parameters(), strict=True))
    return equal and found.figures == right.figures and (found.k, found.n_features) == (right.k, right.n_features)


def test_what_is_pushed_loads_as_the_run_and_names_no_place_of_this_machine(run: Path, tmp_path: Path) -> None:
    out = write(prepare(run, "ann/saes"), tmp_path / "out")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    inside = ("README.md", "cfg.json", "config.yaml", "eval.json", "sae_weights.safetensors")
    assert names == {"README.md", *(f"{SITE}/{name}" for name in inside)}
    assert same(saelab.load(out / SITE), run)
    for name in names:
        content = (out / name).read_bytes()
        assert (
            str(tmp_path).encode() not in content
            and b"my runs" not in content
            and str(Path.home()).encode() + b"/" not in content
        )
    settings = yaml.safe_load((out / SITE / "config.yaml").read_text())
    assert (settings["out"], settings["model"]["name"], settings["corpus"]["source"]) == ("k4", "a model", "text.txt")
    metadata = json.loads((out / SITE / "cfg.json").read_text())["metadata"]
    assert metadata["model_name"] == "a model" and metadata["saelab"]["corpus"] == {"text": "files in text.txt"}
    with pytest.raises(SaelabError, match=r"--out: .* exists"):
        write(prepare(run, "ann/saes"), out)


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ("/disk/ann/data/x.json", "x.json"),
        ("/disk/ann/my data/", "my data"),
        ("~/x", "x"),
        ("C:\\Users\\ann\\x.txt", "x.txt"),
        ("file:///disk/ann/x.txt", "x.txt"),
        ("at /disk/ann/x.txt, line 3", "at x.txt, line 3"),
        ("from ~/data/x.txt", "from x.txt"),
        ("at /disk/ann/my data/x.txt", "at x.txt"),
        ("hf:/disk/ann/my data/x.txt", "hf:x.txt"),
        ("at C:\\Users\\ann\\x.txt", "at x.txt"),
        ("../ann/data/x.txt", "x.txt"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("Skylion007/openwebtext", "Skylion007/openwebtext"),
        ("runs/k4", "runs/k4"),
        ({"/a/b": ["/c/d", 1, None]}, {"b": ["d", 1, None]}),
    ],
)
def test_paths_of_a_machine_become_names(value: object, right: object) -> None:
    assert without_paths(value) == right


def test_a_pushed_run_is_loaded_by_its_id(run: Path, hub: Hub) -> None:
    address = send(prepare(run, "ann/saes"))
    assert "ann/saes/commit" in address
    assert same(saelab.load(f"ann/saes/{SITE}"), run)
    assert same(saelab.load("ann/saes"), run)
    writing = [token for line, token in zip(hub.asked, hub.authorised, strict=True) if "/api/models/ann/saes/" in line]
    assert writing and set(writing) == {"Bearer hf_secret_of_the_tests"}
    stored = [path.read_bytes() for path in hub.root.rglob("*") if path.is_file()]
    assert len(stored) == 6 and not any(b"hf_secret" in content for content in stored)


def test_a_second_autoencoder_and_the_users_own_card_stay_together(run: Path, hub: Hub) -> None:
    send(prepare(run, "ann/saes"))
    (hub.root / "ann/saes/README.md").write_text("license: mit")
    send(prepare(run, "ann/saes", "layers.2"))
    assert (hub.root / "ann/saes/README.md").read_text() == "license: mit"
    assert "layers.2" in (hub.root / "ann/saes/layers.2/README.md").read_text()
    assert same(saelab.load("ann/saes/layers.2"), run)
    with pytest.raises(SaelabError, match=f"has 2 autoencoders; .* ann/saes/{SITE}, ann/saes/layers.2"):
        saelab.load("ann/saes")


def test_private_is_private_or_an_error(run: Path, hub: Hub) -> None:
    send(prepare(run, "ann/hidden"), private=True)
    assert hub.private == {"ann/hidden"}
    send(prepare(run, "ann/shown"))
    asked = len(hub.asked)
    with pytest.raises(SaelabError, match="--private: ann/shown is there and public"):
        send(prepare(run, "ann/shown", "b"), private=True)
    assert not any("commit" in line for line in hub.asked[asked:])


def test_a_hub_that_refuses_is_one_error_without_the_token(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses = True
    with pytest.raises(SaelabError, match="does not let you write there; log in with `hf auth login`") as error:
        send(prepare(run, "ann/saes"))
    assert "secret" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SaelabError, match="ann/saes: was not uploaded: ") as error:
        send(prepare(run, "ann/saes"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("repo", "path", "reason"),
    [
        ("saes", None, "write user/repo"),
        ("a/b/c", None, "no name of a repository"),
        ("ann/--", None, "no name of a repository"),
        ("ann/saes", "../up", "--path: '../up' is no folder"),
        ("ann/saes", "/up", "--path"),
        ("ann/saes", "a//b", "--path"),
        ("ann/saes", 'a"b', "--path"),
    ],
)
def test_names_that_the_hub_does_not_take(run: Path, repo: str, path: str | None, reason: str) -> None:
    with pytest.raises(SaelabError, match=reason):
        prepare(run, repo, path)


def test_only_runs_with_whole_weights_are_pushed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match="not a run folder"):
        prepare(tmp_path, "ann/saes")
    weights = run / "sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SaelabError, match="damaged"):
        prepare(run, "ann/saes")


def test_the_command_asks_before_it_uploads(run: Path, hub: Hub, tmp_path: Path) -> None:
    command = CliRunner()
    asked = command.invoke(app, ["push", str(run), "ann/saes"])
    assert isinstance(asked.exception, SaelabError) and str(asked.exception).startswith("--yes: is missing")
    assert f"{SITE}/sae_weights.safetensors" in asked.output and "public if it is made now" in asked.output
    looked = command.invoke(app, ["push", str(run), "ann/saes", "--out", str(tmp_path / "look")])
    assert looked.exit_code == 0 and "nothing was uploaded" in looked.output
    assert not hub.asked
    done = command.invoke(app, ["push", str(run), "ann/saes", "--yes"])
    assert done.exit_code == 0 and "ann/saes/commit/" in done.output and "the card names no license" in done.output
    assert "secret" not in asked.output + looked.output + done.output


def about(**change: object) -> About:
    config = {"architecture": "topk", "d_in": 8, "d_sae": 4096, "metadata": {"model_name": "m", "hook_name": SITE}}
    usual = About("ann/saes", SITE, config, "site: x\n", {"n_features": 4096, **FIGURES}, None, True, "ann/model")
    return usual._replace(**change)


def test_a_card_says_how_good_and_how_to_load() -> None:
    text = card(about())
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "library_name": "saelab",
        "tags": ["sparse-autoencoder", "interpretability", "saelens"],
        "base_model": "ann/model",
    }
    assert "| FVU | 0.2500 | 1,234 | squared error of the reconstruction" in text
    assert "| delta CE | 0.5000 | 567 | CE spliced - CE clean" in text
    assert "| KL | undefined | 567 |" in text
    assert "| never active | 3 of 4,096 | 1,234 |" in text
    assert f'saelab.load("ann/saes/{SITE}")' in text
    assert f'SAE.from_pretrained("ann/saes", "{SITE}")' in text
    assert "license" not in text and "trained with saelab" not in text and "held out" not in text
    config = dict(about().checkpoint, metadata={"saelab": {"tokens": 1000}})
    text = card(about(checkpoint=config))
    assert "trained with saelab." in text and "Measured on what was held out of the training. N is" in text


def test_a_card_of_a_run_that_lacks_things() -> None:
    text = card(about(evaluation=None, base_model=None, in_saelens=False, unfinished="it stopped after 5 tokens"))
    assert "It was not evaluated." in text and "sae_lens" not in text and "it stopped after 5 tokens" in text
    assert "SAELens has no architecture" in text
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["sparse-autoencoder", "interpretability"]
    assert "| FVU | undefined | undefined |" in card(about(evaluation={"fvu": "<b>"}))


def test_a_card_of_a_transcoder_names_both_sites() -> None:
    sites = {"model_name": "m", "hook_name": SITE, "hook_name_out": "blocks.1.hook_mlp_out"}
    config = dict(about().checkpoint, d_out=8, architecture="saelab_topk_transcoder", metadata=sites)
    text = card(about(checkpoint=config, in_saelens=False))
    assert f"A sparse transcoder of the activations of `m` at `{SITE}` to those at `blocks.1.hook_mlp_out`" in text
    assert "\nThe activation is that at `blocks.1.hook_mlp_out`. N is the number of tokens.\n" in text
    assert "is the reconstruction of those at `blocks.1.hook_mlp_out`." in text


def test_a_card_of_a_crosscoder_names_all_sites() -> None:
    sites = {"model_name": "m", "hook_name": SITE, "hook_names": [SITE, "blocks.1.hook_`b`"]}
    config = dict(about().checkpoint, site_widths=[4, 4], architecture="saelab_topk_crosscoder", metadata=sites)
    sites = [{"site": SITE, "fvu": 0.125, "delta_ce": 0.5}, {"site": "blocks.1.hook_`b`", "fvu": 0.375}]
    text = card(about(checkpoint=config, in_saelens=False, evaluation={"n_features": 4096, **FIGURES, "sites": sites}))
    assert "| FVU at `blocks.1.hook_'b'` | 0.3750 | 1,234 | FVU of this site |" in text
    assert f"| delta CE at `{SITE}` | 0.5000 | 567 | delta CE with the reconstruction in place at this" in text
    assert f"in place at `{SITE}` only. N is" in text and r"resid\_post + blocks.1.hook\_\`b\`" in text
    assert f"A sparse crosscoder of the activations of `m` at `{SITE}`, `blocks.1.hook_" in text and "_`b`" not in text
    assert "unscaled activations at the site, those of all sites side by side; `codes`" in text


def test_a_card_has_the_figures_without_sinks_if_there_are_sinks() -> None:
    without = {"n_features": 4096, **FIGURES, "fvu_without_sinks": 0.125, "delta_ce_without_sinks": 0.75}
    text = card(about(evaluation={**without, "sinks": 2}))
    assert "| FVU without sinks | 0.1250 | 1,234 |" in text and "| delta CE without sinks | 0.7500 | 567 |" in text
    assert "sinks" not in card(about(evaluation={**without, "sinks": 0}))


def test_a_card_of_an_array_and_of_an_adopted_checkpoint() -> None:
    config = dict(about().checkpoint, metadata={"model_name": "a.npy", "hook_name": "a", "saelab": {"array": {}}})
    text = card(about(checkpoint=config))
    assert "# 4,096 features of a.npy\n\nA sparse autoencoder of the rows of the array `a.npy`." in text
    assert "\nA token is a row of the array. N is" in text and "x is `[tokens, 8]`, rows of the array; `codes`" in text
    origin = {"trainer": "sparsify", "trained_on": {"model_name": "gpt2", "dataset_path": "the|pile"}}
    config["metadata"] = {"dataset_path": "here.txt", "saelab": {"tokens": 0, "adopted": origin}}
    text = card(about(checkpoint=config))
    for line in (
        "| checkpoint of | sparsify |",
        "| model and text of its training | `gpt2`, `the/pile` |",
        "| text of the evaluation | `here.txt` |",
        "## How it was evaluated",
        "It was trained elsewhere",
    ):
        assert line in text
    assert "How it was trained" not in text and "trained with saelab" not in text


def test_names_mean_nothing_in_markdown() -> None:
    name = "x` <script>\n\n# y | z ``` [a](b)"
    config = dict(about().checkpoint, metadata={"model_name": name, "hook_name": name, "dataset_path": name})
    text = card(about(checkpoint=config, settings=f"model: |\n  ```\n  {name}\n", unfinished=name))
    outside = text.split("## How it was trained")[0]
    lines = outside.splitlines()
    assert not any(line.startswith("# y") for line in lines)
    assert "<script>" not in outside.replace("`x' <script> # y / z ''' [a](b)`", "")
    assert r"x\` \<script\> \# y \| z \`\`\` \[a\]\(b\)" in outside
    assert "\n````yaml\n" in text and text.rstrip().endswith("\n````")
    for ours in ({"k": "<b>", "allocation": {"name": "topk"}}, {"allocation": "topk"}):  # of another trainer
        assert "<b>" not in card(about(checkpoint=dict(config, metadata={"saelab": ours})))
