"""The stages `explain` and `score` of a run, and the table of its scores.

They read the feature database; only surprisal, explanations of effects and intervention also load the run's language
model, and with it torch. Records are written one by one, and what is written already is not made again: run again after
a kill, a stage continues, and asks nobody twice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saelab.autointerp import lexical
from saelab.autointerp.contexts import contexts
from saelab.autointerp.explainers import Explainer, Explanations, Made, of_contexts, of_effects
from saelab.autointerp.jobs import Job, run_jobs
from saelab.autointerp.llm.budget import Budget, Estimate, estimate
from saelab.autointerp.llm.named import client as named
from saelab.autointerp.llm.protocol import BaseModel, Client, Reply
from saelab.autointerp.parquet import export, exported
from saelab.autointerp.plan import Controls, Plan, Stored, known_scores, stored
from saelab.autointerp.plan import controls as controls_of
from saelab.autointerp.records import EFFECT, About
from saelab.autointerp.scoring import DEFAULT, SCORERS, Judges
from saelab.autointerp.settings import ContextSettings, InterventionSettings, ScoreSettings
from saelab.autointerp.store import ANSWERS, Writer, explanations, writing
from saelab.autointerp.summary import ScoreTable
from saelab.errors import SaelabError, SettingError
from saelab.progress import Say, Track, quiet, silent
from saelab.runs import judges
from saelab.runs.explained import Opened, control_runs, features_of, scores_of

_SAMPLE = 5
"""Features from whose requests the cost is estimated."""

Confirm = Callable[[Estimate], None]
"""Gets the cost before a language model is asked; raises an exception if it is too high."""


def explain(
    run: str | Path,
    features: str | None = None,
    *,
    about: About = "context",
    llm: str | Client | None = None,
    model: str | None = None,
    contrastive: bool = False,
    reasoning: bool = False,
    again: bool = False,
    settings: ContextSettings = ContextSettings(),  # noqa: B008
    concurrency: int = 8,
    budget: Budget | None = None,
    confirm: Confirm | None = None,
    track: Track = silent,
    say: Say = quiet,
) -> Explanations:
    """Explain features of a run from its feature database, into RUN/autointerp; returns how many were.

    `features`: indices, ranges, or a draw, such as "7,9", "0:100", "random:200" (`saelab.autointerp.choice.chosen`); or
    "matched:OTHER", the features nearest in density to those that are explained in the run OTHER. None: `FEATURES`; for
    a control, those matched to the run that it is a control of.
    `about`: when a feature is active ("context"), or what comes after it ("effect", which steers the run's own language
    model; only the intervention score reads it).
    `llm`: the address of a server with the OpenAI chat protocol that has `model`, or ``local`` with `model` a model
    folder, or a `Client`; None: the offline explainer, which is no language model. `contrastive` and `reasoning` are
    for language models and contexts (`saelab.autointerp.explain`).

    A feature that has an explanation of this kind, model and `settings` is not explained again, except with `again`:
    then all are, at another seed and a temperature above 0, and their earlier explanations stay. If some of them have
    fewer explanations than others, because a run with `again` was stopped, only these are. Raises SaelabError if there
    is no feature database or no such feature, as `answers` does, and if another process writes there.
    """
    opened = Opened(run)
    client = named(llm, model, concurrency)
    explainer = _explainer(opened, about, client, contrastive, reasoning, say)
    if client.name == lexical.NAME:
        say("explainer: lexical, from statistics of tokens; it is no language model")
    made = Made(np.array(features_of(opened, features, about)))
    for old, of in explanations(opened.folder, opened.inputs):
        if (old.kind, old.model, of) == (explainer.kind, explainer.model, settings):
            made.add(old)
    attempt = made.next_attempt(again)
    todo = made.features[made.attempts < attempt]

    def job(feature: int, writer: Writer | None) -> Job:
        requests, make = explainer.asked(contexts(opened.database, feature, settings), attempt)

        def finish(replies: Sequence[Reply]) -> None:
            found = make(replies)
            made.add(found)
            if writer is not None:
                writer.explanation(found, settings)

        return Job(requests, finish)

    if client.name != lexical.NAME and len(todo):
        _confirm(client, (job(feature, None) for feature in _sample(todo)), len(todo), budget, confirm, say)
    if len(todo) or not exported(opened.folder):
        with writing(opened.folder, opened.inputs) as writer:
            jobs = (job(int(feature), writer) for feature in todo)
            counted = {"track": track, "label": "explaining", "total": len(todo)}
            run_jobs(client, jobs, cache=opened.folder / ANSWERS, budget=budget, **counted)
            export(opened.folder, opened.inputs)
    return made.counted(client.name, len(todo))


def _explainer(opened: Opened, about: About, client: Client, contrastive: bool, reasoning: bool, say: Say) -> Explainer:
    if about == "context":
        return of_contexts(opened.database, client, contrastive=contrastive, reasoning=reasoning)
    if about != EFFECT:
        raise SettingError(f"about: there is no {about!r} (context, effect)")
    if contrastive or reasoning:
        raise SettingError("contrastive, reasoning: are for explanations of contexts; leave them out")
    from saelab.autointerp.steered_text import raised_tokens  # with torch

    subject, steering = judges.subject(opened.run, say), InterventionSettings()
    return of_effects(client, lambda c: raised_tokens(c, *subject, steering), steering.kl)


def score(
    run: str | Path,
    scores: Sequence[str] = DEFAULT,
    features: str | None = None,
    *,
    llm: str | Client | None = None,
    model: str | None = None,
    embed: str | None = None,
    base: BaseModel | None = None,
    controls: Sequence[str | Path] | None = None,
    settings: ScoreSettings = ScoreSettings(),  # noqa: B008
    concurrency: int = 8,
    budget: Budget | None = None,
    confirm: Confirm | None = None,
    track: Track = silent,
    say: Say = quiet,
) -> ScoreTable:
    """Score the latest explanation of each feature, and a shuffled one as a control, into RUN/autointerp.

    Returns the table of all scores of the run, beside those of the runs `controls`. `scores` are keys of `SCORERS`.
    `features` as in `explain`; None: those that have an explanation. An explanation is scored on windows of the
    settings that it was made with, none of which it was made from. `llm` and `model` name the judge, as in `explain`;
    None: the offline one, which is no language model. `embed`: a sentence-transformers model; None: TF-IDF. `base`
    gives the log-probabilities for surprisal; None: the language model of the run.

    What was scored with these `settings` is not scored again. Raises SaelabError as `explain` does, if there is no such
    score, and if no feature has an explanation.
    """
    opened = Opened(run)
    others = control_runs(opened, controls, say)
    client = named(llm, model, concurrency)
    judges.check(scores, client)
    if client.name == lexical.NAME:
        say("judge: lexical, from words in common; it is no language model")
    asked = judges.judges(opened, scores, client, embed, base, settings, say)
    parts = [_part(opened, names, about, features, asked, say) for about, names in _by_subject(scores).items()]
    for part in parts:
        if client.name != lexical.NAME and len(part.todo):
            jobs = (job for feature in _sample(part.todo) for job in part.plan.jobs(feature, lambda *_: None))
            _confirm(client, jobs, len(part.todo), budget, confirm, say)
    missing = sum(part.missing for part in parts)
    if missing or not exported(opened.folder):
        with writing(opened.folder, opened.inputs) as writer:
            jobs = (job for part in parts for job in _jobs(part, writer, settings))
            counted = {"track": track, "label": "scoring", "total": missing}
            run_jobs(client, jobs, cache=opened.folder / ANSWERS, budget=budget, **counted)
            export(opened.folder, opened.inputs)
    return scores_of(opened, others)


class _Part(NamedTuple):
    """The scores that read explanations of one kind of subject, or none."""

    plan: Plan
    controls: Controls
    todo: np.ndarray
    """Features with scores to be made."""
    missing: int
    """Scores to be made."""


def _by_subject(scores: Sequence[str]) -> dict[About, list[str]]:
    """The scores by what the explanations that they read are about; those without explanations with the contexts."""
    found: dict[About, list[str]] = {}
    for name in scores:
        found.setdefault(SCORERS[name].about or "context", []).append(name)
    return found


def _part(opened: Opened, scores: Sequence[str], about: About, features: str | None, by: Judges, say: Say) -> _Part:
    latest, shuffled = stored(opened.folder, opened.inputs, about)
    subjects = _subjects(opened, scores, about, features, latest)
    if any(SCORERS[name].about for name in scores):
        unexplained = len(subjects) - int(np.isin(subjects, latest.features[latest.explained]).sum())
        if unexplained:
            which = " of their effect" * (about == EFFECT)
            say(f"{unexplained:,} of {len(subjects):,} features have no explanation{which}, and no score of one")
    made = controls_of(opened.database, latest, shuffled, subjects)
    plan = Plan(opened.database, scores, latest, made, by, known_scores(opened.folder, opened.inputs))
    missing = np.array([len(plan.missing(int(feature))) for feature in subjects], int)
    return _Part(plan, made, subjects[missing > 0], int(missing.sum()))


def _jobs(part: _Part, writer: Writer, settings: ScoreSettings) -> Iterator[Job]:
    """The jobs of all scores to be made; writes new controls before the first score of them."""
    write = partial(writer.score, asked=settings)
    for feature in map(int, part.todo):
        if (control := part.controls.new_one(feature)) is not None:
            writer.explanation(*control)
        yield from part.plan.jobs(feature, write)


def _subjects(opened: Opened, scores: Sequence[str], about: About, features: str | None, latest: Stored) -> np.ndarray:
    """The features to be scored, rising."""
    if not len(latest) and any(SCORERS[name].about for name in scores):
        option, which = (" --about effect", " of effects") if about == EFFECT else ("", "")
        raise SaelabError(f"{opened.run}: has no explanations{which}; `saelab explain {opened.run}{option}` makes them")
    if features is None and len(latest):
        return latest.features
    return np.array(features_of(opened, features, about))


def _sample(features: np.ndarray) -> list[int]:
    """Some of the features, evenly spread."""
    return features[np.unique(np.linspace(0, len(features) - 1, _SAMPLE).round().astype(int))].tolist()


def _confirm(
    client: Client, jobs: Iterable[Job], n: int, budget: Budget | None, confirm: Confirm | None, say: Say
) -> None:
    """Report what the requests about `n` features cost, given the jobs of a sample of at most `_SAMPLE` of them."""
    sample = [request for job in jobs for request in job.requests]
    if not sample:
        return
    cost = estimate(client, sample, round(len(sample) * n / min(n, _SAMPLE)), budget.price if budget else None)
    if confirm is None:
        say(f"{client.name}: {cost}")
    else:
        confirm(cost)
