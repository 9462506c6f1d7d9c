"""The processes that train one autoencoder together, arranged along two axes, and what they exchange.

Along `data` each process has a part of the tokens of a batch, and along `features` a part of the features: its rows of
W_enc, b_enc and W_dec. torchrun starts the processes, and `saelab.training.distributed` arranges them. With one process
nothing is exchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab.errors import SaelabError


class LostProcessError(SaelabError):
    """Another process ended, so that nothing can be exchanged any more."""


class ElsewhereError(LostProcessError):
    """Another process raises an error, with its message."""


@dataclass(frozen=True)
class Axis:
    """The processes along one axis. All of them call each method, in the same order."""

    rank: int = 0
    """Number of this process along the axis, from 0."""
    size: int = 1
    """Number of processes along the axis."""
    group: Any = field(default=None, repr=False)
    """The torch.distributed process group; None if there is one process."""

    def __deepcopy__(self, memo: dict) -> "Axis":
        return self  # a process group has no copy

    def part(self, n: int) -> slice:
        """The part of n things, such as tokens or features, that is this process's."""
        return self.parts(n)[self.rank]

    def parts(self, n: int) -> list[slice]:
        """The parts of n things of all processes, in order; equal to within one."""
        return [slice(n * i // self.size, n * (i + 1) // self.size) for i in range(self.size)]

    def share(self, n: int) -> int:
        """Number of n things that are this process's."""
        part = self.part(n)
        return part.stop - part.start

    def sum_(self, x: Tensor) -> Tensor:
        """Replace `x` by its sum over the processes; returns it."""
        return self._reduce(x, "SUM")

    def max_(self, x: Tensor) -> Tensor:
        """Replace `x` by its maximum over the processes; returns it."""
        return self._reduce(x, "MAX")

    def min_(self, x: Tensor) -> Tensor:
        """Replace `x` by its minimum over the processes; returns it."""
        return self._reduce(x, "MIN")

    def gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """`x` of each process, in order of their numbers.

        The `sizes` of the first dimension may differ; None: they are exchanged first.
        """
        if self.size == 1:
            return [x]
        if sizes is None:
            sizes = [int(size) for size in self._gather(torch.tensor([len(x)], device=x.device))]
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        return [found[:size] for found, size in zip(self._gather(padded), sizes, strict=True)]

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What each process, in order of their numbers, sends to this one, which sends it ``parts[its number]``.

        The sizes of the first dimension may differ.
        """
        if self.size == 1:
            return list(parts)
        own = torch.tensor([len(part) for part in parts], device=parts[0].device)
        sizes = [size.tolist() for size in self._gather(own)]
        return list(self._swap(torch.cat(list(parts)), sizes).split([size[self.rank] for size in sizes]))

    def largest(self, *values: int) -> list[int]:
        """The maximum of each value over the processes."""
        return list(values) if self.size == 1 else self.max_(torch.tensor(values)).tolist()

    def barrier(self) -> None:
        """Return when all processes have called this."""
        self.largest(0)

    def together(self, action: Callable[[], object]) -> None:
        """Call `action` in each process, and return when all have done so.

        If it raises a SaelabError, one process raises it and the others ElsewhereError.
        """
        error: SaelabError | None = None
        try:
            action()
        except SaelabError as caught:
            error = caught
        failed = self.size - self.largest(0 if error is None else self.size - self.rank)[0]
        if failed == self.rank and error is not None:
            raise error
        if failed < self.size:
            raise ElsewhereError("another process failed; its own message says why") from error

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        if self.size > 1:
            import torch.distributed as dist

            exchanged(lambda: dist.all_reduce(x, getattr(dist.ReduceOp, how), group=self.group))
        return x

    def _gather(self, x: Tensor) -> list[Tensor]:
        import torch.distributed as dist

        found = [torch.empty_like(x) for _ in range(self.size)]
        exchanged(lambda: dist.all_gather(found, x.contiguous(), group=self.group))
        return found

    def _swap(self, x: Tensor, sizes: list[list[int]]) -> Tensor:
        """The rows that all processes send to this one: of ``sizes[i][j]`` rows from i to j, which `x` has in order."""
        import torch.distributed as dist

        received = [size[self.rank] for size in sizes]
        found, sent = x.new_empty(sum(received), *x.shape[1:]), sizes[self.rank]
        exchanged(lambda: dist.all_to_all_single(found, x, received, sent, group=self.group))
        return found


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one autoencoder."""

    data: Axis = Axis()
    features: Axis = Axis()
    every: Axis = Axis()
    """All of them; the number of a process is ``data.rank * features.size + features.rank``."""

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.every.rank == 0

    def __deepcopy__(self, memo: object) -> Self:
        return self  # a copy of an autoencoder is trained by the same processes

    def once(self, action: Callable[[], object]) -> None:
        """Call `action` in the first process; the others return when it has ended. Errors are as in `Axis.together`."""
        self.every.together(action if self.first else lambda: None)


ALONE = Ranks()


def layout(data: int, features: int) -> Ranks:
    """The process, of data x features, that has the largest parts of tokens and features; for sizes, not connected."""
    return Ranks(*(Axis(size - 1, size) for size in (data, features, data * features)))


def exchanged(exchange: Callable[[], object]) -> None:
    """Run `exchange`. Raises LostProcessError if another process has ended."""
    try:
        exchange()
    except RuntimeError as error:
        raise LostProcessError(
            "another process of the job was killed, or ended without a message (torchrun's report names it)"
        ) from error


def total(x: Tensor, axis: Axis) -> Tensor:
    """The sum of `x` over the processes; each gets the gradient of its own `x`."""
    return x if axis.size == 1 else _Total.apply(x, axis)


def shared(x: Tensor, axis: Axis) -> Tensor:
    """`x`, which all processes have; its gradient is the sum of theirs."""
    return x if axis.size == 1 else _Shared.apply(x, axis)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return axis.sum_(x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.axis.sum_(grad.clone()), None
