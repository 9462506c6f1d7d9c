"""Progress of a long step. Rooms take a `Track` and are silent unless they get one that draws."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Yields `items` unchanged and counts their `size`, in tokens, towards `total`."""

    def __call__(self, items: Iterator[T], label: str, total: int, size: Callable[[T], int]) -> Iterator[T]: ...


def silent(items: Iterator[T], label: str, total: int, size: Callable[[T], int]) -> Iterator[T]:
    """A Track that shows nothing."""
    return items


def bar(items: Iterator[T], label: str, total: int, size: Callable[[T], int]) -> Iterator[T]:
    """A Track that draws a bar on standard error: share done, tokens per second, time left.

    If standard error is not a terminal, it prints one line at the end instead.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} tokens/s")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(30),
        TextColumn("{task.percentage:>3.0f}%"),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        done, begin = 0, time.monotonic()
        for item in items:
            yield item
            done += size(item)
            progress.update(task, completed=min(done, total))
        progress.update(task, completed=total)
    if not console.is_terminal:
        elapsed = time.monotonic() - begin
        console.print(f"{label}: {done:,} tokens in {elapsed:.1f} s ({done / max(elapsed, 1e-9):,.0f} tokens/s)")
