"""Records, each made from the answers to a few questions or from none; many are asked for side by side."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from saelab.autointerp import lexical
from saelab.autointerp.llm.answers import answers
from saelab.autointerp.llm.budget import Budget
from saelab.autointerp.llm.protocol import Client, Reply, Request
from saelab.progress import Track, silent


class Job(NamedTuple):
    """A record to be made."""

    requests: Sequence[Request]
    """Empty if nobody is asked."""
    finish: Callable[[Sequence[Reply]], None]
    """Makes and writes the record, given the replies in the order of the requests."""


def run_jobs(
    client: Client,
    jobs: Iterable[Job],
    *,
    cache: Path,
    budget: Budget | None = None,
    track: Track = silent,
    label: str = "",
    total: int = 0,
) -> None:
    """Finish each job as soon as its last answer is there; `cache`, `budget` and errors are those of `answers`.

    Requests of a job follow those of the one before without a pause. Jobs are read as there is room for their requests,
    so that memory does not grow with their number. The offline judge is asked without threads and without a cache.
    `track` counts finished jobs towards `total`.
    """
    for _ in track(_finished(client, jobs, cache, budget), label, total, lambda _: 1):
        pass


def _finished(client: Client, jobs: Iterable[Job], cache: Path, budget: Budget | None) -> Iterator[None]:
    """Yields once for each finished job."""
    if client.name == lexical.NAME:
        for job in jobs:
            yield job.finish([client.ask(request) for request in job.requests])
        return
    unasked = 0
    """Jobs without requests, finished and not yet counted."""

    def requests() -> Iterator[tuple[tuple[Job, list[Reply]], Request]]:
        nonlocal unasked
        for job in jobs:
            if not job.requests:
                job.finish([])
                unasked += 1
            replies: list[Reply] = []
            for request in job.requests:
                yield (job, replies), request

    for (job, replies), reply in answers(client, requests(), cache=cache, budget=budget):
        replies.append(reply)
        if len(replies) == len(job.requests):
            yield job.finish(replies)
        while unasked:
            unasked -= 1
            yield
    for _ in range(unasked):
        yield
