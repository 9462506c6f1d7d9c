"""Autoencoders in the layouts of the published releases compute what SAELens' loaders compute, and more is refused."""

import io
import json
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import saelab
from saelab.errors import SaelabError
from saelab.sae.checkpoint import save_sae
from saelab.sae.model import SparseAutoencoder
from tests.sae.interop.peers import distance, inputs, numbers, top_k, weights

RELEASES = Path(__file__).parents[2] / "data" / "releases"
"""Written by scripts/release_layouts.py."""
GEMMA = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
NAMES = sorted(path.stem for path in RELEASES.glob("*.safetensors"))


def place(name: str) -> str:
    """Repository and path."""
    with safe_open(RELEASES / f"{name}.safetensors", framework="pt") as file:
        return file.metadata()["path"]


@pytest.mark.parametrize("name", NAMES)
def test_a_release_computes_what_saelens_computes_of_it(name: str, tmp_path: Path) -> None:
    right = load_file(RELEASES / f"{name}.safetensors")
    sae, x, acts = saelab.load(RELEASES / place(name)), right["x"], right["acts"]
    if name == "llama_scope":  # SAELens keeps activations of scaled tokens; Llama Scope itself those of tokens
        acts = acts * 2.5 / 12**0.5
    assert (acts > 0).any(1).all() and not (acts > 0).all()
    assert distance(sae.encode(x).to_dense(), acts) < 1e-6
    assert distance(sae(x), right["recon"]) < 1e-6
    assert sae.transcodes == name.endswith("_transcoder")
    save_sae(sae, tmp_path)
    assert torch.equal(saelab.load(tmp_path)(x), sae(x))


@pytest.mark.parametrize(
    ("name", "model", "site"),
    [
        ("gemma_scope", "google/gemma-2-2b", "blocks.20.hook_resid_post"),
        ("gemma_scope_2", "google/gemma-3-1b-pt", "blocks.13.hook_resid_post"),
        ("gemma_scope_2_transcoder", "google/gemma-3-1b-pt", "blocks.5.hook_mlp_in"),
        ("gemma_scope_transcoder", "google/gemma-2-2b", "blocks.3.ln2.hook_normalized"),
        ("goodfire", "meta-llama/Llama-3.1-8B-Instruct", "blocks.19.hook_resid_post"),
        ("gpt2", "gpt2-small", "blocks.8.hook_resid_pre"),
        ("llama_scope", "meta-llama/Llama-3.1-8B", "blocks.15.hook_resid_post"),
        ("qwen_scope", "Qwen/Qwen3-1.7B-Base", "blocks.3.hook_resid_post"),
    ],
)
def test_the_model_and_the_site_of_a_release(name: str, model: str, site: str) -> None:
    sae = saelab.load(RELEASES / place(name))
    assert (sae.metadata["model_name"], sae.metadata["hook_name"]) == (model, site)
    assert ("hook_name_out" in sae.metadata) == sae.transcodes


def test_a_folder_far_above_does_not_make_a_transcoder(tmp_path: Path) -> None:
    copied = tmp_path / "my transcoders" / GEMMA
    shutil.copytree(RELEASES / GEMMA, copied)
    sae = saelab.load(copied)
    assert not sae.transcodes and sae.metadata["hook_name"] == "blocks.20.hook_resid_post"


def llama_scope(folder: Path, **config: object) -> tuple[Path, torch.Tensor]:
    """Llama Scope with decoder rows of different lengths, and x."""
    w = weights()
    tensors = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    tensors |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    (folder / "checkpoints").mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "checkpoints" / "final.safetensors")
    usual = {
        "d_model": 12,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.3,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 1.7, "out": 1.7},
        "hook_point_in": "blocks.1.hook_resid_post",
        "hook_point_out": "blocks.1.hook_resid_post",
    }
    (folder / "hyperparams.json").write_text(json.dumps(usual | config))
    return folder, inputs()


def dense(sae: SparseAutoencoder, x: torch.Tensor, act_fn: str, c_in: float, c_out: float, included: bool) -> None:
    """Check against Llama Scope as it trains: on scaled tokens, with the activations of decoder norms."""
    w = weights()
    pre = c_in * x @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=1) if included else torch.ones(40)
    size = pre * norms / c_out if included else pre / c_in  # the activation in units of the output
    kept = top_k(size, 6) > 0 if act_fn == "topk" else size > (0.3 if act_fn == "jumprelu" else 0)
    recon = ((pre * kept) @ w["W_dec"] + w["b_dec"]) / c_out
    assert kept.any(1).all() and not kept.all()
    assert distance(sae.encode(x).to_dense(), size * kept) < 1e-5
    assert distance(sae(x), recon) < 1e-5


@pytest.mark.parametrize("included", [True, False])
@pytest.mark.parametrize("out", [1.7, 0.9])
@pytest.mark.parametrize("act_fn", ["jumprelu", "topk", "relu"])
def test_llama_scope_equals_its_training_form(tmp_path: Path, act_fn: str, out: float, included: bool) -> None:
    """An average norm of the output that differs is that of a transcoder."""
    folder, x = llama_scope(
        tmp_path / "a",
        act_fn=act_fn,
        top_k=6,
        sparsity_include_decoder_norm=included,
        dataset_average_activation_norm={"in": 1.7, "out": out},
        hook_point_out="blocks.1.hook_resid_post" if out == 1.7 else "blocks.1.hook_mlp_out",
    )
    sae = saelab.load(folder)
    assert sae.transcodes == (out != 1.7)
    dense(sae, x, act_fn, 12**0.5 / 1.7, 12**0.5 / out, included)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"norm_activation": "token-wise"}, "norm_activation is 'token-wise', not dataset-wise"),
        ({"dataset_average_activation_norm": {"in": 0}}, "in is 0, not a number, above 0"),
        ({"dataset_average_activation_norm": {}}, "in is None, not a number"),
        ({"jump_relu_threshold": "x"}, "jump_relu_threshold is 'x', not a number"),
        ({"d_model": None}, "d_model is None, not the width of x"),
        ({"d_model": 13}, "says d_in = 13, but encoder.weight"),
        ({"act_fn": "topk", "top_k": 41}, "top_k is 41, not between 1 and 40"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', not jumprelu"),
        ({"use_glu_encoder": True}, "use_glu_encoder is true"),
        ({"apply_decoder_bias_to_pre_encoder": True, "hook_point_out": "b"}, "is a transcoder with"),
    ],
)
def test_llama_scope_that_saelab_does_not_compute(tmp_path: Path, config: dict, reason: str) -> None:
    folder, _ = llama_scope(tmp_path / "a", **config)
    with pytest.raises(SaelabError, match=reason):
        saelab.load(folder)


def test_llama_scope_that_subtracts_b_dec(tmp_path: Path) -> None:
    folder, x = llama_scope(tmp_path / "a", apply_decoder_bias_to_pre_encoder=True, act_fn="relu")
    w, c = weights(), 12**0.5 / 1.7
    pre = ((c * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    assert distance(saelab.load(folder)(x), (pre @ w["W_dec"] + w["b_dec"]) / c) < 1e-5


def archive(path: Path, arrays: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in arrays.items():
            file.writestr(f"{name}.npy", content)
    return path


def array(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


def header(shape: str, kind: str = "<f4") -> bytes:
    """An array of 16 bytes that claims another shape."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)


def test_an_npz_that_claims_more_than_it_holds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "params.npz", {"W_enc": header("(1000000, 1000000)"), "W_dec": header("(2, 2)")})
    with pytest.raises(SaelabError, match=r"W_enc is \[1000000, 1000000\], more than the file holds"):
        saelab.load(tmp_path)
    zeros = array(np.zeros((2000, 2000), np.float32))
    archive(path, {"W_enc": zeros, "W_dec": zeros}, zipfile.ZIP_DEFLATED)
    with pytest.raises(SaelabError, match=r"its content would be 32,000,256 bytes, more than the file holds"):
        saelab.load(tmp_path)
    archive(path, {"W_enc": header("(-2, -2)"), "W_dec": header("(2, 2)")})
    with pytest.raises(SaelabError, match=r"W_enc is \[-2, -2\], more than the file holds"):
        saelab.load(tmp_path)


def test_an_npz_with_a_compressed_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    long = b"\x93NUMPY\x02\x00" + (10**7).to_bytes(4, "little") + b" " * 10**7
    archive(tmp_path / "params.npz", {"W_enc": long}, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(SaelabError, match=r"its content would be 10,000,012 bytes, more than the file holds"):
        saelab.load(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_an_npz_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "run").touch, ())

    objects = array(np.array([[Runs()] * 4] * 3, dtype=object))
    w = {name: array(np.zeros(shape, np.float32)) for name, shape in {"W_dec": (4, 3), "b_enc": 4, "b_dec": 3}.items()}
    archive(tmp_path / "params.npz", {**w, "W_enc": objects, "threshold": w["b_enc"]})
    with pytest.raises(SaelabError, match=r"W_enc is \[3, 4\] None, not \[3, 4\] float"):
        saelab.load(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"not a zip file"])
def test_a_damaged_npz_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "params.npz").write_bytes(content)
    with pytest.raises(SaelabError, match=r"params.npz: (the file is damaged|no autoencoder)"):
        saelab.load(tmp_path)


def test_an_npz_cut_off_or_with_other_content_is_named(tmp_path: Path) -> None:
    whole = (RELEASES / GEMMA / "params.npz").read_bytes()
    for content in (whole[:-300], whole[:2000] + bytes(500) + whole[2500:]):
        (tmp_path / "params.npz").write_bytes(content)
        with pytest.raises(SaelabError, match="damaged"):
            saelab.load(tmp_path)


def test_gemma_scope_with_arrays_of_other_shapes(tmp_path: Path) -> None:
    arrays = dict(np.load(RELEASES / GEMMA / "params.npz"))
    np.savez(tmp_path / "params.npz", **arrays | {"threshold": np.zeros(39, np.float32)})
    with pytest.raises(SaelabError, match=r"threshold is \[39\] float32, not \[40\] float"):
        saelab.load(tmp_path)
    del arrays["b_enc"]
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(SaelabError, match="b_enc is missing; found"):
        saelab.load(tmp_path)
    w = weights()
    tensors = {"w_enc": w["W_enc"], "w_dec": numbers(40, 3, 12, seed=2), "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    (tmp_path / "params.npz").unlink()
    save_file(tensors | {"threshold": torch.ones(40)}, tmp_path / "params.safetensors")
    with pytest.raises(SaelabError, match=r"w_dec is \[40, 3, 12\] float32, not a matrix"):
        saelab.load(tmp_path)


def test_qwen_scope_needs_the_name_of_its_repository(tmp_path: Path) -> None:
    shutil.copy(RELEASES / place("qwen_scope"), tmp_path / "layer3.sae.pt")
    with pytest.raises(SaelabError, match="no folder above it says k; give it the name"):
        saelab.load(tmp_path)
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W2K-L0_9"
    folder.mkdir()
    shutil.copy(RELEASES / place("qwen_scope"), folder)
    with pytest.raises(SaelabError, match="says n_features = 2048, but W_enc"):
        saelab.load(folder)
