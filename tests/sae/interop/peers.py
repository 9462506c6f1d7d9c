"""What each peer computes, in its own formulas on dense matrices, and files as its versions write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

REAL = Path(__file__).parents[2] / "data" / "interop"
"""Checkpoints that the peers wrote, with x, activations and reconstruction as they compute them."""
NAMES = sorted(folder.name for folder in REAL.iterdir())


def expected(name: str) -> dict[str, Tensor]:
    """x, acts and recon of a real checkpoint."""
    return load_file(REAL / name / "expected.safetensors")


def distance(found: Tensor, right: Tensor) -> float:
    """Largest difference over the largest number."""
    assert found.shape == right.shape
    return float((found - right).abs().max() / right.abs().max())


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(d_in: int = 12, n: int = 40, d_out: int | None = None) -> dict[str, Tensor]:
    """Random weights by SAELens' names: W_enc ``[d_in, n]``, W_dec ``[n, d_out]``, with rows of different lengths."""
    d_out = d_out or d_in
    return {
        "W_enc": numbers(d_in, n, seed=1, scale=0.4),
        "W_dec": numbers(n, d_out, seed=2, scale=0.3) * torch.linspace(0.3, 3, n)[:, None],
        "b_enc": numbers(n, seed=3, scale=0.2),
        "b_dec": numbers(d_out, seed=4, scale=0.5),
    }


def inputs(d_in: int = 12, tokens: int = 30) -> Tensor:
    """``[tokens, d_in]``, with a mean that is not 0 and lengths that differ."""
    return numbers(tokens, d_in, seed=5) * torch.linspace(0.5, 4, tokens)[:, None] + 1.5


def saelens(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """A folder as SAELens writes it; `config` replaces what it says."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    d_in, n = tensors["W_enc"].shape
    usual = {
        "d_in": d_in,
        "d_sae": n,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"},
        "architecture": "standard",
    }
    (folder / "cfg.json").write_text(json.dumps(usual | config))
    return folder


def top_k(pre: Tensor, k: int) -> Tensor:
    """``[tokens, n]`` with all but the k largest entries of each row 0, and negative ones too."""
    values, index = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter_(1, index, values.relu())
