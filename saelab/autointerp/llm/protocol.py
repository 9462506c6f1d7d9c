"""What an explainer or judge is asked, and what it answers. A back-end is an object with the three methods of `Client`.

Requests are values: equal requests have equal keys, so that an answer is cached on disk under the key of its request
(`answers.py`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Request:
    """One question, with everything that its answer depends on besides the model."""

    messages: tuple[tuple[str, str], ...]
    """(role, text), role: system, user, assistant."""
    max_tokens: int = 256
    temperature: float = 0.0
    top_logprobs: int = 0
    """Alternatives per token whose log-probabilities are asked for; 0: none."""
    schema: Mapping[str, Any] | None = None
    """JSON schema of the answer, for servers that keep to one; others get it from the prompt's words."""
    seed: int = 0

    def key(self, model: str) -> str:
        """Identifies the request to a model: a hash of all fields."""
        whole = json.dumps([model, asdict(self)], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(whole.encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """The answer to a request."""

    text: str
    logprobs: tuple[tuple[tuple[str, float], ...], ...] | None = None
    """For each token of the answer its alternatives, (text, natural log of the probability), likeliest first; None if
    they were not asked for or the server has none."""
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Client(Protocol):
    """A model that can be asked. May be called from several threads."""

    name: str
    """The model, as results name it; no key, and of an address only the host."""
    concurrency: int
    """Requests that may be under way at once."""

    def ask(self, request: Request) -> Reply:
        """The answer. Raises `TemporaryError` if the same request may succeed later, SaelabError if it cannot."""
        ...

    def count(self, text: str) -> int:
        """Tokens of a text, exact or estimated; for the estimate of the cost before a run."""
        ...


class BaseModel(Protocol):
    """A model that gives the log-probability of text."""

    name: str

    def logprobs(self, texts: list[str]) -> list[tuple[list[str], list[float]]]:
        """For each text its tokens, which together are the text, and the natural log of each one's probability after
        those before; first 0. Neither of a text that is longer than the model's context."""
        ...


class TemporaryError(Exception):
    """Too many requests, a fault of the server, a time-out, a cut connection: the same request may succeed later."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""
