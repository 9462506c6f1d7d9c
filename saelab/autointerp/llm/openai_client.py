"""A model on a server with the OpenAI chat protocol: vLLM, Ollama, llama.cpp, OpenRouter, OpenAI.

The key comes from the environment: SAELAB_LLM_KEY, else OPENAI_API_KEY, else a dummy for servers without keys. No name,
message or log of ours has it, and it is cut out of what the server sends. Only the given address is reached: redirects
are not followed, and headers in which the `openai` package describes this machine are left out.

Servers and models differ in the optional parts of a request. A part that a server refuses is left out from then on.
"""

import logging
import os
import re
import threading
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from time import time
from typing import Any
from urllib.parse import urlsplit

from saelab.autointerp.llm.budget import prompt_tokens
from saelab.autointerp.llm.protocol import Reply, Request, TemporaryError
from saelab.errors import SaelabError, SettingError, printable

KEYS = ("SAELAB_LLM_KEY", "OPENAI_API_KEY")
"""Environment variables with the key, the first that is set."""
_DUMMY = "none"
_SHORTEST_SECRET = 8
"""Characters; shorter keys (EMPTY, ollama) are no secrets, and would be cut out of ordinary text."""
_OPTIONAL = {
    "response_format": ("response_format", "json_schema", "schema", "grammar"),
    "logprobs": ("logprobs", "top_logprobs"),
    "seed": ("seed",),
    "max_tokens": ("max_tokens",),
    "temperature": ("temperature",),
}
"""Parts of a request that a server may refuse, and the words by which its message names them."""
_TEMPORARY = (408, 409, 425, 429)
"""Statuses after which the same request may succeed later, besides those of the server's own faults."""
_FILTERED = ("content_filter", "content management policy")
_ADDRESS = "check the address: most servers want /v1 at its end"
_REMEDIES = {
    400: "if the prompt is too long for the model, show fewer or shorter windows",
    401: f"set the key in {KEYS[0]} or {KEYS[1]}",
    403: f"set a key that may use the model in {KEYS[0]} or {KEYS[1]}",
    404: f"check the model's name; {_ADDRESS}",
    413: "show fewer or shorter windows",
}
_MALFORMED = (ValueError, TypeError, AttributeError, LookupError)
"""Errors of reading an answer in another form."""
_BYTES_PER_TOKEN = 3
"""English has some 4.5, program text some 3."""


class OpenAIClient:
    """A `Client` of the model `model` at `url`, such as ``http://localhost:8000/v1``.

    Raises SettingError if the address is no https address, or http of this machine, or has a password or a query.
    """

    def __init__(self, url: str, model: str, *, concurrency: int = 8, timeout: float = 120.0) -> None:
        """`timeout`: seconds that the server may be silent."""
        import openai

        for name in ("openai", "httpcore", "httpcore2"):  # some versions log headers, in which a server may repeat it
            logging.getLogger(name).setLevel(logging.WARNING)
        host, local = _checked(url)
        if not model.strip():
            raise SettingError("model: is empty; name a model that the server has")
        self.name = f"{printable(model)} at {host}"
        self.concurrency = concurrency
        self._model, self._timeout = model, timeout
        key = _key()
        self._clean = lambda text: text.replace(key, "[key]") if len(key) >= _SHORTEST_SECRET else text
        transport = openai.DefaultHttpxClient(
            follow_redirects=False,
            trust_env=not local,  # proxies do not reach this machine's own servers
            event_hooks={"request": [_without_descriptions]},
        )
        self._server = openai.OpenAI(
            api_key=key,
            base_url=url,
            timeout=openai.Timeout(timeout, connect=min(timeout, 10.0)),
            max_retries=0,
            http_client=transport,
        )
        self._refused: set[str] = set()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"OpenAIClient({self.name})"

    @property
    def refused(self) -> frozenset[str]:
        """Parts of requests that the server has refused, such as ``response_format`` and ``logprobs``."""
        return frozenset(self._refused)

    def count(self, text: str) -> int:
        """Tokens of a text, estimated: one for 3 bytes, which is rather too many."""
        return -(-len(text.encode(errors="replace")) // _BYTES_PER_TOKEN)

    def ask(self, request: Request) -> Reply:
        """The answer; its text is "" if the server's filter keeps it back. Raises as `Client.ask` says."""
        while True:
            answer = self._send(request)
            if isinstance(answer, Reply):
                return answer
            if isinstance(answer, Exception):
                raise answer
            with self._lock:
                self._refused.add(answer)

    def _parameters(self, request: Request) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if request.top_logprobs:
            parameters |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        if request.schema is not None:
            schema = {"name": "answer", "schema": dict(request.schema), "strict": True}
            parameters["response_format"] = {"type": "json_schema", "json_schema": schema}
        refused = self.refused
        if "max_tokens" in refused:  # OpenAI's newer models have another name for it
            parameters["max_completion_tokens"] = request.max_tokens
        if "logprobs" in refused:
            parameters.pop("top_logprobs", None)
        return {name: value for name, value in parameters.items() if name not in refused} | {
            "model": self._model,
            "messages": [{"role": role, "content": text} for role, text in request.messages],
        }

    def _send(self, request: Request) -> Reply | Exception | str:
        """The reply, the error to raise, or the name of the optional part that the server refuses.

        Errors are returned, not raised, so that none has the server's as its context, which has the key.
        """
        import openai

        parameters = self._parameters(request)
        try:
            # `chat.completions.create` makes objects of it all, which takes as long as sending and receiving it
            answer: Any = self._server.post("/chat/completions", body=parameters, cast_to=object)
            return self._reply(request, answer)
        except openai.APITimeoutError:
            return TemporaryError(f"the server was silent for {self._timeout:g} s")
        except openai.APIConnectionError as error:
            return TemporaryError(f"the server cannot be reached ({self._quoted(error.__cause__ or error)})")
        except openai.APIStatusError as error:
            return self._failure(error.status_code, error.response.headers, self._quoted(error), request, parameters)
        except (openai.OpenAIError, *_MALFORMED) as error:
            return TemporaryError(f"the answer is not in the chat protocol's form ({self._quoted(error)}); {_ADDRESS}")

    def _failure(
        self, status: int, headers: Mapping[str, str], message: str, request: Request, parameters: Mapping[str, Any]
    ) -> Reply | Exception | str:
        if status in _TEMPORARY or status >= 500:
            return TemporaryError(f"status {status} ({message})", _retry_after(headers))
        if status in (400, 422):
            if any(words in message for words in _FILTERED):
                return Reply("", None, prompt_tokens(self, request))
            if part := _refused_part(message, parameters):
                return part
        advice = _REMEDIES.get(status, "see the server's documentation")
        if 300 <= status < 400:
            advice = "it names another address, which is not followed; give that address"
        return SaelabError(f"{self.name}: refuses the request with status {status} ({message}); {advice}")

    def _reply(self, request: Request, answer: dict[str, Any]) -> Reply:
        choice, usage = answer["choices"][0], answer.get("usage")
        content, listed = choice["message"].get("content"), (choice.get("logprobs") or {}).get("content")
        text = self._clean(content) if isinstance(content, str) else ""
        logprobs = None
        if request.top_logprobs and listed:
            tokens = [
                [(str(each["token"]), float(each["logprob"])) for each in token.get("top_logprobs") or [token]]
                for token in listed
            ]
            logprobs = tuple(tuple(sorted(alternatives, key=lambda each: -each[1])) for alternatives in tokens)
        if not usage:
            return Reply(text, logprobs, prompt_tokens(self, request), self.count(text))
        return Reply(text, logprobs, int(usage["prompt_tokens"]), int(usage["completion_tokens"]))

    def _quoted(self, error: BaseException) -> str:
        """The message of an error, the server's if it has one, on one line without the key."""
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        text = self._clean(str(message or error)) or type(error).__name__  # before it is cut, or a part could be left
        return printable(" ".join(text.split()))[:300]


def _key() -> str:
    """The key from the environment. Raises SettingError, without it, if no header can have it."""
    for name in KEYS:
        key = os.environ.get(name, "").strip()
        if key and not re.fullmatch("[!-~]+", key):
            raise SettingError(f"{name}: the key has blanks or characters beyond ASCII; copy it again")
        if key:
            return key
    return _DUMMY


def _checked(url: str) -> tuple[str, bool]:
    """The host of an address, and whether it is this machine. Raises SettingError if it cannot be used."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError as error:
        raise SettingError(f"url: is no address ({error}); give one such as http://localhost:8000/v1") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SettingError(
            f"url: the address of {host} has a password, a query or a fragment; set the key in {KEYS[0]}"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise SettingError(f"url: {url} is no http or https address; give one such as http://localhost:8000/v1")
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if parts.scheme == "http" and not local:
        raise SettingError(
            f"url: {url} would send key and text unencrypted; use https, or forward a port "
            f"(ssh -L 8000:localhost:{parts.port or 8000} {host}) and give http://localhost:8000{parts.path}"
        )
    return host, local


def _without_descriptions(request: Any) -> None:
    """Remove headers that describe this machine and its user's account; the environment may set the latter."""
    for name in [name for name in request.headers if name.lower().startswith(("x-stainless-", "openai-"))]:
        del request.headers[name]


def _refused_part(message: str, parameters: Mapping[str, Any]) -> str | None:
    """The optional part of a request that an error names; if it names none, the form of the answer."""
    for part, words in _OPTIONAL.items():
        if part in parameters and any(re.search(rf"\b{word}\b", message) for word in words):
            return part
    return "response_format" if "response_format" in parameters else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number, or a date."""
    wait = headers.get("retry-after", "")
    try:
        seconds = float(wait)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(wait).timestamp() - time()
        except ValueError:
            return None
    return max(0.0, seconds)
