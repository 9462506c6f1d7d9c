"""One feature, explained and scored at once: for the explorer, where a person looks at it.

The records are those of the stages (`saelab.runs.autointerp`), written under the same lock. Only the records of this
feature are read, and the Parquet tables are left to the next stage. Needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from saelab.autointerp import explain as prompt
from saelab.autointerp.choice import strangers
from saelab.autointerp.contexts import contexts
from saelab.autointerp.explainers import NO_WINDOWS, Asked, of_contexts
from saelab.autointerp.jobs import Job, run_jobs
from saelab.autointerp.llm.budget import Budget, Estimate, Price, estimate
from saelab.autointerp.llm.protocol import Client, Reply, Request
from saelab.autointerp.overview import Overview, records
from saelab.autointerp.plan import Plan
from saelab.autointerp.records import MANUAL, SHUFFLED, Explanation
from saelab.autointerp.scoring import DEFAULT, SCORERS, Judges
from saelab.autointerp.settings import ContextSettings
from saelab.autointerp.store import ANSWERS, Explained, explanation_at, writing
from saelab.errors import SaelabError, SettingError
from saelab.features.database import Database

LONGEST_AUTHOR = 60
"""Characters of an author's name."""


@dataclass(frozen=True)
class Place:
    """Where the records of a run are, and what they are about."""

    database: Database
    folder: Path

    @property
    def inputs(self) -> str:
        return str(self.database.arrays.manifest["inputs"])


def request(place: Place, feature: int, client: Client) -> Request:
    """What a language model is asked to explain a feature. Raises SaelabError if there are no windows of it."""
    return _asked(place, feature, client)[0][0]


def _asked(place: Place, feature: int, client: Client) -> Asked:
    found = contexts(place.database, feature)
    if not found.explain:
        raise SaelabError(f"feature {feature}: {NO_WINDOWS}")
    return of_contexts(place.database, client).asked(found, 0)


def explain(place: Place, feature: int, client: Client, budget: Budget | None = None) -> Explanation:
    """Explain a feature by a language model, or by the offline explainer if `client` is the offline judge.

    Returns the explanation, which is written; its text is "" if the answer could not be read. Raises SaelabError if
    there are no windows to explain it from, if another process is writing, and as `answers` does.
    """
    requests, make = _asked(place, feature, client)
    made: list[Explanation] = []
    with writing(place.folder, place.inputs) as writer:

        def finish(replies: Sequence[Reply]) -> None:
            made.append(make(replies))
            writer.explanation(made[0], ContextSettings())

        run_jobs(client, [Job(requests, finish)], cache=place.folder / ANSWERS, budget=budget)
    return made[0]


def write_by_hand(place: Place, feature: int, text: str, author: str) -> Explanation:
    """Write a person's explanation of a feature, beside the others; returns it.

    White space is made single spaces. Raises SettingError if the text is empty or longer than those of language models,
    or if the author's name is missing or too long, and SaelabError if another process is writing.
    """
    text, author = " ".join(text.split()), " ".join(author.split())
    for name, value, longest in (("explanation", text, prompt.LONGEST), ("author", author, LONGEST_AUTHOR)):
        if not value:
            raise SettingError(f"{name}: is missing; write one")
        if len(value) > longest:
            raise SettingError(f"{name}: has {len(value):,} characters; write at most {longest}")
    explanation = Explanation(feature, text, MANUAL, MANUAL, author)
    with writing(place.folder, place.inputs) as writer:
        writer.explanation(explanation, ContextSettings())
    return explanation


def cost(place: Place, explained: Explained, judges: Judges, price: Price | None) -> Estimate:
    """What `score` asks of a language model if nothing is scored and there is a control."""
    found, requests = contexts(place.database, explained.explanation.feature, explained.contexts), list[Request]()
    for name in DEFAULT:
        asked = [*SCORERS[name].asked(found, explained.explanation, judges)[0]]
        requests += asked * (1 if SCORERS[name].about is None else 2)
    return estimate(judges.client, requests, len(requests), price)


def score(place: Place, explained: Explained, known: Overview, judges: Judges, budget: Budget | None = None) -> int:
    """Score an explanation and its shuffled control by the scores `DEFAULT`; returns how many scores were made.

    The control is the one that is stored, or else a new one: the explanation of the feature nearest in density among
    those of the same kind and model in `known`; if there is none, among all. Raises SaelabError as `explain` does.
    """
    plan, control = _plan(place, explained, known, judges)
    feature = explained.explanation.feature
    missing = len(plan.missing(feature))
    if missing:
        with writing(place.folder, place.inputs) as writer:
            if control is not None:
                writer.explanation(*control)
            jobs = plan.jobs(feature, partial(writer.score, asked=judges.settings))
            run_jobs(judges.client, jobs, cache=place.folder / ANSWERS, budget=budget)
    return missing


def _plan(place: Place, explained: Explained, known: Overview, judges: Judges) -> tuple[Plan, Explained | None]:
    """The scores of one explanation, and its control if that is new."""
    own = explained.explanation
    of_feature, scores = records(place.folder, known, own.feature)
    stored = None
    for each in of_feature:
        if (each.explanation.kind, each.explanation.model) == (SHUFFLED + own.kind, own.model):
            stored = each
    new = None if stored else _control(place, explained, known)
    control = stored or new
    controls = {(own.feature, own.model, own.kind): control} if control else {}
    made = [(each.score.key, each.contexts, each.asked) for each in scores]
    return Plan(place.database, DEFAULT, {own.feature: explained}, controls, judges, made), new


def _control(place: Place, explained: Explained, known: Overview) -> Explained | None:
    own = explained.explanation
    others = [known.explanations[key] for feature, key in known.latest.items() if feature != own.feature]
    same = [each for each in others if (each.source.kind, each.source.model) == (own.kind, own.model)]
    others = same or others
    density = place.database.table["density"][[own.feature, *(each.feature for each in others)]]
    found = strangers(density, [hash(own.text), *(hash(each.text) for each in others)])[0]
    if found < 0:
        return None
    other = explanation_at(place.folder, others[found - 1].offset).explanation
    note = f"the explanation of feature {other.feature}" + f" ({other.kind})" * (not same)
    as_control = {"kind": SHUFFLED + own.kind, "model": own.model, "answer": "", "tokens": 0, "note": note}
    control = replace(other, feature=own.feature, **as_control)
    return Explained(control, explained.contexts)
