"""Autoencoders by their ids, from a server that stands for the Hub."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import saelab
from saelab.errors import SaelabError
from saelab.runs.export import export
from saelab.runs.from_hub import HubId, _folders, parse, resolve
from tests.hub_server import Hub, in_place_of_the_hub
from tests.sae.interop.peers import REAL
from tests.sae.interop.test_releases import GEMMA, RELEASES, place


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The releases of the tests, in place of the Hub."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "the-hub"
    shutil.copytree(RELEASES, root)
    with in_place_of_the_hub(root, tmp_path / "cache", monkeypatch) as found:
        yield found


def downloads(hub: Hub) -> set[str]:
    """The files that were downloaded."""
    return {line.split("/", 5)[5] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}


@pytest.mark.parametrize(
    ("name", "path", "files"),
    [
        (GEMMA, GEMMA, {"layer_20/width_16k/average_l0_71/params.npz"}),
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", GEMMA, None),
        ("gemma-scope-2-1b-pt-res/layer_13_width_16k_l0_small", place("gemma_scope_2"), None),
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", place("gpt2"), None),
        (
            "jbloom/GPT2-Small-SAEs-Reformatted",
            place("gpt2"),
            {"blocks.8.hook_resid_pre/cfg.json", "blocks.8.hook_resid_pre/sae_weights.safetensors"},
        ),
        (
            "llama_scope_lxr_8x/l15r_8x",
            place("llama_scope"),
            {
                "Llama3_1-8B-Base-L15R-8x/hyperparams.json",
                "Llama3_1-8B-Base-L15R-8x/checkpoints/final.safetensors",
            },
        ),
        (f"{place('llama_scope')}/checkpoints/final.safetensors", place("llama_scope"), None),
        (place("qwen_scope"), place("qwen_scope"), {"layer3.sae.pt"}),
        ("google/gemma-scope-2b-pt-res@main/layer_20/", GEMMA, None),
    ],
)
def test_an_id_loads_what_is_in_its_folder_and_downloads_nothing_else(
    hub: Hub, name: str, path: str, files: set[str] | None
) -> None:
    right = saelab.load(RELEASES / path)
    sae = saelab.load(name)
    assert torch.equal(sae.W_enc, right.W_enc) and torch.equal(sae.W_dec, right.W_dec)
    assert sae.metadata == right.metadata
    if files is not None:
        assert downloads(hub) == files


def test_a_second_load_asks_the_hub_for_nothing_and_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(GEMMA)
    asked = len(hub.asked)
    assert resolve(GEMMA) == first
    assert len(hub.asked) == asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(GEMMA) == first
    assert resolve("google/gemma-scope-2b-pt-res") == first


def test_what_was_interrupted_before_the_weights_is_downloaded_again(hub: Hub) -> None:
    name = place("gpt2")
    folder = resolve(name)
    (folder / "sae_weights.safetensors").unlink()
    hub.asked.clear()
    assert resolve(name) == folder
    assert saelab.load(folder).n_features == 40


def test_a_file_of_torch_save_is_downloaded_only_if_the_id_names_it(hub: Hub) -> None:
    place = "andyrdt/saes/resid_post_layer_3/trainer_1"
    shutil.copytree(REAL / "dictionary_learning_batchtopk", hub.root / place)
    with pytest.raises(SaelabError, match=f"name one to load it with weights_only=True, such as {place}/ae.pt"):
        saelab.load("andyrdt/saes")
    assert not downloads(hub)
    right = saelab.load(REAL / "dictionary_learning_batchtopk")
    assert torch.equal(saelab.load(f"{place}/ae.pt").W_enc, right.W_enc)
    inside = "resid_post_layer_3/trainer_1"
    assert downloads(hub) == {f"{inside}/config.json", f"{inside}/ae.pt"}


def test_a_hookpoint_of_sparsify_comes_with_the_configuration_above_it(hub: Hub) -> None:
    shutil.copytree(REAL / "sparsify_topk", hub.root / "ann/coders/layers.3")
    (hub.root / "ann/coders/config.json").write_text('{"model": "m"}')
    sae = saelab.load("ann/coders/layers.3")
    assert (sae.metadata["model_name"], sae.metadata["hook_name"]) == ("m", "blocks.3.hook_resid_post")
    assert downloads(hub) == {"config.json", "layers.3/cfg.json", "layers.3/sae.safetensors"}


def test_several_autoencoders_are_listed(hub: Hub) -> None:
    reason = "google/gemma-scope-2-1b-pt: has 2 autoencoders; load one of them: google/gemma-scope-2-1b-pt/resid_post"
    with pytest.raises(SaelabError, match=reason):
        saelab.load("google/gemma-scope-2-1b-pt")
    resolve(place("gemma_scope_2"))  # one of them in the cache does not make it the only one
    with pytest.raises(SaelabError, match=reason):
        saelab.load("google/gemma-scope-2-1b-pt")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "nobody/nothing",
            "there is no such file or folder, and the Hub has no model nobody/nothing, or it is private",
        ),
        ("google/gemma-scope-2b-pt-res/layer_2", "on the Hub has no layer_2"),
        ("google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_17", "Nearest: layer_20/width_16k/average_l0_71"),
        ("google/gemma-scope-2b-pt-res@v9/layer_20", "has no revision v9"),
        ("Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_9", r"no weights but files of torch.save; name one .*/layer3.sae.pt"),
        ("nobody/--x", "it is no id of the Hub"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_what_is(hub: Hub, name: str, reason: str) -> None:
    with pytest.raises(SaelabError, match=reason) as error:
        saelab.load(name)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert not downloads(hub)


def test_a_gated_repository_says_where_to_accept(hub: Hub) -> None:
    hub.gated.add("google/gemma-scope-2b-pt-res")
    with pytest.raises(SaelabError, match=r"is gated: accept its conditions at https://huggingface.co/google/gemma"):
        saelab.load(GEMMA)


def test_offline_is_an_error_that_says_how_to_bring_a_copy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SaelabError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\).*hf download google/gemma"):
        saelab.load(GEMMA)
    assert not hub.asked


def test_no_network_is_one_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("saelab.hub.TIMEOUT", 0.5)
    with pytest.raises(SaelabError, match="the Hub cannot be reached") as error:
        saelab.load(GEMMA)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["runs", "runs/k64", "./a/b", "../a/b", "/a/b", "~/a/b", "here/b", "a/b/../../c", "a b/c"]
)
def test_what_is_a_path_is_not_asked_of_the_hub(hub: Hub, name: str) -> None:
    Path("runs").mkdir()
    Path("here").mkdir()
    assert parse(name) is None
    with pytest.raises(SaelabError):
        saelab.load(name)
    assert not hub.asked


def test_a_local_folder_has_precedence_over_an_id(hub: Hub) -> None:
    shutil.copytree(RELEASES / place("gpt2"), GEMMA)
    assert resolve(GEMMA) == Path(GEMMA)
    assert "gpt2" in saelab.load(GEMMA).metadata["model_name"]
    assert not hub.asked


def test_an_export_takes_an_id(hub: Hub, tmp_path: Path) -> None:
    export(Path(GEMMA), "saelens", out=tmp_path / "out")
    assert torch.equal(saelab.load(tmp_path / "out").W_enc, saelab.load(RELEASES / GEMMA).W_enc)


def test_parts_of_an_id() -> None:
    assert parse("user/repo") == HubId("user/repo", None, "")
    assert parse(f"{'x' * 300}/repo") is None
    assert parse("user/repo@refs%2Fpr%2F1/a:v1/b.pt") == HubId("user/repo", "refs/pr/1", "a:v1/b.pt")
    assert str(HubId("user/repo", "v1", "a/b")) == "user/repo@v1/a/b"
    name = "gpt2-small-resid-post-v5-32k/blocks.3.hook_resid_post"
    assert parse(name) == HubId("jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", None, "v5_32k_layer_3.pt")


def test_a_listing_leads_to_no_place_outside_the_repository() -> None:
    names = ["../../x/sae_weights.safetensors", "a/../../sae_weights.safetensors", "a/sae_weights.safetensors"]
    assert _folders(names, "") == {"a": ["a/sae_weights.safetensors"]}
