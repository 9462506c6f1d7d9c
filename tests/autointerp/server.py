"""A server on this machine that speaks the OpenAI chat protocol, for tests, with a persona that decides its answers.

A persona is a function from a `Question` to an `Answer` or a `Fault`. `oracle`, `random_judge` and `garbage` answer;
the others wrap a persona and disturb it. It counts what it answered:

    with serving(oracle(lambda body: "[1, 0]")) as server:
        client = OpenAIClient(server.url, "any")

    python -m tests.autointerp.server --latency 0.05    # a process of its own; prints its address
"""

import argparse
import hashlib
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Question(NamedTuple):
    body: dict[str, Any]
    headers: Mapping[str, str]
    number: int
    """Number of the request since the server began, from 1."""


class Answer(NamedTuple):
    text: str
    logprobs: bool = True
    """Whether they are sent if they are asked for."""
    usage: bool = True


class Fault(NamedTuple):
    status: int
    """0: the connection is cut in the middle of the answer."""
    message: str = "a fault"
    headers: tuple[tuple[str, str], ...] = ()


Persona = Callable[[Question], Answer | Fault]


def prompt(body: Mapping[str, Any]) -> str:
    """All messages of a request as one text."""
    return "\n".join(message["content"] for message in body["messages"])


def oracle(right: Callable[[dict[str, Any]], str]) -> Persona:
    """Answers what `right` says of a request."""
    return lambda question: Answer(right(question.body))


def random_judge(seed: int = 0) -> Persona:
    """Random answers in the form of the request's schema; the same request gets the same one."""

    def answer(question: Question) -> Answer:
        rng = random.Random(f"{seed} {json.dumps(question.body, sort_keys=True)}")
        form = question.body.get("response_format")
        schema = form["json_schema"]["schema"] if form else {"type": "string"}
        return Answer(json.dumps(_made(schema, rng)))

    return answer


def _made(schema: Mapping[str, Any], rng: random.Random) -> Any:
    """A random value of a JSON schema."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if schema["type"] == "object":
        return {name: _made(part, rng) for name, part in schema["properties"].items()}
    if schema["type"] == "array":
        return [_made(schema["items"], rng) for _ in range(schema.get("minItems", 1))]
    if schema["type"] in ("integer", "number"):
        return rng.randint(schema.get("minimum", 0), schema.get("maximum", 10))
    return " ".join(rng.choices(("cats", "code", "dates", "names", "verbs"), k=3))


def garbage(question: Question) -> Answer:
    """Text that no parser should read anything from."""
    return Answer(("Sure!", "[1, 2", '{"verdicts": [1, 0, "no idea"', "", "\u2028 null")[question.number % 5])


def echo(question: Question) -> Answer:
    """The request's headers, as the answer."""
    return Answer(json.dumps(dict(question.headers)))


def slow(persona: Persona, seconds: float) -> Persona:
    def answer(question: Question) -> Answer | Fault:
        time.sleep(seconds)
        return persona(question)

    return answer


def at_first(persona: Persona, times: int | None, fault: Fault) -> Persona:
    """The first `times` requests, or all, get a fault."""
    return lambda question: fault if times is None or question.number <= times else persona(question)


def too_many(persona: Persona, times: int | None = None, retry_after: str = "") -> Persona:
    return at_first(
        persona, times, Fault(429, "too many requests", (("Retry-After", retry_after),) * bool(retry_after))
    )


def failing(persona: Persona, times: int | None = None, status: int = 500) -> Persona:
    return at_first(persona, times, Fault(status))


def cutting(persona: Persona, times: int | None = None) -> Persona:
    return at_first(persona, times, Fault(0))


def without_logprobs(persona: Persona) -> Persona:
    def answer(question: Question) -> Answer | Fault:
        found = persona(question)
        return found._replace(logprobs=False) if isinstance(found, Answer) else found

    return answer


def refusing(persona: Persona, part: str, message: str = "") -> Persona:
    """Requests with `part` get a 400 that names it, or says `message`."""
    fault = Fault(400, message or f"Unsupported parameter: '{part}'")
    return lambda question: fault if part in question.body else persona(question)


def echoing_fault(status: int) -> Persona:
    """Every request gets a fault with the key of the request in headers and message, once at its 300th character."""

    def answer(question: Question) -> Fault:
        key = question.headers["Authorization"]
        return Fault(status, f"{key} {'x' * (279 - len(key))}{key}", (("X-Echo", key),))

    return answer


@dataclass
class Server:
    """A running server and what it counted."""

    url: str
    requests: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    most_at_once: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Those of the last 1000 requests."""
    times: list[float] = field(default_factory=list)
    """When each of them came."""
    of_body: Counter[str] = field(default_factory=Counter)
    """Answers by a hash of the request."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Those of the last request."""


@contextmanager
def serving(persona: Persona) -> Iterator[Server]:
    """A server on a free port of 127.0.0.1 while the block runs."""
    lock = threading.Lock()
    under_way = [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests += 1
                number = server.requests
                server.bodies[:] = [*server.bodies[-999:], body]
                server.times[:] = [*server.times[-999:], time.monotonic()]
                server.headers = self.headers
                under_way[0] += 1
                server.most_at_once = max(server.most_at_once, under_way[0])
            if self.path == "/v1/chat/completions":
                found = persona(Question(body, self.headers, number))
            else:
                found = Fault(404, f"no such path: {self.path}")
            with lock:
                under_way[0] -= 1
                if isinstance(found, Answer):
                    server.answered += 1
                    server.of_body[hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()] += 1
                    server.prompt_tokens += tokens(prompt(body))
                    server.answer_tokens += tokens(found.text)
            if isinstance(found, Answer):
                self.send(200, (), completion(body, found))
            elif found.status:
                self.send(found.status, found.headers, {"error": {"message": found.message}})
            else:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def send(self, status: int, headers: tuple[tuple[str, str], ...], value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            for name, text in (*headers, ("Content-Type", "application/json"), ("Content-Length", str(len(content)))):
                self.send_header(name, text)
            self._headers_buffer += [b"\r\n", content]  # type: ignore[attr-defined]  # one packet
            self.flush_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    class Quiet(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that is killed is part of the tests."""

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        server = Server(f"http://127.0.0.1:{listening.server_address[1]}/v1")
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()


_TOKEN = re.compile(r"\d|[^\W\d]+|\s+|[^\w\s]")


def tokens(text: str) -> int:
    """Number of tokens as this server counts them: words, digits, runs of blanks, signs."""
    return len(_TOKEN.findall(text))


def completion(body: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """The answer in the protocol's form; a 0 or 1 has a probability of 0.9."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": None,
    }
    if body.get("logprobs") and answer.logprobs:
        choice["logprobs"] = {"content": [_logprobs(token) for token in _TOKEN.findall(answer.text)]}
    used = {"prompt_tokens": tokens(prompt(body)), "completion_tokens": tokens(answer.text)}
    usage = {"usage": used | {"total_tokens": sum(used.values())}} if answer.usage else {}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]} | usage


def _logprobs(token: str) -> dict[str, Any]:
    other = {"0": "1", "1": "0"}.get(token, "?")
    alternatives = [
        {"token": token, "logprob": -0.105, "bytes": None},
        {"token": other, "logprob": -2.303, "bytes": None},
    ]
    return alternatives[0] | {"top_logprobs": alternatives[::-1]}  # the order is up to a server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0)
    with serving(slow(random_judge(), parser.parse_args().latency)) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
