"""Runs of a model on the same rows that differ at one site only; the layers below the site run once.

The clean run records the output of the last block below the site. In later runs each block below the site returns a
copy of that record instead of computing anything, and the model's own code passes it on to the site's block, with masks
and positions as usual. The logits equal those of full runs bit for bit.

Models differ in what their blocks pass on: some keep keys and values for later blocks, or add earlier outputs again. So
the first use tests, on one row, whether a shared run is exact. If it is not, every run is a full run. That is also so
if nothing can be shared: at a site within the first block, or outside the blocks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saelab.lm.model import LanguageModel
from saelab.lm.sites import Site


class SplicedRuns:
    """Runs of `lm` with its activations at `site` replaced. Raises SaelabError if the model has no such site."""

    def __init__(self, lm: LanguageModel, site: str) -> None:
        lm.measure([site])  # now: while blocks are skipped they return the record, whatever rows they are called with
        self._lm, self._site = lm, site
        self._below = blocks_below(lm.model, lm.site(site))
        self._shared: bool | None = None if self._below else False  # None: not yet tested

    def shared(self, rows: Tensor) -> bool:
        """Whether runs share the layers below the site. The first call tests it on the first of `rows`."""
        if self._shared is None:
            self._shared = self._exact(rows[:1])
        return self._shared

    def __call__(
        self, rows: Tensor, replacements: Iterable[Callable[[Tensor], Tensor]], *, gradients: bool = False
    ) -> Iterator[Tensor]:
        """Logits of the clean run, then of one run per replacement: ``[rows, context, vocabulary]`` each.

        A replacement is a function as `LanguageModel.spliced_logits` takes it, `gradients` too, and the logits equal
        what that method returns bit for bit. A replacement is asked for when the logits of the one before it have been
        taken. Memory, besides that of one run: the record ``[rows, context, hidden]`` in the model's
        dtype, and a copy of it.
        """
        if not self.shared(rows):
            yield self._lm.logits(rows)
            for replace in replacements:
                yield self._lm.spliced_logits(rows, self._site, replace, gradients=gradients)
            return
        record: list[Any] = []
        yield self._recorded(rows, record)
        for replace in replacements:
            with skipped(self._below, record[0]):
                logits = self._lm.spliced_logits(rows, self._site, replace, gradients=gradients)
            yield logits
            del logits  # the next run needs the memory

    def _recorded(self, rows: Tensor, record: list[Any]) -> Tensor:
        """The clean run's logits; appends the output of the last block below the site to `record`."""

        def keep(_: nn.Module, __: tuple, output: Any) -> None:
            record.append(_copy(output))  # the next block may add to it in place

        handle = self._below[-1].register_forward_hook(keep)
        try:
            return self._lm.logits(rows)
        finally:
            handle.remove()

    def _exact(self, rows: Tensor) -> bool:
        """Whether a run that starts from the record equals the full run, to the bit."""
        record: list[Any] = []
        full = self._recorded(rows, record)
        if len(record) != 1 or not _is_copied(record[0]):
            return False
        self._lm.logits(torch.zeros_like(rows))  # so that any state the model keeps is of another text
        try:
            with skipped(self._below, record[0]):
                return torch.equal(self._lm.logits(rows), full)
        except Exception:  # code that expects something from a skipped block may raise anything
            return False


def blocks_below(model: nn.Module, site: Site) -> list[nn.Module]:
    """The blocks of `model` whose outputs do not depend on the value at `site`, in order; empty if it is in no block.

    The blocks are the items of the outermost ModuleList that contains the site's module. If the site is the output of a
    block, that block counts as below the site.
    """
    path = site.module.split(".")
    for i in range(1, len(path)):
        blocks = model.get_submodule(".".join(path[:i]))
        if isinstance(blocks, nn.ModuleList):
            is_output = i + 1 == len(path) and site.side == "hook_out"
            return list(blocks)[: int(path[i]) + is_output]
    return []


@contextmanager
def skipped(blocks: list[nn.Module], output: Any) -> Iterator[None]:
    """Within the context each of `blocks` returns a copy of `output` and computes nothing."""
    own = [vars(block).get("forward") for block in blocks]  # accelerate sets one

    def forward(*_: Any, **__: Any) -> Any:
        return _copy(output)

    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is None:
                del block.forward
            else:
                block.forward = before


def _copy(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copy, output)) if type(output) is tuple else output


def _is_copied(output: Any) -> bool:
    """Whether `_copy` copies everything in a block's output."""
    if type(output) is tuple:
        return all(part is None or isinstance(part, Tensor) for part in output)
    return isinstance(output, Tensor)
