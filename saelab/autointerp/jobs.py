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
    client: Client, jobs: Iterable[Job], *, cache: Path, budget: Budget | None = None, track: Track = silent
) -> None:
    """Finish each job as soon as its last answer is there; `cache`, `budget` and errors are those of `answers`.

    Requests of a job follow those of the one before without a pause. Jobs are read as there is room for their requests,
    so that memory does not grow with their number. The offline judge is asked without threads and without a cache.
    """

    def requests() -> Iterator[tuple[tuple[Job, list[Reply]], Request]]:
        for job in jobs:
            if not job.requests:
                job.finish([])
            replies: list[Reply] = []
            for request in job.requests:
                yield (job, replies), request

    if client.name == lexical.NAME:
        found = ((key, client.ask(request)) for key, request in requests())
    else:
        found = answers(client, requests(), cache=cache, budget=budget, track=track)
    for (job, replies), reply in found:
        replies.append(reply)
        if len(replies) == len(job.requests):
            job.finish(replies)
