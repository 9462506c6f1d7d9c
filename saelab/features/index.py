"""Writes the feature database of a run: one pass over held-out text, of which a stopped one continues.

`open_index` opens the database in the making. The blocks of the pass go to `add`, which keeps them in shards on disk
(shards.py); `finish` merges the shards (facts_writer.py), adds the columns that need no text, and puts the new database
in the place of the old one.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.activations.array.rows import Array
from saelab.activations.sites import Sites, as_sites
from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.features import coactivation
from saelab.features.array_files import ArrayWriter
from saelab.features.coactivation import coactive_columns
from saelab.features.facts_writer import write_activations, write_text
from saelab.features.layout import EARLIER, FORMAT, MANIFEST, MOST_PLACES, SIZES, UNFINISHED, VERSION, WEIGHTS, arrays
from saelab.features.shards import Shard, ShardWriter, Totals, total
from saelab.features.token_bytes import token_bytes
from saelab.features.weights import weight_columns
from saelab.files import recover_folder, replace_folder, translate_errors, write_json
from saelab.lm.attention import direct_lens
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class Index:
    """A database in the making. `add` takes the blocks of `rows` from row `first_row` on, in order; then `finish`."""

    sae: SparseAutoencoder
    lm: LanguageModel | Array
    rows: Tensor
    """Token ids ``[rows, context]``, on the CPU; of an array the numbers of its rows."""
    sites: Sites
    folder: Path
    inputs: str
    shards: ShardWriter

    @property
    def first_row(self) -> int:
        """The first row whose codes are not on disk yet: 0, or where a stopped pass continues."""
        return self.shards.first_row

    def add(self, block: Block) -> None:
        """Add the next block. Raises SaelabError if a shard cannot be written; finished ones are kept."""
        self.shards.add(block)

    def finish(self) -> dict[str, Any]:
        """Write the database and put it in the place of an earlier one; returns its manifest.

        Raises SaelabError if it cannot be written, or if the rows have no ordinary token; the shards are then kept.
        """
        shards = self.shards.finish()
        kept = "what is encoded is kept"
        with translate_errors(self.folder, kept=kept), replace_folder(self.folder) as unfinished:
            return self._write(unfinished, shards, total(shards))

    def _write(self, folder: Path, shards: list[Shard], totals: Totals) -> dict[str, Any]:
        rows, vocabulary = self._text()
        counted = {
            "rows": self.rows.shape[0],
            "context": self.rows.shape[1],
            "n_features": self.sae.n_features,
            "entries": int(totals.counts.sum()),
            "vocabulary": len(vocabulary),
            "vocabulary_bytes": sum(map(len, vocabulary)),
            "pairs": 0,  # known once they are written
        }
        writer = ArrayWriter(folder, counted)
        write_text(writer, rows, self._occurrences(rows, len(vocabulary)), vocabulary)
        write_activations(writer, shards, totals, rows)
        mapped = writer.mapped("by_feature", "by_token")
        writer.write_columns(coactivation.COLUMNS, coactive_columns(mapped, totals.tokens))
        lens, names = None, [self.lm.name]
        if not isinstance(self.lm, Array):
            names = [model.name for model in self.lm.models]
            if not self.sites.more:
                lens = direct_lens(self.lm, self.sites.outputs[0])
        writer.write_columns(list(WEIGHTS), weight_columns(self.sae, lens))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "inputs": self.inputs,
            **writer.sizes,
            "n_tokens": totals.tokens,
            "never_active": int((totals.counts == 0).sum()),
            "site": self.sites.input,
            **({} if self.sites.target is None else {"target": self.sites.target}),
            **({"more_sites": list(self.sites.more)} if self.sites.more else {}),
            **dict(zip(("model", "second_model"), names, strict=False)),
            "d_in": self.sae.d_in,
            "k": self.sae.k,
            "lens": lens and lens.words,
        }
        if isinstance(self.lm, Array):
            manifest["first_row"] = int(self.rows[0, 0])
        files = {f"{name}.npy": writer.files[f"{name}.npy"] for name in arrays(writer.sizes)}
        write_json(folder / MANIFEST, manifest | {"files": files})
        return manifest

    def _text(self) -> tuple[np.ndarray, list[bytes]]:
        """The token ids ``[rows, context]``, and the bytes of each token of the vocabulary."""
        if isinstance(self.lm, Array):
            ids, labels = self.lm.words(self.rows.numpy())
            return ids, [label.encode(errors="replace") for label in labels]
        return self.rows.numpy(), token_bytes(self.lm.tokenizer, len(self.lm.unembedding))

    def _occurrences(self, rows: np.ndarray, vocabulary: int) -> np.ndarray:
        """Occurrences of each token id among the ordinary tokens, ``[vocabulary]`` int64."""
        counts = torch.zeros(vocabulary, dtype=torch.long)
        for ids in torch.from_numpy(rows).split(max(1, (1 << 20) // rows.shape[1])):
            counts += torch.bincount(ids[self.lm.ordinary(ids)], minlength=vocabulary)
        return counts.numpy()


def open_index(
    sae: SparseAutoencoder,
    lm: LanguageModel | Array,
    rows: Tensor,
    site: str | Sites,
    folder: Path,
    rows_per_forward: int,
    inputs: str,
) -> Index:
    """The database of `rows` ``[rows, context]``, to be written to `folder`. One writer at a time (`files.locked`).

    `inputs` is recorded: a hash of what the database is made from. What a stopped pass over the same rows with the same
    `inputs` has written is kept; that of another is removed. Raises SaelabError if `folder` contains anything but a
    database or cannot be written, or if the rows have more than 2^31 - 1 places.
    """
    _check_replaceable(folder)
    if rows.numel() > MOST_PLACES:
        raise SaelabError(
            f"features.tokens: the text has {rows.numel():,} places, special tokens included, and a database takes at "
            f"most {MOST_PLACES:,}; set features.tokens to less"
        )
    rows = rows.cpu()
    identity = {
        "version": VERSION,
        "inputs": inputs,
        "rows": rows.shape[0],
        "context": rows.shape[1],
        "n_features": sae.n_features,
        "rows_per_forward": rows_per_forward,
        "tokens": _tokens_hash(rows),
    }
    with translate_errors(folder):
        recover_folder(folder)  # a killed writer may have been about to replace the database
    return Index(sae, lm, rows, as_sites(site), folder, inputs, ShardWriter(folder / UNFINISHED, identity))


def _tokens_hash(rows: Tensor) -> str:
    digest = hashlib.sha256()
    for part in rows.split(max(1, (1 << 20) // rows.shape[1])):
        digest.update(part.to(torch.int32).contiguous().numpy().data)
    return digest.hexdigest()


def _check_replaceable(folder: Path) -> None:
    """Raises SaelabError if `folder` contains anything but a feature database."""
    known = {MANIFEST, UNFINISHED, *EARLIER, *(f"{name}.npy" for name in arrays(dict.fromkeys(SIZES, 0)))}
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in known and path.suffix != ".tmp":
            raise SaelabError(
                f"{folder}: contains {path.name}, which is no part of a feature database; choose another folder"
            )
