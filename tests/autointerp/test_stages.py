"""The stages `explain` and `score` on a made-up feature database, with a judge that knows the truth."""

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from saelab.autointerp.contexts import Contexts
from saelab.autointerp.llm.protocol import Client, Reply, Request
from saelab.autointerp.plan import controls, stored
from saelab.autointerp.records import SHUFFLED, Explanation
from saelab.autointerp.settings import ContextSettings, InterventionSettings, ScoreSettings
from saelab.autointerp.steered_text import SteeredTexts, steered_texts
from saelab.autointerp.store import explanations, scores, writing
from saelab.autointerp.summary import Line, ScoreTable, mean_interval
from saelab.cli import app
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.runs.autointerp import explain, score
from saelab.runs.explained import table
from saelab.runs.judges import Subject
from tests.autointerp.test_intervention import SITE, autoencoder
from tests.autointerp.test_surprisal import Reader
from tests.features.dense import write_database
from tests.tiny import long_language_model

INPUTS = "0" * 64
N = 6
SETTINGS = ContextSettings(window=8, explain=6, quantiles=2, positives=10, negatives=10)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Feature f is active on the token " word{f}" and nowhere else; the last one is never active."""
    return made(tmp_path / "run")


def made(run: Path, inputs: str = INPUTS) -> Path:
    rng = np.random.default_rng(0)
    tokens = rng.integers(N, 60, (60, 32))
    for feature in range(N - 1):
        row, position = np.unravel_index(rng.permutation(tokens.size)[: 30 + 10 * feature], tokens.shape)
        tokens[row, position] = feature + 1
    tokens[:, 0] = 0
    z = (tokens[..., None] == np.arange(1, N + 1)) * rng.uniform(1, 2, (*tokens.shape, N))
    z[..., N - 1] = 0
    vocabulary = [b"<eos>", *(f" word{chr(97 + i)}".encode() for i in range(59))]
    write_database(run / "features", z.astype(np.float32), tokens, vocabulary, inputs=inputs)
    return run


class Oracle:
    """Explains a feature by its token, and says of a window whether it has the token."""

    name = "oracle"
    concurrency = 2

    def __init__(self, most: float = float("inf")) -> None:
        self.asked: list[Request] = []
        self.most = most

    def ask(self, request: Request) -> Reply:
        if len(self.asked) >= self.most:
            raise SaelabError("killed")
        self.asked.append(request)
        text = request.messages[-1][1]
        if "verdicts" not in text:
            (token,) = set(re.findall(r"<< (word\w)>>", text))
            return Reply(json.dumps({"explanation": token}), None, 10, 2)
        token = re.findall(r"Description of the feature: (word\w)", text)[0]
        marked = "<<" in text
        lines = re.findall(r"^\d+: (.*)$", text, re.MULTILINE)
        said = [bool(re.search(rf"<< {token}>>" if marked else rf"\b{token}\b", line)) for line in lines]
        return Reply(json.dumps({"verdicts": [int(each) for each in said]}), None, 50, 5)

    def count(self, text: str) -> int:
        return len(text) // 4


def line(found: ScoreTable, name: str) -> Line:
    (only,) = [each for each in found.lines if each.score == name]
    return only


def keys(client: Oracle) -> list[str]:
    return [request.key(client.name) for request in client.asked]


def explained(run: Path, client: Client | None = None) -> None:
    explain(run, f"0:{N}", llm=client or Oracle(), settings=SETTINGS)


def test_the_oracle_scores_1_and_its_shuffled_control_less(run: Path) -> None:
    made = explain(run, f"0:{N}", llm=Oracle(), settings=SETTINGS)
    assert (made.explained, made.new, made.no_windows, made.unreadable) == (N - 1, N, 1, 0)
    assert made.tokens == 12 * (N - 1)
    messages: list[str] = []
    found = score(run, ["detection", "fuzzing"], llm=Oracle(), say=messages.append)
    assert "1 of 6 features have no explanation, and no score of one" in messages
    for name in ("detection", "fuzzing"):
        own = line(found, name)
        assert own.mean == (1, 1, 1) and own.n == N - 1 and own.kind == "default" and not own.lexical
        assert own.same is not None and not own.warning, "right answers differ"
        (shuffled,) = own.differences
        assert shuffled.control == "shuffled" and shuffled.pairs == N - 1 and shuffled.value.low > 0.3
        assert shuffled.verdict == "beats its control"
    for each, _ in explanations(run / "autointerp", INPUTS):
        if each.kind == SHUFFLED + "default":
            assert each.text != f"word{chr(97 + each.feature)}"


class Parrot(Oracle):
    """Explains as the oracle does, and gives the same verdicts whatever it is shown."""

    def ask(self, request: Request) -> Reply:
        right = super().ask(request)
        n = len(json.loads(right.text).get("verdicts", ""))
        return Reply(json.dumps({"verdicts": [i % 2 for i in range(n)]}), None, 1, 1) if n else right


def test_a_judge_that_answers_the_same_whatever_it_is_shown_is_named(run: Path) -> None:
    explained(run)
    found = line(score(run, ["detection"], llm=Parrot()), "detection")
    assert found.same is not None and found.same.answer == "0, 1, 0, 1, 0" and found.same.constant
    assert found.warning == "the judge gives the same answers whatever it is shown: 0, 1, 0, 1, 0 to 100%"
    result = CliRunner().invoke(app, ["score", str(run), "--scores", "predicate"], terminal_width=200)
    assert f"detection by oracle: {found.warning}" in result.output
    assert table(run).to_frame()["warning"].str.len().gt(0).any()


def test_surprisal_asks_a_model_for_log_probabilities(run: Path) -> None:
    explained(run)
    found = line(score(run, ["surprisal"], base=Reader()), "surprisal")
    assert found.mean == (1, 1, 1) and found.judge == "reader" and found.n == N - 1
    assert found.differences[0].value.low > 0.3
    assert line(score(run, ["surprisal"], base=(again := Reader())), "surprisal") == found and not again.seen


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The run studies a tiny model; the list gets each feature for which texts are generated."""
    steered: list[int] = []

    def counted(c: Contexts, *rest: Any) -> SteeredTexts:
        steered.append(c.feature)
        return steered_texts(c, *rest)

    lm, sae = long_language_model(), autoencoder()
    monkeypatch.setattr("saelab.runs.judges.subject", lambda *_: Subject(sae, lm, SITE))
    monkeypatch.setattr("saelab.autointerp.steered_text.steered_texts", counted)
    return steered


FAST = ScoreSettings(steering=InterventionSettings(prompts=4, new_tokens=2))


def test_intervention_scores_effects_and_the_other_scores_contexts(run: Path, subject: list[int]) -> None:
    explained(run)
    made = explain(run, f"0:{N}", about="effect", settings=SETTINGS)
    # feature 0 is active on a special token of the model, which steering leaves as it is
    assert (made.explained, made.no_windows, made.no_effect, made.unreadable) == (N - 2, 1, 1, 0)
    found = score(run, ["intervention", "detection", "embedding"], llm=Oracle(), settings=FAST)
    assert line(found, "detection").mean == (1, 1, 1), "it still gets the explanations of contexts, the earlier ones"
    own = line(found, "intervention")
    assert (own.n, own.kind, own.explainer, own.unit) == (N - 2, "effect", "lexical", "nats")
    assert subject == [*range(1, N - 1)], "texts are generated once for an explanation and its control"
    texts = {each.key: each for each, _ in explanations(run / "autointerp", INPUTS)}
    kinds = {(each.score, texts[each.explanation].kind) for each, _, _ in scores(run / "autointerp", INPUTS)}
    both = {(name, f"{kind}default") for name in ("detection", "embedding") for kind in ("", SHUFFLED)}
    assert kinds == both | {("intervention", "effect"), ("intervention", SHUFFLED + "effect")}
    controls = {each.control: each for each in own.differences}
    assert set(controls) == {"shuffled", "random direction", "random direction, same KL"}
    of = [
        each.figures["above random direction"]
        for each, _, _ in scores(run / "autointerp", INPUTS)
        if each.score == "intervention" and texts[each.explanation].kind == "effect"
    ]
    assert controls["random direction"].value.value == pytest.approx(np.mean(of))
    again = score(run, ["intervention"], settings=FAST)
    assert again.figures() == found.figures() and len(subject) == N - 2


def test_a_score_is_not_made_without_an_explanation_of_its_kind(run: Path, subject: list[int]) -> None:
    explained(run)
    with pytest.raises(SaelabError, match=r"no explanations of effects; `saelab explain .* --about effect` makes them"):
        score(run, ["intervention"])
    other = made(run.parent / "other")
    explain(other, "1:3", about="effect", settings=SETTINGS)
    with pytest.raises(SaelabError, match="has no explanations; `saelab explain"):
        score(other, ["detection"])
    messages: list[str] = []
    found = score(other, ["intruder_embedding"], "1:4", say=messages.append)
    assert line(found, "intruder").n + line(found, "intruder").without == 3
    assert not any("no explanation" in each for each in messages)
    score(other, ["intervention"], "1:4", settings=FAST, say=messages.append)
    assert "1 of 3 features have no explanation of their effect, and no score of one" in messages
    assert not any(each.score == "detection" for each, _, _ in scores(other / "autointerp", INPUTS))


def test_a_language_model_explains_effects_from_the_tokens_that_rise(run: Path, subject: list[int]) -> None:
    class Effects(Oracle):
        def ask(self, request: Request) -> Reply:
            self.asked.append(request)
            return Reply('{"explanation": "vowels"}', None, 30, 3)

    made = explain(run, "0:3,5", about="effect", llm=(client := Effects()), settings=SETTINGS)
    assert (made.explained, made.no_windows, made.no_effect, made.tokens, len(client.asked)) == (2, 1, 1, 66, 2)
    assert all("The lists, as JSON" in each.messages[1][1] for each in client.asked)
    with pytest.raises(SaelabError, match="are for explanations of contexts"):
        explain(run, "0:2", about="effect", llm=Effects(), reasoning=True)
    with pytest.raises(SaelabError, match="there is no 'efect'"):
        explain(run, "0:2", about=cast(Any, "efect"))


def test_explaining_again_keeps_the_earlier_ones_and_continues_after_a_kill(run: Path) -> None:
    class Fickle(Oracle):
        def ask(self, request: Request) -> Reply:
            super().ask(request)
            return Reply(json.dumps({"explanation": f"attempt {request.seed}"}), None, 10, 2)

    explain(run, f"0:{N}", llm=Fickle(), settings=SETTINGS)
    with pytest.raises(SaelabError, match="killed"):
        explain(run, f"0:{N}", llm=(first := Fickle(most=2)), again=True, settings=SETTINGS)
    second = explain(run, f"0:{N}", llm=(rest := Fickle()), again=True, settings=SETTINGS)
    assert len(first.asked) + len(rest.asked) == N - 1, "what the killed run asked is not asked again"
    assert (second.explained, second.no_windows, second.tokens) == (N - 1, 1, 24 * (N - 1))
    assert all(each.seed == 1 and each.temperature > 0 for each in rest.asked)
    by_feature: dict[int, list[str]] = {}
    for each, _ in explanations(run / "autointerp", INPUTS):
        by_feature.setdefault(each.feature, []).append(each.text)
    assert by_feature == {f: ["attempt 0", "attempt 1"] if f < N - 1 else ["", ""] for f in range(N)}
    assert explain(run, f"0:{N}", llm=Fickle(), settings=SETTINGS).new == 0
    third = explain(run, f"0:{N}", llm=(client := Fickle()), again=True, settings=SETTINGS)
    assert third.new == N and {each.seed for each in client.asked} == {2}
    explain(run, "0:2", settings=SETTINGS)
    assert explain(run, "0:2", again=True, settings=SETTINGS).new == 2, "the same text counts as another attempt"
    assert explain(run, "0:2", again=True, settings=SETTINGS).new == 2


def test_garbage_is_counted_and_enters_no_score(run: Path) -> None:
    class Garbage(Oracle):
        name = "garbage"

        def ask(self, request: Request) -> Reply:
            return Reply("Sure!")

    made = explain(run, "0:3", llm=Garbage(), settings=SETTINGS)
    assert (made.explained, made.unreadable) == (0, 3)
    explained(run)
    own = line(score(run, ["detection"], llm=Garbage()), "detection")
    assert own.n == 0 and own.without == N - 1 and own.unread == 4 * (N - 1) and np.isnan(own.mean.value)


def test_a_killed_run_continues_and_asks_nothing_twice(run: Path) -> None:
    whole, first = Oracle(), Oracle(most=3)
    explained(made(run.parent / "whole"), whole)
    with pytest.raises(SaelabError, match="killed"):
        explained(run, first)
    rest = Oracle()
    explained(run, rest)
    assert len(first.asked) + len(rest.asked) == len(whole.asked) == N - 1
    again = Oracle()
    explained(run, again)
    assert not again.asked

    asked: list[str] = []
    whole = Oracle()
    expected = score(run.parent / "whole", ["detection", "fuzzing"], llm=whole)
    for most in (7, 11):
        with pytest.raises(SaelabError, match="killed"):
            score(run, ["detection", "fuzzing"], llm=(judge := Oracle(most)))
        asked += keys(judge)
    found = score(run, ["detection", "fuzzing"], llm=(judge := Oracle()))
    asked += keys(judge)
    assert len(asked) == len(set(asked)) == len(set(keys(whole)))
    assert found.figures() == expected.figures()

    (run / "autointerp/scores.parquet").unlink()  # as if killed before it was written
    score(run, ["detection", "fuzzing"], llm=(judge := Oracle()))
    assert (run / "autointerp/scores.parquet").is_file() and not judge.asked


def test_another_feature_database_makes_the_records_invalid(run: Path) -> None:
    explained(run)
    (run / "features").rename(run / "old")
    made(run, "another")
    with pytest.raises(SaelabError, match="has no explanations; `saelab explain"):
        score(run, ["detection"], llm=Oracle())
    assert len(list(explanations(run / "autointerp", INPUTS))) == N  # they are kept


def test_other_runs_are_controls_paired_by_density(run: Path) -> None:
    other = made(run.parent / "other")
    for each in (run, other):
        explained(each)
        score(each, ["detection"], llm=Oracle())
    (difference,) = [each for each in line(table(run, [other]), "detection").differences if each.control == "other"]
    assert difference.pairs == N - 1 and difference.value == (0, 0, 0)
    assert difference.verdict == "does not beat its control"


def test_parquet_equals_the_json_lines(run: Path) -> None:
    explain(run, f"0:{N}", settings=SETTINGS)
    score(run, ["detection", "embedding", "intruder", "predicate"])
    folder = run / "autointerp"
    stored = [each for each, _, _ in scores(folder, INPUTS)]
    frame = pd.read_parquet(folder / "scores.parquet")
    assert frame["key"].tolist() == [each.key for each in stored]
    for column, get in (("value", 0), ("low", 1), ("high", 2)):
        np.testing.assert_array_equal(frame[column], [each.value[get] for each in stored])
    for column, field in (("type", "score"), ("model", "model"), ("unit", "unit"), ("note", "note")):
        assert frame[column].tolist() == [getattr(each, field) for each in stored]
    texts = {each.key: each.text for each, _ in explanations(folder, INPUTS)}
    assert pq.read_table(folder / "scores.parquet")["text"].to_pylist() == [
        texts.get(each.explanation) for each in stored
    ]
    judged = pd.read_parquet(folder / "judged.parquet")
    assert len(judged) == sum(len(each.judged) for each in stored)
    np.testing.assert_array_equal(judged["said"], [one.said for each in stored for one in each.judged])


def test_the_cost_is_agreed_to_before_anything_is_asked(run: Path) -> None:
    oracle = Oracle()

    def refuse(cost: object) -> None:
        raise SaelabError(f"refused: {cost}")

    with pytest.raises(SaelabError, match=r"refused: [56] requests"):
        explain(run, f"0:{N}", llm=oracle, settings=SETTINGS, confirm=refuse)
    explained(run)
    with pytest.raises(SaelabError, match=r"refused: 4\d requests"):
        score(run, ["detection"], llm=oracle, confirm=refuse)
    assert not oracle.asked


def test_the_commands(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["explain", str(run), "--features", "0:6"])
    assert done.exit_code == 0 and "5 features explained by lexical" in done.output
    assert "it is no language model" in done.output
    done = runner.invoke(app, ["score", str(run), "--scores", "predicate,intruder_embedding,fuzzing"])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.output.splitlines()]
    compared = [row[:4] for row in rows if len(row) == 8]
    assert ["fuzzing", "lexical", "lexical", "shuffled"] in compared, "of two judges each row names its own"
    assert done.exit_code == 0 and "shuffled" in done.output and "chance (0.2)" in done.output
    assert "lexical is no language model" in done.output
    for wrong, message in (
        (["score", str(run), "--scores", "detektion"], "Nearest: detection"),
        (["score", str(run), "--scores", "simulation"], "needs a language model"),
        (["explain", str(run), "--features", "90"], "There is no feature 90"),
        (["explain", str(run), "--contrastive"], "need a language model"),
        (["explain", str(run), "--model", "any"], "llm: is missing"),
        (["explain", str(run), "--price", "cheap"], "--price: 'cheap' is not two numbers"),
        (["explain", str(run.parent)], "is no run folder"),
    ):
        failed = runner.invoke(app, wrong)
        assert isinstance(failed.exception, SaelabError) and message in str(failed.exception)
    monkeypatch.setattr("saelab.runs.autointerp.named", lambda *_: (oracle := Oracle()) and oracle)
    arguments = ["explain", str(run), "--llm", "http://localhost:1/v1", "--model", "any", "--features", "0:2"]
    failed = runner.invoke(app, arguments)
    assert "give --yes" in str(failed.exception)
    done = runner.invoke(app, [*arguments, "--yes", "--price", "1,2"])
    assert done.exit_code == 0, done.exception
    assert "2 features explained by oracle" in done.output and "in money" in done.output


def test_the_interval_of_many_features_is_that_of_the_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).beta(2, 5, 1000)
    drawn = mean_interval(values)
    monkeypatch.setattr("saelab.autointerp.summary.MANY", 999)
    assert mean_interval(values) == pytest.approx(drawn, abs=0.1 * (drawn.high - drawn.low))
    assert mean_interval(values) != drawn


def test_stored_explanations_are_read_when_they_are_needed(run: Path) -> None:
    """The latest of each feature, and its control: the stored one, unless it has the same text, or a new one."""
    folder = run / "autointerp"
    with writing(folder, INPUTS) as writer:
        for feature, text in ((3, "c"), (1, "a"), (2, "b"), (1, "A")):
            writer.explanation(Explanation(feature, text, "default", "m", answer="long"), SETTINGS)
        writer.explanation(Explanation(4, "", "default", "m"), SETTINGS)
        writer.explanation(Explanation(2, "A", f"{SHUFFLED}default", "m"), SETTINGS)
        writer.explanation(Explanation(3, "c", f"{SHUFFLED}default", "m"), SETTINGS)
        writer.explanation(Explanation(1, "of another kind", f"{SHUFFLED}contrastive", "m"), SETTINGS)
        writer.explanation(Explanation(1, "effect", "effect", "m"), SETTINGS)
    latest, shuffled = stored(folder, INPUTS)
    assert {feature: each.explanation.text for feature, each in latest.items()} == {1: "A", 2: "b", 3: "c", 4: ""}
    assert not any(each.explanation.answer for each in latest.values()) and 0 not in latest
    assert latest.features[latest.explained].tolist() == [1, 2, 3]
    found = controls(open_database(run / "features"), latest, shuffled, np.array([1, 2, 3, 4]))
    texts = {control: each.explanation.text for control, each in found.items()}
    assert texts.pop((2, "m", "default")) == "A" and len(found) == 3
    assert texts.pop((1, "m", "default")) == "b" and texts.pop((3, "m", "default")) == "b" and not texts
    assert found.new_one(2) is None and found.new_one(4) is None and found.new_one(0) is None
    new = found.new_one(3)
    assert new is not None and new.explanation.kind == f"{SHUFFLED}default" and new.explanation.feature == 3
    assert new.explanation.note == "the explanation of feature 2" and new.contexts == SETTINGS
    assert found.get((3, "m", "contrastive")) is None
    (effect,) = stored(folder, INPUTS, "effect")[0].values()
    assert effect.explanation.text == "effect"
