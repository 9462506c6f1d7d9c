"""An array as a run reads it: the first rows are trained on, in shuffled batches, and the last ones are held out.

An `Array` stands where a language model and its text stand in other runs. A row of the array is a token: its id is the
number of the row, and it is alone in its context, so rows of ids are ``[rows, 1]``.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.activations.array.files import Part, open_parts, shared_dtype
from saelab.activations.blocks import BEGINNING, Cursor, Shuffled, capacity
from saelab.activations.settings import ArraySource
from saelab.activations.stream import ActivationBatch, names_of
from saelab.errors import SaelabError
from saelab.files import translate_read_errors
from saelab.tensors import raw

BLOCK_TOKENS = 1024
"""Rows that are read together."""
HASHED_BYTES = 1 << 26
"""The content of a larger array is not hashed whole but at this many bytes of it."""
_STRETCHES = 1024
"""Equal distances at which they lie."""
_LONGEST_LABEL = 1000
"""Characters of a label that are kept."""


class Array:
    """The rows of an array on disk. Made by `open_array`."""

    block_tokens = BLOCK_TOKENS

    def __init__(self, source: ArraySource, parts: list[Part], held_out: float, device: torch.device) -> None:
        self.folder = Path(source.path)
        self.name = self.folder.name
        self.device = device
        self.d_in = parts[0].width
        self.dtype = shared_dtype(parts)
        """The dtype that batches have."""
        self._source, self._parts = source, parts
        self._ends = np.cumsum([part.rows for part in parts])
        self.rows = int(self._ends[-1])
        held = math.ceil(self.rows * held_out)
        self.tokens = self.rows - held
        """Rows that are trained on: all but the last ones, which are held out."""
        if not self.tokens:
            raise SaelabError(
                f"activations: {self.folder} has {self.rows:,} rows, of which {held:,} are held out, so none is left "
                "to train on; use a longer array"
            )

    def __repr__(self) -> str:
        return f"Array({self.about})"

    @property
    def about(self) -> str:
        kinds = ", ".join(sorted({str(part.dtype).removeprefix("torch.") for part in self._parts}))
        files = f" in {len(self._parts):,} files" if len(self._parts) > 1 else ""
        held_out = f"the last {self.rows - self.tokens:,} are held out"
        return f"{self.folder}: {self.rows:,} rows x {self.d_in:,}, {kinds}{files}; {held_out}"

    # what a language model gives in other runs

    def width(self, site: str) -> int:
        """d_in, whatever the site is called."""
        return self.d_in

    def ordinary(self, rows: Tensor) -> Tensor:
        """True for every row: there are no special tokens."""
        return torch.ones_like(rows, dtype=torch.bool)

    def activations(self, rows: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        """The rows of the array whose numbers are `rows` ``[rows, 1]``: ``[rows, 1, d_in]`` by site.

        Raises SaelabError, with file and row, if a number is NaN or infinite.
        """
        found = self._take(rows.flatten().cpu().numpy()).to(self.device).view(*rows.shape, self.d_in)
        return dict.fromkeys(sites, found)

    # what a corpus gives in other runs

    def held_out_rows(self, tokens: int) -> np.ndarray:
        """The numbers of the first `tokens` held-out rows, or of all, ``[rows, 1]`` int64."""
        return np.arange(self.tokens, min(self.tokens + tokens, self.rows))[:, None]

    def train_rows(self, tokens: int) -> np.ndarray:
        """The numbers of `tokens` rows that are trained on, at equal distances, or of all, ``[rows, 1]`` int64."""
        n = min(tokens, self.tokens)
        return (np.arange(n) * self.tokens // n)[:, None]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The facts that decide the activations of the rows, and which are held out.

        The content counts by a hash, of `HASHED_BYTES` at equal distances if there are more: a hash of 100 GB would
        take minutes. So another file is noticed, and a change of single rows between those read may not be.
        """
        digest = hashlib.sha256()
        bytes_of_row = max(part.dtype.itemsize for part in self._parts) * self.d_in
        most = max(_STRETCHES, HASHED_BYTES // bytes_of_row)
        if self.rows <= most:
            stretches = [(start, min(start + BLOCK_TOKENS, self.rows)) for start in range(0, self.rows, BLOCK_TOKENS)]
        else:
            length = most // _STRETCHES
            starts = np.linspace(0, self.rows - length, _STRETCHES).astype(np.int64).tolist()
            stretches = [(start, start + length) for start in starts]
        for start, stop in stretches:
            for part, _, rows in self._split(np.arange(start, stop)):
                digest.update(raw(part.take(rows)))
        kinds = [[part.rows, str(part.dtype).removeprefix("torch.")] for part in self._parts]
        return {
            "rows": self.rows,
            "d_in": self.d_in,
            "files": kinds,
            "sha256": digest.hexdigest(),
            "trained": self.tokens,
        }

    @property
    def fingerprint(self) -> str:
        """Hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

    # labels

    @cached_property
    def labels_fingerprint(self) -> str | None:
        """Hash of the file of labels; None if there is none."""
        if self._source.labels is None:
            return None
        path = Path(self._source.labels)
        with translate_read_errors(path, "labels", "Write the file again."), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def words(self, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Token ids of held-out rows, the first ones, ``[rows, 1]`` int32, and the text of each id.

        Rows with equal labels have one id; without labels, each row has its own, whose text is ``row NUMBER``. Raises
        SaelabError if the labels cannot be read, or if there is not one for each row of the array.
        """
        numbers = rows.flatten()
        if self._source.labels is None:
            return np.arange(len(numbers), dtype=np.int32)[:, None], [f"row {number}" for number in numbers.tolist()]
        labels = self._labels(Path(self._source.labels), int(numbers[0]), int(numbers[-1]) + 1)
        ids = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return np.array([ids[label] for label in labels], np.int32)[:, None], list(ids)

    def _labels(self, path: Path, first: int, stop: int) -> list[str]:
        lines = 0
        found: list[str] = []
        with translate_read_errors(path, "labels", "Write the file again."), path.open(encoding="utf-8") as file:
            for lines, line in enumerate(file, 1):
                if first < lines <= stop:
                    found.append(_label(path, line.rstrip("\n"), lines)[:_LONGEST_LABEL])
        if lines != self.rows:
            raise SaelabError(
                f"activations.array.labels: {path} has {lines:,} lines, and the array {self.rows:,} rows; it needs a "
                "line for each row"
            )
        return found

    # blocks to train on (`blocks.Blocks`)

    def batches(
        self,
        site: str | Sequence[str],
        batch_tokens: int,
        *,
        seed: int,
        buffer_tokens: int = 131_072,
        gradients: bool = False,
        start: Cursor = BEGINNING,
    ) -> Shuffled:
        """Every row that is trained on once per epoch, globally shuffled, epoch after epoch, from `start` on.

        Memory: ``2 * buffer_tokens * (d_in * bytes of the dtype + 8)``. Raises SaelabError if there are several sites,
        or if `gradients` are asked.
        """
        if gradients:
            raise SaelabError(f"activations: {self.folder} has no gradients")
        if len(sites := names_of(site)) > 1:
            raise SaelabError(f"site: {self.folder} is one array, so {', '.join(sites)} would all be the same")
        return Shuffled(self, batch_tokens, seed, buffer_tokens, start)

    def group_capacity(self, buffer_tokens: int) -> int:
        """Rows in each of the two buffers of `batches`."""
        return capacity(self, buffer_tokens)

    def token_bytes(self, site: str | Sequence[str], *, gradients: bool = False) -> int:
        """Bytes of a row in the buffers of `batches`: its numbers, and its own number in int64."""
        return self.d_in * self.dtype.itemsize + 8

    @property
    def n_blocks(self) -> int:
        return -(-self.tokens // BLOCK_TOKENS)

    def memory(self, tokens: int) -> list[Tensor]:
        return [torch.empty(tokens, self.d_in, dtype=self.dtype), torch.empty(tokens, dtype=torch.long)]

    def announce(self, number: int) -> None:
        """Nothing: the system reads a mapped file ahead by itself."""

    def read(self, number: int, columns: list[Tensor], at: int) -> int:
        rows = np.arange(number * BLOCK_TOKENS, min((number + 1) * BLOCK_TOKENS, self.tokens))
        columns[0][at : at + len(rows)] = self._take(rows)
        columns[1][at : at + len(rows)] = torch.from_numpy(rows)
        return len(rows)

    def batch(self, columns: list[Tensor]) -> ActivationBatch:
        values, rows = columns
        return ActivationBatch(values, rows, rows, torch.zeros_like(rows))

    # reading

    def _take(self, rows: np.ndarray) -> Tensor:
        """The rows with these numbers, ``[rows, d_in]`` of `dtype`. Raises SaelabError, with file and row, if a number
        is NaN or infinite in that dtype."""
        found = torch.empty(len(rows), self.d_in, dtype=self.dtype)
        for part, index, own in self._split(rows):
            values = part.take(own).to(self.dtype)
            if not (finite := torch.isfinite(values).all(1)).all():
                row = int(own[int((~finite).nonzero()[0])])
                raise SaelabError(
                    f"{part.path}: row {row} has NaN, infinity, or a number that is too large for float32; remove or "
                    "replace such rows"
                )
            found[torch.from_numpy(index)] = values
        return found

    def _split(self, rows: np.ndarray) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
        """For each file that has some of `rows`: it, the places of those in `rows`, and their numbers in the file."""
        owner = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(owner).tolist():
            index = np.flatnonzero(owner == number)
            part = self._parts[number]
            yield part, index, rows[index] - (int(self._ends[number]) - part.rows)


def open_array(source: ArraySource, held_out: float, device: torch.device | str = "cpu") -> Array:
    """The array of `source`, of which the share `held_out` of the rows, the last ones, is held out.

    Raises SaelabError as `open_parts` does, and if no row is left to train on.
    """
    return Array(source, open_parts(Path(source.path), source.tensor), held_out, torch.device(device))


def _label(path: Path, line: str, number: int) -> str:
    """The label in a line: the line, or in a .jsonl file the text or number there."""
    if path.suffix != ".jsonl":
        return line
    value = json.loads(line)
    if isinstance(value, Mapping | list) or value is None:
        raise SaelabError(f"{path}: line {number} is not one text or number; write one label in each line")
    return str(value)
