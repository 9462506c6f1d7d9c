"""Writes the feature database of a run: one pass over held-out text, of which a stopped one continues.

`open_index` opens the database in the making. The blocks of the pass go to `add`, which keeps them in shards on disk
(shards.py); `finish` merges the shards (merge.py), computes the tables while it does, and puts the new database in the
place of the old one.
"""

import hashlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saelab.encoded import Block
from saelab.errors import SaelabError
from saelab.features.contexts import ContextsFile
from saelab.features.layout import CONTEXTS, FACTS, FEATURES, MOST_PLACES, SUMMARY, UNFINISHED, VERSION
from saelab.features.merge import write_facts
from saelab.features.settings import FeatureSettings
from saelab.features.shards import ShardWriter, Totals, total
from saelab.features.statistics import Statistics
from saelab.features.weights import displayed_vocabulary, neighbours, top_logits
from saelab.files import recover_folder, replace_folder, translate_errors, write_json
from saelab.lm.model import LanguageModel
from saelab.sae.model import SparseAutoencoder

_ROW_GROUP = 1024
"""Features in a row group of the table: a reader of one feature decodes one group, so those are small."""


@dataclass(frozen=True)
class Index:
    """A database in the making. `add` takes the blocks of `rows` from row `first_row` on, in order; then `finish`."""

    sae: SparseAutoencoder
    lm: LanguageModel
    rows: Tensor
    """Token ids ``[rows, context]``, on the CPU."""
    site: str
    folder: Path
    settings: FeatureSettings
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
        """Write the database and put it in the place of an earlier one; returns its summary.

        Raises SaelabError if it cannot be written, or if the rows have no ordinary token; the shards are then kept.
        """
        shards = self.shards.finish()
        totals = total(shards)
        statistics = Statistics(totals)
        vocabulary = displayed_vocabulary(self.lm.tokenizer, len(self.lm.unembedding))
        summary = self._summary(totals)
        extra = totals.counts.clamp_max(self.settings.contexts) * self.settings.window  # cells of the contexts' windows
        kept = "what is encoded is kept"
        with translate_errors(self.folder, kept=kept), replace_folder(self.folder) as unfinished:
            facts = unfinished / FACTS
            facts.mkdir()
            with closing(ContextsFile(unfinished / CONTEXTS, self.rows, self.settings, vocabulary)) as contexts:
                for activity in write_facts(facts, shards, totals, self.rows, self.inputs, extra):
                    statistics.add(activity)
                    contexts.add(activity)
            of_weights = top_logits(self.sae, self.lm, self.site, vocabulary) | neighbours(self.sae.W_dec)
            _write_table(unfinished / FEATURES, statistics, of_weights, self.sae.n_features)
            write_json(unfinished / SUMMARY, summary)
        return summary

    def _summary(self, totals: Totals) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "n_tokens": totals.tokens,
            "n_features": self.sae.n_features,
            "never_active": int((totals.counts == 0).sum()),
            "k": self.sae.k,
            "site": self.site,
            "model": self.lm.name,
            "d_in": self.sae.d_in,
        }


def open_index(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    rows: Tensor,
    site: str,
    folder: Path,
    settings: FeatureSettings,
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
    contexts, window = min(settings.contexts, len(rows)), min(settings.window, rows.shape[1])  # as many as there can be
    settings = replace(settings, contexts=contexts, window=window)
    identity = {
        "version": VERSION,
        "inputs": inputs,
        "rows": rows.shape[0],
        "context": rows.shape[1],
        "n_features": sae.n_features,
        "rows_per_forward": settings.rows_per_forward,
        "tokens": _tokens_hash(rows),
    }
    with translate_errors(folder):
        recover_folder(folder)  # a killed writer may have been about to replace the database
    return Index(sae, lm, rows, site, folder, settings, inputs, ShardWriter(folder / UNFINISHED, identity))


def _tokens_hash(rows: Tensor) -> str:
    digest = hashlib.sha256()
    for part in rows.split(max(1, (1 << 20) // rows.shape[1])):
        digest.update(part.to(torch.int32).contiguous().numpy().data)
    return digest.hexdigest()


def _check_replaceable(folder: Path) -> None:
    """Raises SaelabError if `folder` holds anything but a feature database."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in (FEATURES, CONTEXTS, SUMMARY, FACTS, UNFINISHED) and path.suffix != ".tmp":
            raise SaelabError(
                f"{folder}: holds {path.name}, which is no part of a feature database; choose another folder"
            )


def _write_table(path: Path, statistics: Statistics, of_weights: Mapping[str, pa.Array], n_features: int) -> None:
    """Write features.parquet: a line per feature, with its statistics and what its weights say."""
    writer = None
    for first in range(0, n_features, _ROW_GROUP):
        columns = statistics.columns(first, min(first + _ROW_GROUP, n_features))
        table = pa.table(columns | {name: column.slice(first, _ROW_GROUP) for name, column in of_weights.items()})
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None, "an autoencoder has features"
    writer.close()
