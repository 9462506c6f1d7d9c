"""Activations straight from the model, in reading order; nothing is written to disk."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from saelab.corpus import Corpus
from saelab.errors import SaelabError, SettingError
from saelab.lm.model import LanguageModel
from saelab.ranks import ALONE, Axis
from saelab.tensors import kind

BARREN_ROWS = 4096
"""Rows one after the other that give no activation, after which reading ends: a text may have no end, and no usable
text is like that."""

WIDER = "a wider `model: {dtype: float32}` may help"


@dataclass(frozen=True)
class ActivationBatch:
    """Activations of some tokens, with the row and position of each."""

    values: Tensor
    """``[tokens, d_in]``: float32 from the model, in the cache's dtype from a cache. Those of several sites are side by
    side, and d_in is the sum of their widths."""
    tokens: Tensor
    """Token ids, ``[tokens]`` int64."""
    rows: Tensor
    """Number of the row, in reading order, ``[tokens]`` int64."""
    positions: Tensor
    """Position in the row, counted from 0, ``[tokens]`` int64."""
    gradients: Tensor | None = None
    """Gradients of the model's loss at the site (`LanguageModel.activations_and_gradients`), ``[tokens, d_in]``:
    float32 from the model, in the cache's dtype from a cache."""

    def __repr__(self) -> str:
        gradients = "" if self.gradients is None else ", with gradients"
        return f"ActivationBatch({len(self):,} tokens, d_in {self.values.shape[1]:,}, {kind(self.values)}{gradients})"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors, in the order above; gradients only if there are any."""
        fields = (self.values, self.tokens, self.rows, self.positions)
        return fields if self.gradients is None else (*fields, self.gradients)

    def __getitem__(self, index: Tensor | slice) -> "ActivationBatch":
        """The tokens at `index`: a copy for indices, a view for a slice."""
        return ActivationBatch(*(field[index] for field in self.fields))

    def columns(self, start: int, stop: int) -> "ActivationBatch":
        """The batch of one site, whose values and gradients are the columns from `start` up to `stop` of several.

        A copy, unless these are all columns: arithmetic on parts of rows may differ in the last bits.
        """
        gradients = None if self.gradients is None else self.gradients[:, start:stop].contiguous()
        return replace(self, values=self.values[:, start:stop].contiguous(), gradients=gradients)


def joined(parts: Sequence[ActivationBatch]) -> ActivationBatch:
    """The batch of several sites side by side, from those of the sites; of one site not a copy."""
    return replace(parts[0], values=side_by_side([part.values for part in parts])) if len(parts) > 1 else parts[0]


class ActivationModel(Protocol):
    """What gives the activations of rows of ids: a language model, or an array (array/rows.py), whose ids are rows."""

    name: str

    @property
    def device(self) -> torch.device: ...

    def width(self, site: str) -> int:
        """d_in of a site."""
        ...

    def ordinary(self, rows: Tensor) -> Tensor:
        """True where a token is not special, bool ``[rows, context]``."""
        ...

    def activations(self, rows: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        """Activations by site, ``[rows, context, d_in]``."""
        ...


class Pass(NamedTuple):
    """Result of one pass of the model over some rows."""

    kept: Tensor
    """Positions whose activations are kept, bool ``[rows, context]``."""
    activations: dict[str, Tensor]
    """Activations by site, ``[tokens kept, d_in]`` in the model's dtype, row by row."""
    gradients: dict[str, Tensor]
    """Gradients of the model's loss by site, ``[tokens kept, d_in]`` float32; empty if not requested."""


def run_model(
    lm: ActivationModel, ids: Tensor, sites: Sequence[str], *, gradients: bool = False, special_tokens: bool = False
) -> Pass:
    """One pass over `ids` ``[rows, context]``: the activations at ordinary tokens, or at all with `special_tokens`.

    With `gradients`, also the gradients of the model's loss. Positions after a row's last scored one (its last token,
    and the one before a special token that ends it) are then left out: no loss depends on them at any site, so a
    gradient of 0 says nothing about them. If no position is kept, the model runs on the first row only.
    """
    with_losses = cast(LanguageModel, lm)  # as a model is of which gradients are asked
    ids = ids.to(lm.device).long()
    kept = torch.ones_like(ids, dtype=torch.bool) if special_tokens else lm.ordinary(ids)
    slopes: dict[str, Tensor] = {}
    if gradients:
        kept = kept & (with_losses.scored(ids).flip(1).cumsum(1).flip(1) > 0)
    read = slice(None) if kept.any() else slice(1)
    if gradients:
        values, slopes = with_losses.activations_and_gradients(ids[read], sites)
    else:
        values = lm.activations(ids[read], sites)
    picked = kept[read]
    return Pass(kept, {site: values[site][picked] for site in sites}, {site: slopes[site][picked] for site in slopes})


def names_of(site: str | Sequence[str]) -> list[str]:
    """The names of one site, or of several, in their order."""
    return [site] if isinstance(site, str) else list(site)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Tensors ``[tokens, d]`` of several sites as one, ``[tokens, sum of d]``; of one site not a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def check_losses(corpus: Corpus) -> None:
    """Raises SettingError if rows of `corpus` are too short for a loss, as gradients and evaluation need.

    A position has a loss if it and the next one hold ordinary tokens, so a row needs two of them.
    """
    special = int(corpus.bos is not None)
    if corpus.context - special < 2:
        raise SettingError(
            f"context: {corpus.context} leaves room for one token after BOS, so no position has a loss, which the "
            f"gradient affinity and evaluation need; set context={special + 2} or more"
        )


def barren_rows(before: int, rows: int, kept: int, *, gradients: bool) -> int:
    """Number of rows since the last activation that was kept: `before`, and `rows` more if none of theirs is `kept`.

    Raises SaelabError if there are `BARREN_ROWS`.
    """
    if kept:
        return 0
    if before + rows >= BARREN_ROWS:
        raise nothing_kept(f"{before + rows:,} rows one after the other", gradients)
    return before + rows


def nothing_kept(rows: str, gradients: bool) -> SaelabError:
    """The error of a corpus in which `rows`, in words, give no activation."""
    last = ", or the last that the loss of their row depends on" if gradients else ""
    larger = " or a larger `context`" if gradients else ""
    return SaelabError(
        f"corpus: {rows} hold special tokens only{last}, so there is nothing to train on; use another corpus{larger}"
    )


def provenance(lm: LanguageModel, corpus: Corpus, *, special_tokens: bool = False) -> dict[str, Any]:
    """The facts that decide the activations of a corpus, apart from sites, order and the size of a pass."""
    second = {}
    for other in lm.models[1:]:
        second = {"second_weights": other.fingerprint, "second_model_dtype": str(other.dtype).removeprefix("torch.")}
    return {
        "weights": lm.fingerprint,
        "model_dtype": str(lm.dtype).removeprefix("torch."),
        **second,
        "tokenizer": corpus.identity["tokenizer"],
        "corpus": {name: fact for name, fact in corpus.identity.items() if name not in ("tokenizer", "context")},
        "context": corpus.context,
        "bos": corpus.bos,
        "special_tokens": special_tokens,
    }


def read_activations(
    lm: ActivationModel,
    rows: Iterable[np.ndarray],
    site: str | Sequence[str],
    rows_per_forward: int,
    *,
    first_row: int = 0,
    gradients: bool = False,
    special_tokens: bool = False,
) -> Iterator[ActivationBatch]:
    """The activations that `run_model` keeps of all `rows`, in reading order, one batch per pass that gives any.

    Several sites share a pass. `first_row` is the number of the first row. Raises SaelabError, with site, row and
    position, if the model gives NaN or infinity, and if `BARREN_ROWS` rows one after the other give no activation.
    """
    rows, first, barren = iter(rows), first_row, 0
    while block := list(islice(rows, rows_per_forward)):
        passes = read_passes(lm, [block], site, first_row=first, gradients=gradients, special_tokens=special_tokens)
        for batch in passes:
            barren = barren_rows(barren, len(block), len(batch), gradients=gradients)
            if len(batch):
                yield batch
            del batch  # the next pass needs the memory
        first += len(block)


def read_passes(
    lm: ActivationModel,
    blocks: Sequence[Sequence[np.ndarray]],
    site: str | Sequence[str],
    *,
    first_row: int = 0,
    gradients: bool = False,
    special_tokens: bool = False,
    ranks: Axis = ALONE.every,
) -> Iterator[ActivationBatch]:
    """The activations of one pass of the model over each of `blocks`, in order; of a pass that gives none too.

    There are as many blocks as processes. Each process runs the model on one block and gets the activations of all.
    Raises SaelabError, with site, row and position, if the model gives NaN or infinity: on all processes, when they
    come to that pass.
    """
    sites, block = names_of(site), blocks[ranks.rank]
    ids = torch.from_numpy(np.stack(block))
    kept, values, slopes = run_model(lm, ids, sites, gradients=gradients, special_tokens=special_tokens)
    row, position = kept.nonzero(as_tuple=True)
    row += first_row + sum(map(len, blocks[: ranks.rank]))
    widths = [values[name].shape[1] for name in sites]
    own = ActivationBatch(
        side_by_side([values.pop(name) for name in sites]),
        ids.to(lm.device).long()[kept],
        row,
        position,
        side_by_side([slopes.pop(name) for name in sites]) if gradients else None,
    )
    found = deque(ActivationBatch(*fields) for fields in zip(*map(ranks.gather, own.fields), strict=True))
    del own, row, position
    while found:
        batch = found.popleft()
        slope = None if batch.gradients is None else batch.gradients.split(widths, 1)
        for i, (name, value) in enumerate(zip(sites, batch.values.split(widths, 1), strict=True)):
            check_finite(f"{name}: {lm.name}", "activations", value, batch.rows, batch.positions)
            if slope is not None:
                check_finite(f"{name}: {lm.name}", "gradients", slope[i], batch.rows, batch.positions)
        del slope
        batch = replace(batch, values=batch.values.float())
        yield batch
        del batch  # the next pass needs the memory


def check_finite(source: str, what: str, values: Tensor, rows: Tensor, positions: Tensor, advice: str = WIDER) -> None:
    """Raises SaelabError, with row and position, if a token's `values` ``[tokens, width]`` are NaN or infinite.

    `rows` and `positions` ``[tokens]`` locate the tokens; `source` gives the values, whose name is `what`.
    """
    if (finite := torch.isfinite(values).all(1)).all():
        return
    bad = int((~finite).nonzero()[0])
    raise SaelabError(
        f"{source} gives NaN or infinite {what} at row {int(rows[bad])}, position {int(positions[bad])}; {advice}"
    )
