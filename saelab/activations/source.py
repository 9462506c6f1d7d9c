"""The sources of training batches: the model or a cache. A source can report its position and continue from it."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from saelab.activations.array.rows import Array
from saelab.activations.blocks import Cursor
from saelab.activations.cache.reader import Cache
from saelab.activations.settings import StreamSettings
from saelab.activations.shuffle import Group, cut_group, group_tokens
from saelab.activations.stream import (
    ActivationBatch,
    barren_rows,
    check_losses,
    names_of,
    nothing_kept,
    read_passes,
)
from saelab.corpus import Corpus
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.progress import Track, silent
from saelab.ranks import ALONE, Axis

SAMPLE_TOKENS = 32_768
"""Activations that b_dec, the input scale and the encoder's first scale are set from."""


class Source(Protocol):
    """Shuffled batches of activations without end, of one site or of several side by side."""

    def sample(self) -> Tensor:
        """The first activations, about `SAMPLE_TOKENS`, ``[tokens, d_in]`` float32 on the model's device.

        A run needs it when it begins, not when it resumes: call it before the first batch, on a source opened without
        a state. The batches are the same with and without it.
        """
        ...

    def __iter__(self) -> Iterator[ActivationBatch]: ...

    def __next__(self) -> ActivationBatch: ...

    def state(self) -> dict[str, Any]:
        """Position of the batch that `next` gives, JSON-able.

        A source that starts there gives the same batches; on a CPU with the same number of threads, bit for bit.
        """
        ...

    def close(self) -> None:
        """Frees memory and ends threads; no batch can be read afterwards."""
        ...


class FromModel:
    """A `Source` that runs the model over the training rows of a corpus, epoch after epoch.

    A group is the next `group_tokens` activations in reading order. The activations of a pass past the end of a group
    begin the next one. All batches have `batch_tokens` tokens. To continue within a group, the model reads the group
    again, in the same passes over the same rows.

    Several processes share out the passes: each runs the model on one of the next passes, as many as there are
    processes, and gets the activations of all. So every process has the batches and states that one process has.

    Memory besides one pass of the model, the activations of the other processes' passes, and one batch: on the model's
    device ``tokens * (4 * d_in + 24)`` bytes, with gradients ``tokens * (8 * d_in + 24)``, for the tokens of a group
    or, once `sample` is called, of the sample if that is larger; in main memory 8 bytes for each token of a group, its
    permutation.
    """

    def __init__(
        self,
        lm: LanguageModel,
        corpus: Corpus,
        site: str | Sequence[str],
        stream: StreamSettings,
        *,
        batch_tokens: int,
        seed: int,
        gradients: bool = False,
        special_tokens: bool = False,
        sample_tokens: int = SAMPLE_TOKENS,
        start: Mapping[str, Any] | None = None,
        ranks: Axis = ALONE.every,
        track: Track = silent,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Reads the first group; with `start`, a `state`, the group of the next batch.

        All processes of `ranks` open it with the same arguments and take the same steps. `start` may come from another
        number of processes.

        Raises SaelabError, with site, row and position, if the model gives NaN or infinity; if a whole epoch, or
        `BARREN_ROWS` rows one after the other, give no activation; if `gradients` are asked of rows too short for a
        loss; and if `start` is damaged or comes from another corpus, seed or size of batch.
        """
        if gradients:
            check_losses(corpus)
        self._of = f"{', '.join(names_of(site))} of {lm.name}"
        self._batch_tokens, self._seed, self._sample_tokens = batch_tokens, seed, sample_tokens
        self._group = Group(group_tokens(stream.buffer_tokens, batch_tokens))
        self._gradients, self._rows_per_forward, self._ranks = gradients, stream.rows_per_forward, ranks
        self._read = partial(
            read_passes, lm, site=site, gradients=gradients, special_tokens=special_tokens, ranks=ranks
        )
        if start is not None:
            _check_names(start, ("epoch", "row", "rows", "used", "group", "offset"))
        used = start["used"] if start else 0
        self._number, self._offset = (start["group"], start["offset"]) if start else (0, 0)
        self._rows = _EndlessRows(corpus, seed, say, start)
        self._begin = _ReadPosition(self._rows.state(), used)
        """Position at which the group begins."""
        self._next_pass = _ReadPosition(self._rows.state(), 0)
        """Position at which the pass after the last one that was asked for begins."""
        self._passes = self._run(fresh=start is None)
        self._ahead: deque[tuple[_ReadPosition, ActivationBatch]] = deque()
        """Activations that have been read for later groups, each part with the position at which it begins."""
        self._cuts: list[np.ndarray] = []
        if used:
            position, batch = next(self._passes)
            if used >= len(batch):
                raise SaelabError(
                    f"activations: the state to resume from begins after {used} activations of a forward pass that "
                    f"gives {len(batch)}; use the earlier settings, or start again without the state"
                )
            self._ahead.append((position._replace(used=used), batch[used:]))
        self._next_group(track)

    def __repr__(self) -> str:
        batches = f"batches of {self._batch_tokens:,} tokens"
        return f"FromModel({self._of}, {batches}, group {self._number}, epoch {self._next_pass.rows['epoch']})"

    def sample(self) -> Tensor:
        for _ in self._collect(self._sample_tokens):
            pass
        parts = [self._group.content.values[: self._sample_tokens], *(batch.values for _, batch in self._ahead)]
        return torch.cat(parts)[: self._sample_tokens]

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        if not self._cuts:
            self._next_group()
        batch = self._group.content[torch.from_numpy(self._cuts.pop())]
        self._offset += len(batch)
        if not self._cuts:
            self._number, self._offset = self._number + 1, 0
            self._begin = self._ahead[0][0] if self._ahead else self._next_pass
        return batch

    def state(self) -> dict[str, Any]:
        rows, used = self._begin
        return deepcopy(rows) | {"used": used, "group": self._number, "offset": self._offset}

    def close(self) -> None:
        self._passes.close()
        self._group = Group(self._group.capacity)
        self._ahead.clear()
        self._cuts.clear()

    def _next_group(self, track: Track = silent) -> None:
        """Read a group, and cut it into batches."""
        self._group.clear()
        for _ in track(self._collect(self._group.capacity), "first buffer", self._group.capacity, int):
            pass
        cuts = cut_group(self._group.tokens, self._batch_tokens, self._seed, self._number, offset=self._offset)
        self._cuts = cuts[::-1]

    def _collect(self, tokens: int) -> Iterator[int]:
        """Read until the group and what is read ahead have `tokens`; yields the tokens that each pass adds."""
        self._fill()
        while self._group.tokens + sum(len(batch) for _, batch in self._ahead) < tokens:
            self._ahead.append(next(self._passes))
            added = len(self._ahead[-1][1])
            self._fill()
            yield added

    def _fill(self) -> None:
        """Move activations that were read ahead into the group while there is room."""
        while self._ahead and self._group.tokens < self._group.capacity:
            position, batch = self._ahead.popleft()
            rest = self._group.add(batch)
            if len(rest):
                self._ahead.appendleft((position._replace(used=position.used + len(batch) - len(rest)), rest))

    def _run(self, *, fresh: bool) -> Generator[tuple["_ReadPosition", ActivationBatch], None, None]:
        """The activations of each pass of the model that gives any, with the position at which it begins."""
        useful = self._rows.epoch - fresh  # the last epoch that gave an activation, or may have
        barren = 0
        while True:
            blocks, positions = [], [self._next_pass]
            for _ in range(self._ranks.size):
                blocks.append(list(islice(self._rows, self._rows_per_forward)))
                positions.append(_ReadPosition(self._rows.state(), 0))
            for i, batch in enumerate(self._read(blocks=blocks, first_row=positions[0].rows["row"])):
                self._next_pass, kept = positions[i + 1], len(batch)
                epoch = self._next_pass.rows["epoch"]
                if kept:
                    useful = epoch
                    yield positions[i], batch
                del batch  # the next pass needs the memory
                barren = barren_rows(barren, self._rows_per_forward, kept, gradients=self._gradients)
                if epoch > useful + 1:
                    raise nothing_kept("its training rows", self._gradients)


class FromCache:
    """A `Source` that reads a cache (cache/reader.py), or an array (array/rows.py), epoch after epoch.

    Memory: as for `Cache.batches`; after `sample`, also the batches of the sample that were not yet given.
    """

    def __init__(
        self,
        cache: Cache | Array,
        site: str | Sequence[str],
        *,
        batch_tokens: int,
        seed: int,
        buffer_tokens: int,
        gradients: bool = False,
        device: torch.device | str = "cpu",
        start: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the cache at its beginning, or at `start`, a `state`.

        Raises SaelabError as `Cache.batches` does, and if `start` does not come from a cache.
        """
        if start is not None:
            _check_names(start, asdict(Cursor()))
        self._read = cache.batches(
            site,
            batch_tokens,
            seed=seed,
            buffer_tokens=buffer_tokens,
            gradients=gradients,
            start=Cursor(**start or {}),
        )
        self._sample_tokens, self._device = min(SAMPLE_TOKENS, cache.tokens), device
        self._of, self._batch_tokens = f"{', '.join(names_of(site))} in {cache.folder}", batch_tokens
        self._ahead: deque[tuple[Cursor, ActivationBatch]] = deque()
        """Batches that have been read, each with its position."""

    def __repr__(self) -> str:
        return f"FromCache({self._of}, batches of at most {self._batch_tokens:,} tokens, {self._read.cursor})"

    def sample(self) -> Tensor:
        while sum(len(batch) for _, batch in self._ahead) < self._sample_tokens:
            self._ahead.append((self._read.cursor, next(self._read)))
        return torch.cat([batch.values for _, batch in self._ahead]).to(self._device).float()

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        return self._ahead.popleft()[1] if self._ahead else next(self._read)

    def state(self) -> dict[str, Any]:
        return asdict(self._ahead[0][0] if self._ahead else self._read.cursor)

    def close(self) -> None:
        self._ahead.clear()
        self._read.close()


class _ReadPosition(NamedTuple):
    """A position between two activations of the model, in reading order."""

    rows: dict[str, Any]
    """`_EndlessRows.state` before the pass of the model that gives the second one."""
    used: int
    """Number of activations of that pass before the second one."""


class _EndlessRows(Iterator[np.ndarray]):
    """The training rows of a corpus, epoch after epoch, each in an order of its own."""

    def __init__(self, corpus: Corpus, seed: int, say: Callable[[str], None], start: Mapping[str, Any] | None) -> None:
        self._corpus, self._seed, self._say = corpus, seed, say
        self.epoch: int = start["epoch"] if start else 0
        """Number of the epoch that is being read."""
        self._number: int = start["row"] if start else 0
        """Rows of all epochs read so far."""
        self._rows = corpus.train_rows(seed=seed, epoch=self.epoch, start=start["rows"] if start else None)

    def __next__(self) -> np.ndarray:
        while (row := next(self._rows, None)) is None:
            self.epoch += 1
            self._say(f"the corpus came to its end: epoch {self.epoch + 1} begins")
            self._rows = self._corpus.train_rows(seed=self._seed, epoch=self.epoch)
        self._number += 1
        return row

    def state(self) -> dict[str, Any]:
        """JSON-able state: with it as `start`, the same rows come next."""
        return {"epoch": self.epoch, "row": self._number, "rows": self._rows.state()}


def _check_names(state: Mapping[str, Any], names: Iterable[str]) -> None:
    if state.keys() != set(names):
        raise SaelabError(
            f"activations: the state to resume from has {', '.join(sorted(state)) or 'nothing'} instead of "
            f"{', '.join(sorted(names))}; use the earlier settings, or start again without the state"
        )
