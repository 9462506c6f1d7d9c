"""Progress of a long step. Rooms take a `Track` and are silent unless they get one that draws."""

import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")

Say = Callable[[str], None]
"""Takes a message for the user."""


def quiet(message: str) -> None:
    """Prints nothing."""


class Track(Protocol):
    """Yields `items` unchanged and counts their `size`, mostly in tokens, towards `total`; `note` adds a few words."""

    def __call__(
        self,
        items: Iterator[T],
        label: str,
        total: int,
        size: Callable[[T], int],
        note: Callable[[], str] | None = None,
    ) -> Iterator[T]: ...


def silent(
    items: Iterator[T], label: str, total: int, size: Callable[[T], int], note: Callable[[], str] | None = None
) -> Iterator[T]:
    """A Track that shows nothing."""
    return items


def bar(
    items: Iterator[T],
    label: str,
    total: int,
    size: Callable[[T], int],
    note: Callable[[], str] | None = None,
    *,
    unit: str = "tokens",
) -> Iterator[T]:
    """A Track that draws a bar on standard error: share done, units per second, time left, the note.

    If standard error is not a terminal, it prints one line at the end instead.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    def in_one_line() -> Column:
        return Column(no_wrap=True)

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.completed / task.finished_time if task.finished_time else task.speed
            return Text("" if speed is None else f"{speed:,.0f} {unit}/s")

    class Time(ProgressColumn):
        """Time left, and at the end the time that it took."""

        max_refresh = 0.5  # seconds between changes, or the last digit flickers

        def render(self, task: Task) -> Text:
            if task.finished:
                return Text(f"in {_clock(task.finished_time)}")
            return Text(f"{_clock(task.time_remaining)} left")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(None),
        TextColumn("{task.percentage:>3.0f}%"),
        Rate(in_one_line()),
        Time(in_one_line()),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True) as progress:
        task = progress.add_task(label, total=total, note="")
        done, begin = 0, time.monotonic()
        for item in items:
            yield item
            done += size(item)
            progress.update(task, completed=min(done, total), note=note() if note else "")
        progress.update(task, completed=done, total=done)
    if not console.is_terminal:
        elapsed = time.monotonic() - begin
        rate = done / max(elapsed, 1e-9)
        console.print(f"{label}: {done:,} {unit} in {elapsed:.1f} s ({rate:,.0f} {unit}/s)", highlight=False)


def _clock(seconds: float | None) -> str:
    """Hours, minutes and seconds; a placeholder while they are not known."""
    if seconds is None:
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
