"""`saelab explain` and `saelab score` as a user types them, with a server on this machine as the language model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from saelab.autointerp.llm.openai_client import OpenAIClient
from saelab.autointerp.llm.protocol import Request
from saelab.autointerp.scoring import SCORERS
from saelab.autointerp.store import explanations, scores
from saelab.cli import app
from saelab.errors import SaelabError
from saelab.runs.autointerp import explain, score
from tests.autointerp.server import Answer, Fault, Question, Server, failing, oracle, serving
from tests.autointerp.test_stages import INPUTS, SETTINGS, Oracle, line, made
from tests.tiny import model_folder

FEATURES = 5


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made(tmp_path / "run")


def right(body: dict[str, Any]) -> str:
    """What the oracle of the stages' tests says."""
    return Oracle().ask(Request(tuple((each["role"], each["content"]) for each in body["messages"]))).text


KNOWING = oracle(right)


def command(*arguments: object, answers: str = "") -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], input=answers)


def asking(server: Server, run: Path, *more: object) -> list[object]:
    return ["explain", run, "--features", f"0:{FEATURES}", "--llm", server.url, "--model", "any", *more]


def texts(run: Path) -> list[str]:
    return [each.text for each, _ in explanations(run / "autointerp", INPUTS)]


def test_the_help_names_every_score() -> None:
    words = command("score", "--help").output.replace(",", " ").replace(";", " ").split()
    assert set(SCORERS) <= set(words)


def test_progress_counts_what_is_finished(run: Path) -> None:
    with serving(failing(KNOWING, status=403)) as server:
        failed = command(*asking(server, run, "--yes"))
    assert isinstance(failed.exception, SaelabError) and "status 403" in str(failed.exception)
    assert "explaining: " not in failed.output
    with serving(KNOWING) as server:
        done = command(*asking(server, run, "--yes"))
        assert f"explaining: {FEATURES} features in" in done.output
        done = command("score", run, "--scores", "fuzzing,predicate", "--llm", server.url, "--model", "any", "--yes")
    assert f"scoring: {4 * FEATURES} scores in" in done.output, done.exception


def test_contrastive_and_reasoning_change_the_question(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # all silent windows of the made-up text are scored on, so that no near misses are left
    monkeypatch.setattr("saelab.autointerp.explainers.near_misses", lambda _, c: [c.negatives[0].example])
    with serving(KNOWING) as server:
        done = command(*asking(server, run, "--contrastive", "--reasoning", "--yes"))
        shown = [body["messages"][1]["content"] for body in server.bodies]
    assert done.exit_code == 0 and len(shown) == FEATURES, done.exception
    assert all("Texts on which it is not active, though they are similar" in each for each in shown)
    assert all("First write your reasoning" in each for each in shown)
    kinds = {each.kind for each, _ in explanations(run / "autointerp", INPUTS)}
    assert kinds == {"contrastive, reasoning"} and texts(run) == [f"word{'abcde'[i]}" for i in range(FEATURES)]


def test_again_makes_further_explanations(run: Path) -> None:
    for options in ((), (), ("--again",)):
        assert command("explain", run, "--features", "0:2", *options).exit_code == 0
    assert [each.attempt for each, _ in explanations(run / "autointerp", INPUTS)] == [0, 0, 1, 1]
    failed = command("explain", run, "--about", "causes")
    assert "--about: there is no 'causes' (context, effect)" in str(failed.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("explain --llm local", "--model: is missing; name a model folder"),
        ("explain --llm http://localhost:1/v1", "--model: is missing; name the model to be asked at http://localhost"),
        ("explain --llm ftp://here --model m", "--llm: ftp://here is no http or https address"),
        ("explain --max-money 1", "--max-money: the model's price is not known"),
        ("explain --contrastive", "--contrastive, --reasoning: need a language model"),
        ("explain --features 3:2", "--features: '3:2' is not a range of features"),
        ("explain --features 1-9", "--features: There is no feature 9"),
        ("score --scores simulation", "--scores: simulation needs a language model as judge"),
        ("score --scores detektion", "--scores: there is no 'detektion'"),
        ("controls --kinds untrained,neurons training.tokens=1e5", "training.tokens=1e5: untrained, neurons are not"),
    ],
)
def test_errors_name_options(run: Path, arguments: str, message: str) -> None:
    name, *options = arguments.split()
    assert str(command(name, run, *options).exception).startswith(message)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    assert "is no run folder: it has no config.yaml and no feature" in str(command("explain", tmp_path).exception)


def test_the_cost_is_a_question(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelab.cli_autointerp.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    with serving(KNOWING) as server:
        refused = command(*asking(server, run, "--price", "1,2"), answers="n\n")
        assert "this asks 5 requests" in refused.output and "in money" in refused.output
        assert "go on?" in refused.output and str(refused.exception) == "nothing was asked"
        assert not server.requests and not texts(run)
        done = command(*asking(server, run), answers="y\n")
        assert done.exit_code == 0 and server.requests == FEATURES == len(texts(run))


def test_a_cap_ends_the_run_and_a_higher_one_continues_it(run: Path) -> None:
    with serving(KNOWING) as server:
        assert command(*asking(server, made(run.parent / "whole"), "--yes")).exit_code == 0
        whole = server.prompt_tokens + server.answer_tokens
    with serving(KNOWING) as server:
        cut = command(*asking(server, run, "--yes", "--concurrency", 1, "--max-tokens", int(0.6 * whole)))
        first = server.requests
        assert isinstance(cut.exception, SaelabError) and 0 < first < FEATURES
        message = str(cut.exception)
        assert "leaves no room for the next request" in message and "what was answered is kept" in message
        assert "raise the cap and run again to continue" in message and len(texts(run)) == first
        assert command(*asking(server, run, "--yes")).exit_code == 0
        assert server.requests == FEATURES and set(server.of_body.values()) == {1}
    assert texts(run) == texts(run.parent / "whole")


def test_ctrl_c_loses_nothing(run: Path) -> None:
    started, process = threading.Event(), list[subprocess.Popen[str]]()

    def interrupting(question: Question) -> Answer | Fault:
        if question.number == 3:
            started.wait()
            process[0].send_signal(signal.SIGINT)
        return KNOWING(question)

    with serving(interrupting) as server:
        arguments = [str(each) for each in asking(server, run, "--yes", "--concurrency", 1)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "NO_PROXY": "*"}
        # a shell may have started us with SIGINT ignored, and a process that is born so ignores it too
        code = "import signal, saelab.cli; signal.signal(signal.SIGINT, signal.default_int_handler); saelab.cli.main()"
        typed, pipe = [sys.executable, "-c", code, *arguments], subprocess.PIPE
        process.append(subprocess.Popen(typed, env=environment, stdout=pipe, stderr=pipe, text=True))
        started.set()
        _, said = process[0].communicate(timeout=240)
        assert process[0].returncode == 130 and said.splitlines()[-1] == "interrupted" and "Traceback" not in said
        assert "explaining: " not in said
        assert command(*asking(server, run, "--yes")).exit_code == 0
        assert server.requests == FEATURES and set(server.of_body.values()) == {1}
    assert len(texts(run)) == FEATURES


def test_a_model_folder_explains_and_judges(run: Path) -> None:
    model = run.parent / "tiny"
    shutil.copytree(model_folder("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    done = command("explain", run, "--features", "0", "--llm", "local", "--model", model, "--yes")
    assert done.exit_code == 0, done.exception
    assert "1 features explained by tiny (" in done.output, "its weights are random, but it keeps to the form"
    assert "0 whose answer could not be read" in done.output
    assert command("explain", run, "--features", "0").exit_code == 0
    done = command(
        "score", run, "--scores", "detection", "--features", "0", "--llm", "local", "--model", model, "--yes"
    )
    assert done.exit_code == 0, done.exception
    ((found, _, _),) = scores(run / "autointerp", INPUTS)
    assert found.model.startswith("tiny (") and found.unread == 0 and found.tokens > 1000
    failed = command("explain", run, "--llm", "local", "--model", run.parent / "nothing", "--yes")
    assert isinstance(failed.exception, SaelabError) and "nothing" in str(failed.exception)


def test_embeddings_come_from_sentence_transformers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SentenceTransformer:
        """Counts letters."""

        def __init__(self, name: str) -> None:
            if Path(name).name != "letters":
                raise OSError(f"{name} is not a folder")

        def encode(self, texts: Sequence[str], **_: bool) -> np.ndarray:
            counts = np.array([[1 + text.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    explain(run, f"0:{FEATURES}", settings=SETTINGS)
    failed = command("score", run, "--scores", "embedding", "--embed", "models/letters")
    assert "sentence-transformers is not installed; `pip install 'saelab[embed]'`" in str(failed.exception)
    package = ModuleType("sentence_transformers")
    package.__spec__ = ModuleSpec("sentence_transformers", None)
    package.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    failed = command("score", run, "--scores", "embedding", "--embed", "models/words")
    assert "models/words: is no sentence-transformers model" in str(failed.exception)
    done = command("score", run, "--scores", "embedding,intruder_embedding", "--embed", "models/letters")
    assert done.exit_code == 0, done.exception
    assert {each.model for each, _, _ in scores(run / "autointerp", INPUTS)} == {"letters"}


def test_tokens_are_those_that_the_server_counts(run: Path) -> None:
    explain(run, f"0:{FEATURES}", llm=Oracle(), settings=SETTINGS)
    with serving(KNOWING) as server:
        client = OpenAIClient(server.url, "any")
        found = score(run, ["detection", "embedding", "predicate"], llm=client)
        counted = server.prompt_tokens + server.answer_tokens
    spent: dict[str, int] = dict.fromkeys(("detection", "embedding", "predicate"), 0)
    for each, _, _ in scores(run / "autointerp", INPUTS):
        spent[each.score] += each.tokens
    assert spent == {"detection": counted, "embedding": 0, "predicate": 0} and counted > 0
    own = line(found, "detection")
    assert own.tokens_per_feature == own.tokens / FEATURES and counted / 3 < own.tokens < counted
    shown = dict(found.to_frame()[["score", "tokens per feature"]].itertuples(index=False, name=None))
    assert shown == {"detection": own.tokens_per_feature, "embedding": 0, "predicate": 0}
