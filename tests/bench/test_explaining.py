"""The tables about explanations: made from a small database, finished features are not asked about again."""

import json
from pathlib import Path

import explaining
import explaining_report
import numpy as np
import pytest
from methods_report import rewritten

import saelab
from saelab.autointerp.contexts import contexts
from saelab.autointerp.lexical import LexicalJudge, explain
from saelab.autointerp.llm.protocol import Reply, Request
from saelab.autointerp.scorers.predicate import predicate
from saelab.autointerp.settings import ContextSettings
from saelab.autointerp.similarity import Described
from saelab.features.database import open_database
from tests.features.dense import write_database

FEATURES = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Feature f is active on the token " word{f}", the last one strongly and on another token weakly."""
    path = tmp_path_factory.mktemp("explained") / "run"
    rng = np.random.default_rng(0)
    tokens = rng.integers(FEATURES + 2, 60, (700, 64))
    for token in range(1, FEATURES + 2):
        row, position = np.unravel_index(rng.permutation(tokens.size)[:500], tokens.shape)
        tokens[row, position] = token
    tokens[:, 0] = 0
    z = (tokens[..., None] == np.arange(1, FEATURES + 1)) * rng.uniform(1, 2, (*tokens.shape, FEATURES))
    z[..., -1] += 0.25 * (tokens == FEATURES + 1)
    vocabulary = [b"<eos>", *(f" word{chr(97 + i)}".encode() for i in range(59))]
    write_database(path / "features", z.astype(np.float32), tokens, vocabulary)
    return path


class Counting(LexicalJudge):
    asked = 0

    def ask(self, request: Request) -> Reply:
        self.asked += 1
        return super().ask(request)


def test_every_table_is_made_and_nothing_is_asked_twice(run: Path, tmp_path: Path) -> None:
    judge = Counting()
    records = explaining.measure(run, tmp_path, "0:3", "0:2", judge)
    assert [each["part"] for each in records] == ["tokens", "tokens", *["scores"] * FEATURES]
    found = records[0]["found"]
    assert found["simulation"] > found["fuzzing"] > found["detection"] > 1000
    for each in records[2:-1]:  # their explanation is exact, and they are active together with no other
        figures = [by for of_sampling in each["found"].values() for by in of_sampling.values()]
        assert len(figures) == 8 and all(by["coactive"] is None for by in figures)
        assert {value for by in figures for value in by.values() if value is not None} == {1}
    weak = records[-1]["found"]
    assert (
        weak["top"]["exact"]["strongest"] == 1 and weak["top"]["exact"]["random"] < weak["quantiles"]["exact"]["random"]
    )
    assert weak["top"]["exact"]["recall, weaker half"] < weak["quantiles"]["exact"]["recall, weaker half"]

    asked, path = judge.asked, tmp_path / "features.jsonl"
    path.write_text(path.read_text()[:-20])  # as if killed in the middle of the last line
    assert explaining.measure(run, tmp_path, "0:3", "0:2", judge) == records
    assert asked < judge.asked < 2 * asked
    asked = judge.asked
    assert explaining.measure(run, tmp_path, "0:3", "0:2", judge) == records and judge.asked == asked

    made = explaining_report.tables(records, "lexical")
    text = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in made)
    text = rewritten(text, made, "a file")
    assert "| simulation |" in text and "strongest tenth" in text and "nan" not in text


def test_the_exact_score_is_that_of_the_predicate_on_the_same_windows(run: Path) -> None:
    database = open_database(run / "features")
    found = explaining.scores_of(database, 2, lambda requests: [LexicalJudge().ask(each) for each in requests])
    assert found is not None
    c = contexts(database, 2, ContextSettings(positives=explaining.POSITIVES))
    shown = [
        explaining.place(each)
        for sampling in explaining.SAMPLINGS
        for each in contexts(database, 2, ContextSettings(positives=explaining.POSITIVES, sampling=sampling)).explain
    ]
    kept = [each for each in c.positives if explaining.place(each) not in shown]
    assert len(kept) < len(c.positives)
    places = set(map(explaining.place, kept))
    judged = predicate(c, explain(c)).judged
    truth = [each.said for each in judged if each.truth and (each.row, each.start) in places]
    false = [each.said for each in judged if not each.truth]
    assert found["quantiles"]["exact"]["random"] == pytest.approx((np.mean(truth) + 1 - np.mean(false)) / 2)


def test_too_few_windows_are_no_score_and_the_layers_need_explained_runs(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (20, 64))
    z = np.zeros((20, 64, 1), np.float32)
    z[0, 5] = 1
    write_database(tmp_path / "features", z, tokens, [b"x"] * 9)
    assert explaining.scores_of(open_database(tmp_path / "features"), 0, lambda _: pytest.fail("asks")) is None
    with pytest.raises(saelab.SaelabError, match="has no explained runs named SITE-seed0"):
        explaining_report.layers(tmp_path)
    assert json.loads(json.dumps(explaining_report.TESTS)).keys() > set(explaining.NEGATIVES)


def test_layers_are_compared_by_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring layers have the same features in another order, and others have other features."""
    rng = np.random.default_rng(0)
    words = [f"tokens word{chr(97 + i)}{chr(97 + j)}" for i in range(20) for j in range(20)]
    rows = [rng.standard_normal((50, 40)) for _ in range(2)]
    texts = [dict(enumerate(words[100 * i : 100 * i + 50])) for i in range(2)]

    def described(_sweep: Path, pattern: str) -> dict[tuple[str, str], Described]:
        def of(i: int) -> Described:
            order = rng.permutation(50)
            return Described({n: texts[i][o] for n, o in enumerate(order)}, rows[i][order])

        if "untrained" in pattern:
            return {("blocks.0.hook_resid_post", "1"): of(1)}
        sites = [("blocks.0.hook_resid_post", 0), ("blocks.1.hook_resid_post", 0), ("blocks.2.hook_resid_post", 1)]
        return {(site, seed): of(i) for site, i in sites for seed in "01"}

    monkeypatch.setattr(explaining_report, "_described", described)
    lines = explaining_report.layers(Path("sweep")).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[0].split(": ")[1] for line in cells] == [
        "another seed, the same layer",
        "1 layer apart",
        "2 layers apart",
        "untrained, the same layer",
    ]
    assert [line[1] for line in cells] == ["3", "4", "2", "1"]
    assert [float(line[2]) for line in cells] == pytest.approx([1, 0.5, 0, 0], abs=0.05)
    less = [float(line[4].split()[0]) for line in cells]
    assert less == pytest.approx([0.95, 0.48, 0, 0], abs=0.05) and less[2] == 0
