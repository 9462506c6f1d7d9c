"""A feature database with as many features as one likes, made of copies of a few."""

import json
from pathlib import Path

import numpy as np

from saelab.features.layout import MANIFEST, arrays
from tests.features.dense import made_up, write_database

BASE = 256
ROWS, CONTEXT, VOCABULARY = 24, 64, 300


def write_wide(folder: Path, copies: int) -> Path:
    """Write the database of `BASE` features, each `copies` times: feature f is a copy of feature f modulo `BASE`."""
    z, tokens = made_up(ROWS, CONTEXT, BASE, VOCABULARY)
    vocabulary = [f" w{i}".encode() for i in range(VOCABULARY)]
    write_database(folder, z, tokens, vocabulary)
    manifest = json.loads((folder / MANIFEST).read_text())
    old = {name: np.load(folder / f"{name}.npy") for name in arrays(manifest)}
    new = {}
    for name, array in old.items():
        if name.startswith("table."):
            new[name] = np.tile(array, (copies, *[1] * (array.ndim - 1)))
    new["by_feature.maxima"] = np.tile(old["by_feature.maxima"], copies)
    for name in ("places", "values"):
        new[f"by_feature.{name}"] = np.tile(old[f"by_feature.{name}"], copies)
    new["by_feature.offsets"] = np.concatenate([[0], np.cumsum(np.tile(np.diff(old["by_feature.offsets"]), copies))])
    for order, value in (("by_token", "values"), ("by_vocabulary", "mass")):
        offsets, features = old[f"{order}.offsets"], old[f"{order}.features"]
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        owners = np.tile(owner, copies)
        all_features = (features + BASE * np.arange(copies)[:, None]).reshape(-1)
        sort = np.lexsort((all_features, owners))
        new[f"{order}.features"] = all_features[sort]
        new[f"{order}.{value}"] = np.tile(old[f"{order}.{value}"], copies)[sort]
        new[f"{order}.offsets"] = offsets * copies
    manifest |= {name: manifest[name] * copies for name in ("n_features", "entries", "pairs", "never_active")}
    for name, (dtype, shape) in arrays(manifest).items():
        if name in new:
            np.save(folder / f"{name}.npy", np.ascontiguousarray(new[name], dtype).reshape(shape))
            manifest["files"][f"{name}.npy"]["bytes"] = (folder / f"{name}.npy").stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder
