"""What a peer wrote computes what the peer computes: its own files, and the formats that its versions write."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import saelab
from saelab.sae.checkpoint import save_sae
from saelab.sae.model import SparseAutoencoder
from tests.sae.interop.peers import NAMES, REAL, distance, expected, inputs, numbers, saelens, top_k, weights


def check(sae: SparseAutoencoder, x: Tensor, acts: Tensor, recon: Tensor, most: float = 1e-5) -> None:
    assert (acts > 0).any(1).all() and not (acts > 0).all()
    assert distance(sae.encode(x).to_dense(), acts) < most
    assert distance(sae(x), recon) < most
    assert distance(sae.decode(sae.encode(x), x), recon) < most


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_the_peer_wrote_computes_what_the_peer_computed(name: str, tmp_path: Path) -> None:
    right = expected(name)
    sae = saelab.load(REAL / name)
    check(sae, right["x"], right["acts"], right["recon"])
    save_sae(sae, tmp_path)
    again = saelab.load(tmp_path)
    assert torch.equal(again(right["x"]), sae(right["x"]))
    assert (again.transcodes, again.centred, again.k) == (sae.transcodes, sae.centred, sae.k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    rounded = {name: value.to(dtype) for name, value in weights().items()}
    w, x = {name: value.float() for name, value in rounded.items()}, inputs()
    acts = top_k((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 5)
    folder = saelens(tmp_path, rounded, architecture="topk", k=5, dtype=str(dtype).removeprefix("torch."))
    check(saelab.load(folder), x, acts, acts @ w["W_dec"] + w["b_dec"])


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (deviation + 1e-5), deviation, mean


def constant_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
    return x * factor, 1 / factor, torch.zeros(1)


def as_it_is(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize(
    ("name", "normalise"),
    [
        ("none", as_it_is),
        ("layer_norm", layer_norm),
        ("constant_norm_rescale", constant_norm),
        ("expected_average_only_in", as_it_is),  # folded by SAELens' trainer, and ignored where it is not
    ],
)
def test_inputs_of_saelens(tmp_path: Path, name: str, normalise, architecture: str, apply: bool) -> None:
    w, x = weights(), inputs()
    read, gain, shift = normalise(x)
    z = (read - w["b_dec"] * apply) @ w["W_enc"]
    more: dict = {}
    if architecture == "gated":
        gate, magnitude, r = numbers(40, seed=6), numbers(40, seed=7), numbers(40, seed=8)
        acts = (z + gate > 0) * (z * r.exp() + magnitude).relu()
        del w["b_enc"]
        w |= {"b_gate": gate, "b_mag": magnitude, "r_mag": r}
    elif architecture == "topk":
        acts, more = top_k(z + w["b_enc"], 6), {"k": 6}
    else:
        bound = numbers(40, seed=9) if architecture == "jumprelu" else torch.zeros(40)
        acts = (z + w["b_enc"]).relu() * (z + w["b_enc"] > bound)
        w |= {"threshold": bound} if architecture == "jumprelu" else {}
    recon = (acts @ w["W_dec"] + w["b_dec"]) * gain + shift
    folder = saelens(
        tmp_path / "theirs",
        w,
        architecture=architecture,
        normalize_activations=name,
        apply_b_dec_to_input=apply,
        reshape_activations="hook_z",
        **more,
    )
    sae = saelab.load(folder)
    check(sae, x, acts, recon)
    assert distance(sae(x.view(5, 6, -1)).flatten(0, 1), recon) < 1e-5
    save_sae(sae, tmp_path / "ours")
    check(saelab.load(tmp_path / "ours"), x, acts, recon)
    written = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    assert written["apply_b_dec_to_input"] == apply
    assert written["normalize_activations"] == (name if normalise is not as_it_is else "none")


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_transcoder", "skip_transcoder"])
def test_transcoders_of_saelens_with_another_width(tmp_path: Path, architecture: str, norm: str) -> None:
    w, x = weights(12, 40, 7), inputs()
    read = layer_norm(x)[0] if norm == "layer_norm" else x
    z = read @ w["W_enc"] + w["b_enc"]
    bound = numbers(40, seed=9) if architecture == "jumprelu_transcoder" else torch.zeros(40)
    acts = z.relu() * (z > bound)
    recon = acts @ w["W_dec"] + w["b_dec"]  # SAELens undoes no normalisation of the output
    if architecture == "jumprelu_transcoder":
        w["threshold"] = bound
    if architecture == "skip_transcoder":
        w["W_skip"] = numbers(7, 12, seed=10)
        recon = recon + x @ w["W_skip"].T
    folder = saelens(
        tmp_path / "theirs",
        w,
        architecture=architecture,
        d_out=7,
        apply_b_dec_to_input=False,
        normalize_activations=norm,
    )
    sae = saelab.load(folder)
    assert sae.transcodes and sae.d_out == 7
    check(sae, x, acts, recon)
    save_sae(sae, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "cfg.json").read_text())["architecture"] == architecture
    check(saelab.load(tmp_path / "ours"), x, acts, recon)


@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("rescaled", [False, True])
def test_a_checkpoint_of_saelens_trainer_is_folded_as_its_final_file(
    tmp_path: Path, scale: float | None, rescaled: bool
) -> None:
    """Matryoshka and BatchTopK: in training the threshold is of pre-activations times decoder norms."""
    w, x, s = weights(), inputs(), scale or 1.0
    folded = {"W_enc": w["W_enc"] * s, "W_dec": w["W_dec"] / s, "b_enc": w["b_enc"], "b_dec": w["b_dec"] / s}
    bound = 0.8 / (s if rescaled else 1)
    norms = folded["W_dec"].norm(dim=1) if rescaled else torch.ones(40)
    pre = ((x - folded["b_dec"]) @ folded["W_enc"] + folded["b_enc"]) * norms
    acts = pre.relu() * (pre > bound)
    recon = (acts / norms) @ folded["W_dec"] + folded["b_dec"]
    folder = saelens(
        tmp_path,
        w | {"topk_threshold": torch.tensor(0.8, dtype=torch.float64)},
        architecture="matryoshka_batchtopk",
        k=8.0,
        rescale_acts_by_decoder_norm=rescaled,
        normalize_activations="expected_average_only_in",
    )
    (folder / "trainer_state.pt").write_bytes(b"not read")
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    check(saelab.load(folder), x, acts, recon)


def test_configurations_of_saelens_before_6(tmp_path: Path) -> None:
    w, x = weights(), inputs()
    acts = top_k((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 4)
    folder = saelens(tmp_path / "a", w | {"scaling_factor": torch.ones(40)})
    old = {
        "hook_point": "blocks.2.hook_resid_pre",
        "model_name": "gpt2",
        "d_in": 12,
        "d_sae": 40,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "normalize_activations": False,
        "dtype": "torch.float32",
    }
    (folder / "cfg.json").write_text(json.dumps(old))
    sae = saelab.load(folder)
    check(sae, x, acts, acts @ w["W_dec"] + w["b_dec"])
    assert sae.metadata == {"hook_name": "blocks.2.hook_resid_pre", "model_name": "gpt2"}
    relu = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    for activation in ({}, {"activation_fn": "relu"}):
        (folder / "cfg.json").write_text(json.dumps({"d_in": 12, "d_sae": 40} | activation))
        check(saelab.load(folder), x, relu, relu @ w["W_dec"] + w["b_dec"])


def test_a_logarithm_of_thresholds_and_a_missing_bias(tmp_path: Path) -> None:
    w, x = weights(), inputs()
    del w["b_enc"]
    bound = numbers(40, seed=9)
    z = (x - w["b_dec"]) @ w["W_enc"]
    acts = z.relu() * (z > bound.exp())
    folder = saelens(tmp_path, w | {"log_threshold": bound}, architecture="jumprelu")
    check(saelab.load(folder), x, acts, acts @ w["W_dec"] + w["b_dec"])


def sparsify(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"expansion_factor": 4, "normalize_decoder": True, "k": 5} | config))
    return folder


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_variants_of_sparsify(tmp_path: Path, transcode: bool, skip: bool, turned: bool) -> None:
    w, x = weights(), inputs()
    acts = top_k((x - w["b_dec"] * (not transcode)) @ w["W_enc"] + w["b_enc"], 5)
    recon = acts @ w["W_dec"] + w["b_dec"]
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "b_dec": w["b_dec"]}
    tensors["W_dec"] = w["W_dec"].T if turned else w["W_dec"]
    if skip:
        tensors["W_skip"] = numbers(12, 12, seed=10)
        recon = recon + x @ tensors["W_skip"].T
    config = {"d_in": 12, "num_latents": 40, "transcode": transcode, "skip_connection": skip}
    run = tmp_path / "run"
    folder = sparsify(run / "layers.3", tensors, **config)
    (run / "config.json").write_text(json.dumps({"model": "m", "dataset": "d", "ctx_len": 64, "sae": config}))
    sae = saelab.load(folder)
    check(sae, x, acts, recon)
    assert sae.metadata == {
        "model_name": "m",
        "dataset_path": "d",
        "context_size": 64,
        **(
            {"hook_name": "blocks.3.hook_resid_pre", "hook_name_out": "blocks.3.hook_resid_post"}
            if transcode
            else {"hook_name": "blocks.3.hook_resid_post"}
        ),
    }
    save_sae(sae, tmp_path / "ours")
    check(saelab.load(tmp_path / "ours"), x, acts, recon)
    kind = f"topk{'_skip' if skip else ''}{'_transcoder' if transcode else ''}"
    written = json.loads((tmp_path / "ours" / "cfg.json").read_text())["architecture"]
    assert written == (kind if kind == "topk" else f"saelab_{kind}")


def test_sparsify_with_sizes_from_the_expansion_factor_and_a_linear_decoder(tmp_path: Path) -> None:
    w, x = weights(12, 48), inputs()
    acts = top_k((x - w["b_dec"]) @ w["W_enc"], 5)
    tensors = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "b_dec": w["b_dec"]}
    tensors["encoder.bias"] = torch.zeros(48)
    folder = sparsify(tmp_path, tensors, d_in=12, num_latents=0)
    check(saelab.load(folder), x, acts, acts @ w["W_dec"] + w["b_dec"])


def dictionary(folder: Path, tensors: dict, **trainer) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    if trainer:
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return folder


@pytest.mark.parametrize("norm_factor", [None, 2.5])
@pytest.mark.parametrize("threshold", [-1.0, 0.7])
def test_matryoshka_of_dictionary_learning(tmp_path: Path, threshold: float, norm_factor: float | None) -> None:
    """And a backup of its training, whose biases and threshold are of scaled activations."""
    w, x, s = weights(), inputs(), norm_factor or 1.0
    pre = (x - w["b_dec"] * s) @ w["W_enc"] + w["b_enc"] * s
    acts = pre.relu() * (pre > threshold * s)
    state = w | {"k": torch.tensor(8, dtype=torch.int32), "threshold": torch.tensor(threshold)}
    state["group_sizes"] = torch.tensor([10, 30])
    content = state if norm_factor is None else {"step": 7, "ae": state, "norm_factor": norm_factor, "optimizer": {}}
    sae = saelab.load(dictionary(tmp_path, content, dict_class="MatryoshkaBatchTopKSAE", k=8, dict_size=40))
    check(sae, x, acts, acts @ w["W_dec"] + w["b_dec"] * s)
    assert sae.k == 8


def test_classes_of_dictionary_learning_are_told_from_their_tensors_without_a_configuration(tmp_path: Path) -> None:
    w, x = weights(), inputs()
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    z = x @ w["W_enc"] + w["b_enc"]
    relu, bound = z.relu(), numbers(40, seed=9)
    sae = saelab.load(dictionary(tmp_path / "new", linear | {"decoder.bias": w["b_dec"]}))
    check(sae, x, relu, relu @ w["W_dec"] + w["b_dec"])
    sae = saelab.load(dictionary(tmp_path / "jump", w | {"threshold": bound}))
    jump = relu * (z > bound)
    check(sae, x, jump, jump @ w["W_dec"] + w["b_dec"])
    half = {name: value.half() for name, value in (linear | {"bias": w["b_dec"]}).items()}
    sae = saelab.load(dictionary(tmp_path / "half", half) / "ae.pt")
    first = ((x - half["bias"].float()) @ half["encoder.weight"].float().T + half["encoder.bias"].float()).relu()
    check(sae, x, first, first @ half["decoder.weight"].float().T + half["bias"].float())


@pytest.mark.parametrize("name", ["ReLU", "TopK"])
@pytest.mark.parametrize("tied", [False, True])
def test_files_of_openai(tmp_path: Path, name: str, tied: bool) -> None:
    w, x = weights(), inputs()
    if tied:
        w["W_dec"] = w["W_enc"].T.contiguous()
    read, gain, shift = layer_norm(x) if name == "TopK" else as_it_is(x)
    pre = (read - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    acts = top_k(pre, 6) if name == "TopK" else pre.relu()
    state: dict = {
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "encoder.weight": w["W_enc"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(40, dtype=torch.long),
        "latents_activation_frequency": torch.ones(40),
        "latents_mean_square": torch.zeros(40),
        "activation": name,
        "activation_state_dict": {"k": 6, "postact_fn": "ReLU"} if name == "TopK" else {},
    }
    state["decoder.linear.weight" if tied else "decoder.weight"] = w["W_dec"] if tied else w["W_dec"].T
    if tied:
        state["decoder.linear.weight"] = state["encoder.weight"]
    torch.save(state, tmp_path / "autoencoder.pt")
    for path in (tmp_path, tmp_path / "autoencoder.pt"):
        check(saelab.load(path), x, acts, (acts @ w["W_dec"] + w["b_dec"]) * gain + shift)


def test_gated_is_linear_with_the_thresholds_that_the_gate_implies(tmp_path: Path) -> None:
    """gate > 0 if and only if the magnitude exceeds b_mag - exp(r) b_gate, at every point of the line."""
    n = 25
    gate, magnitude, r = numbers(n, seed=1), numbers(n, seed=2), numbers(n, seed=3)
    tensors = {"W_enc": torch.ones(1, n), "W_dec": torch.ones(n, 1), "b_dec": torch.zeros(1)}
    tensors |= {"b_gate": gate, "b_mag": magnitude, "r_mag": r}
    sae = saelab.load(saelens(tmp_path, tensors, architecture="gated"))
    assert sae.threshold is not None and bool((sae.threshold > 0).any()) and bool((sae.threshold == 0).any())
    torch.testing.assert_close(sae.threshold, (magnitude - r.exp() * gate).clamp_min(0))
    u = torch.linspace(-4, 4, 300)[:, None]
    dense = (u + gate > 0) * (r.exp() * u + magnitude).relu()
    away = ((u + gate).abs() > 1e-5) & ((r.exp() * u + magnitude).abs() > 1e-5)  # rounding decides at the very edge
    found = sae.encode(u).to_dense()
    torch.testing.assert_close(found * away, dense * away)
    assert 0.2 < float((dense > 0).float().mean()) < 0.8
