"""Feature databases for tests: of a real pass, and of dense activations that a test makes up, without any model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.codes import Codes
from saelab.encoded import Block, Reader, read_together
from saelab.features.activity import Activity
from saelab.features.index import open_index
from saelab.features.layout import FACTS
from saelab.features.merge import write_facts
from saelab.features.settings import FeatureSettings
from saelab.features.shards import ShardWriter, total
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder


def index(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    folder: Path,
    settings: FeatureSettings,
    inputs: str = "inputs",
) -> tuple[int, dict[str, Any]]:
    """Write the database of `rows`, as `saelab index` does; returns the first row that was encoded, and the summary."""
    made = open_index(sae, lm, rows, site, folder, settings, inputs)
    reader = Reader(made.add, len(rows), settings.rows_per_forward, made.first_row)
    read_together(sae, lm, rows, site, [reader])
    return made.first_row, made.finish()


def blocks(z: Tensor, rows: Tensor, rows_per_forward: int, first_row: int = 0) -> Iterator[Block]:
    """The blocks of a pass with the activations z ``[rows, context, n_features]``; token 0 is the only special one."""
    context = rows.shape[1]
    for start in range(first_row, len(rows), rows_per_forward):
        ids = rows[start : start + rows_per_forward]
        keep = ids != 0
        if keep.any():
            x = z[start : start + rows_per_forward][keep]
            positions = keep.flatten().nonzero().squeeze(1) + start * context
            yield Block(ids, start, positions, x, Codes.from_mask(x > 0, x))


def facts(folder: Path, z: Tensor, rows: Tensor, rows_per_forward: int = 2, extra: int = 0) -> list[Activity]:
    """Write the shards and facts of z to a new `folder`; returns the activations as they were merged."""
    n_features = z.shape[2]
    identity = {"n_features": n_features, "rows": len(rows), "context": rows.shape[1], "inputs": "inputs"}
    writer = ShardWriter(folder / "unfinished", identity | {"rows_per_forward": rows_per_forward})
    for block in blocks(z, rows, rows_per_forward, writer.first_row):
        writer.add(block)
    shards = writer.finish()
    (folder / FACTS).mkdir()
    costs = torch.full((n_features,), extra)
    return list(write_facts(folder / FACTS, shards, total(shards), rows, "inputs", costs))
