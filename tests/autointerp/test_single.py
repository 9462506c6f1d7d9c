"""One feature explained and scored: as the stages do it, with a clear message if that cannot be."""

from pathlib import Path

import numpy as np
import pytest

from saelab.autointerp import single
from saelab.autointerp.embedders import of_database
from saelab.autointerp.lexical import LexicalJudge
from saelab.autointerp.llm.budget import Budget, BudgetSpent
from saelab.autointerp.llm.protocol import Client, Reply, Request
from saelab.autointerp.overview import overview, records
from saelab.autointerp.records import MANUAL, SHUFFLED, Explanation
from saelab.autointerp.scoring import DEFAULT, Judges
from saelab.autointerp.settings import ContextSettings
from saelab.autointerp.store import Explained, explanations, scores
from saelab.errors import SaelabError, SettingError
from saelab.features.database import open_database
from saelab.files import locked
from saelab.runs import autointerp, explained
from tests.autointerp.test_stages import INPUTS, N, Oracle, made


@pytest.fixture
def place(tmp_path: Path) -> single.Place:
    run = made(tmp_path / "run")
    return single.Place(open_database(run / "features"), run / "autointerp")


def judges(place: single.Place, client: Client | None = None) -> Judges:
    return Judges(client or LexicalJudge(), of_database(place.database), "TF-IDF")


def score(place: single.Place, explanation: Explanation, client: Client | None = None, **more) -> int:
    known = overview(place.folder, INPUTS, N)
    return single.score(place, Explained(explanation, ContextSettings()), known, judges(place, client), **more)


def test_a_feature_is_explained_and_scored_as_by_the_stages(place: single.Place, tmp_path: Path) -> None:
    other = made(tmp_path / "other")
    autointerp.explain(other, "1,2")
    for feature in (1, 2):
        single.explain(place, feature, LexicalJudge())
    assert list(explanations(place.folder, INPUTS)) == list(explanations(other / "autointerp", INPUTS))
    autointerp.score(other, features="1,2")
    own = [each.explanation for each in explanations(place.folder, INPUTS)]
    assert [score(place, each) for each in own] == [9, 9]
    assert [score(place, each) for each in own] == [0, 0], "nothing is scored twice"
    for feature in (1, 2):
        ours, theirs = ({each.score.key: each for each in scores(f, INPUTS, feature)} for f in _folders(place, other))
        assert ours.keys() == theirs.keys() and len(ours) == 9
        assert all(repr(ours[key]) == repr(theirs[key]) for key in ours)
    stored, theirs = (sorted(map(repr, explanations(folder, INPUTS))) for folder in _folders(place, other))
    assert stored == theirs, "the controls too"
    ours, theirs = (explained.table(each.parent) for each in _folders(place, other))
    assert ours.to_frame().equals(theirs.to_frame())


def _folders(place: single.Place, other: Path) -> tuple[Path, Path]:
    return place.folder, other / "autointerp"


def test_what_a_person_writes_is_kept_beside_the_others_and_scored_beside_a_control(place: single.Place) -> None:
    offline = single.explain(place, 1, LexicalJudge())
    single.explain(place, 2, LexicalJudge())
    written = single.write_by_hand(place, 1, '  the tokens\n " wordb" ', " Ann ")
    assert (written.text, written.author, written.kind, written.model) == ('the tokens " wordb"', "Ann", MANUAL, MANUAL)
    assert score(place, written) == 9
    known = overview(place.folder, INPUTS, N)
    latest = known.explanation(1)
    assert latest is not None and latest.text == written.text
    assert known.columns["predicate by exact"][0][1] == 1 > known.columns["predicate by exact"][1][1]
    explained, _ = records(place.folder, known, 1)
    assert [each.explanation.text for each in explained[:2]] == [offline.text, written.text]
    (control,) = [each.explanation for each in explained if each.explanation.kind == SHUFFLED + MANUAL]
    assert control.note == "the explanation of feature 2 (lexical)" and control.text != written.text
    for text, author, problem in (
        (" \n", "Ann", "explanation: is missing"),
        ("x" * 401, "Ann", "explanation: has 401 characters"),
        ("x", " ", "author: is missing"),
        ("x", "A" * 61, "author: has 61 characters"),
    ):
        with pytest.raises(SettingError, match=problem):
            single.write_by_hand(place, 1, text, author)


def test_the_control_is_the_nearest_in_density_of_the_same_kind(place: single.Place) -> None:
    for feature in (0, 1, 3, 4):
        single.explain(place, feature, LexicalJudge())
    single.write_by_hand(place, 2, "words", "Ann")
    own = next(each.explanation for each in explanations(place.folder, INPUTS, 1))
    score(place, own)
    (control,) = [each.explanation for each in explanations(place.folder, INPUTS, 1) if each.explanation != own]
    density = np.asarray(place.database.table["density"])
    order = [feature for feature in np.argsort(density).tolist() if feature in (0, 1, 3, 4)]
    near = order[order.index(1) + 1]
    assert control.note == f"the explanation of feature {near}"


def test_a_language_model_explains_and_judges_within_the_budget(place: single.Place) -> None:
    budget = Budget(tokens=1_000_000)
    for feature in (1, 2):
        made = single.explain(place, feature, client := Oracle(), budget)
        assert client.asked == [single.request(place, feature, client)]
        assert (made.text, made.kind, made.model) == (f"word{'abc'[feature]}", "default", "oracle")
    assert budget.answer_tokens == 4
    explained = Explained(made, ContextSettings())
    cost = single.cost(place, explained, judges(place, Oracle()), None)
    client = _Judge()
    assert score(place, made, client, budget=budget) == 9
    assert cost.requests == len(client.asked) + client.repeated
    own = {each.score.score: each.score for each in scores(place.folder, INPUTS, 2) if each.score.model == "oracle"}
    assert own.keys() == set(DEFAULT) - {"embedding", "predicate"}
    with pytest.raises(BudgetSpent, match="the cap of 10 tokens"):
        single.explain(place, 3, Oracle(), Budget(tokens=10))
    assert not list(explanations(place.folder, INPUTS, 3))


class _Judge(Oracle):
    """Picks the first window as the intruder."""

    repeated = 0

    def ask(self, request: Request) -> Reply:
        if "odd one out" in request.messages[0][1]:
            self.asked.append(request)
            return Reply('{"odd": 1}')
        return super().ask(request)


def test_an_answer_that_cannot_be_read_is_kept_and_shown(place: single.Place) -> None:
    class Garbage(Oracle):
        def ask(self, request: Request) -> Reply:
            return Reply("<b>no</b>")

    made = single.explain(place, 1, Garbage())
    assert (made.text, made.answer) == ("", "<b>no</b>")
    assert overview(place.folder, INPUTS, N).explanation(1) is None


def test_without_windows_and_while_another_process_writes_the_message_is_clear(place: single.Place) -> None:
    with pytest.raises(SaelabError, match=f"feature {N - 1}: there are no windows"):
        single.explain(place, N - 1, LexicalJudge())
    with locked(place.folder), pytest.raises(SaelabError, match="another process is writing"):
        single.explain(place, 1, LexicalJudge())
    with locked(place.folder), pytest.raises(SaelabError, match="another process is writing"):
        single.write_by_hand(place, 1, "x", "Ann")
