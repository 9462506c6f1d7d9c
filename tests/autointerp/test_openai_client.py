"""The client of servers with the OpenAI protocol, against a real server with each persona."""

import json
import logging
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from saelab.autointerp.llm import answers as answers_module
from saelab.autointerp.llm.answers import TRIES, answers
from saelab.autointerp.llm.openai_client import OpenAIClient
from saelab.autointerp.llm.protocol import Reply, Request, TemporaryError
from saelab.autointerp.prompts import probabilities, verdicts
from saelab.errors import SaelabError, SettingError
from tests.autointerp import server as server_module
from tests.autointerp.server import (
    Answer,
    Fault,
    Persona,
    cutting,
    echo,
    echoing_fault,
    failing,
    garbage,
    oracle,
    prompt,
    random_judge,
    refusing,
    serving,
    slow,
    tokens,
    too_many,
    without_logprobs,
)

SCHEMA = {
    "type": "object",
    "properties": {"verdicts": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 3}},
}
ASKED = Request((("system", "Judge."), ("user", "three texts")), 32, 0.0, 2, SCHEMA, 7)
right = oracle(lambda body: '{"verdicts": [1, 0, 1]}')
SECRET = "sk-secret-0123456789"
pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "FIRST_WAIT", 1e-3)
    monkeypatch.delenv("SAELAB_LLM_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def many(n: int) -> list[tuple[int, Request]]:
    return [(i, replace(ASKED, messages=(("user", f"question {i}"),))) for i in range(n)]


def test_every_field_of_a_request_is_sent_and_the_whole_reply_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "of another server")
    with serving(right) as server:
        client = OpenAIClient(server.url, "some/model")
        reply = client.ask(ASKED)
        plain = client.ask(replace(ASKED, top_logprobs=0, schema=None))
        bodies, headers = server.bodies, {name.lower() for name in server.headers}
    assert reply.text == plain.text == '{"verdicts": [1, 0, 1]}' and plain.logprobs is None
    assert reply.prompt_tokens == tokens("Judge.\nthree texts") and reply.answer_tokens == tokens(reply.text)
    assert reply.logprobs is not None and reply.logprobs[7] == (("1", -0.105), ("0", -2.303)), "likeliest first"
    assert probabilities(reply, verdicts(reply.text, 3) or []) == pytest.approx([0.9, 0.1, 0.9], abs=1e-3)
    assert bodies[0] == {
        "model": "some/model",
        "messages": [{"role": "system", "content": "Judge."}, {"role": "user", "content": "three texts"}],
        "max_tokens": 32,
        "temperature": 0.0,
        "seed": 7,
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
        },
    }
    assert bodies[1].keys() == bodies[0].keys() - {"logprobs", "top_logprobs", "response_format"}
    assert client.name == "some/model at 127.0.0.1" and repr(client) == "OpenAIClient(some/model at 127.0.0.1)"
    assert not [name for name in headers if name.startswith(("x-stainless", "openai-"))]


def test_random_judge_and_garbage_are_replies_like_any() -> None:
    with serving(random_judge()) as server:
        client = OpenAIClient(server.url, "m")
        replies = [reply for _, reply in answers(client, many(100), cache=None)]
        assert server.most_at_once <= client.concurrency == 8 and server.answered == 100
    ones = [verdict for reply in replies for verdict in verdicts(reply.text, 3) or []]
    assert len(ones) == 300 and 110 < sum(ones) < 190
    with serving(garbage) as server:
        replies = [reply for _, reply in answers(OpenAIClient(server.url, "m"), many(10), cache=None)]
    assert [verdicts(reply.text, 3) for reply in replies] == [None] * 10


def test_a_server_without_logprobs_and_counts() -> None:
    with serving(without_logprobs(right)) as server:
        assert OpenAIClient(server.url, "m").ask(ASKED).logprobs is None
    with serving(lambda _: Answer("123456", usage=False)) as server:
        reply = OpenAIClient(server.url, "m").ask(ASKED)
    assert reply.answer_tokens == 2 and reply.prompt_tokens == 2 + 4 + 4 + 4, "estimated, so that a budget can count"


@pytest.mark.parametrize(
    "wrong",
    [
        {"usage": {"prompt_tokens": None, "completion_tokens": 3}},
        {"usage": {"prompt_tokens": 3}},
        {"choices": [{"message": {"content": "1"}, "logprobs": {"content": [{"token": "1", "logprob": None}]}}]},
        {"choices": []},
        {"choices": ["text"]},
    ],
)
def test_an_answer_in_another_form_is_a_fault_that_may_pass(wrong: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    made = server_module.completion
    monkeypatch.setattr(server_module, "completion", lambda body, answer: made(body, answer) | wrong)
    with serving(right) as server, pytest.raises(TemporaryError, match="the answer is not in the chat protocol's form"):
        OpenAIClient(server.url, "m").ask(ASKED)


@pytest.mark.parametrize(
    ("persona", "says", "asks_to_wait"),
    [
        (
            too_many(right, 2, "0.05"),
            "status 429 (too many requests)",
            0.05,
        ),
        (failing(right, 2), "status 500 (a fault)", None),
        (failing(right, 2, 503), "status 503 (a fault)", None),
        (cutting(right, 2), "the server cannot be reached (peer closed connection", None),
    ],
)
def test_passing_faults_are_repeated(persona: Persona, says: str, asks_to_wait: float | None) -> None:
    with serving(persona) as server:
        client = OpenAIClient(server.url, "m", concurrency=1)
        with pytest.raises(TemporaryError) as raised:
            client.ask(ASKED)
        assert str(raised.value).startswith(says) and raised.value.retry_after == asks_to_wait
        ((_, reply),) = answers(client, many(1), cache=None)
        assert reply.text == '{"verdicts": [1, 0, 1]}' and server.requests == 3, "nobody else repeats them"
        assert server.times[2] - server.times[1] >= (asks_to_wait or 0)


def test_a_server_may_name_the_time_to_wait_until() -> None:
    date = formatdate(time.time() + 100, usegmt=True)
    with serving(too_many(right, None, date)) as server, pytest.raises(TemporaryError) as raised:
        OpenAIClient(server.url, "m").ask(ASKED)
    assert raised.value.retry_after == pytest.approx(100, abs=3)
    with serving(too_many(right, None, "soon")) as server, pytest.raises(TemporaryError) as raised:
        OpenAIClient(server.url, "m").ask(ASKED)
    assert raised.value.retry_after is None


def test_a_server_that_stays_silent_or_is_not_there(tmp_path: Path) -> None:
    with serving(slow(right, 0.5)) as server:
        with pytest.raises(TemporaryError, match=r"the server was silent for 0.05 s"):
            OpenAIClient(server.url, "m", timeout=0.05).ask(ASKED)
        url = server.url
    client = OpenAIClient(url, "m", concurrency=2)
    with pytest.raises(SaelabError) as raised:
        list(answers(client, many(3), cache=tmp_path / "cache"))
    assert f"m at 127.0.0.1: no answer after {TRIES} tries: the server cannot be reached (" in str(raised.value)


@pytest.mark.parametrize(
    ("part", "says"),
    [("response_format", ""), ("response_format", "bad request"), ("logprobs", ""), ("seed", ""), ("temperature", "")],
)
def test_a_part_that_is_refused_is_left_out_from_then_on(part: str, says: str) -> None:
    with serving(refusing(right, part, says)) as server:
        client = OpenAIClient(server.url, "m")
        assert [client.ask(ASKED).text for _ in range(3)] == ['{"verdicts": [1, 0, 1]}'] * 3
        assert server.requests == 4 and client.refused == {part}
        gone = {part, "top_logprobs"} if part == "logprobs" else {part}
        assert server.bodies[-1].keys() == server.bodies[0].keys() - gone


def test_openai_renames_max_tokens() -> None:
    says = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    with serving(refusing(right, "max_tokens", says)) as server:
        assert OpenAIClient(server.url, "m").ask(ASKED).text
        assert server.bodies[-1]["max_completion_tokens"] == 32 and "max_tokens" not in server.bodies[-1]


def test_what_cannot_succeed_says_what_to_do() -> None:
    cases = {
        Fault(400, "context length exceeded"): "show fewer or shorter windows",
        Fault(401, "who are you"): "set the key in SAELAB_LLM_KEY or OPENAI_API_KEY",
        Fault(404, "no such model"): "check the model's name; check the address: most servers want /v1 at its end",
        Fault(
            307, "there", (("Location", "http://127.0.0.1:1/elsewhere"),)
        ): "which is not followed; give that address",
    }
    for fault, advice in cases.items():
        with serving(lambda _, fault=fault: fault) as server, pytest.raises(SaelabError) as raised:
            OpenAIClient(server.url, "m").ask(replace(ASKED, schema=None))
        assert str(raised.value).startswith(f"m at 127.0.0.1: refuses the request with status {fault.status} (")
        assert str(raised.value).endswith(advice) and server.requests == 1
    with serving(lambda _: Fault(400, "content_filter: filtered")) as server:
        assert OpenAIClient(server.url, "m").ask(ASKED) == Reply("", None, 14, 0)
    with serving(lambda _: Fault(200, "no completion")) as server, pytest.raises(TemporaryError, match="want /v1"):
        OpenAIClient(server.url, "m").ask(ASKED)


@pytest.mark.parametrize("status", [400, 500])
def test_the_key_is_nowhere(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SAELAB_LLM_KEY", f"{SECRET}\n")
    caplog.set_level(logging.DEBUG)
    with serving(echoing_fault(status)) as server:
        client = OpenAIClient(server.url, "m")
        with pytest.raises((SaelabError, TemporaryError)) as raised:
            client.ask(ASKED)
        with pytest.raises(SaelabError) as last:
            list(answers(client, many(3), cache=tmp_path / "cache"))
        assert server.headers["Authorization"] == f"Bearer {SECRET}"
    with serving(echo) as server:
        ((_, reply),) = answers(OpenAIClient(server.url, "m"), many(1), cache=tmp_path / "cache")
    assert "Bearer [key]" in reply.text
    seen = [reply, repr(client), repr(vars(client)), caplog.text, *(str(record.__dict__) for record in caplog.records)]
    for error in (raised.value, last.value):
        while error is not None:
            seen += [str(error), repr(error), *traceback.format_exception(error)]
            error = error.__cause__ or error.__context__
    seen += [path.read_bytes().decode(errors="replace") for path in tmp_path.iterdir()]
    assert caplog.records
    for text in seen:
        assert SECRET not in str(text) and SECRET[:12] not in str(text)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(right) as server:
        for name, key in (("none", "none"), ("OPENAI_API_KEY", "of-openai"), ("SAELAB_LLM_KEY", "of-saelab")):
            monkeypatch.setenv(name, key)
            OpenAIClient(server.url, "m").ask(ASKED)
            assert server.headers["Authorization"] == f"Bearer {key}"
    monkeypatch.setenv("SAELAB_LLM_KEY", "two parts")
    with pytest.raises(SettingError, match="SAELAB_LLM_KEY: the key has blanks") as raised:
        OpenAIClient(server.url, "m")
    assert "two" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://node7:8000/v1", "forward a port (ssh -L 8000:localhost:8000 node7) and give http://localhost:8000/v1"),
        ("https://me:geheim@host/v1", "the address of host has a password"),
        ("https://host/v1?key=geheim", "the address of host has a password, a query"),
        ("localhost:8000/v1", "is no http or https address"),
        ("file:///etc/passwd", "is no http or https address"),
        ("http://[::1/v1", "is no address"),
    ],
)
def test_addresses_that_are_refused(url: str, says: str) -> None:
    with pytest.raises(SettingError) as raised:
        OpenAIClient(url, "m")
    assert says in str(raised.value) and "geheim" not in str(raised.value)


def test_addresses_that_are_not() -> None:
    for url in ("https://openrouter.ai/api/v1", "http://localhost:1/v1", "http://[::1]:1/v1", "http://127.0.0.2/v1"):
        assert OpenAIClient(url, "m").name.startswith("m at ")
    with pytest.raises(SettingError, match="model: is empty"):
        OpenAIClient("http://localhost:1/v1", " ")


CHILD = """
import sys
from pathlib import Path
from saelab.autointerp.llm.answers import answers
from saelab.autointerp.llm.openai_client import OpenAIClient
from saelab.autointerp.llm.protocol import Request
asked = ((i, Request((("user", f"question {i}"),))) for i in range(60))
client = OpenAIClient(sys.argv[1], "m", concurrency=4)
for key, reply in answers(client, asked, cache=Path(sys.argv[2])):
    print(key, reply.text)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_asks_nothing_twice(tmp_path: Path) -> None:
    resumed = threading.Event()

    def persona(question) -> Answer:
        if question.number > 40:
            resumed.wait()
        return Answer(f"to {prompt(question.body)}")

    with serving(persona) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(tmp_path / "cache")]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while server.requests < 44:  # four threads: each has stored what it got before it sends its next request
            assert child.poll() is None
            time.sleep(0.01)
        child.kill()
        child.wait()
        assert server.answered == 40
        before = server.requests
        resumed.set()
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        assert server.requests == before + 20
    assert printed == [f"{i} to question {i}" for i in range(60)]


def test_the_file_of_a_cache_has_no_more_than_keys_and_replies(tmp_path: Path) -> None:
    with serving(right) as server:
        list(answers(OpenAIClient(server.url, "m"), many(3), cache=tmp_path / "cache"))
    content = (tmp_path / "cache").read_bytes()
    assert json.dumps('{"verdicts": [1, 0, 1]}').encode() in content and b"question" not in content
