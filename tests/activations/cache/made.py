"""Caches of made-up activations, written without a language model: every value follows from its row and position."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.activations.cache.layout import Manifest
from saelab.activations.cache.writer import begin, check, finish, rewrite, write_lane
from saelab.activations.stream import Pass

CONTEXT = 16
SITES = {"blocks.0.hook_resid_post": 8, "blocks.1.attn.hook_z": 12}
SITE = "blocks.0.hook_resid_post"
BOS = 0


def identity(**changes: Any) -> dict[str, Any]:
    facts = {
        "model": "made up",
        "weights": "0",
        "model_dtype": "float32",
        "tokenizer": "0",
        "corpus": {"text": "0"},
        "sites": SITES,
        "context": CONTEXT,
        "bos": BOS,
        "dtype": "float32",
        "gradients": False,
        "special_tokens": False,
        "seed": 0,
        "rows_per_forward": 4,
        "passes_per_shard": 3,
        "block_tokens": 50,
        "lanes": 1,
        "nonfinite": "error",
        "tokens": 1000,
    }
    return facts | changes


class Rows:
    """Rows of a lane, each with ids of its own; some contain EOS, which is BOS."""

    def __init__(self, lane: int, start: Mapping[str, Any] | None = None, stop: int = 10**9) -> None:
        self.lane, self.row, self.stop = lane, start["row"] if start else 0, stop

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        if self.row >= self.stop:
            raise StopIteration
        rng = np.random.default_rng([self.lane, self.row])
        self.row += 1
        ids = rng.integers(1, 1000, CONTEXT).astype(np.int32)
        ids[0] = BOS
        if self.row % 3 == 0:
            ids[CONTEXT // 2] = BOS
        return ids

    def state(self) -> dict[str, Any]:
        return {"row": self.row}


def values(ids: torch.Tensor, d_in: int, salt: int) -> torch.Tensor:
    """``[tokens, d_in]``: a token id has the same vector in every batch."""
    phase = torch.arange(1, d_in + 1, dtype=torch.float64) * (salt + 1)
    return torch.sin(ids.double()[:, None] * phase).float()


def forward(facts: Mapping[str, Any]) -> Callable[[np.ndarray], Pass]:
    def run(block: np.ndarray) -> Pass:
        ids = torch.from_numpy(block)
        kept = torch.ones_like(ids, dtype=torch.bool) if facts["special_tokens"] else ids != BOS
        found = {site: values(ids[kept], d_in, salt) for salt, (site, d_in) in enumerate(facts["sites"].items())}
        slopes = {site: value.flip(1) / 1000 for site, value in found.items()} if facts["gradients"] else {}
        return Pass(kept, found, slopes)

    return run


def write(
    folder: Path,
    facts: Mapping[str, Any] | None = None,
    run: Callable[[np.ndarray], Pass] | None = None,
    stop: int = 10**9,
) -> Manifest:
    """Write, continue or repair a cache, as the stage does, in one process."""
    facts = facts or identity()
    run = run or forward(facts)

    def rows(lane: int, start: Mapping[str, Any] | None) -> Rows:
        return Rows(lane, start, stop)

    manifest = begin(folder, facts)
    if manifest is None:
        for lane in range(facts["lanes"]):
            for _ in write_lane(folder, facts, lane, rows, run):
                pass
        manifest = finish(folder, facts)
    for shard, fault in list(check(folder, manifest, contents=True)):
        if fault:
            for _ in (again := rewrite(folder, manifest, shard["name"], rows, run)):
                pass
            del again
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
