"""The judged examples of a score, in groups that show where the judge was right and where not. Needs no torch.

Three kinds of scores:

    verdicts    the judge says of each window whether the feature is active: the four cells of the confusion matrix
    questions   the judge picks one of several windows (intruder): a group for each question
    values      the judge gives each window a number that is compared between windows, as for AUROC. A window counts as
                a mistake if at least half of the windows of the other kind are on the wrong side of it

Examples whose answer could not be read are a group of their own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from saelab.autointerp import lexical
from saelab.autointerp.contexts import Contexts, contexts
from saelab.autointerp.llm.protocol import Request
from saelab.autointerp.records import Explanation, Judged, Score
from saelab.autointerp.scorers import detection, fuzzing, intruder, simulation
from saelab.autointerp.scorers.intruder import SHOWN
from saelab.autointerp.settings import ScoreSettings
from saelab.autointerp.store import Scored
from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.features.examples import Example, example_at


class Group(NamedTuple):
    """Judged examples that have the same outcome, or belong to the same question."""

    title: str
    judged: tuple[Judged, ...]
    mistake: bool = False


def groups(score: Score) -> list[Group]:
    """The judged examples of a score, mistakes first; empty groups are left out."""
    if score.score == "intruder":
        found = _questions(score.judged)
    elif score.unit == "balanced accuracy":
        found = _verdicts(score.judged)
    else:
        found = _values(score.judged)
    unread = tuple(each for each in score.judged if each.said is None and score.score != "intruder")
    found = [*found, Group("the answer could not be read", unread)]
    return sorted((group for group in found if group.judged), key=lambda group: not group.mistake)


def _verdicts(judged: Sequence[Judged]) -> list[Group]:
    cells = {
        (True, False): "should be 1, the judge says 0",
        (False, True): "should be 0, the judge says 1",
        (True, True): "should be 1, the judge says 1",
        (False, False): "should be 0, the judge says 0",
    }
    found = []
    for (truth, said), title in cells.items():
        cell = [each for each in judged if each.said is not None and (each.truth, each.said > 0.5) == (truth, said)]
        cell.sort(key=_said, reverse=said)  # the clearest first
        found.append(Group(title, tuple(cell), mistake=truth != said))
    return found


def _questions(judged: Sequence[Judged]) -> list[Group]:
    found = []
    for number, first in enumerate(range(0, len(judged), SHOWN), 1):
        windows = tuple(judged[first : first + SHOWN])
        unread = any(each.said is None for each in windows)
        right = all(each.said == each.truth for each in windows)
        outcome = "the answer could not be read" if unread else "found" if right else "another one was picked"
        found.append(Group(f"question {number}, the intruder: {outcome}", windows, mistake=not right and not unread))
    return found


def _values(judged: Sequence[Judged]) -> list[Group]:
    by_truth = {
        truth: sorted((each for each in judged if each.said is not None and each.truth == truth), key=_said)
        for truth in (True, False)
    }
    found = []
    for truth, name, sign in ((True, "active", -1), (False, "silent", 1)):
        others = np.array([_said(each) for each in by_truth[not truth]])
        wrong = [bool(len(others)) and np.mean(sign * (_said(each) - others) >= 0) >= 0.5 for each in by_truth[truth]]
        side = {True: "below" if truth else "above", False: "above" if truth else "below"}
        other = "silent" if truth else "active"
        for mistake in (True, False):
            own = [each for each, bad in zip(by_truth[truth], wrong, strict=True) if bad == mistake]
            title = f"{name}, {side[mistake]} most {other} windows" if len(others) else name
            found.append(Group(title, tuple(own if truth == mistake else own[::-1]), mistake))  # the clearest first
    return found


def _said(each: Judged) -> float:
    return float(each.said or 0)


def example_of(database: Database, feature: int, each: Judged) -> Example:
    """The window of a judged example. Raises SaelabError if the text of the database has no such window."""
    rows, context = database.facts.rows.shape
    inside = 0 <= each.row < rows and 0 <= each.start <= each.position < each.start + each.length <= context
    if not inside:
        raise SaelabError(f"feature {feature}: a judged example is not within the text of the feature database")
    active = database.facts.activations(feature)
    place = each.row * context + each.position
    return example_at(database.facts, database.vocabulary, active, place, each.length, each.start)


def asked(database: Database, scored: Scored, explanation: Explanation | None) -> Request | None:
    """The first question of a score, made again; None if none was asked, or if the windows would be others today."""
    score = scored.score
    by_words = score.model == lexical.NAME or score.tokens > 0  # an embedder asks nothing
    if not score.judged or not by_words or (score.score != "intruder" and explanation is None):
        return None
    found = contexts(database, score.feature, scored.contexts)
    places = {(each.example.row, each.example.start) for each in (*found.positives, *found.negatives)}
    if not places >= {(each.row, each.start) for each in score.judged}:
        return None
    if score.score == "intruder":
        return intruder.requests(found, scored.asked)[0]
    if explanation is None or score.score not in _REQUESTS:
        return None
    return _REQUESTS[score.score](found, explanation, scored.asked)[0]


_REQUESTS: dict[str, Callable[[Contexts, Explanation, ScoreSettings], list[Request]]] = {
    "detection": detection.requests,
    "fuzzing": fuzzing.requests,
    "simulation": lambda found, explanation, _: simulation.requests(found, explanation),
}
