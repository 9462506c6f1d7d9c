"""The table of docs/interop.md: every real checkpoint of the tests, loaded, and written for each trainer.

    python scripts/check_interop.py            # print it
    python scripts/check_interop.py --table    # write it into docs/interop.md

The errors of written files are those of the trainers themselves where they are installed, else of `saelab.load`. No
release of sae-lens runs beside saelab's TransformerLens, so the trainers live in an environment of their own, which
needs nothing of saelab's but this repository on its path:

    python -m venv peers && peers/bin/pip install torch sae-lens==6.54.12
    peers/bin/pip install --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0 natsort schedulefree
    PYTHONPATH=. SPARSIFY_DISABLE_TRITON=1 peers/bin/python scripts/check_interop.py --table

An error is the largest difference over the largest number, of activations and of the reconstruction: the larger one.
The exit code is 1 if one exceeds 1e-5.
"""

import importlib
import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import saelab
from saelab.sae.interop.writing import WRITERS

ROOT = Path(__file__).resolve().parents[1]
REAL, PAGE = ROOT / "tests" / "data" / "interop", ROOT / "docs" / "interop.md"
BEGIN, END = "<!-- scripts/check_interop.py begins -->", "<!-- scripts/check_interop.py ends -->"
MOST = 1e-5
Computed = tuple[Tensor, Tensor]
"""Activations ``[tokens, n_features]`` and reconstruction."""


class Row(NamedTuple):
    checkpoint: str
    loaded: float
    written: dict[str, float | None]
    """Error of each trainer on the file that was written for it; None if it has no such class."""


def ours(folder: Path, x: Tensor) -> Computed:
    """What saelab computes."""
    sae = saelab.load(folder)
    return sae.encode(x).to_dense(), sae(x)


def of_saelens(folder: Path, x: Tensor) -> Computed:
    """What SAELens computes."""
    sae = importlib.import_module("sae_lens").SAE.load_from_disk(folder)
    return sae.encode(x), sae(x)


def of_sparsify(folder: Path, x: Tensor) -> Computed:
    """What sparsify computes."""
    sae = importlib.import_module("sparsify").SparseCoder.load_from_disk(folder)
    values, features, _ = sae.encode(x)
    return torch.zeros(len(x), sae.num_latents).scatter_(1, features, values), sae(x).sae_out


def of_dictionary_learning(folder: Path, x: Tensor) -> Computed:
    """What dictionary_learning computes; its decoders are taken as they are, not scaled to rows of length 1."""
    for name in ("nnsight", "circuitsvis", "umap", "zstandard"):  # which its package imports, for other things
        sys.modules.setdefault(name, _Anything(name))
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    home = {"AutoEncoderTopK": "trainers.top_k", "BatchTopKSAE": "trainers.batch_top_k"}.get(name, "dictionary")
    kind = getattr(importlib.import_module(f"dictionary_learning.{home}"), name)
    state = torch.load(folder / "ae.pt", weights_only=True)
    d_in, n = (state["b_dec"] if "b_dec" in state else state["bias"]).shape[0], len(_bias(state))
    sae = kind(d_in, n, int(state["k"])) if "k" in state else kind(d_in, n)
    sae.load_state_dict(state)
    acts = sae.encode(x)
    return acts, sae.decode(acts)


def _bias(state: dict[str, Tensor]) -> Tensor:
    return state["b_enc"] if "b_enc" in state else state["encoder.bias"]


class _Anything(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        return type(name, (), {})


TRAINERS: dict[str, tuple[str, Callable[[Path, Tensor], Computed]]] = {
    "saelens": ("sae_lens", of_saelens),
    "sparsify": ("sparsify", of_sparsify),
    "dictionary_learning": ("dictionary_learning", of_dictionary_learning),
}


def installed(to: str) -> bool:
    """Whether the trainer is there."""
    return importlib.util.find_spec(TRAINERS[to][0]) is not None


@torch.no_grad()
def rows(folder: Path) -> list[Row]:
    """A row for each real checkpoint; `folder` is for the files that are written."""
    found = []
    for source in sorted(REAL.iterdir()):
        right = load_file(source / "expected.safetensors")
        expected = right["acts"], right["recon"]
        sae, written = saelab.load(source), {}
        for to, write in WRITERS.items():
            target = folder / to / source.name
            try:
                write(sae, target)
            except saelab.SaelabError:
                written[to] = None
                continue
            compute = TRAINERS[to][1] if installed(to) else ours
            written[to] = error(compute(target, right["x"]), expected)
        found.append(Row(source.name, error(ours(source, right["x"]), expected), written))
    return found


def error(found: Computed, right: Computed) -> float:
    """The largest difference over the largest number: of activations or of the reconstruction."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True))


def table(found: list[Row]) -> str:
    """The rows in Markdown."""
    by = {to: to if installed(to) else f"{to} (read by saelab)" for to in WRITERS}
    lines = ["| checkpoint | loaded | " + " | ".join(f"written for {name}" for name in by.values()) + " |"]
    lines += ["|---|---|" + "---|" * len(by)]
    for row in found:
        cells = [shown(row.written[to]) for to in by]
        lines.append(f"| {row.checkpoint} | {shown(row.loaded)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: float | None) -> str:
    """An error as text."""
    return "no such class" if value is None else "0" if value == 0 else f"{value:.0e}"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = rows(Path(folder))
    text = table(found)
    print(text)
    if "--table" in sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    errors = [value for row in found for value in (row.loaded, *row.written.values()) if value is not None]
    return int(max(errors) > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
