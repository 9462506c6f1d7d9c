"""Files written for a peer: byte for byte its own where the weights are, and the same numbers whatever the class."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saelab
from saelab.errors import SaelabError
from saelab.runs.export import CHECKPOINTS, export
from saelab.sae.interop.writing import WRITERS
from saelab.sae.model import SparseAutoencoder
from tests.sae.interop.peers import NAMES, REAL, distance, expected, saelens, weights

OWN_BYTES = ["standard", "jumprelu", "batchtopk", "topk", "transcoder", "skip_transcoder"]


@pytest.mark.parametrize("name", [f"saelens_{name}" for name in OWN_BYTES])
def test_a_file_of_saelens_is_written_again_byte_for_byte(tmp_path: Path, name: str) -> None:
    WRITERS["saelens"](saelab.load(REAL / name), tmp_path)
    weights = "sae_weights.safetensors"
    assert (tmp_path / weights).read_bytes() == (REAL / name / weights).read_bytes()
    ours, theirs = (json.loads((folder / "cfg.json").read_text()) for folder in (tmp_path, REAL / name))
    for side in (ours, theirs):
        side.pop("metadata")
    same = {key: ours[key] for key in theirs}
    assert same == theirs
    assert ours.keys() - theirs.keys() <= {"rescale_acts_by_decoder_norm"}
    assert {path.name for path in tmp_path.iterdir()} == {"cfg.json", weights}


@pytest.mark.parametrize("name", ["sparsify_topk", "sparsify_skip_transcoder"])
def test_a_file_of_sparsify_is_written_again_byte_for_byte(tmp_path: Path, name: str) -> None:
    WRITERS["sparsify"](saelab.load(REAL / name), tmp_path)
    assert (tmp_path / "sae.safetensors").read_bytes() == (REAL / name / "sae.safetensors").read_bytes()
    ours, theirs = (json.loads((folder / "cfg.json").read_text()) for folder in (tmp_path, REAL / name))
    assert list(ours) == list(theirs)
    free = ("expansion_factor", "normalize_decoder")  # num_latents overrules the one, and only training reads the other
    assert {**ours, **{key: theirs[key] for key in free}} == theirs
    assert ours["expansion_factor"] == 4 and {type(value) for value in ours.values()} == {str, int, bool}


@pytest.mark.parametrize("name", ["topk", "batchtopk", "standard", "jumprelu"])
def test_a_state_dict_of_dictionary_learning_is_written_again(tmp_path: Path, name: str) -> None:
    source = REAL / f"dictionary_learning_{name}"
    WRITERS["dictionary_learning"](saelab.load(source), tmp_path)
    ours, theirs = (torch.load(folder / "ae.pt", weights_only=True) for folder in (tmp_path, source))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if (name, key) != ("topk", "threshold"):  # TopK does not use it; -1 stands for none
            assert torch.equal(ours[key], value), key
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape)
    config, right = (json.loads((folder / "config.json").read_text())["trainer"] for folder in (tmp_path, source))
    differs = {key for key in right if config[key] != right[key]}
    assert differs <= {"k"} and (name not in ("topk", "batchtopk") or not differs)


def expressed() -> list[tuple[str, str]]:
    """The pairs of a real checkpoint and a peer that has a class for it."""
    plain = [name for name in NAMES if "transcoder" not in name]
    top_k = [name for name in plain if "_topk" in name]
    return [
        *(("saelens", name) for name in NAMES if name != "sparsify_skip_transcoder"),
        *(("sparsify", name) for name in [*top_k, "sparsify_skip_transcoder"]),
        *(("dictionary_learning", name) for name in plain),
    ]


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_checkpoint_in_every_format_that_has_its_class(tmp_path: Path, to: str, name: str) -> None:
    sae, right = saelab.load(REAL / name), expected(name)
    if (to, name) not in expressed():
        with pytest.raises(SaelabError, match=r"has no .*; it has"):
            WRITERS[to](sae, tmp_path)
        assert list(tmp_path.iterdir()) == []
        return
    WRITERS[to](sae, tmp_path)
    again = saelab.load(tmp_path)
    assert distance(again.encode(right["x"]).to_dense(), right["acts"]) < 1e-5
    assert distance(again(right["x"]), right["recon"]) < 1e-5
    assert set(again.metadata) >= {"hook_name", "model_name"} & set(sae.metadata) or to == "sparsify"


def test_what_a_peer_cannot_express_says_why(tmp_path: Path) -> None:
    normalised = saelab.load(
        saelens(tmp_path / "a", weights(), architecture="topk", k=3, normalize_activations="layer_norm")
    )
    for to, reason in [
        ("sparsify", "sparsify does not normalise its input, and this autoencoder does (layer_norm)"),
        (
            "dictionary_learning",
            "dictionary_learning does not normalise its input, and this autoencoder does (layer_norm)",
        ),
    ]:
        with pytest.raises(SaelabError) as caught:
            WRITERS[to](normalised, tmp_path / "b")
        assert str(caught.value) == reason
    narrow = SparseAutoencoder(12, 40, 3, d_out=7)
    with pytest.raises(SaelabError, match=r"sparsify's transcoders have one width; this one has d_in 12 and d_out 7"):
        WRITERS["sparsify"](narrow, tmp_path / "b")
    with pytest.raises(SaelabError, match=r"SAELens has no TopK transcoder; it has ReLU and JumpReLU"):
        WRITERS["saelens"](narrow, tmp_path / "b")
    narrow.threshold = torch.tensor([0.5])
    with pytest.raises(SaelabError, match=r"sparsify has no JumpReLU transcoder; it has TopK"):
        WRITERS["sparsify"](narrow, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_command_exports_a_run_or_any_checkpoint(tmp_path: Path) -> None:
    assert CHECKPOINTS.keys() == WRITERS.keys()
    run = tmp_path / "run"
    shutil.copytree(REAL / "saelens_topk", run / "sae")
    path = export(run, "sparsify")
    assert path == run / "exports" / "sparsify"
    found = load_file(path / "sae.safetensors")
    with pytest.raises(SaelabError, match="exists; choose another, or give --force to replace it"):
        export(run, "sparsify")
    assert export(run, "sparsify", force=True) == path
    assert torch.equal(load_file(path / "sae.safetensors")["W_dec"], found["W_dec"])
    with pytest.raises(SaelabError, match=r"--features: a checkpoint of saelens has all features; leave it out"):
        export(run, "saelens", "1-3")
    with pytest.raises(SaelabError, match=r"exists and is not a folder of such an export"):
        export(run, "saelens", out=path, force=True)
    with pytest.raises(SaelabError, match=r"--out: is missing; .* is no run"):
        export(REAL / "saelens_topk", "sparsify")
    with pytest.raises(SaelabError, match=r"--out: .* belongs to the run itself"):
        export(run, "saelens", out=run / "sae", force=True)
    transcoder = REAL / "sparsify_skip_transcoder"
    with pytest.raises(SaelabError, match=r"er: SAELens has no TopK transcoder with a skip connection; it has"):
        export(transcoder, "saelens", out=tmp_path / "no")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob("*.tmp"))
    x = expected("sparsify_topk")["x"]
    again = saelab.load(export(REAL / "sparsify_topk", "dictionary_learning", out=tmp_path / "dl"))
    assert torch.equal(again(x), saelab.load(REAL / "sparsify_topk")(x))
