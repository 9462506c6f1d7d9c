"""Writes tests/data/releases: made-up autoencoders in the layouts of the releases, with what SAELens computes of each.

    PYTHONPATH=. peers/bin/python scripts/release_layouts.py

Run it in the environment of `scripts/check_interop.py`. The folders are named as repositories of the Hub, so that they
can stand for it. SAELens' own loaders read them, from the folder in place of the Hub; widths are small, so they are
given in place of those that the loaders expect.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1] / "tests" / "data" / "releases"
D_IN, N = 12, 40
NORM = 2.5
"""Average norm of x that Llama Scope scales by."""


class Release(NamedTuple):
    """An autoencoder in the layout of a release."""

    name: str
    repo: str
    path: str
    """In the repository: a folder, or a file."""
    loader: str
    """SAELens' function."""
    write: Callable[[Path, dict[str, Tensor]], None]
    sizes: dict[str, Any]
    """What is not as wide as in the release, for SAELens."""
    n: int = N
    scale: float | None = None
    """What SAELens' table says that x is multiplied by."""


def npz(path: Path, w: dict[str, Tensor]) -> None:
    np.savez(path / "params.npz", **{name: value.numpy() for name, value in w.items()})


def second(path: Path, w: dict[str, Tensor]) -> None:
    """Gemma Scope 2."""
    affine = "affine" in path.name
    tensors = {name.lower(): value for name, value in w.items()}
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.13.output"}
    if "transcoder" in str(path):
        names = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
        places = [f"model.layers.5.{name}" for name in names]
        config |= {"hf_hook_point_in": places[0], "hf_hook_point_out": places[1], "affine_connection": affine}
    if affine:
        tensors["affine_skip_connection"] = numbers(D_IN, D_IN, seed=9)
    save_file(tensors, path / "params.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=2))


def llama(path: Path, w: dict[str, Tensor]) -> None:
    """Decoder rows of length 1: SAELens does not compute `sparsity_include_decoder_norm`."""
    decoder = w["W_dec"] / w["W_dec"].norm(dim=1, keepdim=True)
    tensors = {"encoder.weight": w["W_enc"].T, "decoder.weight": decoder.T}
    tensors |= {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    (path / "checkpoints").mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "checkpoints" / "final.safetensors")
    site = "blocks.15.hook_resid_post"
    config = {
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.53,
        "d_model": D_IN,
        "d_sae": N,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": NORM, "out": NORM},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        "hook_point_in": site,
        "hook_point_out": site,
        "top_k": 8,
    }
    (path / "hyperparams.json").write_text(json.dumps(config, indent=2))


def gpt2(path: Path, w: dict[str, Tensor]) -> None:
    """With a cfg.json of SAELens before version 3."""
    del w["threshold"]
    save_file(w, path / "sae_weights.safetensors")
    save_file({"sparsity": torch.full((N,), -3.0)}, path / "sparsity.safetensors")
    config = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre",
        "hook_point_layer": 8,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "context_size": 128,
        "d_in": D_IN,
        "d_sae": N,
        "activation_fn_str": "relu",
        "normalize_activations": False,
        "dtype": "torch.float32",
        "device": "cuda",
    }
    (path / "cfg.json").write_text(json.dumps(config, indent=2))


def qwen(path: Path, w: dict[str, Tensor]) -> None:
    names = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    torch.save({name: value.contiguous() for name, value in names.items()}, path)


def goodfire(path: Path, w: dict[str, Tensor]) -> None:
    tensors = {"encoder_linear.weight": w["W_enc"].T, "encoder_linear.bias": w["b_enc"]}
    tensors |= {"decoder_linear.weight": w["W_dec"].T, "decoder_linear.bias": w["b_dec"]}
    torch.save({name: value.contiguous() for name, value in tensors.items()}, path)


_SMALL = {"d_in": D_IN, "d_sae": N}
RELEASES = [
    Release(
        "gemma_scope",
        "google/gemma-scope-2b-pt-res",
        "layer_20/width_16k/average_l0_71",
        "gemma_2_sae_huggingface_loader",
        npz,
        _SMALL,
    ),
    Release(
        "gemma_scope_transcoder",
        "google/gemma-scope-2b-pt-transcoders",
        "layer_3/width_16k/average_l0_54",
        "gemma_2_transcoder_huggingface_loader",
        npz,
        {**_SMALL, "d_out": D_IN},
    ),
    Release(
        "gemma_scope_2",
        "google/gemma-scope-2-1b-pt",
        "resid_post/layer_13_width_16k_l0_small",
        "gemma_3_sae_huggingface_loader",
        second,
        {},
    ),
    Release(
        "gemma_scope_2_transcoder",
        "google/gemma-scope-2-1b-pt",
        "transcoder_all/layer_5_width_16k_l0_small_affine",
        "gemma_3_sae_huggingface_loader",
        second,
        {},
    ),
    Release(
        "llama_scope",
        "fnlp/Llama3_1-8B-Base-LXR-8x",
        "Llama3_1-8B-Base-L15R-8x",
        "llama_scope_sae_huggingface_loader",
        llama,
        {"dtype": "float32"},
        scale=D_IN**0.5 / NORM,
    ),
    Release(
        "gpt2",
        "jbloom/GPT2-Small-SAEs-Reformatted",
        "blocks.8.hook_resid_pre",
        "sae_lens_huggingface_loader",
        gpt2,
        {},
    ),
    Release(
        "qwen_scope",
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_9",
        "layer3.sae.pt",
        "qwen_scope_sae_huggingface_loader",
        qwen,
        {"d_in": D_IN},
        n=1024,
    ),
    Release(
        "goodfire",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        "get_goodfire_huggingface_loader",
        goodfire,
        {**_SMALL, "dtype": "float32"},
    ),
]


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(n: int) -> dict[str, Tensor]:
    """By SAELens' names."""
    return {
        "W_enc": numbers(D_IN, n, seed=1, scale=0.4),
        "W_dec": numbers(n, D_IN, seed=2, scale=0.3),
        "b_enc": numbers(n, seed=3, scale=0.2),
        "b_dec": numbers(D_IN, seed=4, scale=0.5),
        "threshold": numbers(n, seed=5).abs(),
    }


@torch.no_grad()
def of_saelens(release: Release, x: Tensor) -> dict[str, Tensor]:
    """Activations and reconstruction as SAELens computes them."""
    loaders = importlib.import_module("sae_lens.loading.pretrained_sae_loaders")
    registry = importlib.import_module("sae_lens.registry")
    loaders.hf_hub_download = local
    loaders.get_safetensors_tensor_shapes = shapes
    config, state, _ = getattr(loaders, release.loader)(
        release.repo, release.path, device="cpu", cfg_overrides={**release.sizes, "device": "cpu"}
    )
    config = loaders.handle_config_defaulting(config)
    kind, settings = registry.get_sae_class(config["architecture"])
    sae = kind(settings.from_dict(config))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state, assign=True)
    if release.scale is not None:
        sae.fold_activation_norm_scaling_factor(release.scale)
    acts = sae.encode(x)
    skipped = x @ sae.W_skip.T if getattr(sae, "W_skip", None) is not None else 0
    return {"x": x, "acts": acts, "recon": sae.decode(acts) + skipped}


def local(repo_id: str, filename: str, subfolder: str | None = None, **_: object) -> str:
    """The file that stands for one of the Hub."""
    path = ROOT.joinpath(repo_id, subfolder or "", filename)
    if not path.is_file():
        raise importlib.import_module("huggingface_hub.utils").EntryNotFoundError(str(path))
    return str(path)


def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
    with safe_open(ROOT / repo_id / filename, framework="pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no mapping)


def main() -> None:
    x = numbers(16, D_IN, seed=6) * 2 + 0.5
    for release in RELEASES:
        target = ROOT / release.repo / release.path
        folder = target.parent if target.suffix in (".pt", ".pth") else target
        folder.mkdir(parents=True, exist_ok=True)
        release.write(target, weights(release.n))
        found = of_saelens(release, x)
        save_file(
            {name: value.detach().contiguous() for name, value in found.items()},
            ROOT / f"{release.name}.safetensors",
            metadata={"path": f"{release.repo}/{release.path}"},
        )
        print(f"{release.name}: {float((found['acts'] > 0).float().sum(1).mean()):.1f} active of {release.n}")


if __name__ == "__main__":
    main()
