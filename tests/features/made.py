"""Feature databases for tests: of a real pass, and of dense activations that a test makes up, without any model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from saelab.codes import Codes
from saelab.encoded import Block, Reader, read_together
from saelab.features.array_files import ArrayWriter
from saelab.features.facts_writer import write_activations, write_text
from saelab.features.index import open_index
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
    """Write the database of `rows` as `saelab index` does; returns the first row that was encoded, and the manifest."""
    made = open_index(sae, lm, rows, site, folder, settings.rows_per_forward, inputs)
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


def write(
    folder: Path, z: Tensor, rows: Tensor, vocabulary: list[bytes], rows_per_forward: int = 2
) -> dict[str, np.ndarray]:
    """Write what saelab's writer makes of the activations z to a new `folder`; returns the arrays, by name."""
    identity = {"n_features": z.shape[2], "rows": len(rows), "context": rows.shape[1], "inputs": "inputs"}
    writer = ShardWriter(folder / "unfinished", identity | {"rows_per_forward": rows_per_forward})
    for block in blocks(z, rows, rows_per_forward, writer.first_row):
        writer.add(block)
    shards = writer.finish()
    totals = total(shards)
    sizes = {"rows": rows.shape[0], "context": rows.shape[1], "n_features": z.shape[2], "pairs": 0}
    sizes |= {"entries": int(totals.counts.sum()), "vocabulary": len(vocabulary)}
    (folder / "made").mkdir()
    arrays = ArrayWriter(folder / "made", sizes | {"vocabulary_bytes": sum(map(len, vocabulary))})
    ordinary = np.bincount(rows[rows != 0], minlength=len(vocabulary))
    write_text(arrays, rows.numpy(), ordinary, vocabulary)
    write_activations(arrays, shards, totals, rows.numpy())
    return {path.name.removesuffix(".npy"): np.load(path) for path in (folder / "made").iterdir()}
