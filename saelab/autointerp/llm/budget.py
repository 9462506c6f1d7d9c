"""What a run may cost and did cost, in tokens and money; and the estimate before it."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from saelab.autointerp.llm.protocol import Client, Reply, Request
from saelab.errors import SaelabError, SettingError

_PER_MESSAGE = 4
"""Tokens that a chat format adds to a message, roughly."""


class BudgetSpent(SaelabError):
    """The next request could exceed a cap."""


class Price(NamedTuple):
    """Price of a million tokens, in any currency."""

    prompt: float
    answer: float

    def of(self, prompt_tokens: int, answer_tokens: int) -> float:
        return (prompt_tokens * self.prompt + answer_tokens * self.answer) / 1e6


@dataclass
class Budget:
    """The caps of a run, and what it used so far; one object for all calls of `answers` that share the caps.

    A request is sent only if, with its whole `max_tokens`, it stays below the caps. The tokens of its prompt are those
    that `Client.count` gives before it is sent, and those that the server reports afterwards. Answers from the cache
    cost nothing. Raises SettingError for a cap that is not positive, and for a cap in money without a price.
    """

    tokens: int | None = None
    """Most tokens of prompts and answers together; None: no cap."""
    money: float | None = None
    """Most money, in the currency of the price; None: no cap."""
    price: Price | None = None
    """None: not known."""
    prompt_tokens: int = field(default=0, init=False)
    answer_tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name, cap in (("tokens", self.tokens), ("money", self.money)):
            if cap is not None and not cap > 0:
                raise SettingError(f"{name}: {cap} is not a positive number")
        if self.price is not None and not (self.price.prompt >= 0 and self.price.answer >= 0):
            raise SettingError(f"price: {tuple(self.price)} are not two numbers of at least 0")
        if self.money is not None and self.price is None:
            raise SettingError(
                "money: the model's price is not known, so its cost cannot be limited; give the price of a million "
                "tokens of prompts and of answers, or limit the tokens"
            )
        self._under_way: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    @property
    def spent(self) -> float | None:
        """The cost so far; None without a price."""
        return self.price.of(self.prompt_tokens, self.answer_tokens) if self.price else None

    @contextmanager
    def reserved(self, prompt_tokens: int, answer_tokens: int) -> Iterator[list[Reply]]:
        """Keep tokens for one request during the block; the reply that the block puts into the list counts instead.

        Waits for requests that are under way if their ends decide whether the caps leave room for this one. Raises
        BudgetSpent if they do not.
        """
        most = (prompt_tokens, answer_tokens)
        with self._changed:
            while problem := self._exceeded(most):
                if not self._under_way:
                    raise BudgetSpent(problem)
                self._changed.wait()
            self._under_way.append(most)
        replies: list[Reply] = []
        try:
            yield replies
        finally:
            with self._changed:
                self._under_way.remove(most)
                self.prompt_tokens += sum(reply.prompt_tokens for reply in replies)
                self.answer_tokens += sum(reply.answer_tokens for reply in replies)
                self._changed.notify_all()

    def _exceeded(self, most: tuple[int, int]) -> str:
        """Why one more request of `most` tokens could exceed a cap; "" if it cannot."""
        prompt = self.prompt_tokens + sum(each[0] for each in [*self._under_way, most])
        answer = self.answer_tokens + sum(each[1] for each in [*self._under_way, most])
        used = self.prompt_tokens + self.answer_tokens
        if self.tokens is not None and prompt + answer > self.tokens:
            return f"the cap of {self.tokens:,} tokens leaves no room for the next request: {used:,} are used"
        if self.money is not None and self.price is not None and self.price.of(prompt, answer) > self.money:
            spent = f"{self.spent:.4f} are spent"
            return f"the cap of {self.money:g} in money leaves no room for the next request: {spent}"
        return ""


def parsed_budget(price: str | None, tokens: float | None, money: float | None) -> Budget:
    """The budget of command-line options; `price` is that of a million tokens of prompts and of answers, "0.10,0.40".

    Raises SaelabError if the price cannot be read, and SettingError as `Budget` does.
    """
    numbers = None
    if price is not None:
        try:
            prompt, answer = map(float, price.split(","))
        except ValueError:
            raise SaelabError(f"--price: {price!r} is not two numbers, such as 0.10,0.40") from None
        numbers = Price(prompt, answer)
    if tokens is not None and not math.isfinite(tokens):
        raise SettingError(f"--max-tokens: {tokens} is not a number of tokens; leave it out for no cap")
    return Budget(None if tokens is None else int(tokens), money, numbers)


class Estimate(NamedTuple):
    """What some requests cost, at most."""

    requests: int
    prompt_tokens: int
    answer_tokens: int
    """If every answer has its full length; most are shorter."""
    money: float | None
    """None without a price."""

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self.prompt_tokens + self.answer_tokens

    def __str__(self) -> str:
        cost = "their price is not known" if self.money is None else f"at most {self.money:,.2f} in money"
        prompts = f"some {self.prompt_tokens:,} tokens of prompts"
        return f"{self.requests:,} requests: {prompts}, at most {self.answer_tokens:,} of answers; {cost}"


def estimate(client: Client, sample: Sequence[Request], requests: int, price: Price | None = None) -> Estimate:
    """What `requests` requests cost if they are like those of `sample`, none of them is cached, and none is repeated.

    Tokens are counted by `client.count`. Raises SettingError if the sample is empty.
    """
    if not sample:
        raise SettingError("sample: has no requests to estimate the cost from")
    prompt = round(requests * sum(prompt_tokens(client, request) for request in sample) / len(sample))
    answer = round(requests * sum(request.max_tokens for request in sample) / len(sample))
    return Estimate(requests, prompt, answer, price.of(prompt, answer) if price else None)


def prompt_tokens(client: Client, request: Request) -> int:
    """Tokens of a request's messages, as `client.count` gives them, with some for the chat format."""
    return sum(client.count(text) + _PER_MESSAGE for _, text in request.messages)
