"""A checkpoint comes back as it was, is a SAELens folder, and a damaged one is named."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saelab
from saelab.errors import SaelabError
from saelab.sae.checkpoint import save_sae
from saelab.sae.initial import initialise, threshold_for
from saelab.sae.model import SparseAutoencoder

GOLDEN = Path(__file__).parents[1] / "data" / "saelens_topk"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sae = SparseAutoencoder(8, 16, 3, {"hook_name": "blocks.1.hook_resid_post", "saelab": {"seed": 5}})
    initialise(sae, torch.randn(50, 8))
    save_sae(sae, tmp_path / "run" / "sae")
    return tmp_path / "run"


def test_round_trip_from_the_run_folder_and_from_the_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20, 8)
    one, two = saelab.load(saved), saelab.load(saved / "sae")
    assert torch.equal(one(x), two(x))
    monkeypatch.chdir(saved / "sae")
    assert torch.equal(saelab.load(".")(x), two(x))
    assert one.metadata["saelab"] == {"format": 1, "k": 3, "beta": 0.0, "seed": 5}
    save_sae(one, saved / "again")
    assert (saved / "again" / "sae_weights.safetensors").read_bytes() == (
        saved / "sae" / "sae_weights.safetensors"
    ).read_bytes()
    assert not any(p.suffix == ".tmp" for p in saved.rglob("*"))


def test_the_folder_is_what_saelens_reads(saved: Path) -> None:
    config = json.loads((saved / "sae" / "cfg.json").read_text())
    golden = json.loads((GOLDEN / "cfg.json").read_text())
    assert golden.keys() <= config.keys()
    assert config["architecture"] == "topk" and config["dtype"] == "float32" and config["k"] == 3
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    shapes = {name: tuple(t.shape) for name, t in load_file(saved / "sae" / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (8, 16), "b_enc": (16,), "W_dec": (16, 8), "b_dec": (8,)}


@pytest.mark.parametrize("threshold", [torch.tensor([0.3]), torch.linspace(-1, 1, 16)])
def test_a_threshold_is_saved_as_the_jumprelu_of_saelens(tmp_path: Path, threshold: torch.Tensor) -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(8, 16, 3)
    x = torch.randn(50, 8)
    initialise(sae, x)
    sae.threshold = threshold
    save_sae(sae, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    golden = Path(__file__).parents[1] / "data" / "saelens_jumprelu" / "cfg.json"
    assert config["architecture"] == "jumprelu" and "k" not in config
    assert json.loads(golden.read_text()).keys() <= config.keys()
    assert tensors["threshold"].shape == (16,) and len(tensors) == 5
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    dense = pre.relu() * (pre > tensors["threshold"])
    torch.testing.assert_close(saelab.load(tmp_path).encode(x).to_dense(), dense)
    assert saelab.load(tmp_path).k == 3


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard"])
def test_a_checkpoint_written_by_saelens_computes_what_saelens_computed(architecture: str) -> None:
    golden = GOLDEN.with_name(f"saelens_{architecture}")
    sae = saelab.load(golden)
    expected = load_file(golden / "expected.safetensors")
    torch.testing.assert_close(sae.encode(expected["x"]).to_dense(), expected["acts"])
    torch.testing.assert_close(sae(expected["x"]), expected["recon"])


def test_a_checkpoint_that_cannot_be_loaded_is_an_error_with_the_reason(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=r"no checkpoint here"):
        saelab.load(tmp_path)

    def damaged(change: dict) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / "sae", folder)
        config = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(config | change))
        return folder

    for change, reason in [
        (
            {"architecture": "matching_pursuit"},
            r"architecture 'matching_pursuit' cannot be loaded: its features depend",
        ),
        ({"architecture": "topkk"}, r"architecture is 'topkk'; known are .* Nearest: topk"),
        ({"normalize_activations": "batch_norm"}, r"normalize_activations is 'batch_norm', not none or"),
        ({"k": 0}, r"k is 0, not a whole number"),
        ({"k": 17}, r"k is 17, not between 1 and d_sae"),
        ({"metadata": 3}, r"metadata is 3, not an object"),
        ({"metadata": ["x"]}, r"metadata is \['x'\], not an object"),
        ({"metadata": {"saelab": [["k", 3]]}}, r"saelab is \[.*\], not an object"),
        ({"metadata": {"saelab": {"beta": "x"}}}, r"beta is 'x', not a number"),
        ({"d_in": None}, r"d_in or d_sae is missing"),
        ({"d_in": -1}, r"d_in is -1, not a whole number"),
        ({"d_in": math.inf}, r"d_in is inf, not a whole number"),
        ({"d_sae": 10**30}, r"d_sae is 10+, not a whole number"),
        ({"d_sae": 2**31 - 1}, r"says n_features = 2147483647, but W_enc in .* is \[8, 16\] float32"),
        ({"d_sae": 17}, r"says n_features = 17, but W_enc"),
    ]:
        with pytest.raises(SaelabError, match=reason):
            saelab.load(damaged(change))
    (damaged({}) / "sae_weights.safetensors").write_bytes(b"short")
    with pytest.raises(SaelabError, match=r"damaged"):
        saelab.load(tmp_path / "damaged")
    tensors = load_file(saved / "sae" / "sae_weights.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "b_dec"}, damaged({}) / "sae_weights.safetensors")
    with pytest.raises(SaelabError, match=r"b_dec is missing"):
        saelab.load(tmp_path / "damaged")


def test_relu_is_saved_as_the_standard_of_saelens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(8, 16, 3)
    x = torch.randn(50, 8)
    sae.threshold = torch.zeros(1)
    initialise(sae, x)
    save_sae(sae, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "standard" and "k" not in config
    assert json.loads((GOLDEN.with_name("saelens_standard") / "cfg.json").read_text()).keys() <= config.keys()
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert set(tensors) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    dense = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    loaded = saelab.load(tmp_path)
    torch.testing.assert_close(loaded.encode(x).to_dense(), dense)
    assert torch.equal(loaded(x), sae(x))


def test_trained_thresholds_are_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(8, 16, 3)
    x = torch.randn(50, 8)
    initialise(sae, x)
    sae.train_thresholds(threshold_for(sae, 3, x), 0.05)
    assert sae.log_threshold is not None
    sae.log_threshold.data += torch.linspace(-0.5, 0.5, 16)
    save_sae(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "jumprelu"
    loaded = saelab.load(tmp_path)
    assert loaded.threshold is not None and torch.equal(loaded.threshold, sae.log_threshold.detach().exp())
    assert torch.equal(loaded(x), sae(x)) and torch.equal(loaded.encode(x).values, sae.encode(x).values)
