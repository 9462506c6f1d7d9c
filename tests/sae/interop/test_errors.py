"""Files that are damaged, lie or attack: an error that says what was found, and nothing allocated, run or followed."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saelab
from saelab.errors import SaelabError
from saelab.sae.checkpoint import save_sae
from saelab.sae.model import SparseAutoencoder
from tests.sae.interop.peers import REAL, saelens, weights

Tensors = dict[str, Tensor]


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No autoencoder is made."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("memory was allocated before the file was checked")

    monkeypatch.setattr("saelab.sae.interop.weights.SparseAutoencoder", refuse)


def changed(w: Tensors, **change: Tensor | None) -> Tensors:
    return {name: value for name, value in (w | change).items() if value is not None}


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        ({"W_dec": torch.zeros(40, 13)}, {}, r"W_dec is \[40, 13\] float32, not \[40, 12\] float"),
        ({"W_dec": torch.zeros(480)}, {}, r"W_dec is \[480\] float32, not a matrix"),
        ({"W_enc": torch.zeros(0, 40)}, {}, r"W_enc is \[0, 40\] float32, not a matrix"),
        ({"W_enc": torch.zeros(12, 40, dtype=torch.int64)}, {}, r"W_enc is \[12, 40\] int64, not \[12, 40\] float"),
        ({"b_enc": torch.zeros(41)}, {}, r"b_enc is \[41\] float32, not \[40\] float"),
        ({"b_dec": torch.zeros(1)}, {}, r"b_dec is \[1\] float32, not \[12\] float"),
        ({"b_dec": None}, {}, r"b_dec is missing; found W_dec \[40, 12\] float32, W_enc"),
        ({"W_other": torch.zeros(3)}, {}, r"tensors that saelab does not know what to do with: W_other"),
        ({}, {"d_in": 13}, r"cfg.json: says d_in = 13, but W_enc in sae_weights.safetensors is \[12, 40\] float32"),
        ({}, {"d_sae": 2**31 - 1}, r"says n_features = 2147483647, but W_enc"),
        ({}, {"d_sae": 10**400}, r"d_sae is 1000+\.\.\., not a whole number"),
        ({}, {"d_sae": True}, r"d_sae is True, not a whole number"),
        ({}, {"d_in": "12"}, r"d_in is '12', not a whole number"),
        ({}, {"architecture": "jumprelu"}, r"threshold is missing; found"),
        ({}, {"architecture": "skip_transcoder"}, r"W_skip is missing; found"),
        ({}, {"architecture": "gated"}, r"b_gate is missing; found"),
        ({}, {"architecture": "abstopk", "k": 3}, r"architecture 'abstopk' cannot be loaded: its activations can be"),
        ({}, {"architecture": ["topk"]}, r"architecture is \['topk'\], not text"),
        ({}, {"apply_b_dec_to_input": 1}, None),
        ({}, {"normalize_activations": "pca"}, r"normalize_activations is 'pca', not none or expected_average_only_in"),
        ({}, {"reshape_activations": "other"}, r"reshape_activations is 'other'"),
        ({}, {"metadata": {}, "activation_fn": "tanh-relu"}, r"activation_fn is 'tanh-relu'; saelab computes relu and"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_before_memory_is_allocated(
    tmp_path: Path, change: dict[str, Any], config: dict[str, Any], reason: str | None
) -> None:
    folder = saelens(tmp_path, weights())
    save_file(changed(weights(), **change), folder / "sae_weights.safetensors")
    usual = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(usual | config))
    if reason is None:  # the flag is read after the weights
        with pytest.raises(AssertionError, match="memory"):
            saelab.load(folder)
        return
    with pytest.raises(SaelabError, match=reason):
        saelab.load(folder)


def test_a_header_that_promises_more_than_the_file_has(tmp_path: Path) -> None:
    folder = saelens(tmp_path, weights())
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * 10**12]}
        for name, shape in (("W_enc", [10**6, 10**6]), ("W_dec", [10**6, 10**6]), ("b_dec", [10**6]))
    }
    text = json.dumps(header).encode()
    (folder / "sae_weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    with pytest.raises(SaelabError, match=r"sae_weights.safetensors: the file is damaged \(.*\); use another copy"):
        saelab.load(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"{", b"[]", b"3", b"[" * 100_000, b'"\xe9"'])
def test_a_configuration_that_is_no_object(tmp_path: Path, content: bytes) -> None:
    folder = saelens(tmp_path, weights())
    (folder / "cfg.json").write_bytes(content)
    with pytest.raises(SaelabError, match=r"cfg.json: (cannot be read as JSON|is not a JSON object)"):
        saelab.load(folder)


def test_a_missing_configuration(tmp_path: Path) -> None:
    folder = saelens(tmp_path, weights())
    (folder / "cfg.json").unlink()
    with pytest.raises(SaelabError, match=r"cfg.json: is missing"):
        saelab.load(folder)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    w = weights()
    w["W_enc"][3, 4] = torch.nan
    with pytest.raises(SaelabError, match=r"1 of 480 values of W_enc are NaN or infinite"):
        saelab.load(saelens(tmp_path / "a", w))
    bound = torch.zeros(40)
    bound[2] = torch.nan
    with pytest.raises(SaelabError, match=r"1 of 40 values of threshold are NaN"):
        saelab.load(saelens(tmp_path / "b", weights() | {"threshold": bound}, architecture="jumprelu"))
    gate = {name: torch.zeros(40) for name in ("b_gate", "b_mag")} | {"r_mag": torch.full((40,), 1e4)}
    w = changed(weights(), b_enc=None)
    with pytest.raises(SaelabError, match=r"values of W_enc are NaN or infinite"):
        saelab.load(saelens(tmp_path / "c", w | gate, architecture="gated"))


class _Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    state = {"encoder.weight": torch.zeros(4, 2), "bias": _Attack(trace)}
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(SaelabError, match=r"ae.pt: cannot be read by torch.load with weights_only=True"):
        saelab.load(tmp_path)
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(state))
    with pytest.raises(SaelabError, match=r"cannot be read by torch.load with weights_only=True"):
        saelab.load(tmp_path)
    assert not trace.exists()


def _state() -> dict[str, Any]:
    return torch.load(REAL / "dictionary_learning_topk" / "ae.pt", weights_only=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"encoder.weight": torch.zeros(1).expand(10**6, 10**6)}, r"encoder.weight is \[1000000, 1000000\], more than"),
        ({"encoder.weight": torch.empty(64, 16, device="meta")}, r"encoder.weight is \[64, 16\], more than the file"),
        ({"encoder.weight": torch.zeros(64, 16).to_sparse()}, r"encoder.weight is \[64, 16\], more than the file"),
        ({"k": torch.tensor(9, dtype=torch.int32)}, r"config.json: says k = 8, but ae.pt has k = 9"),
        ({"k": torch.zeros(3)}, r"k is \[3\] float32, not one whole number"),
        ({"threshold": torch.zeros(3)}, None),
        ({"decoder.weight": torch.zeros(17, 64)}, r"decoder.weight is \[17, 64\] float32, not \[16, 64\]"),
        ({"b_dec": None}, r"b_dec is missing; found"),
        ({"more": torch.zeros(2)}, r"does not know what to do with: more"),
    ],
)
def test_a_state_dict_that_contradicts_itself(tmp_path: Path, change: dict[str, Any], reason: str | None) -> None:
    (tmp_path / "config.json").write_bytes((REAL / "dictionary_learning_topk" / "config.json").read_bytes())
    torch.save(changed(_state(), **change), tmp_path / "ae.pt")
    if reason is None:  # TopK has a threshold that it does not use
        saelab.load(tmp_path)
        return
    with pytest.raises(SaelabError, match=reason):
        saelab.load(tmp_path)


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ({"dict_class": "CrossCoder"}, r"dict_class is 'CrossCoder'; known are AutoEncoder"),
        ({"dict_class": "AutoEncoder"}, r"bias is missing; found"),
        ({"dict_class": "AutoEncoderTopK", "dict_size": 65}, r"says n_features = 65, but encoder.weight in ae.pt"),
        ({"dict_class": "AutoEncoderTopK", "activation_dim": 0}, r"activation_dim is 0, not a whole number"),
        ({}, r"could be of several classes .*; config.json beside it must name the trainer's dict_class"),
    ],
)
def test_a_configuration_of_dictionary_learning_that_lies(tmp_path: Path, trainer: dict, reason: str) -> None:
    torch.save(_state(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    with pytest.raises(SaelabError, match=reason):
        saelab.load(tmp_path)


def test_what_other_files_hold_is_said(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=r"no checkpoint here: no file of weights .* among no files"):
        saelab.load(tmp_path)
    (tmp_path / "README.md").write_text("")
    with pytest.raises(SaelabError, match=r"among README.md; give a run folder"):
        saelab.load(tmp_path)
    save_file({"mlp": torch.zeros(3, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(SaelabError, match=r"none of model.safetensors has tensors of an autoencoder"):
        saelab.load(tmp_path)
    with pytest.raises(SaelabError, match=r"no autoencoder of SAELens, .*: it has mlp \[3, 2\] float32"):
        saelab.load(tmp_path / "model.safetensors")
    with pytest.raises(SaelabError, match=r"README.md: is no file of weights; name one, or the folder of a checkpoint"):
        saelab.load(tmp_path / "README.md")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(SaelabError, match=r"list.pt: holds a list, not a dict of tensors"):
        saelab.load(tmp_path / "list.pt")
    real = load_file(REAL / "saelens_standard" / "sae_weights.safetensors")
    save_file(real, tmp_path / "a.safetensors")
    save_file(real, tmp_path / "b.safetensors")
    with pytest.raises(SaelabError, match=r"holds several checkpoints: a.safetensors, b.safetensors; load one of them"):
        saelab.load(tmp_path)


def test_a_folder_of_hookpoints_says_which_there_are(tmp_path: Path) -> None:
    w = weights()
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"], "b_dec": w["b_dec"]}
    for layer in (10, 2):
        folder = tmp_path / f"layers.{layer}"
        folder.mkdir()
        save_file(tensors | {"W_dec": w["W_dec"]}, folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps({"d_in": 12, "k": 3, "num_latents": 40}))
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "sae.safetensors").write_bytes(b"")
    (tmp_path / "layers.3").symlink_to(outside)
    with pytest.raises(SaelabError, match=r"2 are in its folders: layers.2, layers.10; load one, such as .*2$"):
        saelab.load(tmp_path)
    with pytest.raises(
        SaelabError, match=r"there is no such file or folder; .* has layers.2, layers.10. Nearest: layer"
    ):
        saelab.load(tmp_path / "layers.20")
    assert saelab.load(tmp_path / "layers.10").k == 3


def test_every_byte_of_a_header_may_be_wrong(tmp_path: Path) -> None:
    """Each mutation loads, if it is one of a name or number that does not matter, or is refused with a SaelabError."""
    folder = saelens(tmp_path, weights())
    path = folder / "sae_weights.safetensors"
    good, refused = path.read_bytes(), 0
    length = 8 + struct.unpack("<Q", good[:8])[0]
    for at in range(0, length, 3):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 7
        path.write_bytes(bytes(bad))
        try:
            saelab.load(folder)
        except SaelabError:
            refused += 1
    assert refused > 0.8 * length / 3


def test_a_state_dict_that_is_cut_or_flipped_anywhere(tmp_path: Path) -> None:
    source = REAL / "dictionary_learning_standard"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    good, refused = (source / "ae.pt").read_bytes(), 0
    for at in range(0, len(good), 211):
        for bad in (good[:at], good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]):
            (tmp_path / "ae.pt").write_bytes(bad)
            try:
                saelab.load(tmp_path)
            except SaelabError:
                refused += 1
    assert refused > len(good) / 211  # every file that was cut, at least


def test_a_state_dict_whose_archive_is_compressed_is_refused_before_it_is_read(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save(_state(), content)
    with zipfile.ZipFile(content) as good, zipfile.ZipFile(tmp_path / "ae.pt", "w", zipfile.ZIP_DEFLATED) as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name) + bytes(10**6))
    with pytest.raises(SaelabError, match=r"its content would be .* bytes, more than the file holds"):
        saelab.load(tmp_path)


def test_figures_that_are_no_json_do_not_keep_an_autoencoder_from_loading(tmp_path: Path) -> None:
    save_sae(SparseAutoencoder(4, 6, 2), tmp_path)
    (tmp_path / "eval.json").write_text("[" * 100_000)
    assert saelab.load(tmp_path).figures == {}


def test_a_backup_that_is_not_one(tmp_path: Path) -> None:
    state = _state()
    for content, reason in [
        ({"ae": {**state, "b_dec": torch.zeros(1).expand(10**8)}}, r"b_dec is \[100000000\], more than the file holds"),
        ({"ae": state, "norm_factor": -1.0}, r"norm_factor is -1.0, not a positive number"),
        ({"ae": [1]}, r"no autoencoder of SAELens, .*: it has no tensor; and ae"),
    ]:
        torch.save(content, tmp_path / "ae.pt")
        (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK"}}))
        with pytest.raises(SaelabError, match=reason):
            saelab.load(tmp_path)
