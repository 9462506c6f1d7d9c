"""The stages `explain` and `score` of a run, and the table of its scores.

They read the feature database; only surprisal also loads the run's language model, and with it torch. Records are
written one by one, and what is written already is not made again: run again after a kill, a stage continues, and asks
nobody twice.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saelab.autointerp import explain as prompt
from saelab.autointerp import lexical
from saelab.autointerp.contexts import contexts
from saelab.autointerp.embedders import Embedder, of_database, sentence_transformer
from saelab.autointerp.evidence import near_misses, top_logits
from saelab.autointerp.jobs import Job, run_jobs
from saelab.autointerp.llm.budget import Budget, Estimate, estimate
from saelab.autointerp.llm.named import client as named
from saelab.autointerp.llm.protocol import BaseModel, Client, Reply
from saelab.autointerp.parquet import export, exported
from saelab.autointerp.plan import Plan, new_controls, stored
from saelab.autointerp.records import Explanation
from saelab.autointerp.scoring import DEFAULT, SCORERS, Judges
from saelab.autointerp.settings import ContextSettings, ScoreSettings
from saelab.autointerp.store import Explained, Writer, explanations, writing
from saelab.autointerp.summary import ScoreTable
from saelab.errors import SaelabError, SettingError, did_you_mean
from saelab.features.database import Database
from saelab.progress import Say, Track, quiet, silent
from saelab.runs.explained import Opened, control_runs, features_of, scores_of

ANSWERS = "answers.sqlite"
"""The cache of language models' answers, in the folder of explanations and scores."""
NO_WINDOWS = "there are no windows to explain it from"
_SAMPLE = 5
"""Features from whose requests the cost is estimated."""

Confirm = Callable[[Estimate], None]
"""Gets the cost before a language model is asked; raises an exception if it is too high."""


class Explanations(NamedTuple):
    """Features that `explain` was asked for, counted."""

    explainer: str
    explained: int
    """Those with an explanation, the earlier ones too."""
    new: int
    """Those that were explained now, or tried."""
    few: int
    """Those explained from fewer windows than asked for."""
    no_windows: int
    """Those not explained as there are no windows to explain them from."""
    unreadable: int
    """Those not explained as the answer could not be read."""
    tokens: int
    """Tokens of all prompts and answers, the earlier ones too."""

    def __str__(self) -> str:
        return (
            f"{self.explained:,} features explained by {self.explainer}, {self.few:,} of them from fewer windows than "
            f"asked for; not explained: {self.no_windows:,} without windows, {self.unreadable:,} whose answer could "
            f"not be read"
        )


def explain(
    run: str | Path,
    features: str | None = None,
    *,
    llm: str | Client | None = None,
    model: str | None = None,
    contrastive: bool = False,
    reasoning: bool = False,
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
    `llm`: the address of a server with the OpenAI chat protocol that has `model`, or ``local`` with `model` a model
    folder, or a `Client`; None: the offline explainer, which is no language model. `contrastive` and `reasoning` are
    for language models (`saelab.autointerp.explain`).

    A feature that has an explanation of this kind, model and `settings` is not explained again. Raises SaelabError if
    there is no feature database or no such feature, as `answers` does, and if another process writes there.
    """
    opened = Opened(run)
    client = named(llm, model, concurrency)
    offline = client.name == lexical.NAME
    if offline and (contrastive or reasoning):
        raise SettingError("contrastive, reasoning: need a language model; name one with llm, or leave them out")
    kind = lexical.NAME if offline else "contrastive" if contrastive else "default"
    kind += ", reasoning" * reasoning
    todo = dict.fromkeys(features_of(opened, features))
    made: list[Explanation] = []
    """Without their answers and programs."""
    for old, of in explanations(opened.folder, opened.inputs):
        if (old.kind, old.model, of) == (kind, client.name, settings) and old.feature in todo:
            del todo[old.feature]
            made.append(replace(old, answer="", program=None))
    if offline:
        say("explainer: lexical, from statistics of tokens; it is no language model")

    def job(feature: int, writer: Writer | None) -> Job:
        c = contexts(opened.database, feature, settings)

        def finish(replies: Sequence[Reply]) -> None:
            if not c.explain:
                found = Explanation(feature, "", kind, client.name, note=NO_WINDOWS)
            elif offline:
                found = lexical.explain(c)
            else:
                found = prompt.explanation(c, replies[0], kind, client.name)
            found = replace(found, note=found.note or c.lacking)
            made.append(replace(found, answer="", program=None))
            if writer is not None:
                writer.explanation(found, settings)

        if offline or not c.explain:
            return Job((), finish)
        misses = near_misses(opened.database, c) if contrastive else ()
        logits = top_logits(opened.database, feature)
        return Job((prompt.request(c, top_logits=logits, near_misses=misses, reasoning=reasoning),), finish)

    if not offline and todo:
        _confirm(client, (job(feature, None) for feature in _sample([*todo])), len(todo), budget, confirm, say)
    if todo or not exported(opened.folder):
        with writing(opened.folder, opened.inputs) as writer:
            jobs = (job(feature, writer) for feature in track(iter(todo), "explaining", len(todo), lambda _: 1))
            run_jobs(client, jobs, cache=opened.folder / ANSWERS, budget=budget)
            export(opened.folder, opened.inputs)
    return _counted(client.name, made, len(todo))


def _counted(explainer: str, made: Sequence[Explanation], new: int) -> Explanations:
    none = sum(each.note == NO_WINDOWS for each in made)
    return Explanations(
        explainer=explainer,
        explained=sum(bool(each.text) for each in made),
        new=new,
        few=sum(bool(each.text and each.note) for each in made),
        no_windows=none,
        unreadable=sum(not each.text for each in made) - none,
        tokens=sum(each.tokens for each in made),
    )


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

    Returns the table of all scores of the run, beside those of the runs `controls`; None: its own controls (`saelab
    controls`) that were read from the same text. `scores` are keys of `SCORERS`. `features` as in `explain`; None:
    those that have an explanation. An explanation is scored on windows of the settings that it was made with, none of
    which it was made from. `llm` and `model` name the judge, as in `explain`;
    None: the offline one, which is no language model. `embed`: a sentence-transformers model; None: TF-IDF. `base`
    gives the log-probabilities for surprisal; None: the language model of the run.

    What was scored with these `settings` is not scored again. Raises SaelabError as `explain` does, if there is no such
    score, and if no feature has an explanation.
    """
    opened = Opened(run)
    for name in scores:
        if name not in SCORERS:
            raise SaelabError(f"scores: there is no {name!r} ({', '.join(SCORERS)}).{did_you_mean(name, SCORERS)}")
    others = control_runs(opened, controls, say)
    client = named(llm, model, concurrency)
    if client.name == lexical.NAME:
        say("judge: lexical, from words in common; it is no language model")
    latest, shuffled = stored(opened.folder, opened.inputs)
    subjects = _subjects(opened, scores, features, latest)
    unexplained = sum(not latest[each].explanation.text for each in subjects if each in latest)
    unexplained += sum(each not in latest for each in subjects)
    if unexplained and any(SCORERS[name].explained for name in scores):
        say(f"{unexplained:,} of {len(subjects):,} features have no explanation, and no score of one")
    if base is None and any(SCORERS[name].needs_base for name in scores):
        base = _subject(opened.run, say)
    judges = Judges(client, *_embedder(opened.database, embed), settings, base)
    new = new_controls(opened.database, [latest[each] for each in subjects if each in latest], shuffled)
    plan = Plan(opened.database, scores, latest, shuffled | new, judges, opened.folder)
    todo = [feature for feature in subjects if plan.missing(feature)]
    if client.name != lexical.NAME and todo:
        sample = (job for feature in _sample(todo) for job in plan.jobs(feature, lambda *_: None))
        _confirm(client, sample, len(todo), budget, confirm, say)
    if todo or not exported(opened.folder):
        with writing(opened.folder, opened.inputs) as writer:
            for explanation, of in new.values():
                writer.explanation(explanation, of)
            write = partial(writer.score, asked=settings)
            tracked = track(iter(todo), "scoring", len(todo), lambda _: 1)
            jobs = (job for feature in tracked for job in plan.jobs(feature, write))
            run_jobs(client, jobs, cache=opened.folder / ANSWERS, budget=budget)
            export(opened.folder, opened.inputs)
    return scores_of(opened, others)


def _embedder(database: Database, embed: str | None) -> tuple[Embedder, str]:
    """The embedder and its name."""
    if embed is not None:
        return sentence_transformer(embed), Path(embed).name

    @cache
    def fitted() -> Embedder:  # at the first use: it takes seconds
        return of_database(database)

    def embedder(texts: Sequence[str]) -> np.ndarray:
        return fitted()(texts)

    return embedder, "TF-IDF"


def _subject(run: Path, say: Say) -> BaseModel:
    """The language model of a run."""
    from saelab.autointerp.llm.local import LocalModel
    from saelab.runs.reopen import reopen

    return LocalModel(reopen(run, "analyse", [], say).job.lm)


def _subjects(opened: Opened, scores: Sequence[str], features: str | None, latest: dict[int, Explained]) -> list[int]:
    """The features to be scored."""
    if not latest and any(SCORERS[name].explained for name in scores):
        raise SaelabError(f"{opened.run}: has no explanations; `saelab explain {opened.run}` makes them")
    if features is None and latest:
        return sorted(latest)
    return features_of(opened, features)


def _sample(features: Sequence[int]) -> list[int]:
    """Some of the features, evenly spread."""
    return [features[i] for i in np.unique(np.linspace(0, len(features) - 1, _SAMPLE).round().astype(int)).tolist()]


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
