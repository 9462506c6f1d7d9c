"""Processes of a job as threads of one process, so that a test of what they exchange needs no torchrun.

The threads share torch's global random state: code under test takes its random numbers from generators of its own.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from saelab.ranks import Axis, LostProcessError, Ranks, exchanged

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds that a thread waits for the others: longer means that one of them does not take part."""


class Meeting:
    """The place where the threads of one axis exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self._brought: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """Copies of the tensors of all threads, in order."""
        self._brought[rank] = x.detach()
        exchanged(self.barrier.wait)
        found = [brought.clone() for brought in self._brought]
        exchanged(self.barrier.wait)  # from here on a thread may change its tensor
        return found


class Exchange(NamedTuple):
    """One call of an `Axis` by one thread."""

    how: str
    """SUM, MAX, MIN, GATHER or SWAP."""
    bytes: int
    """Bytes of this thread's tensor; of a swap, those for other threads."""
    callers: tuple[str, ...]
    """Names of the functions that were running, the innermost first."""


@dataclass(frozen=True)
class ThreadAxis(Axis):
    """An `Axis` of threads, with a `Meeting` as its group. Sums are in order of the ranks."""

    exchanges: list[Exchange] = field(default_factory=list, repr=False)
    """What this thread exchanged, in order."""

    @property
    def sent(self) -> list[tuple[Exchange, float]]:
        """Each exchange, and the bytes that a process sends in it if the processes form a ring; it receives as many."""
        factors = {"GATHER": self.size - 1, "SWAP": 1}
        return [(each, each.bytes * factors.get(each.how, 2 * (1 - 1 / self.size))) for each in self.exchanges]

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        if self.size == 1:
            return x
        with torch.no_grad(), _disable_current_modes():  # a test that counts memory must not see the copies
            found = torch.stack(self._exchange(x, how))
            result = found[0].clone() if how == "SUM" else getattr(found, f"a{how.lower()}")(0)
            for other in found[1:] if how == "SUM" else ():
                result += other
            return x.copy_(result)

    def _gather(self, x: Tensor) -> list[Tensor]:
        return self._exchange(x, "GATHER")

    def _swap(self, x: Tensor, sizes: list[list[int]]) -> Tensor:
        kept = sizes[self.rank][self.rank] * x[:1].nbytes
        self.exchanges.append(Exchange("SWAP", x.nbytes - kept, tuple(_callers())))
        with _disable_current_modes():
            brought = self.group.exchange(self.rank, x)
        return torch.cat([rows.split(size)[self.rank] for rows, size in zip(brought, sizes, strict=True)])

    def _exchange(self, x: Tensor, how: str) -> list[Tensor]:
        self.exchanges.append(Exchange(how, x.nbytes, tuple(_callers())))
        found = self.group.exchange(self.rank, x)
        assert all(one.shape == x.shape and one.dtype == x.dtype for one in found), "torch.distributed needs this"
        return found


def _callers() -> Iterator[str]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back


def run_threads(f: Callable[[Ranks], T], *, data: int = 1, features: int = 1) -> list[T]:
    """What `f` returns in each of data x features threads, in order of their numbers.

    An error in one thread ends the others, and is raised here; of several, the one of the first thread that did not
    merely lose another.
    """
    every, along_data, along_features = (
        Meeting(data * features),
        [Meeting(data) for _ in range(features)],
        [Meeting(features) for _ in range(data)],
    )
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(number: int) -> None:
        row, column = divmod(number, features)
        ranks = Ranks(
            data=ThreadAxis(row, data, along_data[column]),
            features=ThreadAxis(column, features, along_features[row]),
            every=ThreadAxis(number, data * features, every),
        )
        try:
            results[number] = f(ranks)
        except BaseException as error:
            errors[number] = error
            for meeting in (every, *along_data, *along_features):
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(data * features)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, error in sorted(errors.items(), key=lambda found: (isinstance(found[1], LostProcessError), found[0])):
        raise error
    return [results[number] for number in range(data * features)]
