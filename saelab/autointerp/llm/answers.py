"""Many requests to one client: several at once, repeated if they fail, and each answered only once.

Answers are kept in a cache on disk as soon as they arrive, so that a run that was killed sends again only those that
were under way. Two equal requests are one.
"""

import random
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from saelab.autointerp.llm.budget import Budget, BudgetSpent, prompt_tokens
from saelab.autointerp.llm.cache import Cache, open_cache
from saelab.autointerp.llm.protocol import Client, Reply, Request, TemporaryError
from saelab.errors import SaelabError, SettingError
from saelab.progress import Track, silent

K = TypeVar("K")

TRIES = 7
"""Times that a request is sent before it has failed."""
FIRST_WAIT = 1.0
"""Seconds, on average, before the second try; doubled before each further one, which makes a minute in all."""
LONGEST_WAIT = 300.0
"""Seconds; if a server asks for more, the request has failed."""
AHEAD = 4
"""Requests taken from the iterable and not yet yielded, for each one that may be under way: a slow answer does not stop
the others, and there is work while the caller computes."""


def answers(
    client: Client,
    requests: Iterable[tuple[K, Request]],
    *,
    cache: Path | None,
    budget: Budget | None = None,
    expected: int = 1,
    track: Track = silent,
) -> Iterator[tuple[K, Reply]]:
    """The reply to each request with the caller's key for it, in the order of the requests.

    Sends at most `client.concurrency` requests at once. `requests` is read in the caller's thread, at most `AHEAD`
    times as many ahead of what was yielded, so that memory does not grow with their number. `cache` is an SQLite file
    that several runs, one at a time, may share; None keeps answers during the call only. `expected` is the number of
    tokens that `track` takes for all, such as `Estimate.tokens`.

    Requests that fail with a TemporaryError are repeated, after a time that doubles, or that the server asks for.
    Raises SaelabError if one fails `TRIES` times or cannot succeed, and BudgetSpent at the first request for which the
    caps leave no room: what was answered before was yielded, and what is under way is waited for and cached.
    """
    if client.concurrency < 1:
        raise SettingError(f"concurrency: {client.concurrency} is not a positive number")
    with open_cache(cache) as known:
        asking = _Asking(client, known, budget, resumable=cache is not None)
        found = asking.in_order(requests)
        yield from track(found, f"asking {client.name}", expected, lambda each: _tokens(each[1]), asking.note)


def _tokens(reply: Reply) -> int:
    return reply.prompt_tokens + reply.answer_tokens


class _Asking:
    """One run of `answers`."""

    def __init__(self, client: Client, cache: Cache, budget: Budget | None, *, resumable: bool) -> None:
        self.client, self.cache, self.budget, self.resumable = client, cache, budget, resumable
        self.under_way: dict[str, Future[Reply]] = {}
        self.stop = threading.Event()
        """Set at the end, and by the first error; nothing is sent after it."""
        self.error: Exception | None = None
        """The first error; the others follow from it."""
        self.random = random.Random()
        self.answered = self.known = 0

    def note(self) -> str:
        spent = self.budget.spent if self.budget else None
        cost = "" if spent is None else f", {spent:.2f} spent"
        return f"{self.answered:,} answers, {self.known:,} requests not sent as their answer was known{cost}"

    def in_order(self, requests: Iterable[tuple[K, Request]]) -> Iterator[tuple[K, Reply]]:
        source, waiting = iter(requests), deque[tuple[K, str, Future[Reply]]]()
        pool = ThreadPoolExecutor(self.client.concurrency, "saelab-llm")
        more = True
        try:
            while True:
                while more and len(waiting) < AHEAD * self.client.concurrency:
                    item = next(source, None)
                    more = item is not None
                    if item is not None:
                        key = item[1].key(self.client.name)
                        waiting.append((item[0], key, self.start(key, item[1], pool)))
                if not waiting:
                    return
                name, key, future = waiting.popleft()
                reply = self.result(future)
                self.under_way.pop(key, None)
                self.answered += 1
                yield name, reply
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)

    def start(self, key: str, request: Request, pool: ThreadPoolExecutor) -> Future[Reply]:
        """The reply, now or later."""
        if key in self.under_way:
            self.known += 1
            return self.under_way[key]
        if (reply := self.cache.get(key)) is None:
            self.under_way[key] = pool.submit(self.answer, key, request)
            return self.under_way[key]
        self.known += 1
        done: Future[Reply] = Future()
        done.set_result(reply)
        return done

    def result(self, future: Future[Reply]) -> Reply:
        try:
            return future.result()
        except Exception as error:
            raise (self.error or error) from None

    def answer(self, key: str, request: Request) -> Reply:
        """The reply from the client, which is cached. Runs in a thread of the pool."""
        try:
            reply = self.within_budget(request)
            self.cache.put(key, reply)
        except Exception as error:
            self.error = self.error or error
            self.stop.set()
            raise
        return reply

    def within_budget(self, request: Request) -> Reply:
        if self.budget is None:
            return self.repeated(request)
        try:
            with self.budget.reserved(prompt_tokens(self.client, request), request.max_tokens) as counted:
                reply = self.repeated(request)
                counted.append(reply)
                return reply
        except BudgetSpent as error:
            advice = f"raise the cap{' and run again to continue' * self.resumable}"
            raise BudgetSpent(f"{self.client.name}: {error}; {self.kept()}{advice}") from None

    def repeated(self, request: Request) -> Reply:
        """The reply, after up to TRIES tries."""
        if self.stop.is_set():
            raise SaelabError(f"{self.client.name}: stopped")
        for number in range(TRIES):
            try:
                return self.client.ask(request)
            except TemporaryError as error:
                problem, wait = str(error), error.retry_after
            longest = wait is not None and wait > LONGEST_WAIT
            if longest or number == TRIES - 1:
                break
            doubled = FIRST_WAIT * 2**number * self.random.uniform(0.5, 1.5)  # not all threads at the same time again
            if self.stop.wait(doubled if wait is None else wait + self.random.uniform(0, FIRST_WAIT)):
                break
        tries = f"{number + 1} {'tries' if number else 'try'}"
        asks = f", and it asks to wait {wait:,.0f} s" if longest and wait else ""
        raise SaelabError(
            f"{self.client.name}: no answer after {tries}: {problem}{asks}; {self.kept()}see to the server, lower the "
            f"concurrency ({self.client.concurrency}) if it has too much to do, and run again"
        )

    def kept(self) -> str:
        return "what was answered is kept; " * self.resumable
